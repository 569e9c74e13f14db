"""The diffusers editor: runs instruction-editing pipelines, by hub id or folder.

    prompts --text encoder, once a run--> embeddings ──┐
    images --VAE, once for all their prompts--> latents ┴─ batches: UNet, scheduler --VAE--> edits

Every edit has its own generator for its noise, so it depends on its image, prompt and seed, not on its batch (except
for rounding: a batch of another size may differ in the last bits).
"""

import hashlib
import inspect
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from dali_diffusemix.errors import ConfigError, MissingDependencyError
from dali_diffusemix.generate.editors import TEMPLATE, EditTask

_log = logging.getLogger(__name__)

SCHEDULERS: Final[Mapping[str, tuple[str, Mapping[str, Any]]]] = {
    "euler-ancestral": ("EulerAncestralDiscreteScheduler", {}),  # as released
    "euler": ("EulerDiscreteScheduler", {}),
    "dpm-solver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
    "lcm": ("LCMScheduler", {}),
}
"""Name to diffusers' class and its options; "default" is the model's own scheduler."""

_ENDINGS: Final = (".json", ".txt", ".model", ".safetensors")  # of a model's files
_DTYPES: Final = ("float16", "bfloat16", "float32")
_INSTRUCT: Final = ("StableDiffusionInstructPix2PixPipeline", "StableDiffusionXLInstructPix2PixPipeline")


