"""Input of commands: types and callbacks of options, and their completion by a shell."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final, TypeAlias

import click
from click.shell_completion import CompletionItem

__all__ = ["PATH", "PRESETS", "STORE", "completed", "json_option", "to_epochs", "to_numbers", "to_presets"]

PRESETS: Final = ("paper", "release")
_MOST_EPOCHS: Final = 100  # `preview` draws no more at once


# Types ----------------------------------------------------------------------------------------------------------------


class _StoreType(click.Path):
    """A folder as a Path, or the URL of a store as a string."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str) and "://" in value:  # imports nothing for a folder
            from dali_diffusemix.store.mirror import is_url

            if is_url(value):
                return value
        return Path(os.fsdecode(super().convert(value, param, ctx)))


PATH: Final = click.Path(path_type=Path)
STORE: Final = _StoreType()


# Callbacks ------------------------------------------------------------------------------------------------------------


def to_numbers(ctx: click.Context, param: click.Parameter, value: str | None) -> list[int] | None:
    """Whole numbers from text such as 1,5,9."""
    try:
        return None if value is None else [int(number) for number in value.split(",")]
    except ValueError as error:
        raise click.BadParameter(f"{value!r} must be whole numbers separated by commas; write 1,5,9.") from error


def to_epochs(ctx: click.Context, param: click.Parameter, value: str | None) -> list[int] | None:
    """Epochs from text such as 0-5 or 0,3,7."""
    if value is None:
        return None
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


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


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
