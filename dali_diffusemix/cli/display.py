"""Output of commands: results on standard output; progress, warnings and errors on standard error."""

import contextlib
import json
import logging
import os
import shutil
import sys
import textwrap
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.filesize import decimal
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dali_diffusemix.base.files import write
from dali_diffusemix.errors import ConfigError, DiffuseMixError

__all__ = [
    "CommandError",
    "Display",
    "echo",
    "is_quiet",
    "notice",
    "notices",
    "readable_rate",
    "readable_seconds",
    "set_quiet",
    "write_file",
]

_LINE_SECONDS: Final = 30.0  # between two lines of progress in a log
_RATE_SECONDS: Final = 1.0  # of work, before which a rate means nothing
_RATE_WINDOW: Final = 30.0  # seconds of work that a rate is of
_BAR: Final = (5, 40)  # columns: the shortest and the longest
_NAMES: Final = 13  # columns
_QUIET: Final = "dali_diffusemix.quiet"  # in the context's `meta`, which a command shares with its group


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


def readable_rate(count: float, seconds: float, unit: str) -> str:
    """Units a second (a minute, if there are few) to three digits, such as 1,230 edits/s; "" if that means nothing."""
    if count <= 0 or seconds < _RATE_SECONDS:
        return ""
    rate, per = count / seconds, "s"
    if rate < 0.1:
        rate, per = 60 * rate, "min"
    rate = float(f"{rate:.3g}")
    if unit == "bytes":
        return f"{decimal(int(rate))}/{per}"
    return f"{rate:,.0f} {unit}/{per}" if rate >= 100 else f"{rate:.3g} {unit}/{per}"


def _readable_count(count: int, unit: str) -> str:
    return decimal(count) if unit == "bytes" else f"{count:,}"


def _clock(seconds: float) -> str:
    """A time as 0:07, 12:34 or 1:23:45."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


# Warnings and errors --------------------------------------------------------------------------------------------------


class CommandError(click.ClickException):
    """An error of this package: its message and notes are shown, without a traceback."""

    exit_code = 1

    def __init__(self, error: DiffuseMixError) -> None:
        super().__init__("\n".join([str(error), *getattr(error, "__notes__", ())]))

    def show(self, file: Any = None) -> None:
        notice("Error", self.message, "red")


def set_quiet(ctx: click.Context) -> None:
    """Show only results and errors from now on, in this command and its group."""
    ctx.meta[_QUIET] = True


def is_quiet(ctx: click.Context) -> bool:
    """True if only results and errors are shown."""
    return bool(ctx.meta.get(_QUIET))


class _NoticeHandler(logging.Handler):
    """Shows the package's log records above the progress bar."""

    def __init__(self, ctx: click.Context) -> None:
        super().__init__(logging.WARNING)
        self._ctx = ctx

    def emit(self, record: logging.LogRecord) -> None:
        # Commands name the files that they leave out in their results.
        if "left out" not in record.getMessage() and not is_quiet(self._ctx):
            notice("Warning", record.getMessage(), "yellow")


@contextlib.contextmanager
def notices(ctx: click.Context) -> Iterator[None]:
    """Show the package's warnings and log records as lines, unless the commands of this context are quiet."""

    def show(message: Warning | str, *args: Any, **options: Any) -> None:
        if not is_quiet(ctx):
            notice("Warning", str(message), "yellow")

    logger, handler = logging.getLogger("dali_diffusemix"), _NoticeHandler(ctx)
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
        self._silent = as_json or is_quiet(click.get_current_context())
        self._rejects = ""

    def line(self, text: str) -> None:
        """Print a line of the result, for people."""
        if not self._as_json:
            echo(_printable(text))

    def fact(self, name: str, text: str) -> None:
        """Print something named, in a column of its own on a terminal, whatever the width of that."""
        whole = f"{name:<{_NAMES}}{text}"
        if sys.stdout.isatty():
            columns = max(shutil.get_terminal_size().columns, 2 * _NAMES)
            whole = textwrap.fill(whole, columns, subsequent_indent=" " * _NAMES, break_on_hyphens=False)
        self.line(whole)

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
        """Show a bar on a terminal, and a line every 30 seconds in a log; nothing beside JSON, or if quiet.

        Yields the function to call with the number of units done, by earlier runs too, and of all units. A unit
        without a name has no rate.
        """
        console = _stderr()
        if self._silent:
            yield lambda done, total: None
        elif not _shows_bars(console):
            yield _LoggedProgress(console, _Pace(what, unit), lambda: self._rejects)
        else:
            pace = _Pace(what, unit)
            with Live(_Bar(pace, lambda: self._rejects), console=console, transient=True, refresh_per_second=8) as live:

                def show(done: int, total: int) -> None:
                    pace.reach(done, total)
                    if done >= total:  # seen before what follows takes its time
                        live.refresh()

                yield show


