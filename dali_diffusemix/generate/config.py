"""The edits to make: editor, prompts, sizes, variants, quality."""

import math
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from dali_diffusemix.errors import ConfigError
from dali_diffusemix.generate import quality
from dali_diffusemix.generate.editors import PROMPTS, EditorConfig
from dali_diffusemix.generate.editors.diffusers import DiffusersConfig
from dali_diffusemix.generate.editors.procedural import ProceduralConfig
from dali_diffusemix.images.codec import RESTARTS, STORED, Stored

# Default originals per shard: a model makes their edits in some minutes, the procedural editor in about one.
_ORIGINALS_BY_MODEL, _ORIGINALS = 64, 512
_QUALITY = 90
_SMALL = 64  # pixels: edits up to this side are stored without loss by default


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """The edits to make: editor, prompts, sizes, quality.

    More than ten fields, because each of them decides the bytes of the store, and the store records them.

    Raises ConfigError if a field breaks its rule.
    """

    editor: str | EditorConfig = "procedural"  # or a model for `DiffusersConfig`: hub id or local folder
    prompts: tuple[str, ...] = PROMPTS  # without the template
    denied: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # prompt to patterns of denied classes
    size: int = 256  # side of a stored edit in pixels; with resize="keep" the square root of its pixel count
    edit_size: int | None = None  # the same for the image given to the editor; None: as stored
    resize: Literal["squash", "keep"] = "squash"  # to a square, as in the released code; or keep the aspect ratio
    variants: int = 1  # edits per original and prompt, from different seeds
    seed: int = 0
    retry: int = 0  # more attempts, each from another seed, at an edit that quality rejects
    thresholds: quality.Thresholds = field(default_factory=quality.Thresholds)
    format: Stored | None = None  # of stored edits; None: raw up to size 64, else jpeg (also if quality is given)
    quality: int | None = None  # of JPEGs; None is 90
    batch_size: int = 16  # edits per call of the editor
    originals_per_shard: int | None = None  # None: 64 for a model, 512 for the procedural editor

    _LIMITS: ClassVar[Mapping[str, tuple[int, int]]] = {
        "size": (1, 4096),
        "edit_size": (1, 4096),
        "variants": (1, 32768),
        "seed": (0, 2**32 - 1),
        "retry": (0, 100),
        "quality": (1, 100),
        "batch_size": (1, 2**20),
        "originals_per_shard": (1, 2**20),
    }

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", tuple(self.prompts))
        denied = {prompt: tuple(patterns) for prompt, patterns in self.denied.items() if patterns}
        object.__setattr__(self, "denied", denied)
        for name, (least, most) in self._LIMITS.items():
            value = getattr(self, name)
            if name in ("edit_size", "originals_per_shard", "quality") and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise ConfigError(f"{name} must be a whole number from {least} to {most}, found {value!r}.")
        if not self.prompts or len(set(self.prompts)) != len(self.prompts):
            raise ConfigError(f"prompts must be one or more, all different, found {list(self.prompts)}.")
        if self.format is not None and self.format not in STORED:
            raise ConfigError(f"format must be one of {', '.join(STORED)}, found {self.format!r}.")
        if self.format in ("png", "raw") and self.quality is not None:
            raise ConfigError(f"quality is that of JPEGs: leave it out beside format={self.format!r}.")
        if self.resize not in ("squash", "keep"):
            raise ConfigError(f"resize must be 'squash' or 'keep', found {self.resize!r}.")
        if unknown := sorted(set(denied) - set(self.prompts)):
            raise ConfigError(f"denied must name prompts of this run, found {unknown[0]!r}; these are {self.prompts}.")
        if isinstance(self.editor, str):
            editor = ProceduralConfig() if self.editor == "procedural" else DiffusersConfig(model=self.editor)
            object.__setattr__(self, "editor", editor)
        if self._side % self.editor_config.multiple:
            raise ConfigError(
                f"edit_size must be divisible by {self.editor_config.multiple} for this editor, found {self._side}; "
                "an edit can be stored at any other size."
            )

    @property
    def editor_config(self) -> EditorConfig:
        """The editor's config, also if `editor` was given as a name."""
        assert not isinstance(self.editor, str)
        return self.editor

    @property
    def shard_length(self) -> int:
        """Originals per shard."""
        if self.originals_per_shard is not None:
            return self.originals_per_shard
        editor = self.editor_config
        return _ORIGINALS_BY_MODEL if editor.accelerated or getattr(editor, "remote", False) else _ORIGINALS

    @property
    def stored_format(self) -> str:
        """The format of stored edits."""
        # Of small images JPEG loses what can be seen, and decoding them is most of the time of loading.
        return self.format or ("raw" if self.size <= _SMALL and self.quality is None else "jpeg")

    @property
    def jpeg_quality(self) -> int:
        """That of stored JPEGs."""
        return _QUALITY if self.quality is None else self.quality

    @property
    def _side(self) -> int:
        return self.size if self.edit_size is None else self.edit_size

    @property
    def scale(self) -> float:
        """The factor from the side that an edit is made with to the side that it is stored with."""
        return self.size / self._side

    def settings(self) -> dict[str, str | int | float | bool | None]:
        """The settings that an edit store records: all that decides an edit besides original, prompt and variant."""
        stored: dict[str, str | int] = {"format": self.stored_format}
        if self.stored_format == "jpeg":  # as stores say it that were made before there were others
            stored = {"quality": self.jpeg_quality, "subsampling": "4:2:0", "restarts": RESTARTS}
        return {
            **self.editor_config.settings(),
            "size": self.size,
            "edit_size": self._side,
            "resize": f"bicubic, aspect ratio {'squashed' if self.resize == 'squash' else 'kept'}",
            **stored,
            "seed": self.seed,
            "retry": self.retry,
            **{f"threshold {name}": value for name, value in self.thresholds.settings().items()},
        }

    def shape(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the image given to the editor, for an original of this size."""
        if self.resize == "squash":
            return self._side, self._side
        # The same number of pixels for every shape, so that no panorama is too large for the editor.
        step, ratio = self.editor_config.multiple, math.sqrt(height / width)
        return tuple(max(1, round(side / step)) * step for side in (self._side * ratio, self._side / ratio))  # type: ignore[return-value]


@dataclass(frozen=True, kw_only=True)
class PromptFile:
    """Prompts from a TOML file:

    template = "A transformed version of image into {prompt}"   # may be left out
    prompts = ["autumn", "snowy", "sunset"]

    [deny]                               # class, or a pattern of classes, to prompts that would change its label
    "yellow *" = ["autumn", "sunset"]
    """

    prompts: tuple[str, ...]
    denied: Mapping[str, tuple[str, ...]]  # prompt to patterns of classes that it is not applied to
    template: str | None

    @classmethod
    def read(cls, file: str | os.PathLike[str]) -> "PromptFile":
        """Read one. Raises ConfigError."""
        try:
            content = tomllib.loads(Path(file).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"prompts: {str(file)!r} must be a TOML file, found: {error}.") from error
        if unknown := sorted(set(content) - {"prompts", "template", "deny"}):
            raise ConfigError(f"prompts: {str(file)!r} may have prompts, template and [deny], found {unknown[0]!r}.")
        return cls.parse(content, file)

    @classmethod
    def parse(cls, content: Mapping[str, object], file: str | os.PathLike[str]) -> "PromptFile":
        """Take these three keys of a file that was read. Raises ConfigError."""
        template, deny = content.get("template"), content.get("deny", {})
        if not (template is None or isinstance(template, str)) or not isinstance(deny, dict):
            raise ConfigError(f"prompts: {str(file)!r}: template must be a string and [deny] a table.")
        prompts = _strings(file, "prompts", content.get("prompts", list(PROMPTS)))
        denied: dict[str, tuple[str, ...]] = {}
        for pattern, names in deny.items():
            for prompt in _strings(file, f"deny {pattern!r}", names):
                if prompt not in prompts:
                    raise ConfigError(
                        f"prompts: {str(file)!r} denies {prompt!r} to {pattern!r}, but its prompts are {list(prompts)}."
                    )
                denied[prompt] = (*denied.get(prompt, ()), pattern)
        return cls(prompts=prompts, denied=denied, template=template)


def _strings(file: str | os.PathLike[str], name: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(one, str) and one for one in value):
        raise ConfigError(f"prompts: {str(file)!r}: {name} must be a list of strings, found {value!r}.")
    return tuple(value)
