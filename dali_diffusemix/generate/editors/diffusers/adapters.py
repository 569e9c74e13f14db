"""Adapters: what a class of pipelines takes, and how it is called so that an edit depends on its own image only.

Pipelines of diffusers take a list of images in different senses: as a batch (Stable Diffusion), as references that
*every* edit sees (FLUX.2), or not at all (Qwen-Image-Edit-Plus). Some change the size or the aspect ratio of what they
are given. An adapter knows that of its class.
"""

import inspect
import math
import warnings
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dali_diffusemix.base.words import did_you_mean
from dali_diffusemix.errors import ConfigError
from dali_diffusemix.generate.editors import INSTRUCTION, TEMPLATE

DESCRIPTION: Final = "A picture in the style of {prompt}"
"""The result in words, for image to image."""

_EMBEDDINGS: Final = 2**28  # bytes of embeddings of prompts that are kept
_DIFFUSION: Final = ("euler-ancestral", "euler", "dpm-solver++", "unipc", "ddim", "lcm")


@dataclass(frozen=True, kw_only=True)
class PipelineOptions:
    """The options of a config, with the defaults of the model's class; None: the class does not take it."""

    steps: int
    template: str
    dtype: str
    scheduler: str = "default"
    guidance: float | None = None
    image_guidance: float | None = None
    strength: float | None = None
    negative_prompt: str | None = None


class Adapter:
    """Edits with the pipelines of one class.

    Args:
        pipeline: The loaded pipeline.
        options: How to call it.
    """

    pipeline: ClassVar[str]
    """The class's name in diffusers."""
    also: ClassVar[tuple[str, ...]] = ()
    """Text-to-image classes whose models it runs."""
    defaults: ClassVar[PipelineOptions]
    optional: ClassVar[frozenset[str]] = frozenset({"lora"})
    """Fields of a config that it takes and that have no default."""
    multiple: ClassVar[int] = 16
    """The divisor of both sides of an image, in pixels."""
    in_batches: ClassVar[bool] = False
    """It edits several images in a call, each by itself."""
    schedulers: ClassVar[tuple[str, ...]] = ()
    """Of `SCHEDULERS`, besides the model's own."""
    denoiser: ClassVar[str] = "transformer"
    large: ClassVar[tuple[str, ...]] = ("transformer", "text_encoder")
    """The components that are quantized."""
    packages: ClassVar[tuple[str, ...]] = ()
    """What it needs besides diffusers and transformers."""
    one_forward: ClassVar[bool] = False
    """A step is one call of the denoiser, and the pipeline gives the cache no context itself."""

    def __init__(self, pipeline: Any, options: PipelineOptions) -> None:
        self.loaded = pipeline
        self.options = options
        self._embedded: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._embedded_bytes = 0

    @classmethod
    def defaults_of(cls, index: Mapping[str, Any]) -> PipelineOptions:
        """The defaults for a model with this model_index.json."""
        return cls.defaults

    @classmethod
    def takes(cls, index: Mapping[str, Any]) -> frozenset[str]:
        """The fields of a config that not every class takes, and this one does."""
        defaults = cls.defaults_of(index)
        return cls.optional | {name for name in _SOME_TAKE if getattr(defaults, name, None) is not None}

    @classmethod
    def is_guided(cls, options: PipelineOptions) -> bool:
        """True if a negative prompt has an effect."""
        return (options.guidance or 0) > 1

    @classmethod
    def working_size(cls, height: int, width: int) -> tuple[int, int]:
        """(height, width) in which the class edits an image of this size; it is resized before and after."""
        return height, width

    def encode(self, images: Sequence[NDArray[np.uint8]]) -> Sequence[Any]:
        """The arguments of `make` for images, (height, width, 3) uint8 of one size; computed once for all prompts."""
        return [Image.fromarray(image) for image in images]

    def make(self, images: Sequence[Any], texts: Sequence[str], seeds: Sequence[int], height: int, width: int) -> Any:
        """Edits, a tensor of (n, 3, height, width) from 0 to 1: one per text.

        Args:
            images: For each edit, of `encode`; one unless it edits in batches.
            texts: The text of each.
            seeds: The seed of each.
            height: In pixels.
            width: In pixels.
        """
        (image,) = images
        return self._call(seeds, self._arguments(image, texts[0], height, width))

    def embedded(self, text: str) -> dict[str, Any]:
        """A text's embeddings as arguments of the pipeline's call; the latest are kept."""
        if text in self._embedded:
            self._embedded.move_to_end(text)
            return self._embedded[text]
        found = self._embedded[text] = self._embed(text)
        self._embedded_bytes += _bytes(found)
        while len(self._embedded) > 1 and self._embedded_bytes > _EMBEDDINGS:
            self._embedded_bytes -= _bytes(self._embedded.popitem(last=False)[1])
        return found

    def _embed(self, text: str) -> dict[str, Any]:
        return {"prompt": text}

    def _arguments(self, image: Any, text: str, height: int, width: int) -> dict[str, Any]:
        """Of the call of a class that edits one image at a time."""
        return {**self.embedded(text), "image": image, "height": height, "width": width}

    def _call(self, seeds: Sequence[int], arguments: Mapping[str, Any]) -> Any:
        """Call the pipeline; returns its images."""
        import torch

        # On the CPU, so that the noise is the same for every device.
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        denoiser = getattr(self.loaded, self.denoiser)
        context: AbstractContextManager[Any] = nullcontext()
        if getattr(denoiser, "is_cache_enabled", False):
            denoiser._reset_stateful_cache()  # an edit that failed leaves its state
            if self.one_forward:
                context = denoiser.cache_context("cond")
        with context:
            return self.loaded(
                **arguments,
                num_inference_steps=self.options.steps,
                generator=generators if self.in_batches else generators[0],
                output_type="pt",
            ).images


