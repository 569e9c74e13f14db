"""The result of a comparison, as JSON and as text."""

import statistics
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

__all__ = ["BenchResult", "Measurement", "Trial"]

_PAYS: Final = 1.05  # the smallest gain that is advised
_COLUMNS: Final = 80  # of the text


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The counted rounds of a contender, one value per round."""

    images_per_second: tuple[float, ...]
    cpu_seconds_per_image: tuple[float, ...]  # of the contender's process and its workers
    peak_memory_mib: float | None = None  # of the same processes, in the uncounted round; None: unknown here

    def json(self) -> dict[str, Any]:
        """Return medians, the lowest and the highest round, and all rounds."""
        rates = self.images_per_second
        return {
            "images_per_second": round(statistics.median(rates), 1),
            "lowest": round(min(rates), 1),
            "highest": round(max(rates), 1),
            "cpu_seconds_per_image": round(statistics.median(self.cpu_seconds_per_image), 6),
            "peak_memory_mib": None if self.peak_memory_mib is None else round(self.peak_memory_mib, 1),
            "rounds": [round(rate, 1) for rate in rates],
        }


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A change that was tried, and its gain per round: images per second with it, over those without it."""

    setting: str  # at most one change of each setting is advised
    change: str
    gains: tuple[float, ...]

    @property
    def gain(self) -> float:
        """The median gain."""
        return statistics.median(self.gains)

    @property
    def pays(self) -> bool:
        """True if it is worth doing: a median gain of at least 1.05, and a gain in every round."""
        return self.gain >= _PAYS and min(self.gains) > 1

    def __str__(self) -> str:
        return f"{self.change}: {self.gain:.2f}x"

    def json(self) -> dict[str, Any]:
        """Return the change, its median gain, the lowest and the highest."""
        return {
            "change": self.change,
            "gain": round(self.gain, 3),
            "lowest": round(min(self.gains), 3),
            "highest": round(max(self.gains), 3),
        }


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """The result of `bench`."""

    machine: Mapping[str, Any]
    settings: Mapping[str, Any]
    results: Mapping[str, Measurement]  # by contender
    left_out: Mapping[str, str] = field(default_factory=dict)  # contender to reason
    trials: tuple[Trial, ...] = ()

    @property
    def advice(self) -> tuple[Trial, ...]:
        """The changes that pay: the best one for each setting, greatest gain first."""
        ranked = sorted((trial for trial in self.trials if trial.pays), key=lambda trial: -trial.gain)
        best: dict[str, Trial] = {}
        for trial in ranked:
            best.setdefault(trial.setting, trial)
        return tuple(best.values())

    def json(self) -> dict[str, Any]:
        """Return one JSON object: machine, settings, results, left_out, tried, advice."""
        return {
            "machine": dict(self.machine),
            "settings": dict(self.settings),
            "results": {name: measurement.json() for name, measurement in self.results.items()},
            "left_out": dict(self.left_out),
            "tried": [trial.json() for trial in self.trials],
            "advice": [trial.json() for trial in self.advice],
        }

    def lines(self) -> Iterator[str]:
        """Yield a text of at most 80 columns: a table, what was tried, and what to change."""
        settings = self.settings
        yield from textwrap.wrap(
            f"{settings['images']} of {settings['originals']} images, {settings['size']} px, batches of "
            f"{settings['batch_size']}, {settings['num_workers']} workers, {settings['device']}, "
            f"{settings['rounds']} rounds",
            _COLUMNS,
        )
        if settings.get("undecodable"):
            yield f"{settings['undecodable']} left out: they cannot be decoded"
        yield ""
        yield f"{'':14}{'images/s':>9}{'lowest':>9}{'highest':>9}{'CPU ms/image':>14}{'MiB':>7}{'relative':>10}"
        first = next(iter(self.results), "")
        for name, measurement in self.results.items():
            row = measurement.json()
            memory = "-" if row["peak_memory_mib"] is None else f"{row['peak_memory_mib']:.0f}"
            ratio = row["images_per_second"] / self.results[first].json()["images_per_second"]
            yield (
                f"{name:14}{row['images_per_second']:9.0f}{row['lowest']:9.0f}{row['highest']:9.0f}"
                f"{row['cpu_seconds_per_image'] * 1e3:14.2f}{memory:>7}{ratio:9.2f}x"
            )
        for name, reason in self.left_out.items():
            yield from textwrap.wrap(f"{name} left out: {reason}", _COLUMNS, subsequent_indent="  ")
        yield ""
        yield f"Tried on {first}, each by itself:"
        for trial in self.trials:
            yield f"  {trial} ({min(trial.gains):.2f} to {max(trial.gains):.2f})"
        yield ""
        if not self.advice:
            yield "Advice: nothing to change"
        for trial in self.advice:
            yield f"Advice: {trial}"