@dataclass(frozen=True, kw_only=True)
class DiffusersConfig:
    """An instruction-editing pipeline of diffusers; the defaults are the released code's.

    InstructPix2Pix (Stable Diffusion and SDXL) has a fast path; any other pipeline that takes a prompt and an image is
    called as it is.

    Raises ConfigError if a field breaks its rule.
    """

    model: str = "timbrooks/instruct-pix2pix"  # hub id, or the folder of a saved pipeline, with safetensors
    revision: str | None = None  # of a hub id: branch, tag or commit
    scheduler: str = "euler-ancestral"  # of SCHEDULERS, or "default"
    steps: int = 100  # 20 do for dpm-solver++
    guidance: float = 4.0  # by the prompt
    image_guidance: float = 1.5  # by the image, where the pipeline has it
    template: str = TEMPLATE  # {prompt} is replaced by the prompt
    dtype: str = "float16"  # or "bfloat16" or "float32"; a CPU needs one of these
    compile: bool = field(default=False, metadata={"setting": False})  # torch.compile the denoiser

    accelerated: ClassVar[bool] = True
    multiple: ClassVar[int] = 8  # pixels per latent

    def __post_init__(self) -> None:
        if self.scheduler not in (*SCHEDULERS, "default"):
            raise ConfigError(f"scheduler must be one of {[*SCHEDULERS, 'default']}, found {self.scheduler!r}.")
        if self.dtype not in _DTYPES:
            raise ConfigError(f"dtype must be one of {list(_DTYPES)}, found {self.dtype!r}.")
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or not 1 <= self.steps <= 1000:
            raise ConfigError(f"steps must be a whole number from 1 to 1000, found {self.steps!r}.")
        for name in ("guidance", "image_guidance"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 100:
                raise ConfigError(f"{name} must be a number from 0 to 100, found {value!r}.")
        if not self.model:
            raise ConfigError("model must be a hub id or a folder, found an empty string.")
        if "{prompt}" not in self.template:
            raise ConfigError(f"template must hold {{prompt}}, where the prompt goes; found {self.template!r}.")

    def settings(self) -> dict[str, str | int | float | bool | None]:
        """The settings that an edit store records. A folder's revision is a hash of its files, so it may be moved.

        Raises:
            ConfigError: There is no such model.
        """
        folder = _folder(self.model, self.revision)
        return {
            "editor": "diffusers",
            "model": Path(self.model).name if Path(self.model).is_dir() else self.model,
            "revision": _revision(folder) if Path(self.model).is_dir() else folder.name,
            "pipeline": str(_model_index(folder).get("_class_name")),
            "scheduler": self.scheduler,
            "steps": self.steps,
            "guidance": float(self.guidance),
            "image_guidance": float(self.image_guidance),
            "template": self.template,
            "dtype": self.dtype,
        }

    def check(self, prompts: Sequence[str]) -> None:
        """Check the model's files. Any prompt is valid.

        Raises:
            ConfigError: There is no such model, its weights are not safetensors, or it needs code of its own.
            MissingDependencyError: diffusers or transformers is not installed.
        """
        folder = _folder(self.model, self.revision)
        _diffusers()
        _check_files(folder, self.model)

    def load(self, prompts: Sequence[str], *, device: str, batch_size: int) -> "DiffusersEditor":
        """Load the pipeline onto a device.

        Raises:
            ConfigError: There is no such model, it is no editing pipeline, its weights are not safetensors, it needs
                code of its own, or float16 is asked for on a CPU.
            MissingDependencyError: diffusers or transformers is not installed.
        """
        if device == "cpu" and self.dtype == "float16":
            raise ConfigError("dtype must be 'float32' or 'bfloat16' on a CPU, found 'float16'.")
        return DiffusersEditor(_load(self, device), self, prompts, batch_size)


class DiffusersEditor:
    """Edits with a diffusion pipeline; `DiffusersConfig.load` makes it."""

    def __init__(self, pipeline: Any, config: DiffusersConfig, prompts: Sequence[str], batch_size: int) -> None:
        self._pipeline = pipeline
        self._config = config
        self._batch_size = batch_size
        self._instructs = type(pipeline).__name__ in _INSTRUCT
        self._takes = set(inspect.signature(type(pipeline).__call__).parameters)
        self._texts = {prompt: config.template.format(prompt=prompt) for prompt in prompts}
        self._embeddings: dict[str, dict[str, Any]] = {}
        if self._instructs:
            with self._computing():
                self._embeddings = {prompt: self._embed(text) for prompt, text in self._texts.items()}

    def edit(self, images: Sequence[NDArray[np.uint8]], tasks: Sequence[EditTask]) -> list[NDArray[Any]]:
        """Return one edit per task, in the tasks' order; see `Editor.edit`.

        Args:
            images: Originals, each (height, width, 3) uint8 RGB; sides divisible by 8.
            tasks: The edits to make; each names one of the editor's prompts.

        Raises:
            ConfigError: A task names another prompt, or a single edit does not fit in the GPU's memory.
        """
        for task in tasks:
            if task.prompt not in self._texts:
                raise ConfigError(
                    f"prompt must be one of {list(self._texts)}, found {task.prompt!r}; name it in `load`."
                )
        edits: dict[int, NDArray[Any]] = {}
        # Images of one size make a batch.
        order = sorted(range(len(tasks)), key=lambda task: images[tasks[task].image].shape[:2])
        with self._computing():
            for _, group in groupby(order, key=lambda task: images[tasks[task].image].shape[:2]):
                left = list(group)
                latents = self._encode(images, {tasks[task].image for task in left}) if self._instructs else {}
                while left:
                    batch = left[: self._batch_size]
                    try:
                        made = self._make(images, latents, [tasks[task] for task in batch])
                    except Exception as error:
                        self._halve(error)
                        continue
                    edits.update(zip(batch, made, strict=True))
                    left = left[len(batch) :]
        return [edits[task] for task in range(len(tasks))]

    def _make(
        self, images: Sequence[NDArray[np.uint8]], latents: Mapping[int, Any], tasks: Sequence[EditTask]
    ) -> list[NDArray[Any]]:
        """Edit images of one size in one call of the pipeline."""
        import torch
        from PIL import Image

        height, width = images[tasks[0].image].shape[:2]
        asked: dict[str, Any] = {
            "num_inference_steps": self._config.steps,
            "guidance_scale": self._config.guidance,
            "image_guidance_scale": self._config.image_guidance,
            # On the CPU, so that the noise is the same for every device.
            "generator": [torch.Generator("cpu").manual_seed(task.seed) for task in tasks],
            "height": height,
            "width": width,
            "output_type": "pt",
        }
        if self._instructs:
            asked["image"] = torch.cat([latents[task.image] for task in tasks])
            embeddings = [self._embeddings[task.prompt] for task in tasks]
            asked |= {name: torch.cat([one[name] for one in embeddings]) for name in embeddings[0]}
        else:
            asked["image"] = [Image.fromarray(images[task.image]) for task in tasks]
            asked["prompt"] = [self._texts[task.prompt] for task in tasks]
        given = {name: value for name, value in asked.items() if name in self._takes}
        return _pixels(self._pipeline(**given).images)

    def _embed(self, text: str) -> dict[str, Any]:
        """A prompt's embeddings, as arguments of the pipeline's call."""
        pipeline = self._pipeline
        names = ["prompt_embeds", "negative_prompt_embeds"]
        if "pooled_prompt_embeds" in self._takes:
            names += ["pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
            values = pipeline.encode_prompt(text, device=pipeline.device, do_classifier_free_guidance=True)
        else:
            # The three parts are prompt, negative and negative again; the call takes the first two.
            embedded = pipeline._encode_prompt(text, pipeline.device, 1, True)
            values = (embedded[:1], embedded[1:2])
        return dict(zip(names, values, strict=True))

    def _encode(self, images: Sequence[NDArray[np.uint8]], wanted: set[int]) -> dict[int, Any]:
        """Index of an image to its latents, (1, 4, height / 8, width / 8); each goes through the VAE once."""
        import torch

        pipeline, left = self._pipeline, sorted(wanted)
        latents: dict[int, Any] = {}
        dtype = next(pipeline.unet.parameters()).dtype
        while left:
            batch = left[: self._batch_size]
            pixels = torch.from_numpy(np.stack([images[index] for index in batch])).to(pipeline.device)
            pixels = pixels.permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1
            try:
                encoded = pipeline.prepare_image_latents(pixels, len(batch), 1, dtype, pipeline.device, False)
            except Exception as error:
                self._halve(error)
                continue
            if getattr(pipeline, "is_cosxl_edit", False):  # the call multiplies once more
                encoded = encoded / pipeline.vae.config.scaling_factor
            latents.update(zip(batch, encoded.split(1), strict=True))
            left = left[len(batch) :]
        return latents

    def _halve(self, error: Exception) -> None:
        """Halve the batch size if the GPU's memory was too small; else raise the error."""
        import torch

        if not isinstance(error, torch.OutOfMemoryError):
            raise error
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if self._batch_size == 1:
            raise ConfigError(
                "edit_size must be such that one edit fits in the GPU's memory, found too little for a batch of 1: "
                f"make it smaller, or the dtype ({self._config.dtype}), or use a GPU with more memory. {error}"
            ) from error
        self._batch_size //= 2
        _log.warning("The batch does not fit in the GPU's memory; its size is halved to %d edits.", self._batch_size)

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Run without gradients; on a CPU with one thread, so that results do not depend on the number of threads."""
        import torch

        threads = torch.get_num_threads()
        one = self._pipeline.device.type == "cpu"
        try:
            if one:
                torch.set_num_threads(1)
            with torch.inference_mode():
                yield
        finally:
            if one:
                torch.set_num_threads(threads)


def _pixels(images: Any) -> list[NDArray[Any]]:
    """Tensors (n, 3, height, width) from 0 to 1 as arrays: uint8, or float32 where a number is not finite."""
    import torch

    images = images.to(torch.float32) if isinstance(images, torch.Tensor) else torch.stack(list(images)).float()
    images = images.permute(0, 2, 3, 1)
    finite = images.isfinite().all(dim=3).all(dim=2).all(dim=1).tolist()
    whole = (images.nan_to_num() * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
    return [
        np.ascontiguousarray(whole[index]) if ok else (images[index] * 255).cpu().numpy()
        for index, ok in enumerate(finite)
    ]


def _load(config: DiffusersConfig, device: str) -> Any:
    """Load a pipeline, ready to be called."""
    diffusers = _diffusers()
    import torch

    folder = _folder(config.model, config.revision)
    _check_files(folder, config.model)
    index = _model_index(folder)
    without = {"safety_checker": None, "feature_extractor": None} if "safety_checker" in index else {}
    options = {"requires_safety_checker": False} if without else {}
    try:
        with _quiet(diffusers):
            pipeline = diffusers.DiffusionPipeline.from_pretrained(
                str(folder),
                dtype=getattr(torch, config.dtype),
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                **without,
                **options,
            )
    except Exception as error:  # of many kinds
        raise ConfigError(
            f"model: {config.model!r} cannot be loaded as a pipeline of diffusers {diffusers.__version__} "
            f"({type(error).__name__}: {error}); give one that `DiffusionPipeline.from_pretrained` loads."
        ) from error
    takes = inspect.signature(type(pipeline).__call__).parameters
    if not {"prompt", "image"} <= set(takes):
        raise ConfigError(
            f"model: {config.model!r} must be a pipeline that edits an image by a prompt, found "
            f"{type(pipeline).__name__}; use an instruction-editing one, such as timbrooks/instruct-pix2pix."
        )
    if config.scheduler != "default":
        name, chosen = SCHEDULERS[config.scheduler]
        pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config, **chosen)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(device)
    for name in ("unet", "vae"):
        if (module := getattr(pipeline, name, None)) is not None:
            module.to(memory_format=torch.channels_last)
    if config.compile:
        name = "unet" if hasattr(pipeline, "unet") else "transformer"
        getattr(pipeline, name).compile(mode="default", dynamic=False)
    return pipeline


def _diffusers() -> Any:
    try:
        import diffusers
        import transformers  # noqa: F401 - most pipelines need it for prompts
    except ImportError as error:
        raise MissingDependencyError(
            f"the diffusers editor needs diffusers and transformers ({error}); run `pip install "
            "'dali-diffusemix[generate]'`."
        ) from error
    return diffusers


@contextmanager
def _quiet(diffusers: Any) -> Iterator[None]:
    """Silence messages while a pipeline is loaded; errors are raised."""
    import transformers

    loggers: list[tuple[Any, Callable[[], int]]] = [
        (library.utils.logging, library.utils.logging.get_verbosity) for library in (diffusers, transformers)
    ]
    before = [get() for _, get in loggers]
    try:
        for module, _ in loggers:
            module.set_verbosity_error()
            module.disable_progress_bar()
        with warnings.catch_warnings():
            for category in (DeprecationWarning, FutureWarning):  # of one library about another
                warnings.simplefilter("ignore", category)
            yield
    finally:
        for (module, _), level in zip(loggers, before, strict=True):
            module.set_verbosity(level)
            module.enable_progress_bar()


@lru_cache(8)
def _folder(model: str, revision: str | None) -> Path:
    """The folder of a model's files; from the hub, only safetensors and configs are fetched."""
    if Path(model).is_dir():
        if revision is not None:
            raise ConfigError(f"revision must be left out for a model in a folder, found {revision!r}.")
        return Path(model).absolute()
    if model.startswith(("/", ".", "~")) or model.count("/") != 1:
        raise ConfigError(
            f"model must be a folder or a hub id (owner/name), unless the editor is 'procedural'; found {model!r}, "
            "which is no folder."
        )
    _diffusers()
    from huggingface_hub import snapshot_download

    patterns = [f"*{ending}" for ending in _ENDINGS]
    # A local copy is used as it is: a cluster's nodes need no network.
    failure: Exception | None = None
    for local in (True, False):
        try:
            found = Path(snapshot_download(model, revision=revision, allow_patterns=patterns, local_files_only=local))
            if (found / "model_index.json").is_file():
                return found
        except Exception as error:  # of the network, of the hub, of the disk
            failure = error
    raise ConfigError(
        f"model: {model!r} is neither a folder nor available from the hub ({type(failure).__name__}: {failure}). On a "
        f"machine with a network, `hf download {model}` fetches it; or give the folder of a copy."
    ) from failure


def _model_index(folder: Path) -> dict[str, Any]:
    file = folder / "model_index.json"
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(index, dict):
            return index
        error: Exception = ValueError("no object")
    except (OSError, ValueError) as caught:
        error = caught
    raise ConfigError(f"model: {str(folder)!r} must be a saved pipeline with a model_index.json ({error}).") from error


def _check_files(folder: Path, model: str) -> None:
    """Refuse models that would run code: modules in the folder, and pickled weights."""
    for name, source in _model_index(folder).items():
        library = source[0] if isinstance(source, list) and source else None
        if isinstance(library, str) and library not in ("diffusers", "transformers") and library.endswith(".py"):
            raise ConfigError(
                f"model: {model!r} needs its own code {library} for its {name}; no code of a model is run."
            )
        if (folder / name).is_dir() and (scripts := sorted((folder / name).glob("*.py"))):
            raise ConfigError(
                f"model: {model!r} brings code of its own ({name}/{scripts[0].name}), and no code of a model is run; "
                "use one made of diffusers' own classes."
            )
        if (
            isinstance(source, list)
            and (folder / name).is_dir()
            and any((folder / name).glob("*.bin"))
            and not any((folder / name).glob("*.safetensors"))
        ):
            raise ConfigError(
                f"model: {model!r} has only pickled weights ({name}), which may run code when they are read; give one "
                "with safetensors (`save_pretrained(..., safe_serialization=True)` writes them)."
            )
    if scripts := sorted(folder.glob("*.py")):
        raise ConfigError(
            f"model: {model!r} brings code of its own ({scripts[0].name}), and no code of a model is run; use one made "
            "of diffusers' own classes."
        )
    if not any(folder.rglob("*.safetensors")):
        raise ConfigError(
            f"model: {model!r} must have its weights as safetensors, found none; "
            "`save_pretrained(..., safe_serialization=True)` writes them."
        )


@lru_cache(8)
def _revision(folder: Path) -> str:
    """The revision of a model in a folder: a hash of its files' names and contents."""
    whole = hashlib.sha256()
    for file in sorted(file for file in folder.rglob("*") if file.suffix in _ENDINGS):
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        whole.update(f"{file.relative_to(folder)}\0{digest}\n".encode())
    return f"sha256:{whole.hexdigest()}"
