"""The options of the diffusers editor, checked against what the model's class takes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Final

from dali_diffusemix.base.words import did_you_mean
from dali_diffusemix.errors import ConfigError
from dali_diffusemix.generate.editors import check_template
from dali_diffusemix.generate.editors.diffusers.adapters import (
    ADAPTERS,
    Adapter,
    PipelineOptions,
    adapter_of,
    options_of,
)
from dali_diffusemix.generate.editors.diffusers.editor import DiffusersEditor
from dali_diffusemix.generate.editors.diffusers.files import (
    Lora,
    check_files,
    folder_of,
    local_index,
    read_index,
    require_diffusers,
    revision_of,
)
from dali_diffusemix.generate.editors.diffusers.loading import (
    QUANTIZATIONS,
    SCHEDULERS,
    check_packages,
    load_pipeline,
)

_DTYPES: Final = ("float16", "bfloat16", "float32")
_NUMBERS: Final = {"guidance": (0, 100), "image_guidance": (0, 100), "strength": (0, 1), "cache": (0, 1)}


@dataclass(frozen=True, kw_only=True)
class DiffusersConfig:
    """A pipeline of diffusers that edits images.

    A field that is None has the default of the model's class, which its model_index.json names; docs/generation.md has
    a table of the classes. InstructPix2Pix has the released code's defaults: euler-ancestral, 100 steps, guidance 4.0
    and 1.5. A field that the class does not take is refused if it is given.

    Raises ConfigError if a field breaks its rule.
    """

    model: str = "timbrooks/instruct-pix2pix"  # hub id, or the folder of a saved pipeline, with safetensors
    revision: str | None = None  # of a hub id: branch, tag or commit
    scheduler: str | None = None  # of SCHEDULERS, or "default": the model's own
    steps: int | None = None  # 20 do for dpm-solver++
    guidance: float | None = None  # by the prompt
    image_guidance: float | None = None  # by the image
    strength: float | None = None  # of image to image: the part of the steps that is made, between 0 and 1
    template: str | None = None  # {prompt} is replaced by the prompt, {class} by the class of the image
    negative_prompt: str | None = None  # what an edit is guided away from
    dtype: str | None = None  # "float16", "bfloat16" or "float32"; a CPU needs one of the last two
    lora: str | None = None  # NAME[:FILE][@SCALE], NAME a file, a folder or a hub id
    quantize: str | None = None  # of QUANTIZATIONS: the weights take less memory
    cache: float | None = None  # First Block Cache: the change of the first block below which the others are skipped
    compile: bool = field(default=False, metadata={"setting": False})  # torch.compile the denoiser

    accelerated: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, allowed in (
            ("scheduler", (*SCHEDULERS, "default")),
            ("dtype", _DTYPES),
            ("quantize", tuple(QUANTIZATIONS)),
        ):
            if (text := getattr(self, name)) is not None and text not in allowed:
                raise ConfigError(f"{name} must be one of {list(allowed)}, found {text!r}{did_you_mean(text, allowed)}")
        steps = self.steps
        if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= 1000):
            raise ConfigError(f"steps must be a whole number from 1 to 1000, found {steps!r}.")
        for name, (least, most) in _NUMBERS.items():
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
                raise ConfigError(f"{name} must be a number from {least} to {most}, found {value!r}.")
        if not self.model:
            raise ConfigError("model must be a hub id or a folder, found an empty string.")
        if self.template is not None:
            check_template(self.template)
        if self.lora is not None:
            Lora.parse(self.lora)

    @property
    def multiple(self) -> int:
        """The divisor of both sides of the images that it takes.

        It depends on the model's class. Of a model that is not on this machine yet it is 8, the least.
        """
        index = local_index(self.model, self.revision)
        adapter = None if index is None else ADAPTERS.get(str(index.get("_class_name")))
        return 8 if adapter is None else adapter.multiple

    def settings(self) -> dict[str, str | int | float | bool | None]:
        """The settings that an edit store records. A folder's revision is a hash of its files, so it may be moved.

        Those that the model's class does not take, and options that are not used, are left out.

        Raises:
            ConfigError: There is no such model or LoRA, or its class is not known or does not take a field.
        """
        folder = folder_of(self.model, self.revision)
        adapter, options = self._chosen(folder)
        found: dict[str, str | int | float | bool | None] = {
            "editor": "diffusers",
            "model": Path(self.model).name if Path(self.model).is_dir() else self.model,
            "revision": revision_of(folder) if Path(self.model).is_dir() else folder.name,
            "pipeline": adapter.pipeline,
            "scheduler": options.scheduler,
            "steps": options.steps,
            "guidance": _number(options.guidance),
            "image_guidance": _number(options.image_guidance),
            "strength": _number(options.strength),
            "template": options.template,
            "negative_prompt": options.negative_prompt,
            "dtype": options.dtype,
            **({} if self.lora is None else Lora.parse(self.lora).settings()),
            "quantize": self.quantize,
            "cache": _number(self.cache),
        }
        return {name: value for name, value in found.items() if value is not None}

    def check(self, prompts: Sequence[str]) -> None:
        """Check the model's files and class, and the fields for it. Any prompt is valid.

        Raises:
            ConfigError: There is no such model or LoRA, its weights are not safetensors, it needs code of its own, or
                its class is not known or does not take a field.
            MissingDependencyError: diffusers, transformers or another package that it needs is not installed.
        """
        folder = folder_of(self.model, self.revision)
        require_diffusers()
        check_files(folder, self.model)
        adapter, _ = self._chosen(folder)
        check_packages(adapter, lora=self.lora is not None, quantize=self.quantize)
        if self.lora is not None:
            Lora.parse(self.lora).found()

    def load(self, prompts: Sequence[str], *, device: str, batch_size: int) -> DiffusersEditor:
        """Load the pipeline onto a device.

        Args:
            prompts: The prompts that tasks may name.
            device: "cpu", "cuda" or "cuda:N".
            batch_size: The most edits made at once; classes that edit one image at a time do so.

        Raises:
            ConfigError: It is one that `check` refuses, it cannot be loaded, or float16 or a quantization of
                bitsandbytes is asked for on a CPU.
            MissingDependencyError: diffusers, transformers or another package that it needs is not installed.
        """
        folder = folder_of(self.model, self.revision)
        require_diffusers()
        check_files(folder, self.model)
        adapter, options = self._chosen(folder)
        if device == "cpu" and options.dtype == "float16":
            raise ConfigError("dtype must be 'float32' or 'bfloat16' on a CPU, found 'float16'.")
        if device == "cpu" and self.quantize is not None and QUANTIZATIONS[self.quantize] == "bitsandbytes":
            raise ConfigError(f"quantize must be one of torchao's on a CPU, found {self.quantize!r}.")
        pipeline = load_pipeline(
            folder,
            self.model,
            adapter,
            options,
            device,
            lora=None if self.lora is None else Lora.parse(self.lora),
            quantize=self.quantize,
            cache=self.cache,
            compile=self.compile,
        )
        return DiffusersEditor(adapter(pipeline, options), prompts, batch_size)

    def _chosen(self, folder: Path) -> tuple[type[Adapter], PipelineOptions]:
        index = read_index(folder)
        adapter = adapter_of(self.model, index)
        return adapter, options_of(adapter, index, vars(self))


def _number(value: float | None) -> float | None:
    return None if value is None else float(value)
