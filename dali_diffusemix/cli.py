"""The command line: `dali-diffusemix COMMAND`.

Results go to standard output, as lines or with `--json` as one object; progress, warnings and errors go to standard
error. Exit codes: 0 done, 1 an error of ours, 2 a wrong command line, 130 interrupted. What a command needs is
imported inside it, so that `--help` answers at once.
"""

import contextlib
import io
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

from dali_diffusemix.errors import ConfigError, DiffuseMixError

_LINE_SECONDS: Final = 30.0  # between two lines of progress where there is no terminal
_INTERRUPTED: Final = 130  # 128 + SIGINT, as shells have it

_PATH: Final = click.Path(path_type=Path)


class _Store(click.Path):
    """A folder, or the URL of a store, which stays a string."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from dali_diffusemix.remote import is_url

        return value if is_url(value) else Path(os.fsdecode(super().convert(value, param, ctx)))


_STORE: Final = _Store()


# What is shown --------------------------------------------------------------------------------------------------------


def _console() -> Console:
    # Made anew each time: standard error is another one under tests, and while a bar is shown.
    return Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)


def _printable(text: str) -> str:
    """Text that is safe in any terminal: undecodable bytes and control characters of file names are escaped."""
    return "".join(c if c.isprintable() or c == "\n" else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # a byte that is not UTF-8, as Python holds it in names
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


def _notice(kind: str, message: str, style: str) -> None:
    _console().print(Text.assemble((f"{kind}: ", f"bold {style}"), (_printable(message), style)))


class _Rate(ProgressColumn):
    """Units a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f} {task.fields['unit']}/s", style="cyan")


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
            click.echo(_printable(text))

    def result(self, content: Mapping[str, Any]) -> None:
        """Print the result for machines, if it was asked for. A byte that is not UTF-8 is escaped as \\udcXX."""
        if self._as_json:
            click.echo(json.dumps(content))

    def rejects(self, by_prompt: Mapping[str, int]) -> None:
        """Show how many edits were rejected, by prompt, beside the progress."""
        worst = sorted(by_prompt.items(), key=lambda pair: -pair[1])
        self._rejects = _printable(", ".join(f"{prompt} {count}" for prompt, count in worst if count))

    @contextlib.contextmanager
    def progress(self, what: str, unit: str) -> Iterator[Callable[[int, int], None]]:
        """A bar on a terminal; else a line now and then; nothing beside JSON."""
        console = _console()
        if self._as_json:
            yield lambda done, total: None
        elif not console.is_terminal:
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
        except KeyboardInterrupt:
            _notice("Interrupted", "run the same command again to go on.", "yellow")
            ctx.exit(_INTERRUPTED)


# What is given --------------------------------------------------------------------------------------------------------


def _numbers(ctx: click.Context, param: click.Parameter, value: str | None) -> list[int] | None:
    """Whole numbers with commas between."""
    try:
        return None if value is None else [int(number) for number in value.split(",")]
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is not whole numbers with commas between; write 1,5,9.") from error


def _more(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    """Show the help with the options that most people can do without."""
    if value:
        for one in ctx.command.params:
            if isinstance(one, click.Option):
                one.hidden = False
        click.echo(ctx.get_help())
        ctx.exit()


_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="dali-diffusemix", prog_name="dali-diffusemix")
def main() -> None:
    """DiffuseMix (Islam et al., CVPR 2024) at load time.

    Edit a folder of photographs once; from then on every epoch mixes them afresh while it loads.

    \b
      dali-diffusemix demo          see it all on photographs that are there already
    """


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

    from dali_diffusemix.catalog import default_location, index
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
    from dali_diffusemix.fractals import bank_from_folder, render_bank

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


@main.command("generate")
@click.argument("root", type=_PATH)
@click.argument("store", type=_PATH)
@click.option("--editor", default="procedural", show_default=True, metavar="NAME", help="Or a model: hub id or folder.")
@click.option("--prompts", metavar="A,B", help="Or a prompts.toml.  [default: the paper's nine]")
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
    default=512,
    show_default=True,
    metavar="N",
    help="Work lost if killed, at most.",
)
@click.option("--revision", hidden=True, metavar="NAME", help="Of the model on the hub.")
@click.option("--scheduler", metavar="NAME", help="Of the diffusion.  [default: euler-ancestral]")
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
@click.option("--layout", metavar="NAME", help="Of ROOT, a published dataset: cub, flowers, ...")
@click.option("--split", default="train", show_default=True, metavar="NAME", help="Of the layout; or A+B.")
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

    Run again, it makes what is missing and nothing twice; new images, prompts and variants add to what is there.
    The procedural editor restyles without a model: it is not diffusion.

    \b
    Example:
      dali-diffusemix generate data/train cache/edits --prompts autumn,snowy
    """
    from dali_diffusemix.generate import GenerateConfig, generate, list_originals
    from dali_diffusemix.layouts import read_layout
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
    from dali_diffusemix.quality import VERDICTS

    return sum(verdicts.get(name, 0) for name in VERDICTS)


def _editing(editor: str, prompts: str | None, diffusion: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a GenerateConfig that say who edits, and what is asked for."""
    from dali_diffusemix.editors import PROMPTS
    from dali_diffusemix.editors.diffusers import DiffusersConfig
    from dali_diffusemix.generate import PromptFile

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
    from dali_diffusemix.engines.local import LocalEngine, default_devices
    from dali_diffusemix.engines.ray import RayEngine

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