# In batches ----------------------------------------------------------------------------------------------------------


class _StableDiffusion(Adapter, ABC):
    optional = frozenset({"lora", "negative_prompt"})
    multiple = 8
    in_batches = True
    schedulers = _DIFFUSION
    denoiser = "unet"
    large = ("unet",)

    def make(self, images: Sequence[Any], texts: Sequence[str], seeds: Sequence[int], height: int, width: int) -> Any:
        import torch

        embeddings = [self.embedded(text) for text in texts]
        stacked = {name: torch.cat([one[name] for one in embeddings]) for name in embeddings[0]}
        return self._call(seeds, {**stacked, **self._others(images, height, width)})

    @abstractmethod
    def _others(self, images: Sequence[Any], height: int, width: int) -> dict[str, Any]:
        """The arguments besides the embeddings."""


class _PooledEmbeddings(_StableDiffusion):
    """SDXL: two text encoders, one of which gives an embedding of the whole text."""

    def _embed(self, text: str) -> dict[str, Any]:
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        values = self.loaded.encode_prompt(
            text,
            device=self.loaded.device,
            do_classifier_free_guidance=True,
            negative_prompt=self.options.negative_prompt,
        )
        return dict(zip(names, values, strict=True))


class InstructPix2PixAdapter(_StableDiffusion):
    """InstructPix2Pix: an image goes through the VAE once for all its prompts."""

    pipeline = "StableDiffusionInstructPix2PixPipeline"
    defaults = PipelineOptions(
        steps=100,  # as released; 20 do for dpm-solver++
        scheduler="euler-ancestral",
        guidance=4.0,
        image_guidance=1.5,
        template=TEMPLATE,
        dtype="float16",
    )

    @classmethod
    def is_guided(cls, options: PipelineOptions) -> bool:
        return (options.guidance or 0) > 1 and (options.image_guidance or 0) >= 1

    def encode(self, images: Sequence[NDArray[np.uint8]]) -> Sequence[Any]:
        import torch

        pipeline = self.loaded
        pixels = torch.from_numpy(np.stack(images)).to(pipeline.device)
        pixels = pixels.permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1
        dtype = next(pipeline.unet.parameters()).dtype
        encoded = pipeline.prepare_image_latents(pixels, len(images), 1, dtype, pipeline.device, False)
        if getattr(pipeline, "is_cosxl_edit", False):  # the call multiplies once more
            encoded = encoded / pipeline.vae.config.scaling_factor
        return tuple(encoded.split(1))

    def _embed(self, text: str) -> dict[str, Any]:
        # The three parts are prompt, negative and negative again; the call takes the first two.
        embedded = self.loaded._encode_prompt(text, self.loaded.device, 1, True, self.options.negative_prompt)
        return {"prompt_embeds": embedded[:1], "negative_prompt_embeds": embedded[1:2]}

    def _others(self, images: Sequence[Any], height: int, width: int) -> dict[str, Any]:
        import torch

        return {
            "image": torch.cat(list(images)),
            "guidance_scale": self.options.guidance,
            "image_guidance_scale": self.options.image_guidance,
        }


