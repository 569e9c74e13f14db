"""The command `dali-diffusemix`: --version, and the errors and interrupts of all its commands."""

import contextlib
import io
import platform
import sys
from typing import Any, Final

import click

from dali_diffusemix.cli.display import CommandError, echo, notice, notices
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

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        # A file name may hold any byte, and a terminal may only know ASCII: neither may end a run.
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            with notices():
                return super().invoke(ctx)
        except DiffuseMixError as error:
            raise CommandError(error) from error
        except KeyboardInterrupt as error:
            resumed = ctx.invoked_subcommand in _RESUMED
            again = "run the same command again to resume." if resumed else "nothing is kept of it."
            notice("Interrupted", f"{error}; {again}" if str(error) else again, "yellow")
            ctx.exit(_INTERRUPTED)


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


@click.group(
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 done, 1 an error, 2 a wrong command line, 130 interrupted.",
)
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show versions.")
def main() -> None:
    """DiffuseMix: edit once, mix differently in every epoch. Try `demo`."""