@main.command("verify")
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
    from dali_diffusemix.verify import discard as discard_damaged
    from dali_diffusemix.verify import verify

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


@main.command("report")
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
    from dali_diffusemix.report import write_report

    display = _Display(as_json)
    with display.progress("Drawing", "edits") as progress:
        report = write_report(store, out, root=root, most=most, progress=progress)
    shown = f"{report.edits} of " if report.edits < report.of else ""
    display.line(f"{shown}{report.of} edits in {report.page}")
    display.result({"page": str(report.page), "edits": report.edits, "of": report.of, "originals": report.originals})


@main.command("export")
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
    from dali_diffusemix.export import export

    display = _Display(as_json)
    with display.progress("Exporting", "images") as progress:
        exported = export(root, store, out, progress=progress, **options)
    display.line(f"{exported.originals} originals and {exported.edits} {exported.kind} in {out}")
    if exported.left_out:
        display.line(f"{exported.left_out} left out: they could not be decoded")
    display.result(
        {"out": str(out), "originals": exported.originals, "edits": exported.edits, "left_out": exported.left_out}
    )


@main.command("pack")
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
    from dali_diffusemix.catalog import index
    from dali_diffusemix.pack import PackConfig, pack
    from dali_diffusemix.store import OriginalStore

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
@click.option("--out", type=_PATH, default="sheet.png", show_default=True, metavar="FILE", help="PNG to write.")
@click.option("--rows", default=8, show_default=True, metavar="N", help="How many samples, up to 64.")
@click.option(
    "--indices", callback=_numbers, metavar="1,5", help="Which samples.  [default: mixed ones of many classes]"
)
@click.option("--epoch", default=0, show_default=True, metavar="N", help="The epoch whose samples to draw.")
@click.option("--seed", default=0, show_default=True, metavar="N", help="The seed of your training run.")
@click.option("--preset", type=click.Choice(["paper", "release"]), default="paper", show_default=True)
@click.option("--crop-size", default=224, show_default=True, metavar="N", help="Pixels a side of a sample.")
@_json_option
def preview_command(
    root: Path,
    edits: Path,
    fractals: Path,
    out: Path,
    rows: int,
    indices: list[int] | None,
    epoch: int,
    seed: int,
    preset: str,
    crop_size: int,
    as_json: bool,
) -> None:
    """Draw samples as training sees them.

    One row each: original, edit, mask, hybrid, fractal, augmented.

    \b
    Example:
      dali-diffusemix preview data/train --edits cache/edits --fractals cache/fractals.npy
    """
    from dali_diffusemix.dataset import DiffuseMixDataset
    from dali_diffusemix.plan import MixSpec, TrainCrop
    from dali_diffusemix.preview import contact_sheet, spread_indices

    display = _Display(as_json)
    dataset = DiffuseMixDataset(
        root,
        edits=edits,
        fractals=fractals,
        mix=MixSpec.paper() if preset == "paper" else MixSpec.release(),
        crop=TrainCrop(crop_size),
        seed=seed,
    )
    chosen = indices if indices is not None else spread_indices(dataset, epoch=epoch, rows=rows)
    sheet = contact_sheet(dataset, epoch=epoch, indices=chosen)
    content = io.BytesIO()
    sheet.save(content, "PNG")
    _write(out, content.getvalue())
    display.line(f"{len(chosen)} samples in {out}, {sheet.width} x {sheet.height} pixels")
    display.result({"sheet": str(out), "width": sheet.width, "height": sheet.height, "indices": chosen})


@main.command("bench")
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
      dali-diffusemix bench data/train --edits cache/edits --fractals cache/fractals.npy
    """
    from dali_diffusemix.bench import bench

    display = _Display(as_json)
    with display.progress("Measuring", "turns") as progress:
        result = bench(root, num_workers=threads, progress=progress, **settings)
    for line in result.lines():
        display.line(line)
    display.result(result.json())


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
    unfinished = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            unfinished.write_bytes(content)
            unfinished.replace(file)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"{str(file)!r}: must be a file that can be written, found: {error}; name another") from error