class InstructPix2PixXLAdapter(_PooledEmbeddings, InstructPix2PixAdapter):
    """InstructPix2Pix of SDXL."""

    pipeline = "StableDiffusionXLInstructPix2PixPipeline"

    def _others(self, images: Sequence[Any], height: int, width: int) -> dict[str, Any]:
        return {**super()._others(images, height, width), "height": height, "width": width}


class ImageToImageAdapter(_StableDiffusion):
    """Image to image of Stable Diffusion: the image with noise is denoised under a description."""

    pipeline = "StableDiffusionImg2ImgPipeline"
    also = ("StableDiffusionPipeline",)
    defaults = PipelineOptions(steps=50, guidance=7.5, strength=0.6, template=DESCRIPTION, dtype="float16")

    def _embed(self, text: str) -> dict[str, Any]:
        values = self.loaded.encode_prompt(text, self.loaded.device, 1, True, self.options.negative_prompt)
        return dict(zip(("prompt_embeds", "negative_prompt_embeds"), values, strict=True))

    def _others(self, images: Sequence[Any], height: int, width: int) -> dict[str, Any]:
        return {
            "image": list(images),
            "guidance_scale": self.options.guidance,
            "strength": self.options.strength,
        }


class ImageToImageXLAdapter(_PooledEmbeddings, ImageToImageAdapter):
    """Image to image of SDXL."""

    pipeline = "StableDiffusionXLImg2ImgPipeline"
    also = ("StableDiffusionXLPipeline",)
    defaults = PipelineOptions(steps=50, guidance=5.0, strength=0.6, template=DESCRIPTION, dtype="float16")


# One image at a time -------------------------------------------------------------------------------------------------


class Flux2Adapter(Adapter):
    """FLUX.2: takes a list of images as references for every edit, so it is given one.

    It refuses sides under 64 pixels and panoramas longer than 8 to 1: they are edited in the nearest size it takes.
    """

    pipeline = "Flux2Pipeline"
    defaults = PipelineOptions(steps=50, guidance=4.0, template=INSTRUCTION, dtype="bfloat16")
    packages: ClassVar[tuple[str, ...]] = ("torchvision",)  # for its tokenizer's class

    @classmethod
    def working_size(cls, height: int, width: int) -> tuple[int, int]:
        short, long = sorted((height, width))
        short = max(short, math.ceil(long / 8 / cls.multiple) * cls.multiple)
        if short < 64:
            short, long = 64, round(long * 64 / short / cls.multiple) * cls.multiple
        return (short, long) if height <= width else (long, short)

    def encode(self, images: Sequence[NDArray[np.uint8]]) -> Sequence[Any]:
        return [self._reference(Image.fromarray(image)) for image in images]

    def _reference(self, image: Image.Image) -> Image.Image:
        """The image as the pipeline wants to see it: up to a megapixel; otherwise it would cut its edges off."""
        scale = min(1.0, math.sqrt(2**20 / (image.width * image.height)))
        width, height = (max(1, int(side * scale / 16)) * 16 for side in image.size)
        return image if scale == 1 else image.resize((width, height), Image.Resampling.BICUBIC)

    def _embed(self, text: str) -> dict[str, Any]:
        return {"prompt_embeds": self.loaded.encode_prompt(text)[0]}

    def _arguments(self, image: Any, text: str, height: int, width: int) -> dict[str, Any]:
        return {**super()._arguments(image, text, height, width), "guidance_scale": self.options.guidance}


