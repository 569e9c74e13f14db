"""A recipe: everything that decides a training run, except the paths of its files. Read from TOML, checked, compared.

Sections are the dataclasses below; fields that a file omits have the defaults given here.
"""

import dataclasses
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from dali_diffusemix import (
    AutoAugment,
    EvalCrop,
    MixSpec,
    RandAugment,
    RandomCrop,
    RandomErasing,
    Schedule,
    TimmRandAugment,
    TrainCrop,
    TrivialAugmentWide,
)
from dali_diffusemix.base.words import did_you_mean
from dali_diffusemix.catalog import LAYOUTS
from dali_diffusemix.errors import ConfigError
from dali_diffusemix.generate.editors import PROMPTS

AUGMENTATIONS: dict[str, Any] = {  # of each sample, by the dataset
    "randaugment": RandAugment(),
    "trivialaugment": TrivialAugmentWide(),
    "autoaugment": AutoAugment(),
    "threeaugment": "ThreeAugment",
    "randomerasing": RandomErasing(0.25),
}
MIXERS = ("cutmix", "mixup")  # of batches
STEP = 32  # pixels by which progressive resizing grows


def rule(holds: bool, name: str, must: str, found: object) -> None:
    if not holds:
        raise ConfigError(f"{name} must be {must}, found {found!r}.")


@dataclass(frozen=True, kw_only=True)
class Data:
    """The images."""

    layout: str
    train: str = "train"  # the layout's split
    test: str = "test"  # the layout's split for testing
    test_share: float = 0.0  # or, if the layout has none, this share of the training images
    held_out: float = 0.0  # share of the training images for validation; 0 validates on the test images
    per_class: int | None = None  # number of training images per class
    split_seed: int = 0  # of the three above
    on_error: str = "substitute"  # for images that cannot be read; or "raise"

    def __post_init__(self) -> None:
        rule(self.layout in LAYOUTS, "data.layout", f"one of {', '.join(LAYOUTS)}", self.layout)
        for name in ("test_share", "held_out"):
            rule(0 <= getattr(self, name) < 1, f"data.{name}", "a share from 0 to below 1", getattr(self, name))
        for name in (self.train,) if self.test_share else (self.train, self.test):
            unknown = set(name.split("+")) - set(LAYOUTS[self.layout])
            rule(not unknown, "data.train and data.test", f"of {', '.join(LAYOUTS[self.layout])}", name)
        rule(self.per_class is None or self.per_class > 0, "data.per_class", "at least 1", self.per_class)


@dataclass(frozen=True, kw_only=True)
class Edits:
    """The edits to make if there are none; see `dali-diffusemix generate`."""

    editor: str = "timbrooks/instruct-pix2pix"
    prompts: tuple[str, ...] = PROMPTS
    size: int = 256  # pixels per side, as stored
    edit_size: int | None = None  # as the editor works on them
    resize: str = "squash"
    variants: int = 1
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Fractals:
    """The fractal bank to render if there is none."""

    count: int = 64
    size: int = 256
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Mix:
    """The mix: a preset and its changes."""

    preset: str = "paper"  # "paper", "release", "edits" (originals and whole edits, unmixed) or "none"
    masks: tuple[str, ...] | None = None
    seam_width: float | None = None
    fractal_weight: float | None = None
    order: str | None = None
    epoch: str | None = None
    probability: float | None = None

    def __post_init__(self) -> None:
        rule(
            self.preset in ("paper", "release", "edits", "none"),
            "mix.preset",
            "paper, release, edits or none",
            self.preset,
        )
        self.spec()

    def spec(self) -> MixSpec | None:
        """Return the mix, or None to train on plain images."""
        changes = {
            name: value for name, value in dataclasses.asdict(self).items() if name != "preset" and value is not None
        }
        if self.preset in ("edits", "none"):
            rule(not changes, "mix", f"the preset alone with preset = {self.preset!r}", changes)
            return None
        return dataclasses.replace(getattr(MixSpec, self.preset)(), **changes)


