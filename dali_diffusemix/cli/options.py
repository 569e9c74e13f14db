"""Input of commands: their class, types and callbacks of options, and their completion by a shell."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final, TypeAlias

import click
from click.shell_completion import CompletionItem

from dali_diffusemix.cli.display import set_quiet

__all__ = [
    "PATH",
    "PRESETS",
    "STORE",
    "StyledCommand",
    "StyledContext",
    "Whole",
    "completed",
    "output_options",
    "quiet_option",
    "to_epochs",
    "to_numbers",
    "to_presets",
]

PRESETS: Final = ("paper", "release")
_MOST_EPOCHS: Final = 100  # `preview` draws no more at once


# Commands -------------------------------------------------------------------------------------------------------------


class _StyledFormatter(click.HelpFormatter):
    """Headings and names in colour; click takes it out again where the output is no terminal."""

    def write_usage(self, prog: str, args: str = "", prefix: str | None = None) -> None:
        super().write_usage(prog, args, click.style("Usage: ", bold=True, fg="green"))

    def write_heading(self, heading: str) -> None:
        super().write_heading(click.style(heading, bold=True, fg="green"))

    def write_dl(self, rows: Iterable[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:
        super().write_dl([(click.style(name, fg="cyan"), text) for name, text in rows], col_max, col_spacing)


class StyledContext(click.Context):
    """The context of a command: its help has colours, where the output is a terminal that wants them."""

    formatter_class = _StyledFormatter

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
            self.color = False
        elif os.environ.get("FORCE_COLOR"):
            self.color = True


class StyledCommand(click.Command):
    """A command of this program."""

    context_class = StyledContext


# Types ----------------------------------------------------------------------------------------------------------------


class _StoreType(click.Path):
    """A folder as a Path, or the URL of a store as a string."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str) and "://" in value:  # imports nothing for a folder
            from dali_diffusemix.store.mirror import is_url

            if is_url(value):
                return value
        return Path(os.fsdecode(super().convert(value, param, ctx)))


class Whole(click.IntRange):
    """A whole number in a range, of which the help says no more than its text does."""

    def __init__(self, least: int = 1, most: int | None = None) -> None:
        super().__init__(least, most)
        self._least, self._most = least, most

    def _describe_range(self) -> str:
        return ""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            number = int(value)
        except ValueError:
            number = self._least - 1
        if number < self._least or (self._most is not None and number > self._most):
            rule = f"at least {self._least}" if self._most is None else f"from {self._least} to {self._most}"
            self.fail(f"{value!r} must be a whole number, {rule}.", param, ctx)
        return number


PATH: Final = click.Path(path_type=Path)
STORE: Final = _StoreType()


# Callbacks ------------------------------------------------------------------------------------------------------------


def to_numbers(ctx: click.Context, param: click.Parameter, value: str | None) -> list[int] | None:
    """Whole numbers from text such as 1,5,9."""
    try:
        return None if value is None else [int(number) for number in value.split(",")]
    except ValueError as error:
        raise click.BadParameter(f"{value!r} must be whole numbers separated by commas; write 1,5,9.") from error


def to_epochs(ctx: click.Context, param: click.Parameter, value: str) -> list[int]:
    """Epochs from text such as 0-5 or 0,3,7."""
    epochs: list[int] = []
    for part in value.split(","):
        first, dash, last = part.strip().partition("-")
        if not (first.isdecimal() and (last.isdecimal() or not dash)) or int(last or first) < int(first):
            raise click.BadParameter(f"{value!r} must be epochs; write 0-5 or 0,3,7.")
        length = int(last or first) - int(first) + 1
        if len(epochs) + length > _MOST_EPOCHS:
            raise click.BadParameter(f"{value!r} must be at most {_MOST_EPOCHS} epochs; draw fewer at once.")
        epochs += range(int(first), int(first) + length)
    return epochs


def to_presets(ctx: click.Context, param: click.Parameter, value: str) -> list[str]:
    """Names of presets from text such as paper,release."""
    names = [name.strip() for name in value.split(",")]
    if not set(names) <= set(PRESETS) or len(set(names)) < len(names):
        raise click.BadParameter(f"{value!r} must be one of {', '.join(PRESETS)}, or both as {','.join(PRESETS)}.")
    return names


def _to_quiet(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        set_quiet(ctx)


quiet_option = click.option(
    "-q",
    "--quiet",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_to_quiet,
    help="Print only the result and errors.",
)


def output_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options --json, which it takes as `as_json`, and --quiet."""
    json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
    return json_option(quiet_option(command))


# Completion -----------------------------------------------------------------------------------------------------------

_Completer: TypeAlias = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def completed(words: Callable[[], Iterable[str]], *, kind: str = "", many: bool = False) -> _Completer:
    """Return a callback that completes an option's value.

    Args:
        words: Returns the values there are; imports what it needs.
        kind: What is completed if no word fits: "file", "dir", or "" for nothing.
        many: The value is a list of words, separated by commas.
    """

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        before, comma, begun = incomplete.rpartition(",") if many else ("", "", incomplete)
        taken = before.split(",")
        fitting = [word for word in words() if word.startswith(begun) and word not in taken]
        if fitting or not kind:
            return [CompletionItem(before + comma + word) for word in fitting]
        return [CompletionItem(incomplete, type=kind)]

    return complete
