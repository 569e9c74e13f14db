"""Settings as a person would write them in code: without what is the default anyway."""

import dataclasses
from collections.abc import Iterator
from typing import Any, Final

from dali_diffusemix.plan.schedule import Schedule
from dali_diffusemix.plan.spec import MixSpec

_MOST: Final = 200  # characters of a setting
_NAMED: Final = (("MixSpec.paper()", MixSpec.paper()), ("MixSpec.release()", MixSpec.release()))


def written(setting: object) -> str:
    """One line for a crop, a mix, an augmentation, a tuple or a `Schedule` of such; of anything else its repr, cut.

    TrainCrop(size=224, scale=(0.08, 1.0), ...)   ->   TrainCrop(224)
    MixSpec(masks=('left', ...), ...)             ->   MixSpec.paper()
    """
    text = " ".join(_written(setting).split())
    return text if len(text) <= _MOST else f"{text[: _MOST - 4]} ..."


def _written(value: object) -> str:
    for name, known in _NAMED:
        if type(value) is MixSpec and value == known:
            return name
    if isinstance(value, Schedule):
        steps = ", ".join(f"{epoch}: {_written(one)}" for epoch, one in value.steps)
        return f"{type(value).__name__}({{{steps}}})"
    if type(value) is tuple:
        return f"({', '.join(map(_written, value))}{',' * (len(value) == 1)})"
    if isinstance(value, float):
        text = repr(value).removesuffix(".0")  # of a whole number the int is as good
        return text if len(text) < 8 else f"{value:.4g}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return f"{type(value).__name__}({', '.join(_arguments(value))})"
    text = repr(value)
    return type(value).__name__ if " at 0x" in text else text  # Python's own repr says nothing more


def _arguments(value: Any) -> Iterator[str]:
    """The arguments that make a dataclass this value, but for those that are the default."""
    fields = [one for one in dataclasses.fields(value) if one.init and one.repr]
    needed = {one.name: getattr(value, one.name) for one in fields if _is_needed(one)}
    # Made anew, because `__post_init__` may turn a default into something else.
    default = type(value)(**needed)
    by_position = True
    for one in fields:
        found = getattr(value, one.name)
        by_position = by_position and one.name in needed and not one.kw_only
        if one.name in needed or found != getattr(default, one.name):
            yield _written(found) if by_position else f"{one.name}={_written(found)}"


def _is_needed(one: "dataclasses.Field[Any]") -> bool:
    return one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING
