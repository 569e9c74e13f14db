"""The result of a comparison, as JSON and as text."""

import statistics
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

__all__ = ["BenchResult", "Command", "Measurement", "Spent", "Trial", "gigabytes"]

_PAYS: Final = 1.05  # the smallest gain that is advised
_COLUMNS: Final = 80  # of the text
_WHOLE_TABLE: Final = 78  # columns that it takes; without the lowest and the highest rounds 60
_SAME: Final = 1.05  # loaders whose speeds differ by less are about as fast

_WHAT: Final = {  # the contenders
    "diffusemix": "this loader: every sample that has an edit is mixed",
    "diffusemix_resident": "this loader, raw stores in memory: mixed as above",
    "plain": "this loader: nothing is mixed",
    "plain_resident": "this loader, raw store in memory: nothing is mixed",
    "plain_dali": "a DALI pipeline: decode, crop, resize, normalise, no mix",
    "pillow_plain": "Pillow under torch's DataLoader: nothing is mixed",
    "pillow_mixed": "Pillow under torch's DataLoader: mixed like diffusemix",
}


def gigabytes(size: int) -> str:
    """A number of bytes, for people."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


class Command(NamedTuple):
    """A command, and the bytes that the store it makes will take; None: unknown."""

    command: str
    bytes: int | None = None


class Spent(NamedTuple):
    """Seconds per image; they overlap. Reading has a thread, decoding is CPU time of all threads."""

    read: float
    decode: float
    mix: float


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The counted rounds of a contender, one value per round."""

    images_per_second: tuple[float, ...]
    cpu_seconds_per_image: tuple[float, ...]  # of the contender's process and its workers
    peak_memory_mib: float | None = None  # of the same processes, in the uncounted round; None: unknown here
    spent: Spent | None = None  # of this package's loader: its `LoaderStats`; medians of the rounds

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
    commands: tuple[Command, ...] = ()  # to run for it
    use: str = ""  # what to load then, and how

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
        """Return the change, its median gain, the lowest and the highest, and how to make it."""
        return {
            "change": self.change,
            "gain": round(self.gain, 3),
            "lowest": round(min(self.gains), 3),
            "highest": round(max(self.gains), 3),
            "commands": [command._asdict() for command in self.commands],
            "use": self.use,
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
        packing = [setting for setting in best if setting in ("pack", "pack smaller")]
        if packing == ["pack", "pack smaller"]:
            del best["pack smaller"]  # it changes pixels, and gains less
        return tuple(best.values())

    @property
    def _first(self) -> str:
        """The contender that the others are there for: this loader, mixed if there are edits."""
        return next(iter(self.results), "")

    def _over(self, name: str, other: str) -> float | None:
        """A contender's images per second, over those of another; None if one of them was left out."""
        if name not in self.results or other not in self.results:
            return None
        return statistics.median(self.results[name].images_per_second) / statistics.median(
            self.results[other].images_per_second
        )

    @property
    def verdict(self) -> str:
        """One sentence: whether this loader is faster or slower than others here, and why; "" if it ran alone."""
        mixed = self._first.startswith("diffusemix")
        others = {
            "plain_dali": "plain DALI, which does not mix" if mixed else "plain DALI",
            "pillow_mixed" if mixed else "pillow_plain": "Pillow in DataLoader workers",
        }
        speeds = {name: speed for name in others if (speed := self._over(self._first, name)) is not None}
        if not speeds:
            return ""
        compared = " and ".join(_speed(speed, others[name]) for name, speed in speeds.items())
        sentence = f"Here this loader, {'mixing' if mixed else 'without a mix'}, is {compared}"
        measurement = self.results[self._first]
        remedy = "" if min(speeds.values()) > 1 / _SAME else f" {self._remedy}"
        if measurement.spent is None or self.settings.get("device") != "cpu":  # a GPU's time is not measured
            return f"{sentence}.{remedy}"
        read, decode, mix = measurement.spent
        whole = statistics.median(measurement.cpu_seconds_per_image)
        parts = {"reading": read, "decoding": decode, "mixing": mix, "the rest": whole - read - decode - mix}
        took = [f"{part} {_milliseconds(seconds)}" for part, seconds in parts.items() if seconds > 0]
        most = max(parts, key=lambda part: parts[part])
        return (
            f"{sentence}: an image took {_milliseconds(whole)} of CPU time ({_listed(took)}, partly at once); "
            f"{self._reason(most, mixed=mixed, faster=next(iter(speeds.values())) >= _SAME)}.{remedy}"
        )

    @property
    def _remedy(self) -> str:
        """A sentence: the change to try where this loader is slower than another."""
        if self.advice:
            return f"To make it faster, try {self.advice[0].change}, as advised above."
        return (
            "None of the changes that were tried makes it faster; docs/performance.md says when it is slower, and why."
        )

    def _reason(self, most: str, *, mixed: bool, faster: bool) -> str:
        """Why the loader is as fast as it is, from where most of its time goes."""
        side = self.settings.get("median_size")
        size = "" if side is None else f" (median {side[1]} x {side[0]} pixels)"
        if most == "the rest":
            what = (
                "of each batch and sample" if self.settings.get("raw") else "around decoding, of each file and batch,"
            )
            return f"images{size} are so small that the work {what} takes most"
        if most == "mixing":
            what = "mixing" if mixed else "resizing"
            raw = self.settings.get("raw")
            why = "raw images need no decoding" if raw else "only the parts that samples show are decoded"
            return f"{what} takes most, since {why}{size}"
        if most == "reading":
            return f"reading takes most, of {'an original and an edit' if mixed else 'one original'} a sample{size}"
        if faster:
            return f"only the parts of images{size} that samples show are decoded"
        what = "an original and an edit have" if mixed else "an original has"
        return f"decoding takes most: {what} to be decoded{size}, and showing only a part saves little of it"

    def json(self) -> dict[str, Any]:
        """Return one JSON object: machine, settings, results, left_out, tried, advice, verdict."""
        return {
            "machine": dict(self.machine),
            "settings": dict(self.settings),
            "results": {name: self._result(name) for name in self.results},
            "left_out": dict(self.left_out),
            "tried": [trial.json() for trial in self.trials],
            "advice": [trial.json() for trial in self.advice],
            "verdict": self.verdict,
        }

    def _result(self, name: str) -> dict[str, Any]:
        measurement, ratio = self.results[name], self._over(name, "plain_dali")
        return measurement.json() | {
            "what": _WHAT.get(name, ""),
            "over_plain_dali": None if ratio is None else round(ratio, 3),
            "seconds_per_image": None
            if measurement.spent is None
            else {part: round(seconds, 7) for part, seconds in measurement.spent._asdict().items()},
        }

    def lines(self, columns: int = _COLUMNS) -> Iterator[str]:
        """Yield a text: a table, what was tried, and what to change. Only commands may be longer than the columns."""
        settings, columns = self.settings, max(columns, 40)
        yield from textwrap.wrap(
            f"{settings['images']} of {settings['originals']} images, {settings['size']} px, batches of "
            f"{settings['batch_size']}, {settings['num_workers']} workers, {settings['device']}, "
            f"{settings['rounds']} rounds",
            columns,
        )
        if settings.get("undecodable"):
            yield f"{settings['undecodable']} left out: they cannot be decoded"
        yield from textwrap.wrap(
            "Each row is a loader that makes batches of tensors from the same files. Speeds are medians of the rounds.",
            columns,
        )
        yield ""
        yield from self._table(whole=columns >= _WHOLE_TABLE)
        for name, reason in self.left_out.items():
            what = f"{name} ({_WHAT[name].split(':')[0]})" if name in _WHAT else name
            yield from textwrap.wrap(f"{what} left out: {reason}", columns, subsequent_indent="  ")
        yield ""
        yield f"Tried on {self._first}, each by itself:"
        for trial in self.trials:
            text = f"{trial} ({min(trial.gains):.2f} to {max(trial.gains):.2f})"
            yield from _wrapped(text, columns, "  ", "    ")
        yield ""
        if not self.advice:
            yield "Advice: nothing to change"
        for trial in self.advice:
            yield from _wrapped(f"Advice: {trial}", columns, "", "  ")
            for command, size in trial.commands:
                yield f"  {command}" + ("" if size is None else f"  # {gigabytes(size)}")
            yield from _wrapped(trial.use and f"use {trial.use}", columns, "  ", "    ")
        if self.verdict:
            yield ""
            yield from textwrap.wrap(self.verdict, columns)

    def _table(self, *, whole: bool) -> Iterator[str]:
        """Two lines for each contender: its name and numbers, and what it is."""
        over = "plain_dali" if "plain_dali" in self.results else self._first
        extremes = f"{'lowest':>9}{'highest':>9}" if whole else ""
        label = "vs DALI" if over == "plain_dali" else "relative"
        yield f"{'':20}{'images/s':>9}{extremes}{'CPU ms/image':>14}{'MiB':>7}{label:>10}"
        for name, measurement in self.results.items():
            row = measurement.json()
            memory = "-" if row["peak_memory_mib"] is None else f"{row['peak_memory_mib']:.0f}"
            extremes = f"{row['lowest']:9,.0f}{row['highest']:9,.0f}" if whole else ""
            yield (
                f"{name:20}{row['images_per_second']:9,.0f}{extremes}"
                f"{row['cpu_seconds_per_image'] * 1e3:14.2f}{memory:>7}{self._over(name, over):9.2f}x"
            )
            if name in _WHAT:
                yield f"  {_WHAT[name]}"


def _speed(ratio: float, other: str) -> str:
    kind = "faster than" if ratio >= _SAME else "slower than" if ratio <= 1 / _SAME else "about as fast as"
    return f"{kind} {other} ({ratio:.2f}x)"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.{2 if seconds >= 1e-4 else 3}f} ms"


def _wrapped(text: str, columns: int, first: str, rest: str) -> list[str]:
    return textwrap.wrap(
        text,
        columns,
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,  # paths, to be copied
        break_on_hyphens=False,
    )


def _listed(words: list[str]) -> str:
    return ", ".join(words[:-1]) + " and " + words[-1]
