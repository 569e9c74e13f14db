"""`generate`: edits of originals, into a store."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import click
from rich.filesize import decimal

from dali_diffusemix.cli.display import Display, echo, readable_rate, readable_seconds
from dali_diffusemix.cli.generate_options import GenerateOptions, command_line_option, read_options, template
from dali_diffusemix.cli.options import PATH, StyledCommand, completed, output_options
from dali_diffusemix.errors import ConfigError

if TYPE_CHECKING:
    from dali_diffusemix.generate.config import GenerateConfig
    from dali_diffusemix.generate.engines import Engine
    from dali_diffusemix.generate.estimate import Estimate
    from dali_diffusemix.generate.run import Redoable

# Options that are fields of PromptFile, of GenerateConfig and of DiffusersConfig, with the same names.
_PROMPTS: Final = ("prompts", "template", "class_prompts", "deny", "class_names")
_EDITS: Final = (
    *(
        "size",
        "edit_size",
        "resize",
        "variants",
        "seed",
        "retry",
        "format",
        "quality",
        "batch_size",
        "originals_per_shard",
    ),
)
_EDITOR: Final = (
    *("template", "negative_prompt", "strength", "revision", "scheduler", "steps", "guidance", "image_guidance"),
    *("dtype", "lora", "quantize", "cache", "compile", "model", "fields", "requests", "patience", "editor_options"),
)


class _GenerateCommand(StyledCommand):
    """Names the options file where the command line has an option that only the file has."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            name = error.option_name.lstrip("-").replace("-", "_")
            if name not in GenerateOptions.__dataclass_fields__:
                raise
            raise click.UsageError(
                f"{error.option_name} is an option of the file only; write it there as {name}, and give --config FILE.",
                ctx,
            ) from error