class Flux2KleinAdapter(Flux2Adapter):
    """FLUX.2 klein; the distilled models need no guidance."""

    pipeline = "Flux2KleinPipeline"
    defaults = PipelineOptions(steps=50, guidance=4.0, template=INSTRUCTION, dtype="bfloat16")
    distilled: ClassVar[PipelineOptions] = PipelineOptions(steps=4, template=INSTRUCTION, dtype="bfloat16")
    packages = ()

    @classmethod
    def defaults_of(cls, index: Mapping[str, Any]) -> PipelineOptions:
        return cls.distilled if index.get("is_distilled") else cls.defaults

    def __init__(self, pipeline: Any, options: PipelineOptions) -> None:
        super().__init__(pipeline, options)
        self._nothing: dict[str, Any] = {}  # the embedding of an empty text, for guidance

    def _embed(self, text: str) -> dict[str, Any]:
        if self.is_guided(self.options) and not self._nothing:
            self._nothing["negative_prompt_embeds"] = self.loaded.encode_prompt("")[0]
        return {**super()._embed(text), **self._nothing}

    def _arguments(self, image: Any, text: str, height: int, width: int) -> dict[str, Any]:
        arguments = super()._arguments(image, text, height, width)
        return {**arguments, "guidance_scale": self.options.guidance or 1.0}


class Flux2KleinKVAdapter(Flux2Adapter):
    """FLUX.2 klein that looks at the image in the first step only; distilled."""

    pipeline = "Flux2KleinKVPipeline"
    defaults = PipelineOptions(steps=4, template=INSTRUCTION, dtype="bfloat16")
    packages = ()

    def _arguments(self, image: Any, text: str, height: int, width: int) -> dict[str, Any]:
        return Adapter._arguments(self, image, text, height, width)


class FluxKontextAdapter(Adapter):
    """FLUX.1 Kontext: left to itself it answers in the nearest of its own sizes, of a megapixel."""

    pipeline = "FluxKontextPipeline"
    defaults = PipelineOptions(steps=28, guidance=2.5, template=INSTRUCTION, dtype="bfloat16")
    optional = frozenset({"lora", "cache"})
    large = ("transformer", "text_encoder_2")
    one_forward = True

    def _embed(self, text: str) -> dict[str, Any]:
        embeddings, pooled, _ = self.loaded.encode_prompt(text, None)
        return {"prompt_embeds": embeddings, "pooled_prompt_embeds": pooled}

    def _arguments(self, image: Any, text: str, height: int, width: int) -> dict[str, Any]:
        return {
            **super()._arguments(image, text, height, width),
            "guidance_scale": self.options.guidance,
            "max_area": height * width,
            "_auto_resize": False,
        }


class QwenImageEditAdapter(Adapter):
    """Qwen-Image-Edit: guided by a negative prompt; with a Lightning LoRA guidance is 1, and there is none.

    The model sees the image resized to a megapixel, and its text encoder sees it too.
    """

    pipeline = "QwenImageEditPipeline"
    defaults = PipelineOptions(steps=50, guidance=4.0, negative_prompt=" ", template=INSTRUCTION, dtype="bfloat16")
    optional = frozenset({"lora", "cache", "negative_prompt"})
    schedulers = ("lightning",)
    packages = ("torchvision",)

    def _arguments(self, image: Any, text: str, height: int, width: int) -> dict[str, Any]:
        guided = self.is_guided(self.options)
        return {
            **super()._arguments(image, text, height, width),
            "true_cfg_scale": self.options.guidance,
            "negative_prompt": self.options.negative_prompt if guided else None,
        }


