"""The command line: `dali-diffusemix COMMAND`.

Results go to standard output, as lines or with `--json` as one object; progress, warnings and errors go to standard
error. Exit codes: 0 done, 1 an error of ours, 2 a wrong command line, 130 interrupted. What a command needs is
imported inside it, so that `--help` and a shell that completes are answered at once.
"""

import contextlib
import io
import json
import logging
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

import click
from click.shell_completion import CompletionItem, get_completion_class
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

_LINE_SECONDS: Final = 30.0  # between two lines of progress where there is no terminal
_INTERRUPTED: Final = 130  # 128 + SIGINT, as shells have it

_PATH: Final = click.Path(path_type=Path)


class _Store(click.Path):
    """A folder, or the URL of a store, which stays a string."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str) and "://" in value:  # else there is nothing to import
            from dali_diffusemix.store.mirror import is_url

            if is_url(value):
                return value
        return Path(os.fsdecode(super().convert(value, param, ctx)))


_STORE: Final = _Store()


# What is shown --------------------------------------------------------------------------------------------------------


def _console() -> Console:
    # Made anew each time: standard error is another one under tests, and while a bar is shown.
    return Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)


def _is_watched(console: Console) -> bool:
    """Whether a bar may be drawn: on a terminal that can move back, and that nobody keeps as a log.

    Not `is_terminal`, which FORCE_COLOR makes true of a pipe.
    """
    if sys.stderr is None or os.environ.get("CI", "") not in ("", "0", "false"):  # None: it was closed
        return False
    return sys.stderr.isatty() and not console.is_dumb_terminal


def _printable(text: str) -> str:
    """Text that is safe in any terminal: undecodable bytes and control characters of file names are escaped."""
    return "".join(c if c.isprintable() or c == "\n" else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # a byte that is not UTF-8, as Python holds it in names
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


def _notice(kind: str, message: str, style: str) -> None:
    _console().print(Text.assemble((f"{kind}: ", f"bold {style}"), (_printable(message), style)))


def _echo(text: str, *, nl: bool = True) -> None:
    """Print to standard output. Where that is a closed pipe, click ends the run in silence."""
    try:
        click.echo(text, nl=nl)
    except BrokenPipeError:
        raise
    except OSError as error:
        sys.stdout = None  # else the interpreter tries again at its end, and complains
        message = f"standard output must take what is printed, found: {error.strerror}; make room, or name another file"
        raise _Failure(DiffuseMixError(message)) from error


class _Rate(ProgressColumn):
    """Units a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        # What two calls in the first instant would give is no rate.
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


class _Display:
    """What a command shows while it runs: a `demo.Display`."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._rejects = ""

    def line(self, text: str) -> None:
        """Print a line of the result, for people."""
        if not self._as_json:
            _echo(_printable(text))

    def result(self, content: Mapping[str, Any]) -> None:
        """Print the result for machines, if it was asked for. A byte that is not UTF-8 is escaped as \\udcXX."""
        if self._as_json:
            _echo(json.dumps(content))

    def rejects(self, by_prompt: Mapping[str, int]) -> None:
        """Show how many edits were rejected, by prompt, beside the progress."""
        worst = sorted(by_prompt.items(), key=lambda pair: -pair[1])
        self._rejects = _printable(", ".join(f"{prompt} {count}" for prompt, count in worst if count))

    @contextlib.contextmanager
    def progress(self, what: str, unit: str) -> Iterator[Callable[[int, int], None]]:
        """A bar on a terminal, a line now and then in a log; nothing beside JSON."""
        console = _console()
        if self._as_json:
            yield lambda done, total: None
        elif not _is_watched(console):
            yield _Lines(console, what, unit, lambda: self._rejects)
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


class _Lines:
    """Progress of long work in a log file."""

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


class _Log(logging.Handler):
    """Shows the package's log records above the bar."""

    def emit(self, record: logging.LogRecord) -> None:
        # Files left out are in the results of the commands that meet them.
        if "left out" not in record.getMessage():
            _notice("Warning", record.getMessage(), "yellow")


@contextlib.contextmanager
def _notices() -> Iterator[None]:
    """Show the package's warnings and log records as lines."""

    def show(message: Warning | str, *args: Any, **options: Any) -> None:
        _notice("Warning", str(message), "yellow")

    logger, handler = logging.getLogger("dali_diffusemix"), _Log(logging.WARNING)
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("default", category=UserWarning, module=r"dali_diffusemix\b")
            warnings.showwarning = show
            yield
    finally:
        logger.removeHandler(handler)


class _Failure(click.ClickException):
    """An error of ours, as it is shown: its message and notes, without a traceback."""

    exit_code = 1

    def __init__(self, error: DiffuseMixError) -> None:
        super().__init__("\n".join([str(error), *getattr(error, "__notes__", ())]))

    def show(self, file: Any = None) -> None:
        _notice("Error", self.message, "red")