def _to_prompts(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    """Prompts from text such as autumn,snowy."""
    if value is None:
        return None
    if value.endswith(".toml"):
        raise click.BadParameter(f"{value!r} must be prompts separated by commas; give the file as --config.")
    words = tuple(word.strip() for word in value.split(","))
    if not all(words):
        raise click.BadParameter(f"{value!r} must be prompts separated by commas; write a,b,c.")
    return words


def _to_redo(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...]:
    """Kinds of edits from text such as rejected,unreadable."""
    words = () if value is None else tuple(word.strip() for word in value.split(","))
    if not set(words) <= {"rejected", "unreadable"}:
        raise click.BadParameter(f"{value!r} must be rejected, unreadable, or both as rejected,unreadable.")
    return words


def _print_config(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        echo(template(), nl=False)
        ctx.exit()


def _prompts() -> Iterable[str]:
    from dali_diffusemix.generate.editors import PROMPTS

    return PROMPTS


def _quantizations() -> Iterable[str]:
    from dali_diffusemix.generate.editors.diffusers.loading import QUANTIZATIONS

    return QUANTIZATIONS


def _layouts() -> Iterable[str]:
    from dali_diffusemix.catalog.layouts import LAYOUTS

    return LAYOUTS


@click.command("generate", cls=_GenerateCommand, short_help="Make edited copies of images: the slow step, done once.")
@click.argument("root", type=PATH)
@click.argument("store", type=PATH)
@command_line_option("editor", "NAME", shell_complete=completed(lambda: ["procedural"], kind="dir"))
@command_line_option("model", "NAME")
@command_line_option("prompts", "A,B", callback=_to_prompts, shell_complete=completed(_prompts, many=True))
@command_line_option("size", "N")
@command_line_option("variants", "N")
@command_line_option("seed", "N")
@command_line_option("retry", "N")
@command_line_option("format", "NAME", shell_complete=completed(lambda: ["jpeg", "png", "raw"]))
@command_line_option("batch_size", "N")
# Not in --help, which fits a screen; the file has them with their meanings.
@command_line_option("negative_prompt", "TEXT")
@command_line_option("strength", "X")
@command_line_option("lora", "NAME")
@command_line_option("quantize", "NAME", shell_complete=completed(_quantizations))
@command_line_option("device", "NAME")
@command_line_option("part", "I/N")
@command_line_option("layout", "NAME", shell_complete=completed(_layouts))
@click.option("--config", type=PATH, metavar="FILE", help="TOML file with these and further options.")
@click.option(
    "--print-config",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_config,
    help="Print such a file, with every option explained.",
)
@click.option(
    "--redo",
    metavar="A,B",
    callback=_to_redo,
    shell_complete=completed(lambda: ["rejected", "unreadable"], many=True),
    help="Make edits again: rejected (by checks or in `review`), unreadable, or both.",
)
@click.option("--dry-run", is_flag=True, help="Estimate time and size by making a few edits.")
@output_options
def generate_command(
    root: Path,
    store: Path,
    config: Path | None,
    redo: tuple[str, ...],
    dry_run: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Make edited copies of the images of ROOT, which holds a folder for each class, in the folder STORE.

    Run it again to resume, or to add edits: options that are not given are then those of STORE. The default
    editor, procedural, restyles images without a diffusion model.

    \b
    Example:
      dali-diffusemix generate data/train cache/edits --prompts autumn,snowy
    """
    from dali_diffusemix.catalog.layouts import read_layout
    from dali_diffusemix.generate.config import PromptFile
    from dali_diffusemix.generate.engines.local import default_devices
    from dali_diffusemix.generate.estimate import estimate
    from dali_diffusemix.generate.run import generate, list_originals
    from dali_diffusemix.store import WHOLE, Part, check_order

    display = Display(as_json)
    check_order(root, store)
    in_file = {} if config is None else read_options(config)
    options = GenerateOptions(**{**in_file, **{name: value for name, value in given.items() if value is not None}})
    written = PromptFile.parse({name: in_file[name] for name in _PROMPTS if name in in_file}, config or "")
    of_file: dict[str, Any] = {
        name: getattr(written, name) for name in _PROMPTS if name in in_file and name != "template"
    }
    edits = _config_of(options, of_file, store)
    editor = edits.editor_config
    engine = _engine_of(options, editor.accelerated, remote=getattr(editor, "remote", False))
    if options.layout is not None:
        root, catalog = read_layout(options.layout, root, options.split or "train")
    elif options.split is not None:
        raise ConfigError(f"split must be left out without a layout, found {options.split!r}; set layout too.")
    else:
        with display.progress("Reading headers", "images") as progress:
            catalog = list_originals(root, progress=progress)
    part = WHOLE if options.part is None else Part.parse(options.part)
    again = cast("Sequence[Redoable]", redo)
    if dry_run:
        devices = getattr(engine, "devices", ()) or default_devices(edits.editor_config.accelerated)
        with display.progress("Making edits for the estimate", "edits"):  # of which the number is not known
            found = estimate(root, store, edits, catalog=catalog, devices=devices, part=part, redo=again)
        _show_estimate(display, found, len(devices))
        return
    with display.progress("Making edits", "edits") as progress:
        summary = generate(
            root,
            store,
            edits,
            catalog=catalog,
            engine=engine,
            part=part,
            redo=again,
            progress=progress,
            rejects=display.rejects,
        )
    if catalog.rejected:
        display.line(f"{len(catalog.rejected)} files left out; `dali-diffusemix index` lists them")
    for verdict, count in summary.verdicts.items():
        if verdict == "accepted":
            display.line(f"{count} edits of {len(catalog)} images")
            if summary.used < count:
                display.line(f"{summary.used} of them are used; the others were rejected by hand, or denied since")
        elif count:
            display.line(f"{count} not used: {verdict}")
    if editor.settings()["editor"] == "procedural":
        display.line("restyled by the procedural editor: not diffusion")
    rejected = {prompt: _rejected(verdicts) for prompt, verdicts in summary.by_prompt.items()}
    display.lines(f"{count:>8}  rejected under {prompt!r}" for prompt, count in rejected.items() if count)
    if summary.made:
        rate = readable_rate(summary.made, summary.seconds, "edits")
        display.line(f"{summary.made} made now, in {summary.seconds:.1f} s" + (rate and f": {rate}"))
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
            "used": summary.used,
            "missing_shards": summary.missing,
            "seconds": summary.seconds,
            "images_per_second": summary.images_per_second,
        }
    )


def _show_estimate(display: Display, found: "Estimate", workers: int) -> None:
    display.line(f"{found.edits} edits would be made")
    if found.tried:
        display.line(
            f"about {decimal(found.bytes)} and {readable_seconds(found.seconds)} on {workers} "
            f"worker{'s' * (workers > 1)}, from {found.tried} edits made for the estimate"
        )
    display.result(
        {
            "edits": found.edits,
            "bytes": found.bytes if found.tried else None,
            "seconds": found.seconds if found.tried else None,
            "tried": found.tried,
            "workers": workers,
        }
    )


def _rejected(verdicts: Mapping[str, int]) -> int:
    from dali_diffusemix.store import REJECTIONS

    return sum(verdicts.get(name, 0) for name in REJECTIONS)


def _config_of(options: GenerateOptions, written: Mapping[str, Any], store: Path) -> "GenerateConfig":
    """Return the edits to make, with a store's own options where none are given.

    Args:
        options: Those of the command line and of the file.
        written: The prompts and classes of the file, fields of `PromptFile`; the command line may replace the prompts.
        store: The edit store's folder, which need not exist.
    """
    from dali_diffusemix.generate.config import GenerateConfig
    from dali_diffusemix.generate.editors import PROMPTS
    from dali_diffusemix.generate.editors.choice import choose_editor, editor_of_store
    from dali_diffusemix.store.layout import Header

    making = {**written, **_given(options, _EDITS)}
    if options.prompts is not None:
        making["prompts"] = tuple(options.prompts)
    of_editor = _given(options, _EDITOR)
    header = Header.find(store)
    if options.prompts is not None and written.get("deny") is not None:
        # What the file denies waits until its prompt is asked for; a prompt that nothing knows is refused.
        known = {*making["prompts"], *chain.from_iterable(making.get("class_prompts", {}).values())}
        known |= set() if header is None else set(header.prompts)
        later = set(written.get("prompts", PROMPTS)) - known
        denied = {name: [prompt for prompt in of if prompt not in later] for name, of in written["deny"].items()}
        making["deny"] = {name: of for name, of in denied.items() if of}
    if header is not None:
        editor = editor_of_store(header.settings, options.editor, of_editor)
        return GenerateConfig.from_store(store, editor=editor, **making)
    editor = choose_editor(options.editor or "procedural", of_editor)
    if (own := getattr(editor, "prompts", None)) is not None:  # an editor of one's own that states them
        making.setdefault("prompts", own)
    return GenerateConfig(editor=editor, **making)


def _engine_of(options: GenerateOptions, accelerated: bool, *, remote: bool = False) -> "Engine":
    """Return the engine that runs the work; the default is one worker if the work is done elsewhere."""
    from dali_diffusemix.generate.engines.local import LocalEngine, default_devices
    from dali_diffusemix.generate.engines.ray import RayEngine

    if options.engine not in (None, "local", "ray"):
        raise ConfigError(f"engine must be 'local' or 'ray', found {options.engine!r}.")
    if options.workers is not None and options.workers < 1:
        raise ConfigError(f"workers must be 1 or more, found {options.workers}.")
    if options.engine == "ray":
        if options.device is not None:
            raise ConfigError(
                f"device must be left out with engine 'ray', found {options.device!r}; Ray places workers by num_gpus."
            )
        return RayEngine(
            address=options.address, workers=options.workers, num_gpus=options.num_gpus if accelerated else 0
        )
    for name, value in _given(options, ("address", "num_gpus")).items():
        raise ConfigError(f"{name} must be left out with engine 'local', found {value!r}; set engine = \"ray\".")
    devices = default_devices(accelerated) if options.device is None else (options.device,)
    devices = devices[:1] if remote else devices
    return LocalEngine([devices[worker % len(devices)] for worker in range(options.workers or len(devices))])


def _given(options: GenerateOptions, names: Iterable[str]) -> dict[str, Any]:
    return {name: value for name in names if (value := getattr(options, name)) is not None}