class QwenImageEditPlusAdapter(QwenImageEditAdapter):
    """Qwen-Image-Edit 2509 and later."""

    pipeline = "QwenImageEditPlusPipeline"
    defaults = PipelineOptions(steps=40, guidance=4.0, negative_prompt=" ", template=INSTRUCTION, dtype="bfloat16")


class DreamLiteAdapter(Adapter):
    """DreamLite: edit and image side by side, guided by both."""

    pipeline = "DreamLitePipeline"
    defaults = PipelineOptions(steps=30, guidance=3.5, image_guidance=1.5, template=INSTRUCTION, dtype="bfloat16")
    optional = frozenset({"negative_prompt"})
    denoiser = "unet"
    large = ("unet", "text_encoder")
    packages = ("torchvision",)

    @classmethod
    def is_guided(cls, options: PipelineOptions) -> bool:
        return True

    def _arguments(self, image: Any, text: str, height: int, width: int) -> dict[str, Any]:
        return {
            **super()._arguments(image, text, height, width),
            "guidance_scale": self.options.guidance,
            "image_guidance_scale": self.options.image_guidance,
            "negative_prompt": self.options.negative_prompt,
        }


class DreamLiteMobileAdapter(Adapter):
    """DreamLite, distilled: no guidance."""

    pipeline = "DreamLiteMobilePipeline"
    defaults = PipelineOptions(steps=4, template=INSTRUCTION, dtype="bfloat16")
    optional = frozenset()
    denoiser = "unet"
    large = ("unet", "text_encoder")
    packages = ("torchvision",)


class ZImageAdapter(Adapter):
    """Image to image of Z-Image; the defaults are for the Turbo model."""

    pipeline = "ZImageImg2ImgPipeline"
    also = ("ZImagePipeline",)
    defaults = PipelineOptions(steps=8, guidance=0.0, strength=0.6, template=DESCRIPTION, dtype="bfloat16")
    optional = frozenset({"lora", "negative_prompt"})

    @classmethod
    def is_guided(cls, options: PipelineOptions) -> bool:
        return (options.guidance or 0) > 0

    def _embed(self, text: str) -> dict[str, Any]:
        values = self.loaded.encode_prompt(
            text,
            do_classifier_free_guidance=self.is_guided(self.options),
            negative_prompt=self.options.negative_prompt,
        )
        return dict(zip(("prompt_embeds", "negative_prompt_embeds"), values, strict=True))

    def _arguments(self, image: Any, text: str, height: int, width: int) -> dict[str, Any]:
        return {
            **super()._arguments(image, text, height, width),
            "guidance_scale": self.options.guidance,
            "strength": self.options.strength,
        }


class SanaSprintAdapter(Adapter):
    """Image to image of Sana-Sprint. At diffusers' default of two steps and strength 0.6 it would not see the image."""

    pipeline = "SanaSprintImg2ImgPipeline"
    also = ("SanaSprintPipeline",)
    defaults = PipelineOptions(steps=4, guidance=4.5, strength=0.5, template=DESCRIPTION, dtype="bfloat16")
    multiple = 32

    def _embed(self, text: str) -> dict[str, Any]:
        parameters = inspect.signature(type(self.loaded).__call__).parameters
        instruction = parameters["complex_human_instruction"].default
        values = self.loaded.encode_prompt(text, complex_human_instruction=instruction)
        return dict(zip(("prompt_embeds", "prompt_attention_mask"), values, strict=True))

    def _arguments(self, image: Any, text: str, height: int, width: int) -> dict[str, Any]:
        arguments = {
            **super()._arguments(image, text, height, width),
            "guidance_scale": self.options.guidance,
            "strength": self.options.strength,
            "use_resolution_binning": False,  # to one of its own sizes, whose edges it would cut off
        }
        # A time between two steps, which it refuses for other numbers of them.
        return arguments if self.options.steps == 2 else {**arguments, "intermediate_timesteps": None}

    def _call(self, seeds: Sequence[int], arguments: Mapping[str, Any]) -> Any:
        import torch

        with warnings.catch_warnings():
            # If its VAE runs out of memory, the pipeline warns, and goes on without an image.
            warnings.filterwarnings("error", "(?s).*VAE tiling")
            try:
                return super()._call(seeds, arguments)
            except UserWarning as warning:
                if isinstance(warning.__context__, torch.OutOfMemoryError):
                    raise warning.__context__ from None
                raise


