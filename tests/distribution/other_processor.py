"""A pytest plugin: the library that was built for another processor gives the same bits as the one for this machine.

    OTHER_PROCESSOR="qemu-aarch64 -L /usr/aarch64-linux-gnu CALL LIBRARY" pytest -p other_processor TESTS

Every call of the library that a test makes is made of the other one too, with the same bytes, by call.cpp in a process
of its own. Where a byte differs afterwards the test fails, and the run does where a function was never called.
wheels.py runs it.
"""

import collections
import ctypes
import functools
import os
import shlex
import struct
import subprocess
import threading
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dali_diffusemix.base import native

_PREFIX = "dali_diffusemix_"
_RETURNS = {"mix", "flame", "read", "tile_jpeg", "interface"}  # the others return nothing
_COMMAND = shlex.split(os.environ["OTHER_PROCESSOR"])
_process = subprocess.Popen(_COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
_one = threading.Lock()
_calls: collections.Counter[str] = collections.Counter()


class _Address(ctypes.c_void_p):
    """An address that knows its array."""

    array: NDArray[np.generic]


def _address(array: NDArray[np.generic]) -> _Address:
    address = _Address(array.ctypes.data)
    address.array = array
    return address


def _bytes(array: NDArray[np.generic]) -> bytes:
    return ctypes.string_at(array.ctypes.data, array.nbytes)


def _pointers(name: str, arguments: tuple[Any, ...]) -> list[tuple[int, int, bytes]]:
    """The addresses that lie in arguments: number of the argument, offset in it, what lies there."""
    if name == "mix":
        pieces = arguments[0].array.reshape(-1)
        found = enumerate((int(p["data"]), int(p["height"]) * int(p["width"]) * 3) for p in pieces)
        return [(0, i * pieces.itemsize, ctypes.string_at(data, length)) for i, (data, length) in found if data]
    if name == "gather":
        found = enumerate(zip(arguments[1].array.tolist(), arguments[2].array.tolist(), strict=True))
        return [(1, i * 8, ctypes.string_at(data, length)) for i, (data, length) in found]
    return []


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def _other(call: bytes, length: int, descriptors: Iterable[int]) -> bytes:
    """What call.cpp answers; in a process of its own if that has to inherit open files."""
    if inherited := sorted(set(filter(_is_open, descriptors))):
        answer = subprocess.run(_COMMAND, input=call, stdout=subprocess.PIPE, pass_fds=inherited).stdout
    else:
        assert _process.stdin is not None and _process.stdout is not None
        with _one:  # at a time, of threads
            _process.stdin.write(call)
            _process.stdin.flush()
            answer = _process.stdout.read(length)
    assert len(answer) == length, "the other processor gave no answer"
    return answer


def _call(function: Any, name: str, *arguments: Any) -> int:
    held = [argument.array if isinstance(argument, _Address) else None for argument in arguments]
    pointers = _pointers(name, arguments)
    symbol = (_PREFIX + name).encode()
    message = bytearray(struct.pack("<q", len(symbol)) + symbol)
    message += struct.pack("<qq", len(arguments), len(arguments) + len(pointers))
    for argument, array in zip(arguments, held, strict=True):
        if array is not None or isinstance(argument, bytes):
            content = argument if array is None else _bytes(array)
            message += struct.pack("<qq", 1, len(content)) + content
        else:
            message += struct.pack("<qq", 0, int(getattr(argument, "value", argument) or 0))
    for _, _, content in pointers:
        message += struct.pack("<qq", 1, len(content)) + content
    message += struct.pack("<q", len(pointers))
    for i, (argument, offset, _) in enumerate(pointers):
        message += struct.pack("<qqq", argument, offset, len(arguments) + i)
    files = {"read": 3, "read_stretches": 1}.get(name)
    descriptors = () if files is None else held[files].tolist()
    sizes = [
        a.nbytes if a is not None else len(b) if isinstance(b, bytes) else 0
        for a, b in zip(held, arguments, strict=True)
    ]
    inside = b"".join(content for _, _, content in pointers)
    answer = _other(bytes(message), 8 + sum(sizes) + len(inside), descriptors)
    result = int(function(*arguments))

    if name in _RETURNS:
        width = ctypes.sizeof(function.restype)
        assert int.from_bytes(answer[:width], "little", signed=True) == result, name
    at = 8
    holders = {place for place, _, _ in pointers}  # addresses differ
    for i, (argument, array) in enumerate(zip(arguments, held, strict=True)):
        if sizes[i] and i not in holders:
            content = argument if array is None else _bytes(array)
            assert answer[at : at + sizes[i]] == content, f"argument {i} of {name} differs"
        at += sizes[i]
    assert answer[at:] == inside, name
    _calls[name] += 1
    return result


class _Both:
    """Takes the place of the library."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    @functools.cache  # noqa: B019 - lives as long as the process
    def _function(self, name: str) -> Callable[..., int]:
        function = getattr(self._library, _PREFIX + name)

        def call(*arguments: Any) -> int:
            function.restype = getattr(call, "restype", ctypes.c_int)
            return _call(function, name, *arguments)

        return call

    def __getattr__(self, name: str) -> Callable[..., int]:
        return self._function(name.removeprefix(_PREFIX))


def pytest_configure() -> None:
    both = _Both(native.load())
    native.library = lambda: both  # type: ignore
    native._address = _address


def pytest_terminal_summary(terminalreporter: Any) -> None:
    counts = ", ".join(f"{name} {count}" for name, count in sorted(_calls.items()))
    terminalreporter.write_line(f"{sum(_calls.values())} calls gave the same bits on the other processor: {counts}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    for name in ("interface", "quiet"):
        getattr(native.library(), _PREFIX + name)()
    _process.communicate()
    symbols = subprocess.run(("nm", "-D", _COMMAND[-1]), capture_output=True, text=True, check=True).stdout.split()
    missing = {symbol.removeprefix(_PREFIX) for symbol in symbols if symbol.startswith(_PREFIX)} - set(_calls)
    if missing:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        print(f"never called: {sorted(missing)}")
