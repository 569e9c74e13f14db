"""Threads for work that a Ctrl-C may interrupt at any moment.

`concurrent.futures` takes locks in Python where a task is handed over and where its result is waited for. An exception
that a signal throws there, in the main thread, can leave one held, and then the threads, or whoever ends them, wait for
ever. Here tasks and results go through queues that are C's, whose calls an exception comes before or after.
"""

import weakref
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, Final, Generic, TypeVar

_T = TypeVar("_T")


class Result(Generic[_T]):
    """What a task will have given. One thread may ask for it."""

    def __init__(self) -> None:
        self._box: SimpleQueue[tuple[_T | None, BaseException | None]] = SimpleQueue()
        self._found: tuple[_T | None, BaseException | None] | None = None

    def done(self) -> bool:
        """Whether the task has ended."""
        return self._found is not None or not self._box.empty()

    def error(self) -> BaseException | None:
        """What the task raised; waits for its end."""
        self._found = self._found or self._box.get()
        return self._found[1]

    def get(self) -> _T:
        """What the task returned; waits for its end, and raises what it raised."""
        if (error := self.error()) is not None:
            raise error
        assert self._found is not None
        return self._found[0]  # type: ignore[return-value]


class Workers:
    """Some threads, begun with the first task, that end with `close`, with this object or with the interpreter.

    Args:
        count: How many.
        name: Of the threads.
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

    def drop(self) -> None:
        """Drop tasks that have not begun: nobody may wait for them."""
        with suppress(Empty):
            while True:
                self._tasks.get_nowait()

    def close(self) -> None:
        """Drop tasks that have not begun, and wait for the end of those that have."""
        self.drop()
        _end(self._tasks, self._count)
        for thread in self._threads:
            if thread.ident is not None:  # it was begun
                thread.join()


def _end(tasks: "SimpleQueue[Any]", count: int) -> None:
    for _ in range(count):
        tasks.put(None)


def _work(tasks: "SimpleQueue[Any]") -> None:
    while (task := tasks.get()) is not None:
        result, function, arguments = task
        try:
            result._box.put((function(*arguments), None))
        except BaseException as error:  # it is whoever asks for it
            result._box.put((None, error))
        # While it waits, it holds nothing.
        del task, result, function, arguments