_SOME_TAKE: Final = ("guidance", "image_guidance", "strength", "negative_prompt", "lora", "cache")

_EVERY: Final[tuple[type[Adapter], ...]] = (
    InstructPix2PixAdapter,
    InstructPix2PixXLAdapter,
    Flux2KleinAdapter,
    Flux2KleinKVAdapter,
    Flux2Adapter,
    FluxKontextAdapter,
    QwenImageEditAdapter,
    QwenImageEditPlusAdapter,
    DreamLiteAdapter,
    DreamLiteMobileAdapter,
    ZImageAdapter,
    SanaSprintAdapter,
    ImageToImageAdapter,
    ImageToImageXLAdapter,
)

ADAPTERS: Final[Mapping[str, type[Adapter]]] = {
    name: adapter for adapter in _EVERY for name in (adapter.pipeline, *adapter.also)
}
"""The class in a model_index.json to its adapter."""


def adapter_of(model: str, index: Mapping[str, Any]) -> type[Adapter]:
    """The adapter for a model with this model_index.json.

    Raises:
        ConfigError: Its class is not known.
    """
    name = index.get("_class_name")
    if isinstance(name, str) and name in ADAPTERS:
        return ADAPTERS[name]
    raise ConfigError(
        f"model: {model!r} must be a pipeline of a class that can edit images here, found {name}; these are "
        f"{', '.join(ADAPTERS)}. For another one write an editor of your own."
    )


def options_of(adapter: type[Adapter], index: Mapping[str, Any], given: Mapping[str, Any]) -> PipelineOptions:
    """The options for a model: the ones given (None: not given), and the defaults of its class.

    Raises:
        ConfigError: The class does not take one of them, or it would have no effect.
    """
    takes = adapter.takes(index)
    for name in _SOME_TAKE:
        if given.get(name) is not None and name not in takes:
            raise ConfigError(
                f"{name} must be left out for {adapter.pipeline}, which does not take it, found {given[name]!r}; it "
                f"takes {', '.join(each for each in _SOME_TAKE if each in takes) or 'none of its like'}."
            )
    defaults = adapter.defaults_of(index)
    values = {name: getattr(defaults, name) for name in PipelineOptions.__dataclass_fields__}
    values |= {name: given[name] for name in values if given.get(name) is not None}
    options = PipelineOptions(**values)
    known = ("default", *adapter.schedulers)
    if options.scheduler not in known:
        raise ConfigError(
            f"scheduler must be one of {list(known)} for {adapter.pipeline}, found {options.scheduler!r}"
            f"{did_you_mean(options.scheduler, known)}"
        )
    if options.strength is not None:
        made = options.steps * options.strength
        if int(made) < 1 or int(options.steps - made) < 1:
            raise ConfigError(
                f"strength must be such that of {options.steps} steps at least one is made and one is left out: "
                f"otherwise nothing is edited, or the image is not seen; found {options.strength}. Change it, or steps."
            )
    if not adapter.is_guided(options):
        if given.get("negative_prompt") is not None:
            raise ConfigError(
                f"negative_prompt must be left out where there is no guidance, found {given['negative_prompt']!r} "
                f"beside guidance = {options.guidance}."
            )
        options = PipelineOptions(**{**values, "negative_prompt": None})
    return options


def _bytes(value: Any) -> int:
    """The size of embeddings."""
    if isinstance(value, Mapping):
        return sum(map(_bytes, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(_bytes, value))
    return len(value) if isinstance(value, str) else int(value.nbytes)
