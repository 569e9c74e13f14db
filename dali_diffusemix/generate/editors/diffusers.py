"""The diffusers editor: instruction-editing pipelines, by hub id or folder, as fast as their results allow.

    prompts --text encoder, once a run--> embeddings ──┐
    images --VAE, once for all their prompts--> latents ┴─ batches: UNet, scheduler --VAE--> edits

Every edit has a generator of its own for its noise, so that a result depends on its image, prompt and seed, not on what
else is in its batch (but for the last bits of the arithmetic, which batches of other sizes may round otherwise).
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
"""Name to diffusers' class and what it is made with; "default" is the model's own."""

_ENDINGS: Final = (".json", ".txt", ".model", ".safetensors")  # of the files that a model is made of
_DTYPES: Final = ("float16", "bfloat16", "float32")
_INSTRUCT: Final = ("StableDiffusionInstructPix2PixPipeline", "StableDiffusionXLInstructPix2PixPipeline")


@dataclass(frozen=True, kw_only=True)
class DiffusersConfig:
    """An instruction-editing pipeline of diffusers; the defaults are the released code's.

    The two InstructPix2Pix pipelines (Stable Diffusion, SDXL) are made for; any other whose call takes a prompt and an
    image is called as it is.

    Raises ConfigError where a field breaks its rule.
    """

    model: str = "timbrooks/instruct-pix2pix"  # hub id, or the folder of a saved pipeline, with safetensors
    revision: str | None = None  # of a hub id: branch, tag or commit
    scheduler: str = "euler-ancestral"  # of SCHEDULERS, or "default"
    steps: int = 100  # 20 do for dpm-solver++
    guidance: float = 4.0  # by the prompt
    image_guidance: float = 1.5  # by the image, where the pipeline has it
    template: str = TEMPLATE  # {prompt} is where the prompt goes
    dtype: str = "float16"  # or "bfloat16", "float32": what a CPU needs
    compile: bool = field(default=False, metadata={"setting": False})  # torch.compile of what denoises

    accelerated: ClassVar[bool] = True
    multiple: ClassVar[int] = 8  # pixels that one latent stands for

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
        """What an edit store records. A folder's revision is a hash of its files, so it may be moved.

        Raises:
            ConfigError: The model is not there.
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
        """Look at the model's files; any prompt will do.

        Raises:
            ConfigError: The model is not there, has weights that are not safetensors, or wants its own code to be run.
            MissingDependencyError: diffusers or transformers is not installed.
        """
        folder = _folder(self.model, self.revision)
        _diffusers()
        _check_files(folder, self.model)

    def load(self, prompts: Sequence[str], *, device: str, batch_size: int) -> "DiffusersEditor":
        """Load the pipeline onto a device.

        Raises:
            ConfigError: The model is not there, is no pipeline that edits, has weights that are not safetensors or
                wants code of its own to be run; or the CPU is asked for float16.
            MissingDependencyError: diffusers or transformers is not installed.
        """
        if device == "cpu" and self.dtype == "float16":
            raise ConfigError("dtype must be 'float32' or 'bfloat16' on a CPU, found 'float16'.")
        return DiffusersEditor(_load(self, device), self, prompts, batch_size)


