"""Threads for work that a Ctrl-C may interrupt at any moment.

`concurrent.futures` takes locks in Python when a task is handed over and when its result is awaited. An exception that
a signal raises there, in the main thread, can leave a lock held, and then threads wait for ever. Here tasks and results
go through queues written in C, whose calls an exception comes before or after.
"""

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, Final, Generic, Self, TypeVar

_T = TypeVar("_T")
_Item = TypeVar("_Item")


class Result(Generic[_T]):
    """The result of a task that may still be running. One thread may ask for it."""

    def __init__(self) -> None:
        self._box: SimpleQueue[tuple[_T | None, BaseException | None]] = SimpleQueue()
        self._found: tuple[_T | None, BaseException | None] | None = None

    def done(self) -> bool:
        """True if the task has ended."""
        return self._found is not None or not self._box.empty()

    def wait(self, seconds: float) -> bool:
        """Wait for the task's end for so many seconds at most. Returns True if it has ended."""
        if self._found is None:
            with suppress(Empty):
                self._found = self._box.get(timeout=seconds)
        return self._found is not None

    def error(self) -> BaseException | None:
        """The exception that the task raised, if any; waits for its end."""
        self._found = self._found or self._box.get()
        return self._found[1]

    def get(self) -> _T:
        """The value that the task returned; waits for its end, and raises its exception."""
        if (error := self.error()) is not None:
            raise error
        assert self._found is not None
        return self._found[0]  # type: ignore[return-value]


class Workers:
    """Threads that run tasks. They start with the first task and end with `close`, this object or the interpreter.

    As a context manager it is closed at the end of the block.

    Args:
        count: The number of threads.
        name: The beginning of their names.
    """

    def __init__(self, count: int, name: str) -> None:
        self._count: Final = count
        self._name: Final = name
        self._tasks: SimpleQueue[Any] = SimpleQueue()
        self._threads: list[Thread] = []
        weakref.finalize(self, _end, self._tasks, count).atexit = False

    def submit(self, function: Callable[..., _T], *arguments: Any) -> Result[_T]:
        """Have a thread call a function; returns at once."""
        while len(self._threads) < self._count:
            thread = Thread(target=_work, args=(self._tasks,), name=f"{self._name}_{len(self._threads)}", daemon=True)
            self._threads.append(thread)
            thread.start()
        result: Result[_T] = Result()
        self._tasks.put((result, function, arguments))
        return result

    def map(self, function: Callable[[_Item], _T], items: Iterable[_Item]) -> Iterator[_T]:
        """Have threads call a function with each item; yields the results in the items' order.

        All tasks are submitted at once. The first exception of a task is raised in its turn.
        """
        results = deque([self.submit(function, item) for item in items])
        return (results.popleft().get() for _ in range(len(results)))

    def drop(self) -> None:
        """Drop the tasks that have not begun; nobody may wait for them."""
        with suppress(Empty):
            while True:
                self._tasks.get_nowait()

    def close(self, *, wait: bool = True) -> None:
        """Drop the tasks that have not begun, and wait for the end of those that have."""
        self.drop()
        _end(self._tasks, self._count)
        for thread in self._threads if wait else ():
            if thread.ident is not None:  # it was started
                thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _end(tasks: "SimpleQueue[Any]", count: int) -> None:
    for _ in range(count):
        tasks.put(None)


def _work(tasks: "SimpleQueue[Any]") -> None:
    while (task := tasks.get()) is not None:
        result, function, arguments = task
        try:
            result._box.put((function(*arguments), None))
        except BaseException as error:  # it belongs to the thread that asks for the result
            result._box.put((None, error))
        # A waiting thread holds nothing.
        del task, result, function, arguments
