"""All options of `generate`: their names, types and meanings, and the TOML file that sets them.

Some of them are options of the command line too, which wins over the file. Nothing heavy is imported here, because
`--help` shows these texts.
"""

import json
import textwrap
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Any, Final, get_args

import click

from dali_diffusemix.base.words import did_you_mean
from dali_diffusemix.errors import ConfigError

__all__ = ["GenerateOptions", "command_line_option", "read_options", "template"]


def _option(text: str, example: Any, default: str | None = "") -> Any:
    """An option that is unset unless it is given.

    Args:
        text: Its meaning: a sentence.
        example: Its value in the template.
        default: What an unset one means: the example if empty; None if `text` says it.
    """
    if default == "":
        default = example if isinstance(example, str) else json.dumps(example)
    return field(default=None, metadata={"text": text, "example": example, "default": default})


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """The options that were given; None: not given."""

    editor: str | None = _option(
        "Editor: procedural, a model (hub id or folder), a server (URL), or your own module:Class.",
        "procedural",
    )
    prompts: tuple[str, ...] | None = _option("Prompts to edit with.", ["autumn", "snowy"], "the paper's nine")
    size: int | None = _option("Side length of an edit in pixels.", 256)
    edit_size: int | None = _option("Side length while editing, if the model needs another one.", 256, "the same")
    resize: str | None = _option("Shape of edits: squash (to a square) or keep (the aspect ratio).", "squash")
    variants: int | None = _option("Number of edits per image and prompt.", 1)
    seed: int | None = _option("The same seed gives the same edits.", 0)
    retry: int | None = _option("Attempts to replace a rejected edit.", 0)
    format: str | None = _option("File format: jpeg, png or raw.", "jpeg", "raw up to size 64, jpeg above")
    quality: int | None = _option("JPEG quality, from 1 to 100.", 90, "90; if it is given, format is jpeg")
    batch_size: int | None = _option("Edits in one call of a model.", 16)
    originals_per_shard: int | None = _option(
        "Number of originals in a shard; a killed run loses at most one shard per worker.", 64, "512, with a model 64"
    )

    template: str | None = _option(
        "Text that the model is given, with {prompt} and perhaps {class}.",
        "A transformed version of image into {prompt}",
        "by the model's class; InstructPix2Pix this",
    )
    negative_prompt: str | None = _option("Text that edits are moved away from.", "blurry", None)
    strength: float | None = _option("Share of the diffusion steps to run, from 0 to 1.", 0.6, "by the model's class")
    revision: str | None = _option(
        "Branch, tag or commit of a model on the hub; for a server's model it is only noted.",
        "main",
        "the hub's default",
    )
    scheduler: str | None = _option(
        "Scheduler: euler-ancestral, euler, dpm-solver++, unipc, ddim, lcm, lightning, default.",
        "dpm-solver++",
        "by the model's class; InstructPix2Pix the first",
    )
    steps: int | None = _option(
        "Number of diffusion steps; for dpm-solver++ 20 are enough.", 20, "by the model's class; InstructPix2Pix 100"
    )
    guidance: float | None = _option("Guidance scale of the prompt.", 4.0, "by the model's class; InstructPix2Pix 4.0")
    image_guidance: float | None = _option(
        "Guidance scale of the image.", 1.5, "by the model's class; InstructPix2Pix 1.5"
    )
    dtype: str | None = _option(
        "Number type of the model: float16, bfloat16 or float32; not float16 on a CPU.",
        "bfloat16",
        "by the model's class; InstructPix2Pix float16",
    )
    lora: str | None = _option(
        "LoRA, as NAME[:FILE][@SCALE], where NAME is a file, folder or hub id.", "owner/name:file.safetensors@0.8", None
    )
    quantize: str | None = _option(
        "Weights of fewer bits: torchao-int8, torchao-float8, bnb-8bit or bnb-4bit.", "torchao-int8", None
    )
    cache: float | None = _option(
        "First Block Cache: skip the other blocks where the first one changes less than this.", 0.1, None
    )
    compile: bool | None = _option("Compile the model: it takes minutes to start, and is faster afterwards.", False)

    model: str | None = _option("Name of the model that a server is asked for.", "Qwen/Qwen-Image-Edit-2511", None)
    fields: Mapping[str, Any] | None = _option("Further fields of the server's form.", {"true_cfg_scale": 4.0}, None)
    requests: int | None = _option("Number of requests to the server at once, per worker.", 8)
    patience: float | None = _option("Seconds to wait for a server that is away or busy.", 600.0)

    engine: str | None = _option("Where workers run: local (this machine) or ray (a cluster).", "local")
    device: str | None = _option("Device: cpu, cuda or cuda:N.", "cuda:0", "all GPUs, else all cores")
    workers: int | None = _option("Number of worker processes.", 4, "one per device")
    address: str | None = _option("Address of the Ray cluster.", "HOST:6379", "Ray on this machine")
    num_gpus: float | None = _option("Number of GPUs per Ray worker.", 1.0, "1 if the cluster has any")
    part: str | None = _option("Make only part I of N, as one of N machines.", "1/4", None)

    layout: str | None = _option("Published dataset that ROOT holds, such as cub.", "cub", None)
    split: str | None = _option("Split of the layout, or several as A+B.", "train")

    editor_options: Mapping[str, Any] | None = _option("Arguments of the constructor of your own editor.", {}, None)
    class_prompts: Mapping[str, Any] | None = _option(
        "Classes, or patterns of classes, and prompts that only they have.", {}, None
    )
    deny: Mapping[str, Any] | None = _option(
        "Classes, or patterns of classes, and the prompts that would change their label.", {}, None
    )
    class_names: Mapping[str, Any] | None = _option(
        "Classes and the words that {class} stands for, if their folders' names are not these words.", {}, None
    )


