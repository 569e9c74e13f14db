"""The command `dali-diffusemix`: --version, and the errors and interrupts of all its commands."""

import contextlib
import io
import os
import platform
import shlex
import sys
from collections.abc import Mapping
from typing import Any, Final

import click

from dali_diffusemix.cli.display import CommandError, echo, notice, notices
from dali_diffusemix.cli.options import StyledContext, quiet_option
from dali_diffusemix.errors import DiffuseMixError

__all__ = ["main"]

_INTERRUPTED: Final = 130  # 128 + SIGINT, as in shells
_RESUMED: Final = ("generate", "pack", "score")  # commands that resume when they are run again

_PACKAGES: Final = (  # that --version shows, if installed
    *("torch", "nvidia-dali-cuda120", "nvidia-dali-cuda130", "cupy-cuda12x", "cupy-cuda13x", "diffusers", "ray"),
    *("numpy", "pillow"),
)


class _Group(click.Group):
    """The commands in the order in which they were added; errors are shown alike for all."""

    context_class = StyledContext

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.obj = list(args)  # as they were typed, for the command that an error suggests
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        # A file name may hold any byte, and a terminal may only know ASCII: neither may end a run.
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            with notices(ctx):
                return super().invoke(ctx)
        except DiffuseMixError as error:
            if (meant := _replaced(ctx.obj, error.instead)) != ctx.obj:
                error.add_note(f"Try: {shlex.join(['dali-diffusemix', *meant])}")
            raise CommandError(error) from error
        except KeyboardInterrupt as error:
            resumed = ctx.invoked_subcommand in _RESUMED
            again = "run the same command again to resume." if resumed else "nothing is kept of it."
            notice("Interrupted", f"{error}; {again}" if str(error) else again, "yellow")
            ctx.exit(_INTERRUPTED)


def _replaced(words: list[str], instead: Mapping[str, str]) -> list[str]:
    """The words of a command line with other paths, which are relative where the ones before were."""
    others = {os.path.abspath(path): other for path, other in instead.items()}  # noqa: PTH100 - keeps links

    def other_of(word: str) -> str:
        found = others.get(os.path.abspath(word), word)  # noqa: PTH100
        return found if found == word or os.path.isabs(word) else os.path.relpath(found)  # noqa: PTH117

    return [other_of(word) for word in words]


def _version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    """Print the versions of this package, of Python and of the packages that matter."""
    if not value or ctx.resilient_parsing:
        return
    from importlib import metadata

    from dali_diffusemix import __version__

    echo(f"dali-diffusemix, version {__version__}")
    echo(f"Python {platform.python_version()}")
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            echo(f"{package} {metadata.version(package)}")
    ctx.exit()


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_version,
    help="Print the versions of this program and of its packages.",
)
@quiet_option
def main() -> None:
    """\b
    Edit training images once, and mix them with their edits anew in each epoch.
    Start with `dali-diffusemix demo FOLDER`, on photographs of your own.
    """
