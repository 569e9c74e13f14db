"""The arguments of settings, checked and read into Python's own kinds, so that equal settings have one repr.

The state of a loader compares settings by it. Numbers and arrays of NumPy are taken as Python's; bools, complex
numbers, NaN, infinity and text are not numbers.
"""

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from dali_diffusemix.errors import ConfigError

_T = TypeVar("_T")


def real(value: object) -> float | None:
    """A finite number as a float; None of anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        return None
    try:
        found = float(value) + 0.0  # not -0.0
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def whole(value: object) -> int | None:
    """A whole number as an int; None of anything else, such as 3.0."""
    return int(value) if isinstance(value, int | np.integer) and not isinstance(value, bool) else None


def several(value: object, read: Callable[[object], _T | None]) -> tuple[_T, ...] | None:
    """Each in a tuple, list or array of one axis as `read` reads it; None if it is no such, or one cannot be read."""
    given = value.tolist() if isinstance(value, np.ndarray) else value
    found = tuple(map(read, given)) if isinstance(given, tuple | list) else (None,)
    return tuple(one for one in found if one is not None) if None not in found else None


def alike(values: tuple[_T, ...]) -> _T | tuple[_T, ...]:
    """One value for several that are equal."""
    return values[0] if len(set(values)) == 1 else values


def refused(name: str, rule: str, value: object, example: object) -> ConfigError:
    """The error of a setting: what it must be, what it is, and something that it may be."""
    return ConfigError(f"{name} must {rule}, found {value!r}; for example {name}={example!r}.")


def number_in(name: str, value: object, low: float, high: float, example: float, rule: str = "") -> float:
    """A number from `low` to `high`. Raises ConfigError."""
    found = real(value)
    if found is None or not low <= found <= high:
        raise refused(name, rule or f"lie in [{low}, {high}]", value, example)
    return found


def probability(name: str, value: object) -> float:
    """A number from 0 to 1. Raises ConfigError."""
    return number_in(name, value, 0, 1, 0.5, "lie in [0, 1], a probability")


def whole_number(name: str, value: object, low: int, high: int, example: int) -> int:
    """A whole number from `low` to `high`. Raises ConfigError."""
    found = whole(value)
    if found is None or not low <= found <= high:
        raise refused(name, f"be a whole number from {low} to {high}", value, example)
    return found


def pair(value: object) -> tuple[float, float] | None:
    """(low, high) of numbers in order, or None."""
    found = several(value, real)
    return (found[0], found[1]) if found is not None and len(found) == 2 and found[0] <= found[1] else None


def interval(name: str, value: object, low: float, high: float, example: tuple[float, float]) -> tuple[float, float]:
    """(low, high) of numbers in order, within limits. Raises ConfigError."""
    found = pair(value)
    if found is None or not low <= found[0] or not found[1] <= high:
        raise refused(name, f"be (low, high) with {low} ≤ low ≤ high ≤ {high}", value, example)
    return found


def sides(name: str, value: object) -> tuple[int, int]:
    """(height, width) of a side or a pair of sides. Raises ConfigError."""
    one = whole(value)
    found = several((one, one) if one is not None else value, whole)
    if found is None or len(found) != 2 or not all(1 <= side <= 16384 for side in found):
        raise refused(name, "be 1 to 16384 pixels, an int or (height, width)", value, 224)
    return found[0], found[1]


def choice(name: str, value: object, known: Sequence[str]) -> str:
    """One of some words. Raises ConfigError."""
    if not isinstance(value, str) or value not in known:
        raise ConfigError(f"{name} must be one of {tuple(known)}, found {value!r}.")
    return str(value)


def put(setting: object, **values: object) -> None:
    """Write fields of a frozen setting, in its `__post_init__`."""
    for name, value in values.items():
        object.__setattr__(setting, name, value)
