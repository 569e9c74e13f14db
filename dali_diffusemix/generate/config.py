"""The edits to make: editor, prompts, sizes, variants, quality."""

import math
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Literal

from dali_diffusemix.base.words import did_you_mean
from dali_diffusemix.errors import ConfigError
from dali_diffusemix.generate import quality
from dali_diffusemix.generate.editors import PROMPTS, EditorConfig, check_words
from dali_diffusemix.generate.editors.choice import choose_editor, editor_of_store
from dali_diffusemix.images.codec import RESTARTS, STORED, Stored
from dali_diffusemix.store import Wish
from dali_diffusemix.store.layout import Header

# Default originals per shard: a model makes their edits in some minutes, the procedural editor in about one.
_ORIGINALS_BY_MODEL, _ORIGINALS = 64, 512
_QUALITY = 90
_FORMAT = {"format", "quality"}  # fields that decide the format together
_SMALL = 64  # pixels: edits up to this side are stored without loss by default


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """The edits to make: editor, prompts, sizes, quality.

    More than ten fields, because each of them decides the bytes of the store, and the store records them.

    Raises ConfigError if a field breaks its rule.
    """

    editor: str | EditorConfig = "procedural"  # or a name for `choose_editor`
    prompts: tuple[str, ...] = PROMPTS  # of all classes, without the template
    class_prompts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # class, or pattern, to its own prompts
    deny: Mapping[str, tuple[str, ...]] | None = None  # class, or pattern, to prompts not for it; None: as in the store
    class_names: Mapping[str, str] = field(default_factory=dict)  # class to what {class} stands for; see `class_name`
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
        object.__setattr__(self, "prompts", _checked_prompts("prompts", self.prompts))
        for name in ("class_prompts", "deny"):
            if (given := getattr(self, name)) is not None:
                checked = {pattern: _checked_prompts(name, of_class) for pattern, of_class in given.items()}
                object.__setattr__(self, name, checked)
        for name, (least, most) in self._LIMITS.items():
            value = getattr(self, name)
            if name in ("edit_size", "originals_per_shard", "quality") and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise ConfigError(f"{name} must be a whole number from {least} to {most}, found {value!r}.")
        for prompt in self.all_prompts:
            check_words("prompts", prompt, known=("class",))
        if not self.all_prompts:
            raise ConfigError("prompts must be one or more, found none, and no class_prompts either.")
        for pattern, of_class in self.class_prompts.items():
            if both := sorted(set(of_class) & set(self.prompts)):
                raise ConfigError(
                    f"class_prompts: {pattern!r} must have prompts of its own, found {both[0]!r}, which all classes "
                    "have; remove it from one of the two."
                )
        if self.format is not None and self.format not in STORED:
            raise ConfigError(
                f"format must be one of {', '.join(STORED)}, found {self.format!r}{did_you_mean(self.format, STORED)}"
            )
        if self.format in ("png", "raw") and self.quality is not None:
            raise ConfigError(f"quality is that of JPEGs: leave it out beside format={self.format!r}.")
        if self.resize not in ("squash", "keep"):
            end = did_you_mean(self.resize, ("squash", "keep"))
            raise ConfigError(f"resize must be 'squash' or 'keep', found {self.resize!r}{end}")
        if isinstance(self.editor, str):
            object.__setattr__(self, "editor", choose_editor(self.editor))
        if self._side % self.editor_config.multiple:
            raise ConfigError(
                f"edit_size must be divisible by {self.editor_config.multiple} for this editor, found {self._side}; "
                "an edit can be stored at any other size."
            )

    @classmethod
    def from_store(cls, store: str | os.PathLike[str], **given: Any) -> "GenerateConfig":
        """The config that a store was made with, except for the fields given.

        Args:
            store: The edit store's folder.
            **given: Fields.

        Raises:
            StoreError: There is no edit store.
            ConfigError: The store does not know its editor, which is a model in a folder or a server; or a field breaks
                its rule.
        """
        header = Header.read(Path(store))
        settings: Mapping[str, Any] = header.settings
        if not isinstance(given.get("editor"), EditorConfig):
            given["editor"] = editor_of_store(settings, given.get("editor"))
        only = {prompt: rule.only for prompt, rule in header.rules.items() if rule.only is not None}
        of_some = set(chain.from_iterable(given.get("class_prompts", {}).values()))  # from now on
        stored: dict[str, Any] = {
            name: settings[name]
            for name in ("size", "edit_size", "seed", "retry", "format", "quality")
            if settings.get(name) is not None and not (name in _FORMAT and _FORMAT & given.keys())
        }
        if stored.get("edit_size") == stored.get("size"):  # which a size that is given changes too
            stored.pop("edit_size", None)
        limits = quality.Thresholds().settings()
        stored |= {
            "resize": "keep" if str(settings.get("resize")).endswith("kept") else "squash",
            # Stores of other versions may lack settings: the writer then says which.
            "thresholds": quality.Thresholds(
                **{name: settings.get(f"threshold {name}", value) for name, value in limits.items()}
            ),
            "prompts": tuple(prompt for prompt in header.prompts if prompt not in only and prompt not in of_some),
            "class_prompts": _turned(
                {prompt: of for prompt, of in only.items() if prompt not in given.get("prompts", ())}
            ),
            "variants": header.variants(Path(store)),
        }
        return cls(**{**stored, **given})

    @property
    def all_prompts(self) -> tuple[str, ...]:
        """The prompts of all classes, then those of some."""
        return tuple(dict.fromkeys((*self.prompts, *chain.from_iterable(self.class_prompts.values()))))

    def wish(self, classes: Sequence[str], stored: Mapping[str, str]) -> Wish:
        """The edits that a store of originals of these classes is to have; `stored` are its class names so far."""
        prompts: dict[str, tuple[str, ...] | None] = dict.fromkeys(self.prompts)
        prompts.update(_turned(self.class_prompts))
        template = getattr(self.editor_config, "template", None) or ""
        names = {}
        if any("{class}" in text for text in (template, *self.all_prompts)):
            names = {name: self.class_names.get(name) or stored.get(name) or class_name(name) for name in classes}
        return Wish(
            prompts=prompts,
            variants=self.variants,
            originals_per_shard=self.shard_length,
            deny=None if self.deny is None else _turned(self.deny),
            class_names=names,
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


def class_name(folder: str) -> str:
    """The words that `{class}` stands for, unless they are given: a class's folder without its number."""
    return re.sub(r"^\d+[\s._-]+", "", folder).replace("_", " ").strip() or folder


def _turned(table: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Prompt to patterns of classes, from pattern to prompts; or the other way round."""
    found: dict[str, tuple[str, ...]] = {}
    for name, values in table.items():
        for value in values:
            found[value] = (*found.get(value, ()), name)
    return found


def _checked_prompts(name: str, given: Sequence[str]) -> tuple[str, ...]:
    if isinstance(given, str) or not all(isinstance(prompt, str) and prompt for prompt in given):
        raise ConfigError(f"{name} must be lists of prompts, found {given!r}.")
    if len(set(given)) != len(given):
        raise ConfigError(f"{name} must be all different, found {list(given)}.")
    return tuple(given)


@dataclass(frozen=True, kw_only=True)
class PromptFile:
    """Prompts from a TOML file:

    template = "A transformed version of image into {prompt}"   # may be left out; {class} stands for the class
    prompts = ["autumn", "snowy", "sunset"]                     # of all classes

    [class_prompts]                      # class, or a pattern of classes, to prompts of its own
    "tulips" = ["a {class} in a vase"]

    [deny]                               # class, or a pattern of classes, to prompts that would change its label
    "yellow *" = ["autumn", "sunset"]

    [class_names]                        # class to what {class} stands for, if the folder's name does not say it
    n11939491 = "daisy"
    """

    prompts: tuple[str, ...]
    class_prompts: Mapping[str, tuple[str, ...]]
    deny: Mapping[str, tuple[str, ...]] | None
    class_names: Mapping[str, str]
    template: str | None

    KEYS: ClassVar = ("prompts", "template", "class_prompts", "deny", "class_names")

    @classmethod
    def read(cls, file: str | os.PathLike[str]) -> "PromptFile":
        """Read one. Raises ConfigError."""
        try:
            content = tomllib.loads(Path(file).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"prompts: {str(file)!r} must be a TOML file, found: {error}.") from error
        if unknown := sorted(set(content) - set(cls.KEYS)):
            raise ConfigError(f"prompts: {str(file)!r} may have {', '.join(cls.KEYS)}, found {unknown[0]!r}.")
        return cls.parse(content, file)

    @classmethod
    def parse(cls, content: Mapping[str, object], file: str | os.PathLike[str]) -> "PromptFile":
        """Take these keys of a file that was read. Raises ConfigError."""
        template = content.get("template")
        if not (template is None or isinstance(template, str)):
            raise ConfigError(f"prompts: {str(file)!r}: template must be a string, found {template!r}.")
        names = content.get("class_names", {})
        if not isinstance(names, dict) or not all(isinstance(words, str) and words for words in names.values()):
            raise ConfigError(f"prompts: {str(file)!r}: [class_names] must be a table of strings, found {names!r}.")
        prompts = _strings(file, "prompts", content.get("prompts", list(PROMPTS)))
        class_prompts = _table(file, "class_prompts", content.get("class_prompts", {}))
        deny = _table(file, "deny", content["deny"]) if "deny" in content else None
        return cls(
            prompts=prompts,
            class_prompts=class_prompts,
            deny=deny,
            class_names={str(name): words for name, words in names.items()},
            template=template,
        )


def _table(file: str | os.PathLike[str], name: str, value: object) -> dict[str, tuple[str, ...]]:
    if not isinstance(value, dict):
        raise ConfigError(f"prompts: {str(file)!r}: [{name}] must be a table, found {value!r}.")
    return {str(pattern): _strings(file, f"{name} {pattern!r}", prompts) for pattern, prompts in value.items()}


def _strings(file: str | os.PathLike[str], name: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(one, str) and one for one in value):
        raise ConfigError(f"prompts: {str(file)!r}: {name} must be a list of strings, found {value!r}.")
    return tuple(value)