class DiffusersEditor:
    """Edits with a diffusion pipeline; made by `DiffusersConfig.load`."""

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
            tasks: What to make; each names one of the editor's prompts.

        Raises:
            ConfigError: A task names another prompt, or one edit alone is too much for the GPU's memory.
        """
        for task in tasks:
            if task.prompt not in self._texts:
                raise ConfigError(f"prompt: the editor was made for {list(self._texts)}, found {task.prompt!r}.")
        edits: dict[int, NDArray[Any]] = {}
        # Images of one size make a batch.
        order = sorted(range(len(tasks)), key=lambda place: images[tasks[place].image].shape[:2])
        with self._computing():
            for _, group in groupby(order, key=lambda place: images[tasks[place].image].shape[:2]):
                places = list(group)
                latents = self._encode(images, {tasks[place].image for place in places}) if self._instructs else {}
                while places:
                    batch = places[: self._batch_size]
                    try:
                        made = self._make([images[tasks[place].image] for place in batch], latents, tasks, batch)
                    except Exception as error:
                        self._halve(error)
                        continue
                    edits.update(zip(batch, made, strict=True))
                    places = places[len(batch) :]
        return [edits[place] for place in range(len(tasks))]

    def _make(
        self,
        images: Sequence[NDArray[np.uint8]],
        latents: Mapping[int, Any],
        tasks: Sequence[EditTask],
        batch: Sequence[int],
    ) -> list[NDArray[Any]]:
        import torch
        from PIL import Image

        height, width = images[0].shape[:2]
        asked: dict[str, Any] = {
            "num_inference_steps": self._config.steps,
            "guidance_scale": self._config.guidance,
            "image_guidance_scale": self._config.image_guidance,
            # The CPU's, so that the noise is the same on every device.
            "generator": [torch.Generator("cpu").manual_seed(tasks[place].seed) for place in batch],
            "height": height,
            "width": width,
            "output_type": "pt",
        }
        if self._instructs:
            asked["image"] = torch.cat([latents[tasks[place].image] for place in batch])
            embeddings = [self._embeddings[tasks[place].prompt] for place in batch]
            asked |= {name: torch.cat([one[name] for one in embeddings]) for name in embeddings[0]}
        else:
            asked["image"] = [Image.fromarray(image) for image in images]
            asked["prompt"] = [self._texts[tasks[place].prompt] for place in batch]
        given = {name: value for name, value in asked.items() if name in self._takes}
        return _pixels(self._pipeline(**given).images)

    def _embed(self, text: str) -> dict[str, Any]:
        """A prompt's embeddings, as the pipeline's call takes them."""
        pipeline = self._pipeline
        names = ["prompt_embeds", "negative_prompt_embeds"]
        if "pooled_prompt_embeds" in self._takes:
            names += ["pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
            values = pipeline.encode_prompt(text, device=pipeline.device, do_classifier_free_guidance=True)
        else:
            # Of three parts, prompt, negative and negative again, the call takes two.
            embedded = pipeline._encode_prompt(text, pipeline.device, 1, True)
            values = (embedded[:1], embedded[1:2])
        return dict(zip(names, values, strict=True))

    def _encode(self, images: Sequence[NDArray[np.uint8]], places: set[int]) -> dict[int, Any]:
        """Image to its latents, (1, 4, height / 8, width / 8); each goes through the VAE once."""
        import torch

        pipeline, left = self._pipeline, sorted(places)
        latents: dict[int, Any] = {}
        dtype = next(pipeline.unet.parameters()).dtype
        while left:
            batch = left[: self._batch_size]
            pixels = torch.from_numpy(np.stack([images[place] for place in batch])).to(pipeline.device)
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
        """Go on with half of the batch if it was too large for the GPU; else raise the error."""
        import torch

        if not isinstance(error, torch.OutOfMemoryError):
            raise error
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if self._batch_size == 1:
            raise ConfigError(
                "edit_size must be such that one edit fits into the GPU's memory, found too little for a batch of 1: "
                f"make it smaller, or the dtype (now {self._config.dtype}), or use a GPU with more. {error}"
            ) from error
        self._batch_size //= 2
        _log.warning("The GPU's memory is too small for the batch; going on with %d edits at once.", self._batch_size)

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """On a CPU with one thread, so that a store's bytes do not depend on how many processes shared the cores."""
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
        np.ascontiguousarray(whole[place]) if ok else (images[place] * 255).cpu().numpy()
        for place, ok in enumerate(finite)
    ]


def _load(config: DiffusersConfig, device: str) -> Any:
    """A pipeline, ready to be called."""
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
        import transformers  # noqa: F401 - what most pipelines read prompts with
    except ImportError as error:
        raise MissingDependencyError(
            f"the diffusers editor needs diffusers and transformers ({error}): pip install 'dali-diffusemix[generate]'"
        ) from error
    return diffusers


@contextmanager
def _quiet(diffusers: Any) -> Iterator[None]:
    """Without the chatter of loading: what goes wrong is raised."""
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
    """Where a model's files are; those of the hub are fetched, safetensors and configs alone."""
    if Path(model).is_dir():
        if revision is not None:
            raise ConfigError(f"revision must be left out for a model in a folder, found {revision!r}.")
        return Path(model).absolute()
    if model.startswith(("/", ".", "~")) or model.count("/") != 1:
        raise ConfigError(
            f"model must be a folder or a hub id (owner/name), and else the editor is 'procedural'; found {model!r}, "
            "which is no folder."
        )
    _diffusers()
    from huggingface_hub import snapshot_download

    patterns = [f"*{ending}" for ending in _ENDINGS]
    # What is there is used as it is: no network is asked on a cluster's nodes.
    failure: Exception | None = None
    for local in (True, False):
        try:
            found = Path(snapshot_download(model, revision=revision, allow_patterns=patterns, local_files_only=local))
            if (found / "model_index.json").is_file():
                return found
        except Exception as error:  # of the network, of the hub, of the disk
            failure = error
    raise ConfigError(
        f"model: {model!r} is neither a folder nor to be had from the hub ({type(failure).__name__}: {failure}). Where "
        f"there is a network, `hf download {model}` fetches it; or give the folder of a copy."
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
    """Refuse what would run code: modules in the folder, and weights that are pickled."""
    for name, source in _model_index(folder).items():
        library = source[0] if isinstance(source, list) and source else None
        if isinstance(library, str) and library not in ("diffusers", "transformers") and library.endswith(".py"):
            raise ConfigError(f"model: {model!r} wants {library} to be run for its {name}; no code of a model is run.")
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
                f"model: {model!r} has pickled weights alone ({name}), which may run code when they are read; give one "
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
    """What a folder's model is: a hash of its files' names and contents."""
    whole = hashlib.sha256()
    for file in sorted(file for file in folder.rglob("*") if file.suffix in _ENDINGS):
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        whole.update(f"{file.relative_to(folder)}\0{digest}\n".encode())
    return f"sha256:{whole.hexdigest()}"