class _Group(click.Group):
    """The commands, in the order in which they are used, with one way of showing what goes wrong."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        # File names may hold anything, and a terminal may know ASCII alone: nothing of that ends a run.
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            with _notices():
                return super().invoke(ctx)
        except DiffuseMixError as error:
            raise _Failure(error) from error
        except KeyboardInterrupt as error:
            goes_on = ctx.invoked_subcommand in ("generate", "pack")
            again = "run the same command again to go on." if goes_on else "nothing is kept of it."
            _notice("Interrupted", f"{error}; {again}" if str(error) else again, "yellow")
            ctx.exit(_INTERRUPTED)


# What is given --------------------------------------------------------------------------------------------------------


def _numbers(ctx: click.Context, param: click.Parameter, value: str | None) -> list[int] | None:
    """Whole numbers with commas between."""
    try:
        return None if value is None else [int(number) for number in value.split(",")]
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is not whole numbers with commas between; write 1,5,9.") from error


_MOST_EPOCHS: Final = 100  # as `preview` has it


def _epochs(ctx: click.Context, param: click.Parameter, value: str | None) -> list[int] | None:
    """Epochs, and stretches of them, with commas between."""
    if value is None:
        return None
    epochs: list[int] = []
    for stretch in value.split(","):
        first, dash, last = stretch.strip().partition("-")
        if not (first.isdecimal() and (last.isdecimal() or not dash)) or int(last or first) < int(first):
            raise click.BadParameter(f"{value!r} is not epochs; write 0-5 or 0,3,7.")
        length = int(last or first) - int(first) + 1
        if len(epochs) + length > _MOST_EPOCHS:
            raise click.BadParameter(f"{value!r} is more than {_MOST_EPOCHS} epochs; draw fewer at once.")
        epochs += range(int(first), int(first) + length)
    return epochs


_PRESETS: Final = ("paper", "release")


def _presets(ctx: click.Context, param: click.Parameter, value: str) -> list[str]:
    """Names of presets with commas between."""
    names = [name.strip() for name in value.split(",")]
    if not set(names) <= set(_PRESETS) or len(set(names)) < len(names):
        raise click.BadParameter(f"{value!r} must be one of {', '.join(_PRESETS)}, or both as {','.join(_PRESETS)}.")
    return names


def _more(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    """Show the help with the options that most people can do without."""
    if value and not ctx.resilient_parsing:
        for one in ctx.command.params:
            if isinstance(one, click.Option):
                one.hidden = False
        _echo(ctx.get_help())
        ctx.exit()


_SHOWN: Final = (  # by --version, where they are installed
    "torch",
    "nvidia-dali-cuda120",
    "nvidia-dali-cuda130",
    "cupy-cuda12x",
    "cupy-cuda13x",
    "diffusers",
    "ray",
    "numpy",
    "pillow",
)


def _version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    """Show the versions of this package, of Python and of what is installed of the packages that matter."""
    if not value or ctx.resilient_parsing:
        return
    from importlib import metadata

    from dali_diffusemix import __version__

    _echo(f"dali-diffusemix, version {__version__}")
    _echo(f"Python {platform.python_version()}")
    for package in _SHOWN:
        with contextlib.suppress(metadata.PackageNotFoundError):
            _echo(f"{package} {metadata.version(package)}")
    ctx.exit()


_Completer: TypeAlias = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def _words(words: Callable[[click.Context], Iterable[str]], *, kind: str = "", many: bool = False) -> _Completer:
    """Completes words; a path of this kind ("file" or "dir") where none fits; `many` with commas between."""

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        before, comma, begun = incomplete.rpartition(",") if many else ("", "", incomplete)
        taken = before.split(",")
        fitting = [word for word in words(ctx) if word.startswith(begun) and word not in taken]
        if fitting or not kind:
            return [CompletionItem(before + comma + word) for word in fitting]
        return [CompletionItem(incomplete, type=kind)]

    return complete


def _prompts(ctx: click.Context) -> Sequence[str]:
    from dali_diffusemix.generate.editors import PROMPTS

    return PROMPTS


def _schedulers(ctx: click.Context) -> Iterable[str]:
    from dali_diffusemix.generate.editors.diffusers import SCHEDULERS

    return SCHEDULERS


def _layouts(ctx: click.Context) -> Iterable[str]:
    from dali_diffusemix.catalog.layouts import LAYOUTS

    return LAYOUTS


def _splits(ctx: click.Context) -> Iterable[str]:
    from dali_diffusemix.catalog.layouts import LAYOUTS

    return LAYOUTS.get(ctx.params.get("layout") or "", ())


_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


@click.group(
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 done, 1 an error, 2 a wrong command line, 130 interrupted.",
)
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show versions.")
def main() -> None:
    """DiffuseMix (Islam et al., CVPR 2024) at load time: edit a folder of photographs once, and mix them afresh in
    every epoch. Begin with `demo`."""


# Commands -------------------------------------------------------------------------------------------------------------


@main.command("index")
@click.argument("root", type=_PATH)
@click.option("--refresh", is_flag=True, help="List anew: find new files, forget vanished ones.")
@click.option("--workers", type=int, metavar="N", help="Threads that read headers.  [default: 8]")
@_json_option
def index_command(root: Path, refresh: bool, workers: int | None, as_json: bool) -> None:
    """List the images of ROOT, a folder of class folders.

    The list is kept, so that later commands start at once. Every file is listed, or reported with the reason.

    \b
    Example:
      dali-diffusemix index data/train
    """
    import numpy as np

    from dali_diffusemix.catalog.listing import index
    from dali_diffusemix.catalog.table import default_location
    from dali_diffusemix.store import OriginalStore

    if OriginalStore.find(root) is not None:
        raise ConfigError(
            f"root must be a folder of images, found a packed store, {str(root)!r}, which is listed already; index the "
            "folder that it was packed from."
        )
    display = _Display(as_json)
    location = default_location(root)
    with display.progress("Reading headers", "images") as progress:
        catalog = index(root, location=location, refresh=refresh, workers=workers, progress=progress)
    counts = np.bincount(catalog.labels, minlength=len(catalog.classes)).tolist()
    display.line(f"{len(catalog)} images in {len(catalog.classes)} classes")
    _list(display, (f"{count:>8}  {name}" for name, count in zip(catalog.classes, counts, strict=True)), most=20)
    if catalog.rejected:
        display.line(f"{len(catalog.rejected)} left out")
        _list(display, (f"  {one.path}: {one.reason}" for one in catalog.rejected))
    display.line(f"kept in {location}")
    display.result(
        {
            "root": str(root),
            "images": len(catalog),
            "classes": dict(zip(catalog.classes, counts, strict=True)),
            "rejected": [{"path": one.path, "reason": one.reason} for one in catalog.rejected],
            "fingerprint": catalog.fingerprint,
            "catalog": str(location),
        }
    )


@main.command("fractals")
@click.argument("path", type=_PATH)
@click.option("--count", default=64, show_default=True, metavar="N", help="How many to render.")
@click.option("--size", default=256, show_default=True, metavar="N", help="Pixels a side.")
@click.option("--seed", default=0, show_default=True, metavar="N", help="The same seed gives the same fractals.")
@click.option("--from-folder", type=_PATH, metavar="DIR", help="Take a folder's images instead.")
@click.option("--overwrite", is_flag=True, help="Replace PATH if it is there.")
@_json_option
@click.pass_context
def fractals_command(
    ctx: click.Context,
    path: Path,
    count: int,
    size: int,
    seed: int,
    from_folder: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Render fractal flames into a bank, the file PATH.

    \b
    Example:
      dali-diffusemix fractals cache/fractals.npy --count 64
    """
    from dali_diffusemix.fractals.bank import bank_from_folder, render_bank

    display = _Display(as_json)
    left_out: list[tuple[Path, str]] = []
    if from_folder is None:
        with display.progress("Rendering fractals", "fractals") as progress:
            bank = render_bank(path, count=count, size=size, seed=seed, overwrite=overwrite, progress=progress)
    else:
        for name in ("count", "seed"):
            if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
                raise click.UsageError(f"--{name} is for rendering; leave it out beside --from-folder.")
        with display.progress("Reading images", "images") as progress:
            bank, left_out = bank_from_folder(path, from_folder, size=size, overwrite=overwrite, progress=progress)
    display.line(f"{len(bank)} fractals of {size} x {size} pixels in {path}")
    if left_out:
        display.line(f"{len(left_out)} files left out")
        _list(display, (f"  {file}: {reason}" for file, reason in left_out))
    display.result(
        {
            "path": str(path),
            "shape": bank.shape,
            "left_out": [{"path": str(file), "reason": reason} for file, reason in left_out],
        }
    )