def _shows_bars(console: Console) -> bool:
    """True on a terminal that can move its cursor back, and whose output is not kept as a log.

    Not `is_terminal`: FORCE_COLOR makes that true for a pipe.
    """
    if sys.stderr is None or os.environ.get("CI", "") not in ("", "0", "false"):  # None: it was closed
        return False
    return sys.stderr.isatty() and not console.is_dumb_terminal


class _Pace:
    """Units of work that are done, and their rate."""

    def __init__(self, what: str, unit: str) -> None:
        self.what, self.unit = what, unit
        self.done, self.total = 0, 0  # of which the total is 0 until it is known
        self._begin = time.monotonic()
        self._reached: deque[tuple[float, int]] = deque()  # times, and units that were done by then

    def reach(self, done: int, total: int) -> None:
        """Note the units that are done. Those of the first call may be an earlier run's: they have no rate."""
        now = time.monotonic()
        self.done, self.total = done, total
        self._reached.append((now, done))
        while now - self._reached[0][0] > _RATE_WINDOW and len(self._reached) > 2:
            self._reached.popleft()

    @property
    def elapsed(self) -> float:
        """Seconds since the work began."""
        return time.monotonic() - self._begin

    @property
    def _recent(self) -> tuple[int, float]:
        """Units that were done lately, and the seconds that they took."""
        if not self._reached:
            return 0, 0.0
        (begin, before), (end, done) = self._reached[0], self._reached[-1]
        return done - before, end - begin

    @property
    def rate(self) -> str:
        """Units a second; "" while that means nothing."""
        return readable_rate(*self._recent, self.unit) if self.unit else ""

    @property
    def left(self) -> float | None:
        """Seconds that are left; None while that cannot be said."""
        count, seconds = self._recent
        return (self.total - self.done) * seconds / count if count and seconds >= _RATE_SECONDS else None

    @property
    def count(self) -> tuple[str, str]:
        """Units done, and all."""
        return _readable_count(self.done, self.unit), _readable_count(self.total, self.unit)

    @property
    def columns(self) -> int:
        """Columns that count, rate and time take, nearly."""
        return 2 * len(self.count[1]) + len(f"/ 1,230 {self.unit}/s 12:34 left ")


class _Bar:
    """A line of progress that fits any terminal, and below it what was rejected.

    On a narrow terminal the rate is left out first, then the bar, then the time: numbers are never cut.
    """

    def __init__(self, pace: _Pace, rejects: Callable[[], str]) -> None:
        self._pace, self._rejects = pace, rejects

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        pace, left = self._pace, self._pace.left
        count = Text("/".join(pace.count) if pace.total else "", style="bold")
        clock = Text(_clock(pace.elapsed) if left is None else f"{_clock(left)} left", style="cyan")
        rate = Text(pace.rate, style="cyan")
        what = Text(pace.what)
        shown = [part for part in (what, count, rate, clock) if part.plain]
        for dropped in (rate, clock):
            if sum(len(part) + 1 for part in shown) > options.max_width:
                shown = [part for part in shown if part is not dropped]
        # As if all was shown, so that the bar keeps its length.
        taken = max(sum(len(part) + 1 for part in shown), len(what) + pace.columns)
        width = min(_BAR[1], options.max_width - taken - 1)
        line: list[RenderableType] = [*shown]
        if width >= _BAR[0]:
            line.insert(
                1,
                ProgressBar(pace.total or None, pace.done, width=width, complete_style="green", finished_style="green"),
            )
        grid = Table.grid(padding=(0, 1, 0, 0))
        for _ in line:
            grid.add_column(no_wrap=True)
        grid.add_row(*line)
        yield grid
        if rejects := self._rejects():
            yield Text(f"rejected: {rejects}", style="yellow", no_wrap=True, overflow="ellipsis")


class _LoggedProgress:
    """Progress of long work, as lines of a log."""

    def __init__(self, console: Console, pace: _Pace, rejects: Callable[[], str]) -> None:
        self._console, self._pace, self._rejects = console, pace, rejects
        self._last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        pace, now = self._pace, time.monotonic()
        pace.reach(done, total)
        if now - self._last < _LINE_SECONDS:
            return
        self._last = now
        left, rejects = pace.left, self._rejects()
        facts = [f"{pace.what}: {' of '.join(pace.count)}", pace.rate]
        facts.append("" if left is None else f"{readable_seconds(left)} left")
        rejected = f"; rejected: {rejects}" if rejects else ""
        self._console.print(", ".join(filter(None, facts)) + rejected)


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
