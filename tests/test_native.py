"""native: the C library is used if it was built from these sources, and not otherwise."""

import ctypes
import logging

import pytest

from dali_diffusemix.base import native


def test_a_library_of_other_sources_is_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As an update leaves it behind: its structs may differ, and a call would end the process."""
    native.load()
    monkeypatch.setattr(native, "_INTERFACE", 99)
    with pytest.raises(OSError, match="it has interface 4, this version needs 99"):
        native.load()
    native.library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert native.library() is None
    finally:
        native.library.cache_clear()
    assert "has interface 4, this version needs 99" in caplog.text and "reinstall" in caplog.text


def test_a_library_from_before_the_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    libc = ctypes.CDLL(None)  # has no such function either
    monkeypatch.setattr(ctypes, "CDLL", lambda path: libc)
    with pytest.raises(OSError, match="it has interface 1"):
        native.load()