@dataclass(frozen=True, kw_only=True)
class Crop:
    """The crops for training and for evaluation."""

    size: int
    train: str = "TrainCrop"
    resize: int | None = None  # of RandomCrop: shorter side before the crop
    padding: int = 0  # of RandomCrop
    from_size: int | None = None  # of TrainCrop, for progressive resizing: the size of the first epochs
    ramp: tuple[int, ...] | None = None  # the size grows to `size` from the first of these two epochs to the second
    eval_resize: int | None = None  # of EvalCrop

    def __post_init__(self) -> None:
        rule(self.train in ("TrainCrop", "RandomCrop"), "crop.train", "TrainCrop or RandomCrop", self.train)
        if self.train == "TrainCrop":
            rule(self.resize is None and not self.padding, "crop.resize and padding", "RandomCrop's alone", self.train)
        progressive = (self.from_size, self.ramp)
        rule((self.from_size is None) == (self.ramp is None), "crop.from_size and ramp", "given together", progressive)
        if self.from_size is not None and self.ramp is not None:
            rule(self.train == "TrainCrop", "crop.from_size and ramp", "TrainCrop's alone", self.train)
            sizes = (self.from_size, self.size)
            rule(0 < sizes[0] < sizes[1], "crop.from_size and size", "growing", sizes)
            rule(sizes[0] % STEP == sizes[1] % STEP == 0, "crop.from_size and size", f"multiples of {STEP}", sizes)
            rule(
                len(self.ramp) == 2 and 0 <= self.ramp[0] < self.ramp[1], "crop.ramp", "[first, last epoch]", self.ramp
            )
        self.training(), self.evaluation()

    def training(self) -> TrainCrop | RandomCrop | Schedule[TrainCrop]:
        if self.train == "RandomCrop":
            return RandomCrop(self.size, resize=self.resize, padding=self.padding)
        if self.from_size is None or self.ramp is None:
            return TrainCrop(self.size)
        # Linear in the epoch, to the nearest multiple of 32: the law of FFCV's ImageNet recipe.
        (first, last), grown = self.ramp, self.size - self.from_size
        sizes = {
            epoch: STEP * round((self.from_size + grown * (epoch - first) / (last - first)) / STEP)
            for epoch in range(first, last + 1)
        }
        grows = {epoch: size for epoch, size in sizes.items() if size != sizes.get(epoch - 1, self.from_size)}
        return Schedule({epoch: TrainCrop(size) for epoch, size in ({0: self.from_size} | grows).items()})

    def evaluation(self) -> EvalCrop:
        return EvalCrop(self.size, resize=self.eval_resize)


@dataclass(frozen=True, kw_only=True)
class Model:
    """See `models.build`."""

    name: str
    weights: str | None = None
    small: bool = False
    width: int = 64


@dataclass(frozen=True, kw_only=True)
class Train:
    """SGD with momentum, a linear warm-up and a cosine schedule."""

    epochs: int | None = None  # or
    updates: int | None = None
    batch_size: int = 256  # of all processes together
    lr: float = 0.1
    lr_min: float = 0.0
    warmup_epochs: float = 0.0  # and
    warmup_updates: int = 0
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    label_smoothing: float = 0.0
    augment: tuple[str, ...] = ()  # after the mix: AUGMENTATIONS, timm's rand-m9-mstd0.5-inc1; then one of MIXERS
    validate_every: int | None = None  # updates; default: once per epoch
    seed: int = 0

    def __post_init__(self) -> None:
        rule((self.epochs is None) != (self.updates is None), "train.epochs or updates", "given, one of them", self)
        for name in ("epochs", "updates", "batch_size", "validate_every"):
            value = getattr(self, name)
            rule(value is None or value > 0, f"train.{name}", "at least 1", value)
        rule(self.lr > 0, "train.lr", "above 0", self.lr)
        rule(0 <= self.label_smoothing < 1, "train.label_smoothing", "from 0 to below 1", self.label_smoothing)
        known = {name for name in self.augment if name in AUGMENTATIONS or name in MIXERS or name.startswith("rand-")}
        names = ", ".join((*AUGMENTATIONS, "timm's rand-m9-mstd0.5-inc1", *MIXERS))
        rule(known == set(self.augment), "train.augment", f"some of {names}", list(self.augment))
        mixers = [name for name in self.augment if name in MIXERS]
        last = not mixers or (mixers == [self.augment[-1]])
        rule(last, "train.augment", "settings of samples first, then cutmix or mixup, not both", list(self.augment))
        _ = self.samples_augment

    @property
    def samples_augment(self) -> tuple[Any, ...]:
        """The dataset's `augment`."""
        names = [name for name in self.augment if name not in MIXERS]
        return tuple(AUGMENTATIONS[name] if name in AUGMENTATIONS else TimmRandAugment.of(name) for name in names)

    @property
    def mixer(self) -> str | None:
        """What mixes batches: cutmix, mixup or nothing."""
        return next((name for name in self.augment if name in MIXERS), None)


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    fgsm: tuple[float, ...] = ()  # strengths, in steps of 1/255
    corruptions: tuple[int, ...] = ()  # strengths of noise, blur, contrast and JPEG, from 1 to 5

    def __post_init__(self) -> None:
        known = all(one in range(1, 6) for one in self.corruptions)
        rule(known, "evaluate.corruptions", "strengths from 1 to 5", self.corruptions)
        rule(all(0 < one <= 255 for one in self.fgsm), "evaluate.fgsm", "steps of 1/255, above 0", self.fgsm)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    data: Data
    crop: Crop
    model: Model
    train: Train
    edits: Edits = field(default_factory=Edits)
    fractals: Fractals = field(default_factory=Fractals)
    mix: Mix = field(default_factory=Mix)
    evaluate: Evaluate = field(default_factory=Evaluate)

    @classmethod
    def read(cls, file: Path, changes: Sequence[str] = ()) -> "Recipe":
        """Read the recipe of a TOML file. `changes` have the form "train.lr=0.1" with values as in TOML; text needs no
        quotes, and "unset" stands for the default of an optional field.
        """
        try:
            tables = tomllib.loads(file.read_text())
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"the recipe {str(file)!r} cannot be read: {error}.") from error
        for change in changes:
            name, equals, value = change.partition("=")
            section, dot, key = name.strip().partition(".")
            if not (equals and dot):
                meant = [f"{one}.{key}" for one, of in get_type_hints(cls).items() for key in get_type_hints(of)]
                like = next((one for one in meant if equals and one.endswith(f".{name.strip()}")), "")
                raise ConfigError(f"--set must be section.field=value, found {change!r}{did_you_mean(like, meant)}")
            tables.setdefault(section, {})[key] = _value(value.strip())
        return cls.from_tables(tables)

    @classmethod
    def from_tables(cls, tables: Mapping[str, Any]) -> "Recipe":
        return _build(cls, tables, "")

    def __post_init__(self) -> None:
        ramp, epochs = self.crop.ramp, self.train.epochs
        grown = ramp is None or epochs is None or ramp[1] < epochs
        rule(grown, "crop.ramp", f"over before the last of {epochs} epochs (or unset, with from_size)", ramp)

    def tables(self) -> dict[str, Any]:
        """Return plain data, for checkpoints and logs."""
        return dataclasses.asdict(self)

    def check_same(self, tables: Mapping[str, Any], where: str) -> None:
        """Raise ConfigError, with the difference, if a checkpoint is from another recipe."""
        ours = {section: fields for section, fields in self.tables().items() if section != "evaluate"}
        if differs := difference(tables, ours):
            name, there, here = differs
            raise ConfigError(
                f"{where} is of another recipe: {name} is {there!r} there and {here!r} here; give the same recipe, or "
                "another --out."
            )