_DIFFUSION: Final = ("revision", "scheduler", "steps", "guidance", "image_guidance", "dtype", "compile")


@main.command("generate", short_help="Edit the images of ROOT into the folder STORE.")
@click.argument("root", type=_PATH)
@click.argument("store", type=_PATH)
@click.option(
    "--editor",
    default="procedural",
    show_default=True,
    metavar="NAME",
    shell_complete=_words(lambda _: ["procedural"], kind="dir"),
    help="Else a model: hub id or folder.",
)
@click.option(
    "--prompts",
    metavar="A,B",
    shell_complete=_words(_prompts, kind="file", many=True),
    help="Or a prompts.toml.  [default: the paper's nine]",
)
@click.option("--size", default=256, show_default=True, metavar="N", help="Pixels a side of a stored edit.")
@click.option("--edit-size", hidden=True, type=int, metavar="N", help="The same while editing.  [default: --size]")
@click.option(
    "--resize",
    hidden=True,
    type=click.Choice(["squash", "keep"]),
    default="squash",
    show_default=True,
    help="The shape.",
)
@click.option("--variants", hidden=True, default=1, show_default=True, metavar="N", help="Edits per image and prompt.")
@click.option("--seed", default=0, show_default=True, metavar="N", help="The same seed gives the same edits.")
@click.option("--retry", hidden=True, default=0, show_default=True, metavar="N", help="More tries for a rejected edit.")
@click.option("--quality", hidden=True, default=90, show_default=True, metavar="N", help="Of the JPEG files, 1 to 100.")
@click.option("--batch-size", hidden=True, default=16, show_default=True, metavar="N", help="Edits made at once.")
@click.option(
    "--originals-per-shard",
    hidden=True,
    type=int,
    metavar="N",
    help="Work lost if killed, at most.  [default: 512; by a model 64]",
)
@click.option("--revision", hidden=True, metavar="NAME", help="Of the model on the hub.")
@click.option(
    "--scheduler",
    metavar="NAME",
    shell_complete=_words(_schedulers),
    help="Of the diffusion.  [default: euler-ancestral]",
)
@click.option("--steps", type=int, metavar="N", help="Of the diffusion.  [default: 100]")
@click.option("--guidance", hidden=True, type=float, metavar="X", help="By the prompt.  [default: 4]")
@click.option("--image-guidance", hidden=True, type=float, metavar="X", help="By the image.  [default: 1.5]")
@click.option("--dtype", hidden=True, metavar="NAME", help="float16, bfloat16 or float32.  [default: float16]")
@click.option(
    "--compile", hidden=True, is_flag=True, default=None, help="Compile the model: minutes at first, faster after."
)
@click.option("--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True, help="Where to run.")
@click.option("--device", hidden=True, metavar="NAME", help="cpu, cuda or cuda:N.  [default: all GPUs, else all cores]")
@click.option("--workers", hidden=True, type=int, metavar="N", help="Processes.  [default: one a device]")
@click.option("--address", hidden=True, metavar="HOST", help="Of the Ray cluster.  [default: this machine]")
@click.option(
    "--num-gpus", hidden=True, type=float, metavar="X", help="GPUs of a Ray worker.  [default: 1 if there are any]"
)
@click.option("--part", metavar="I/N", help="Make the I-th of N parts alone.")
@click.option(
    "--layout",
    metavar="NAME",
    shell_complete=_words(_layouts),
    help="Of ROOT, a published dataset: cub, flowers, ...",
)
@click.option(
    "--split",
    default="train",
    show_default=True,
    metavar="NAME",
    shell_complete=_words(_splits),
    help="Of the layout; or A+B.",
)
@_json_option
@click.option("--more", is_flag=True, is_eager=True, expose_value=False, callback=_more, help="Show all options.")
def generate_command(
    root: Path,
    store: Path,
    editor: str,
    prompts: str | None,
    engine: str,
    device: str | None,
    workers: int | None,
    address: str | None,
    num_gpus: float | None,
    part: str | None,
    layout: str | None,
    split: str,
    as_json: bool,
    **options: Any,
) -> None:
    """Edit the images of ROOT, a folder or a packed store, into the folder STORE.

    Run again, it makes what is missing, and new images, prompts and variants too.
    The procedural editor restyles without a model: it is not diffusion.

    \b
    Example:
      dali-diffusemix generate data/train cache/edits --prompts autumn,snowy
    """
    from dali_diffusemix.catalog.layouts import read_layout
    from dali_diffusemix.generate.config import GenerateConfig
    from dali_diffusemix.generate.run import generate, list_originals
    from dali_diffusemix.store import WHOLE, Part

    display = _Display(as_json)
    diffusion = {name: value for name in _DIFFUSION if (value := options.pop(name)) is not None}
    config = GenerateConfig(**_editing(editor, prompts, diffusion), **options)
    works = _engine(engine, config.editor_config.accelerated, device, workers, address, num_gpus)
    if layout is not None:
        root, catalog = read_layout(layout, root, split)
    else:
        with display.progress("Reading headers", "images") as progress:
            catalog = list_originals(root, progress=progress)
    with display.progress("Making edits", "edits") as progress:
        summary = generate(
            root,
            store,
            config,
            catalog=catalog,
            engine=works,
            part=WHOLE if part is None else Part.parse(part),
            progress=progress,
            rejects=display.rejects,
        )
    if catalog.rejected:
        display.line(f"{len(catalog.rejected)} files left out; `dali-diffusemix index` lists them")
    for verdict, count in summary.verdicts.items():
        if verdict == "accepted":
            display.line(f"{count} edits of {len(catalog)} images")
        elif count:
            display.line(f"{count} not used: {verdict}")
    if editor == "procedural":
        display.line("restyled by the procedural editor: not diffusion")
    rejected = {prompt: _rejected(verdicts) for prompt, verdicts in summary.by_prompt.items()}
    _list(display, (f"{count:>8}  rejected under {prompt!r}" for prompt, count in rejected.items() if count))
    if summary.made:
        display.line(f"{summary.made} made now, in {summary.seconds:.1f} s: {summary.images_per_second:.1f}/s")
    else:
        display.line("all were there already")
    if summary.missing:
        display.line(f"{summary.missing} shards are left to other parts")
    display.line(f"kept in {store}")
    display.result(
        {
            "store": str(store),
            "originals": len(catalog),
            "rejected": len(catalog.rejected),
            "verdicts": dict(summary.verdicts),
            "by_prompt": {prompt: dict(verdicts) for prompt, verdicts in summary.by_prompt.items()},
            "by_class": {name: dict(verdicts) for name, verdicts in summary.by_class.items()},
            "made": summary.made,
            "missing_shards": summary.missing,
            "seconds": summary.seconds,
            "images_per_second": summary.images_per_second,
        }
    )


def _rejected(verdicts: Mapping[str, int]) -> int:
    from dali_diffusemix.store import REJECTIONS

    return sum(verdicts.get(name, 0) for name in REJECTIONS)


def _editing(editor: str, prompts: str | None, diffusion: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a GenerateConfig that say who edits, and what is asked for."""
    from dali_diffusemix.generate.config import PromptFile
    from dali_diffusemix.generate.editors import PROMPTS
    from dali_diffusemix.generate.editors.diffusers import DiffusersConfig

    fields: dict[str, Any] = {"prompts": PROMPTS}
    template: dict[str, Any] = {}
    if prompts is not None and prompts.endswith(".toml"):
        file = PromptFile.read(prompts)
        fields = {"prompts": file.prompts, "denied": file.denied}
        template = {} if file.template is None else {"template": file.template}
    elif prompts is not None:
        words = tuple(word.strip() for word in prompts.split(","))
        if not all(words):
            raise click.BadParameter(f"{prompts!r} has an empty part; write a,b,c.", param_hint="--prompts")
        fields = {"prompts": words}
    if editor != "procedural":
        return {**fields, "editor": DiffusersConfig(model=editor, **template, **diffusion)}
    if diffusion:
        name = "--" + next(iter(diffusion)).replace("_", "-")
        raise click.UsageError(f"{name} is for a diffusion model; name one with --editor, or leave it out.")
    return {**fields, "editor": editor}


def _engine(
    engine: str,
    accelerated: bool,
    device: str | None,
    workers: int | None,
    address: str | None,
    num_gpus: float | None,
) -> Any:
    from dali_diffusemix.generate.engines.local import LocalEngine, default_devices
    from dali_diffusemix.generate.engines.ray import RayEngine

    if workers is not None and workers < 1:
        raise click.UsageError("--workers must be 1 or more.")
    if engine == "ray":
        if device is not None:
            raise click.UsageError("--device is for --engine local; Ray places workers by --num-gpus.")
        return RayEngine(address=address, workers=workers, num_gpus=num_gpus if accelerated else 0)
    for name, value in (("address", address), ("num-gpus", num_gpus)):
        if value is not None:
            raise click.UsageError(f"--{name} is for --engine ray; leave it out.")
    devices = default_devices(accelerated) if device is None else (device,)
    return LocalEngine([devices[place % len(devices)] for place in range(workers or len(devices))])


@main.command("verify", short_help="Hash and decode all of STORE, and say what is wrong.")
@click.argument("store", type=_PATH)
@click.option("--quick", is_flag=True, help="Hash the files, but decode no image.")
@click.option("--discard", is_flag=True, help="Have damaged shards made anew by the next run.")
@click.option("--workers", type=int, metavar="N", help="Threads.  [default: the cores]")
@_json_option
def verify_command(store: Path, quick: bool, discard: bool, workers: int | None, as_json: bool) -> None:
    """Hash and decode all of STORE, edits or packed originals, and say what is wrong.

    Nothing is changed without --discard; what that takes away is made anew by `generate` or `pack`.
    The exit code is 1 if something is wrong.

    \b
    Example:
      dali-diffusemix verify cache/edits
    """
    from dali_diffusemix.inspect.verify import discard as discard_damaged
    from dali_diffusemix.inspect.verify import verify

    display = _Display(as_json)
    with display.progress("Verifying", "shards") as progress:
        found = verify(store, decoding=not quick, workers=workers, progress=progress)
    display.line(f"{found.shards} shards, {found.images} images, {found.bytes / 1e6:.1f} MB")
    if found.missing:
        display.line(f"{found.missing} shards are not finished; the command that makes them does the rest")
    _list(display, (str(problem) for problem in found.problems))
    if found.damaged and discard:
        discard_damaged(store, found)
        display.line(f"{len(found.damaged)} damaged shards discarded; run the command again that made them")
    elif found.damaged:
        display.line(f"{len(found.damaged)} shards are damaged; --discard has them made anew")
    elif not found.problems:
        display.line("nothing is wrong")
    display.result(
        {
            "store": str(store),
            "shards": found.shards,
            "missing": found.missing,
            "images": found.images,
            "bytes": found.bytes,
            "damaged": list(found.damaged),
            "problems": [{"shard": one.shard, "file": one.file, "what": one.what} for one in found.problems],
        }
    )
    if found.problems:
        click.get_current_context().exit(1)


@main.command("report", short_help="Write a gallery of the edits in STORE, for any browser.")
@click.argument("store", type=_PATH)
@click.option("--out", type=_PATH, default="report", show_default=True, metavar="DIR", help="Where to write.")
@click.option("--root", type=_PATH, metavar="DIR", help="The originals.  [default: where they were]")
@click.option("--most", default=10_000, show_default=True, metavar="N", help="Edits shown at most.")
@_json_option
def report_command(store: Path, out: Path, root: Path | None, most: int, as_json: bool) -> None:
    """Write a gallery of the edits in STORE: pages that open from disk, in any browser.

    Originals beside their edits, verdicts, scores, settings and cost, to be filtered by class, prompt
    and verdict.

    \b
    Example:
      dali-diffusemix report cache/edits --out report
    """
    from dali_diffusemix.inspect.report import write_report

    display = _Display(as_json)
    with display.progress("Drawing", "edits") as progress:
        report = write_report(store, out, root=root, most=most, progress=progress)
    shown = f"{report.edits} of " if report.edits < report.of else ""
    display.line(f"{shown}{report.of} edits in {report.page}")
    display.result({"page": str(report.page), "edits": report.edits, "of": report.of, "originals": report.originals})


@main.command("export", short_help="Write images and edits as an ImageFolder, for other loaders.")
@click.argument("root", type=_PATH)
@click.argument("store", type=_PATH)
@click.argument("out", type=_PATH)
@click.option("--mixed", is_flag=True, help="Mix originals and edits as the released code does, once and for all.")
@click.option("--fractals", type=_PATH, metavar="FILE", help="The fractal bank, for --mixed.")
@click.option("--size", default=256, show_default=True, metavar="N", help="Pixels a side of a mixed image.")
@click.option("--seed", default=0, show_default=True, metavar="N", help="The same seed gives the same mixed images.")
@click.option("--quality", default=95, show_default=True, metavar="N", help="Of the mixed JPEG files.")
@_json_option
def export_command(root: Path, store: Path, out: Path, as_json: bool, **options: Any) -> None:
    """Write the images of ROOT and their edits in STORE to OUT as an ImageFolder, for other loaders.

    Each edit lies beside its original, in the folder of its class. With --mixed each is mixed with its
    original and a fractal instead: the same in every epoch, unlike what this package's loader does.

    \b
    Example:
      dali-diffusemix export data/train cache/edits exported
    """
    from dali_diffusemix.inspect.export import export

    display = _Display(as_json)
    with display.progress("Exporting", "images") as progress:
        exported = export(root, store, out, progress=progress, **options)
    display.line(f"{exported.originals} originals and {exported.edits} {exported.kind} in {out}")
    if exported.left_out:
        display.line(f"{exported.left_out} left out: they could not be decoded")
    display.result(
        {"out": str(out), "originals": exported.originals, "edits": exported.edits, "left_out": exported.left_out}
    )


@main.command("pack", short_help="Pack the images of ROOT, to be read in its place, and faster.")
@click.argument("root", type=_PATH)
@click.argument("store", type=_PATH)
@click.option("--max-side", type=int, metavar="N", help="Make larger images smaller: pixels of the longest side.")
@click.option("--quality", type=int, metavar="N", help="Of JPEG files, 1 to 100.  [default: 90 with --max-side]")
@click.option("--no-tiles", is_flag=True, help="Store files as they are, byte for byte; loading them takes longer.")
@_json_option
def pack_command(
    root: Path, store: Path, max_side: int | None, quality: int | None, no_tiles: bool, as_json: bool
) -> None:
    """Pack the images of ROOT into the folder STORE, to be read in its place.

    Without --max-side and --quality no pixel changes: JPEGs are rearranged into tiles, of which loading
    reads those that are seen. With either, all are made JPEG. Run again, it goes on where it was stopped.
    Train on STORE as on ROOT: edits made of one serve the other.

    \b
    Example:
      dali-diffusemix pack data/train cache/originals --max-side 500
    """
    from dali_diffusemix.catalog.listing import index
    from dali_diffusemix.store import OriginalStore
    from dali_diffusemix.store.pack import PackConfig, pack

    display = _Display(as_json)
    config = PackConfig(max_side=max_side, quality=quality, tiled=not no_tiles)
    catalog = None
    if OriginalStore.find(root) is None:  # else `pack` says what is wrong
        with display.progress("Reading headers", "images") as progress:
            catalog = index(root, progress=progress)
    with display.progress("Packing", "images") as progress:
        summary = pack(root, store, config, catalog=catalog, progress=progress)
    display.line(f"{summary.originals} images, {summary.bytes / 1e6:.1f} MB")
    if summary.left_out:
        display.line(f"{len(summary.left_out)} left out: they could not be decoded")
        _list(display, (f"  {one.path}" for one in summary.left_out))
    display.line(f"{summary.made} done now, in {summary.seconds:.1f} s" if summary.made else "all were there already")
    display.line(f"kept in {store}")
    display.result(
        {
            "store": str(store),
            "originals": summary.originals,
            "bytes": summary.bytes,
            "left_out": [{"path": one.path, "reason": one.reason} for one in summary.left_out],
            "made": summary.made,
            "seconds": summary.seconds,
        }
    )


@main.command("preview")
@click.argument("root", type=_STORE)
@click.option("--edits", type=_STORE, required=True, metavar="STORE", help="The edit store.")
@click.option("--fractals", type=_PATH, required=True, metavar="FILE", help="The fractal bank.")
@click.option("--out", type=_PATH, default="sheet.png", show_default=True, metavar="FILE", help="A .png or .jpg.")
@click.option("--rows", default=8, show_default=True, metavar="N", help="How many samples, up to 64.")
@click.option("--indices", callback=_numbers, metavar="1,5", help="Which.  [default: mixed ones of many classes]")
@click.option("--epoch", default=0, show_default=True, metavar="N", help="The epoch whose samples to draw.")
@click.option("--epochs", callback=_epochs, metavar="0-5", help="Several instead; --out x.webp or .gif animates one.")
@click.option("--parts", is_flag=True, help="Outline what is decoded of each image.")
@click.option("--seed", default=0, show_default=True, metavar="N", help="The seed of your training run.")
@click.option(
    "--preset",
    "presets",
    callback=_presets,
    default="paper",
    show_default=True,
    metavar="NAME",
    help="Or release; or paper,release.",
    shell_complete=_words(lambda _: _PRESETS, many=True),
)
@click.option("--crop-size", default=224, show_default=True, metavar="N", help="Pixels a side of a sample.")
@_json_option
@click.pass_context
def preview_command(
    ctx: click.Context,
    root: Path,
    edits: Path,
    fractals: Path,
    out: Path,
    rows: int,
    indices: list[int] | None,
    epoch: int,
    epochs: list[int] | None,
    parts: bool,
    seed: int,
    presets: list[str],
    crop_size: int,
    as_json: bool,
) -> None:
    """Draw samples as training sees them.

    One row each: original, edit, mask, hybrid, fractal, augmented.

    \b
    Example:
      dali-diffusemix preview data/train --edits edits --fractals fractals.npy
    """
    from dali_diffusemix.inspect import preview
    from dali_diffusemix.loading.dataset import DiffuseMixDataset
    from dali_diffusemix.plan.crops import TrainCrop
    from dali_diffusemix.plan.spec import MixSpec

    given = {name for name in ctx.params if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE}
    ending = out.suffix.lower()
    animated = ending in preview.ANIMATION_ENDINGS
    _check_picture(out, preview.SHEET_ENDINGS, preview.ANIMATION_ENDINGS)
    if epochs is not None and "epoch" in given:
        raise click.UsageError("--epoch is for one epoch; leave it out beside --epochs.")
    kinds = [
        option
        for option, asked in (("--epochs", epochs), ("--parts", parts), ("--preset with several names", presets[1:]))
        if asked
    ]
    if len(kinds) > 1:
        raise click.UsageError(f"{kinds[0]} and {kinds[1]} are drawn on sheets of their own; leave one of them out.")
    if animated:
        if epochs is None:
            raise click.UsageError(f"{ending} is an animation over epochs; name them, as --epochs 0-11.")
        if len(indices or [0]) > 1 or (indices is None and "rows" in given and rows != 1):
            found = f"--rows {rows}" if indices is None else f"--indices {','.join(map(str, indices))}"
            raise click.UsageError(f"{ending} is an animation of one sample, found {found}; name one, as --indices 5.")
        rows = 1

    display = _Display(as_json)
    mixes = {name: MixSpec.paper() if name == "paper" else MixSpec.release() for name in presets}
    dataset = DiffuseMixDataset(
        root,
        edits=edits,
        fractals=fractals,
        mix=mixes[presets[0]],
        crop=TrainCrop(crop_size),
        seed=seed,
    )
    shown = [epoch] if epochs is None else epochs
    more: dict[str, Any] = {}
    if len(presets) > 1:
        try:
            samples = preview.matching_indices(dataset, mixes, epoch=epoch, originals=indices, rows=rows)
        except ConfigError as error:
            error.add_note("--indices names originals where several presets are side by side.")
            raise
        chosen = samples["paper"]  # of a fixed epoch: an index is an original
        pictures = [preview.presets_sheet(dataset, mixes, epoch=epoch, indices=samples)]
        more["samples"] = samples
        what = f"{len(chosen)} originals under {' and '.join(presets)}"
    else:
        chosen = indices if indices is not None else preview.spread_indices(dataset, epoch=shown[0], rows=rows)
        what = f"{len(chosen)} samples" if epochs is None else f"{len(chosen)} samples in {len(epochs)} epochs"
        if animated:
            pictures = preview.animation(dataset, index=chosen[0], epochs=shown)
            what = f"sample {chosen[0]} in {len(shown)} epochs"
        elif epochs is not None:
            pictures = [preview.epochs_sheet(dataset, epochs=epochs, indices=chosen)]
        elif parts:
            pictures = [preview.parts_sheet(dataset, epoch=epoch, indices=chosen)]
            shares = preview.decoded_shares(dataset, epoch=epoch, indices=chosen).tolist()
            more["decoded"] = [
                # NaN is not JSON.
                {"original": original, "edit": None if edit != edit else edit, "both": both}
                for original, edit, both in shares
            ]
        else:
            pictures = [preview.contact_sheet(dataset, epoch=epoch, indices=chosen)]
    _write(out, preview.encoded(pictures, ending))
    width, height = pictures[0].size
    display.line(f"{what} in {out}, {width} x {height} pixels")
    display.result(
        {
            "sheet": str(out),
            "width": width,
            "height": height,
            "indices": chosen,
            "epochs": shown,
            "presets": presets,
            "frames": len(pictures),
            **more,
        }
    )


def _check_picture(out: Path, sheets: Sequence[str], animations: Sequence[str]) -> None:
    if out.suffix.lower() not in (*sheets, *animations):
        raise click.BadParameter(
            f"{str(out)!r} must end in {' or '.join(sheets)}, or for an animation in {' or '.join(animations)}, "
            f"found {out.suffix or 'no ending'!r}.",
            param_hint="--out",
        )


@main.command("bench", short_help="Compare this loader with others, and say what to change.")
@click.argument("root", metavar="DATA", type=_PATH)
@click.option("--edits", type=_PATH, metavar="STORE", help="The edit store; without it nothing is mixed.")
@click.option("--fractals", type=_PATH, metavar="FILE", help="The fractal bank.")
@click.option("--batch-size", default=64, show_default=True, metavar="N", help="Samples per batch.")
@click.option("--threads", type=int, metavar="N", help="num_workers of all.  [default: the cores]")
@click.option("--device", default="cpu", show_default=True, metavar="NAME", help="cpu, cuda or cuda:N.")
@click.option("--size", default=224, show_default=True, metavar="N", help="Pixels a side of a sample.")
@click.option("--rounds", default=5, show_default=True, metavar="N", help="Turns of each contender.")
@click.option("--seconds", default=1.0, show_default=True, metavar="S", help="Length of a turn.")
@click.option("--images", default=2048, show_default=True, metavar="N", help="Originals used at most.")
@_json_option
def bench_command(root: Path, threads: int | None, as_json: bool, **settings: Any) -> None:
    """Compare this loader with others on DATA, and say what to change.

    DATA is a folder or a packed store. Of many images a random sample is used; it takes a minute or two.

    \b
    Example:
      dali-diffusemix bench data/train --edits edits --fractals fractals.npy
    """
    from dali_diffusemix.bench import bench

    display = _Display(as_json)
    with display.progress("Measuring", "turns") as progress:
        result = bench(root, num_workers=threads, progress=progress, **settings)
    for line in result.lines():
        display.line(line)
    display.result(result.json())


@main.command("doctor")
@click.argument("data", metavar="[DATA]", type=_STORE, required=False)
@_json_option
@click.pass_context
def doctor_command(ctx: click.Context, data: Path | str | None, as_json: bool) -> None:
    """Try what this package needs, and say what works here.

    What does not is shown with its reason and what to do. It takes some seconds and leaves nothing behind. Put
    what it prints into bug reports. Of DATA, a folder of images or a store, some files are read to see how fast
    that is.

    The exit code is 0 if the loader works on some device, the CPU or a GPU, else 1.

    \b
    Example:
      dali-diffusemix doctor data/train
    """
    from dali_diffusemix.doctor import examine

    display = _Display(as_json)
    with display.progress("Trying", "checks") as progress:
        report = examine(data, progress=progress)
    for line in report.lines():
        display.line(line)
    display.result(report.json())
    ctx.exit(0 if report.ok else 1)


@main.command("demo")
@click.argument("folder", type=_PATH, required=False)
@click.option("--out", type=_PATH, default="demo", show_default=True, metavar="DIR", help="Where to write.")
@click.option("--keep", is_flag=True, help="Go on with what an earlier demo wrote there.")
@_json_option
def demo_command(folder: Path | None, out: Path, keep: bool, as_json: bool) -> None:
    """Go the whole way, from photographs to mixed batches.

    FOLDER holds class folders of photographs, of which up to 64 are used; without it, those that ship with
    scikit-image and scikit-learn are. The edits are procedural, not diffusion. What an earlier demo wrote to
    the same place is replaced, unless it is kept.

    \b
    Example:
      dali-diffusemix demo
    """
    from dataclasses import asdict

    from dali_diffusemix.demo import run_demo

    display = _Display(as_json)
    result = run_demo(display, folder=folder, out=out, keep=keep)
    display.line(f"Done in {result.seconds:.0f} s. Look at {os.path.relpath(result.sheet)}")
    display.result(asdict(result))


@main.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion_command(shell: str) -> None:
    """Print what makes SHELL complete commands, options and paths.

    \b
    At the end of ~/.bashrc   eval "$(dali-diffusemix completion bash)"
    At the end of ~/.zshrc    eval "$(dali-diffusemix completion zsh)"
    In ~/.config/fish/config.fish   dali-diffusemix completion fish | source

    \b
    Example:
      dali-diffusemix completion bash
    """
    complete = get_completion_class(shell)
    assert complete is not None
    source = complete(main, {}, "dali-diffusemix", "_DALI_DIFFUSEMIX_COMPLETE").source()
    # Click's words for fish end at a comma, which lists of prompts have.
    _echo(source.replace('string split ","', 'string split --max 1 ","'), nl=False)


def _list(display: _Display, lines: Iterable[str], most: int | None = None) -> None:
    """Print lines, the first ones if there are many."""
    everything = list(lines)
    for line in everything[:most]:
        # A name may hold a line break.
        display.line(line.replace("\n", "\\n"))
    if most is not None and len(everything) > most:
        display.line(f"{'...':>8}  and {len(everything) - most} more")


def _write(file: Path, content: bytes) -> None:
    """Write a file whole or not at all. Raises ConfigError."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write(file, content)
    except OSError as error:
        raise ConfigError(f"{str(file)!r}: must be a file that can be written, found: {error}; name another") from error
