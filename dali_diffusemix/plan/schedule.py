"""Settings that change with the epoch: a crop, a mix and so on may be one value or a `Schedule` of values."""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from dali_diffusemix.errors import ConfigError
from dali_diffusemix.plan.numbers import whole

_T = TypeVar("_T")
_T_co = TypeVar("_T_co", covariant=True)


@dataclass(frozen=True, init=False, repr=False)
class Schedule(Generic[_T_co]):
    """A setting that changes with the epoch: each value holds from its epoch on, until the next one.

        crop=Schedule({0: TrainCrop(128), 30: TrainCrop(192), 60: TrainCrop(224)})   # progressive resizing
        mix=Schedule({0: None, 5: MixSpec.paper()})                                  # five epochs without mixing

    Args:
        values: Values by the first epoch of each: whole numbers from 0 on, 0 among them.

    Raises:
        ConfigError: an epoch breaks the rule, 0 is missing, or a value is a Schedule.
    """

    steps: tuple[tuple[int, _T_co], ...]
    """(first epoch, value), sorted by epoch."""

    def __init__(self, values: Mapping[int, _T_co]) -> None:
        if not isinstance(values, Mapping):
            raise ConfigError(
                f"Schedule must be given values by epoch, found {values!r}; for example "
                "Schedule({0: TrainCrop(128), 30: TrainCrop(224)})."
            )
        for epoch, value in values.items():
            if not _is_epoch(epoch):
                raise ConfigError(
                    f"epochs of a Schedule must be whole numbers, at least 0, found {epoch!r}; count epochs from 0."
                )
            if isinstance(value, Schedule):
                raise ConfigError(f"values of a Schedule cannot be Schedules, found {value!r}; write one Schedule.")
        if 0 not in values:
            raise ConfigError(
                f"epochs of a Schedule must begin with 0, found {sorted(values)}; add the value from epoch 0 on."
            )
        steps = sorted(((int(epoch), value) for epoch, value in values.items()), key=lambda step: step[0])
        object.__setattr__(self, "steps", tuple(steps))

    def at(self, epoch: int) -> _T_co:
        """The value in an epoch, at least 0."""
        if not _is_epoch(epoch):
            raise ConfigError(f"epoch must be a whole number, at least 0, found {epoch!r}; epochs count from 0.")
        return self.steps[bisect_right(self.epochs, epoch) - 1][1]

    @property
    def epochs(self) -> tuple[int, ...]:
        """The epochs from which a value holds, sorted."""
        return tuple(epoch for epoch, _ in self.steps)

    @property
    def values(self) -> tuple[_T_co, ...]:
        """The values in the order of their first epochs."""
        return tuple(value for _, value in self.steps)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({{{', '.join(f'{epoch}: {value!r}' for epoch, value in self.steps)}}})"


def _is_epoch(epoch: object) -> bool:
    found = whole(epoch)
    return found is not None and found >= 0


def schedule_meant(value: object, otherwise: str) -> str:
    """The remedy for a value that is none of a setting: a Schedule if it is a dictionary by epoch."""
    by_epoch = isinstance(value, Mapping) and value and all(map(_is_epoch, value))
    return "Schedule({...}) around the dictionary" if by_epoch else otherwise


def setting_at(setting: _T | Schedule[_T], epoch: int) -> _T:
    """The value of a setting in an epoch."""
    return setting.at(epoch) if isinstance(setting, Schedule) else setting


def values_of(setting: _T | Schedule[_T]) -> tuple[_T, ...]:
    """The values of a setting."""
    return setting.values if isinstance(setting, Schedule) else (setting,)


def epochs_of(setting: object) -> tuple[int, ...]:
    """The epochs from which a value of a setting holds, sorted; 0 is the first."""
    return setting.epochs if isinstance(setting, Schedule) else (0,)