_SECTIONS: Final = {  # by the first option in them
    "editor": "Edits",
    "template": "The diffusion model",
    "model": "The server",
    "engine": "Where to run",
    "layout": "Originals",
    "editor_options": "Your own editor",
    "class_prompts": "Classes",
}
_TABLES: Final[Mapping[str, str]] = {  # at the end, since what follows the name of a table belongs to it
    "editor_options": "strength = 0.8",
    "class_prompts": '"tulips" = ["a {class} in a vase"]',
    "deny": '"yellow *" = ["autumn", "sunset"]',
    "class_names": 'n11939491 = "daisy"',
}
_OPTIONS: Final[Mapping[str, Field[Any]]] = {one.name: one for one in fields(GenerateOptions)}
_RULES: Final[Mapping[type, str]] = {
    str: "a string",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
}


def _type_of(option: Field[Any]) -> Any:
    """The type of its values; a generic alias for lists and tables."""
    (kind,) = (one for one in get_args(option.type) if one is not NoneType)
    return kind


def command_line_option(name: str, metavar: str, **more: Any) -> Callable[..., Any]:
    """Return the decorator that gives a command one of these options."""
    option = _OPTIONS[name]
    kind, default = _type_of(option), option.metadata["default"]
    return click.option(
        f"--{name.replace('_', '-')}",
        type=kind if kind in _RULES else str,
        metavar=metavar,
        help=option.metadata["text"] + (f"  [default: {default}]" if default else ""),
        **more,
    )


def read_options(file: Path) -> dict[str, Any]:
    """Read an options file; returns the options that it sets. The prompts in it are checked by `PromptFile`.

    Raises:
        ConfigError: It is not a TOML file, or has an unknown key or a value of the wrong type.
    """
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(
            f"config must be a TOML file, found {str(file)!r}: {error}; `dali-diffusemix generate --print-config` "
            "prints one."
        ) from error
    for name, value in content.items():
        if name not in _OPTIONS:
            end = did_you_mean(name, _OPTIONS)
            known = f"; these are {', '.join(_OPTIONS)}" if end == "." else ""
            raise ConfigError(f"config must have known keys, found {name!r} in {str(file)!r}{known}{end}")
        kind = _type_of(_OPTIONS[name])
        allowed = (int, float) if kind is float else kind
        if kind in _RULES and (not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool)):
            raise ConfigError(f"{name} must be {_RULES[kind]}, found {value!r} in {str(file)!r}; correct it there.")
    return content


def template() -> str:
    """Return an options file with every option commented out, with its meaning and default."""
    return "\n".join(_template_lines()) + "\n"


def _template_lines() -> Iterator[str]:
    yield "# Options of `dali-diffusemix generate ROOT STORE --config FILE`."
    yield "# Remove the # before a line to set an option; the command line wins over this file."
    for name, option in _OPTIONS.items():
        if name in _SECTIONS:
            yield f"\n# {_SECTIONS[name]} {'-' * (60 - len(_SECTIONS[name]))}"
        default = option.metadata["default"]
        text = option.metadata["text"] + (f" Default: {default}." if default else "")
        yield "\n" + textwrap.fill(text, 118, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)
        if name in _TABLES:
            yield f"#[{name}]\n#{_TABLES[name]}"
        else:
            yield f"#{name} = {_toml(option.metadata['example'])}"


def _toml(value: Any) -> str:
    """A value as TOML writes it; tables in one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {_toml(one)}" for name, one in value.items()) + "}"
    return json.dumps(value)
