"""Output of commands: results on standard output; progress, warnings and errors on standard error."""

import contextlib
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from dali_diffusemix.base.files import write
from dali_diffusemix.errors import ConfigError, DiffuseMixError

__all__ = ["CommandError", "Display", "echo", "notice", "notices", "readable_seconds", "write_file"]

_LINE_SECONDS: Final = 30.0  # between two lines of progress in a log


# Text -----------------------------------------------------------------------------------------------------------------


def echo(text: str, *, nl: bool = True) -> None:
    """Print to standard output. If that is a closed pipe, click ends the run in silence."""
    try:
        click.echo(text, nl=nl)
    except BrokenPipeError:
        raise
    except OSError as error:
        sys.stdout = None  # otherwise the interpreter tries again when it exits, and complains
        message = f"standard output must take what is printed, found: {error.strerror}; make room, or name another file"
        raise CommandError(DiffuseMixError(message)) from error


def notice(kind: str, message: str, style: str) -> None:
    """Print a warning or an error to standard error."""
    _stderr().print(Text.assemble((f"{kind}: ", f"bold {style}"), (_printable(message), style)))


def _stderr() -> Console:
    # A new console each time: tests and progress bars replace sys.stderr.
    return Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)


def _printable(text: str) -> str:
    """Text that is safe in any terminal: undecodable bytes and control characters of file names are escaped."""
    return "".join(c if c.isprintable() or c == "\n" else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # a byte that is not UTF-8, as Python holds it in names
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


def readable_seconds(seconds: float) -> str:
    """A time in the unit that suits it, such as 12 minutes."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"


# Warnings and errors --------------------------------------------------------------------------------------------------


class CommandError(click.ClickException):
    """An error of this package: its message and notes are shown, without a traceback."""

    exit_code = 1

    def __init__(self, error: DiffuseMixError) -> None:
        super().__init__("\n".join([str(error), *getattr(error, "__notes__", ())]))

    def show(self, file: Any = None) -> None:
        notice("Error", self.message, "red")


class _NoticeHandler(logging.Handler):
    """Shows the package's log records above the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        # Commands name the files that they leave out in their results.
        if "left out" not in record.getMessage():
            notice("Warning", record.getMessage(), "yellow")


@contextlib.contextmanager
def notices() -> Iterator[None]:
    """Show the package's warnings and log records as lines."""

    def show(message: Warning | str, *args: Any, **options: Any) -> None:
        notice("Warning", str(message), "yellow")

    logger, handler = logging.getLogger("dali_diffusemix"), _NoticeHandler(logging.WARNING)
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("default", category=UserWarning, module=r"dali_diffusemix\b")
            warnings.showwarning = show
            yield
    finally:
        logger.removeHandler(handler)


# Results and progress -------------------------------------------------------------------------------------------------


class Display:
    """Results and progress of one command: a `demo.DemoDisplay`."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._rejects = ""

    def line(self, text: str) -> None:
        """Print a line of the result, for people."""
        if not self._as_json:
            echo(_printable(text))

    def lines(self, lines: Iterable[str], most: int | None = None) -> None:
        """Print lines, or the first `most` of them and how many are left."""
        everything = list(lines)
        for line in everything[:most]:
            # File names may hold line breaks.
            self.line(line.replace("\n", "\\n"))
        if most is not None and len(everything) > most:
            self.line(f"{'...':>8}  and {len(everything) - most} more")

    def result(self, content: Mapping[str, Any]) -> None:
        """Print the result as JSON, if that was asked for. A byte that is not UTF-8 is escaped as \\udcXX."""
        if self._as_json:
            echo(json.dumps(content))

    def rejects(self, by_prompt: Mapping[str, int]) -> None:
        """Show the number of rejected edits of each prompt beside the progress."""
        worst = sorted(by_prompt.items(), key=lambda pair: -pair[1])
        self._rejects = _printable(", ".join(f"{prompt} {count}" for prompt, count in worst if count))

    @contextlib.contextmanager
    def progress(self, what: str, unit: str) -> Iterator[Callable[[int, int], None]]:
        """Show a bar on a terminal, a line every 30 seconds in a log, and nothing beside JSON."""
        console = _stderr()
        if self._as_json:
            yield lambda done, total: None
        elif not _shows_bars(console):
            yield _LoggedProgress(console, what, unit, lambda: self._rejects)
        else:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(complete_style="green"),
                MofNCompleteColumn(),
                _Rate(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            with _Bars(*columns, console=console, transient=True) as bars:
                bar = bars.add_task(what, total=None, unit=unit)

                def show(done: int, total: int) -> None:
                    bars.note = f"rejected: {self._rejects}" if self._rejects else ""
                    bars.update(bar, completed=done, total=total)

                yield show


def _shows_bars(console: Console) -> bool:
    """True on a terminal that can move its cursor back, and whose output is not kept as a log.

    Not `is_terminal`: FORCE_COLOR makes that true for a pipe.
    """
    if sys.stderr is None or os.environ.get("CI", "") not in ("", "0", "false"):  # None: it was closed
        return False
    return sys.stderr.isatty() and not console.is_dumb_terminal


class _Rate(ProgressColumn):
    """Units a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        # Two calls within the first half second give no meaningful rate.
        return Text(
            "" if speed is None or (task.elapsed or 0) < 0.5 else f"{speed:.1f} {task.fields['unit']}/s", style="cyan"
        )


class _Bars(Progress):
    """A bar, and a line below it."""

    note = ""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        if self.note:
            yield Text(self.note, style="yellow", no_wrap=True, overflow="ellipsis")


class _LoggedProgress:
    """Progress of long work, as lines of a log."""

    def __init__(self, console: Console, what: str, unit: str, rejects: Callable[[], str]) -> None:
        self._console, self._what, self._unit, self._rejects = console, what, unit, rejects
        self._begin = self._last = time.monotonic()
        self._before: int | None = None  # units that an earlier run had done

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._before is None:
            self._before = done
        if now - self._last < _LINE_SECONDS:
            return
        self._last = now
        rate = (done - self._before) / (now - self._begin)
        left = f", {(total - done) / rate:.0f} s left" if rate > 0 else ""
        rejects = self._rejects()
        rejected = f"; rejected: {rejects}" if rejects else ""
        self._console.print(f"{self._what}: {done} of {total}, {rate:.1f} {self._unit}/s{left}{rejected}")


# Files ----------------------------------------------------------------------------------------------------------------


def write_file(file: Path, content: bytes) -> None:
    """Write a file whole or not at all. Raises ConfigError."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write(file, content)
    except OSError as error:
        raise ConfigError(
            f"{str(file)!r}: must be a file that can be written, found: {error}; name another."
        ) from error