def difference(theirs: Mapping[str, Any], ours: Mapping[str, Mapping[str, Any]]) -> tuple[str, Any, Any] | None:
    """Return the first field of our tables that differs: its name, their value (None if they lack it) and ours."""
    for section, fields in ours.items():
        for name, value in fields.items():
            found = theirs.get(section, {}).get(name)
            if _plain(found) != _plain(value):
                return f"{section}.{name}", found, value
    return None


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return None if text == "unset" else text


def _build(cls: type, table: Mapping[str, Any], where: str) -> Any:
    """Build a dataclass from a table, checking every name and type."""
    hints = get_type_hints(cls)
    rule(isinstance(table, Mapping), where or "the recipe", "a table", table)
    if unknown := sorted(set(table) - set(hints)):
        what = f"fields of {where[:-1]}" if where else "sections of a recipe"
        raise ConfigError(
            f"{what} must be some of {', '.join(hints)}, found {unknown[0]!r}{did_you_mean(unknown[0], hints)}"
        )
    values = {}
    for name, hint in hints.items():
        if name in table:
            value = table[name]
            values[name] = (
                _build(hint, value, f"{name}.") if dataclasses.is_dataclass(hint) else _of(hint, value, where + name)
            )
    needed = [one.name for one in dataclasses.fields(cls) if one.name not in values and _needed(one)]
    if needed:
        raise ConfigError(f"{where}{needed[0]} is missing; the recipe must have it.")
    return cls(**values)


def _needed(one: dataclasses.Field) -> bool:
    return one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING


def _of(hint: Any, value: Any, name: str) -> Any:
    """Return a value of a field's type: int, float, str, bool, a list of one of them, or None."""
    kinds = get_args(hint) if type(None) in get_args(hint) else (hint,)
    if value is None and type(None) in kinds:
        return None
    kind = next(one for one in kinds if one is not type(None))
    if get_origin(kind) is tuple:
        rule(isinstance(value, list | tuple), name, "a list", value)
        return tuple(_of(get_args(kind)[0], one, name) for one in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    rule(
        isinstance(value, kind) and (kind is bool or not isinstance(value, bool)),
        name,
        f"of kind {kind.__name__}",
        value,
    )
    return value
