"""From a model's files to a pipeline on a device, ready to be called."""

import importlib.util
import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Final

from dali_diffusemix.errors import ConfigError, MissingDependencyError
from dali_diffusemix.generate.editors.diffusers.adapters import Adapter, PipelineOptions
from dali_diffusemix.generate.editors.diffusers.files import Lora, require_diffusers

SCHEDULERS: Final[Mapping[str, tuple[str, Mapping[str, Any]]]] = {
    "euler-ancestral": ("EulerAncestralDiscreteScheduler", {}),  # as released
    "euler": ("EulerDiscreteScheduler", {}),
    "dpm-solver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    # What Qwen-Image-Lightning was distilled with: a constant shift of 3.
    "lightning": (
        "FlowMatchEulerDiscreteScheduler",
        {
            "shift": 1.0,
            "use_dynamic_shifting": True,
            "time_shift_type": "exponential",
            "base_shift": math.log(3),
            "max_shift": math.log(3),
            "base_image_seq_len": 256,
            "max_image_seq_len": 8192,
            "shift_terminal": None,
        },
    ),
}
"""Name to diffusers' class and its options; "default" is the model's own scheduler. A class of pipelines takes some."""

QUANTIZATIONS: Final[Mapping[str, str]] = {
    "torchao-int8": "torchao",
    "torchao-float8": "torchao",
    "bnb-8bit": "bitsandbytes",
    "bnb-4bit": "bitsandbytes",
}
"""Name to the package that it needs; the weights of the large components are stored in that precision."""


def check_packages(adapter: type[Adapter], *, lora: bool, quantize: str | None) -> None:
    """Raise MissingDependencyError if a package that a pipeline needs is not installed."""
    needs = {name: f"{adapter.pipeline} needs it" for name in adapter.packages}
    needs |= {"peft": "a LoRA needs it"} if lora else {}
    needs |= {QUANTIZATIONS[quantize]: f"quantize = {quantize!r} needs it"} if quantize is not None else {}
    for name, reason in needs.items():
        if importlib.util.find_spec(name) is None:
            raise MissingDependencyError(f"{name} is not installed, and {reason}; run `pip install {name}`.")


def load_pipeline(
    folder: Path,
    model: str,
    adapter: type[Adapter],
    options: PipelineOptions,
    device: str,
    *,
    lora: Lora | None,
    quantize: str | None,
    cache: float | None,
    compile: bool,
) -> Any:
    """Load a pipeline of an adapter's class onto a device.

    Raises:
        ConfigError: The files are not of such a pipeline, the LoRA is not one for it, or it cannot be quantized here.
        MissingDependencyError: A package that it needs is not installed.
    """
    diffusers = require_diffusers()
    import torch

    check_packages(adapter, lora=lora is not None, quantize=quantize)
    more: dict[str, Any] = {}
    if "safety_checker" in inspect.signature(getattr(diffusers, adapter.pipeline).__init__).parameters:
        more = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    # Quantized weights are put onto the current GPU as they are read.
    current: AbstractContextManager[Any] = nullcontext() if device == "cpu" else torch.cuda.device(device)
    with _quiet(diffusers), current:
        try:
            if quantize is not None:
                more["quantization_config"] = quantization(adapter, options, quantize)
            pipeline = getattr(diffusers, adapter.pipeline).from_pretrained(
                str(folder),
                dtype=getattr(torch, options.dtype),
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                **more,
            )
        except Exception as error:  # of many kinds
            raise ConfigError(
                f"model: {model!r} cannot be loaded as a {adapter.pipeline} of diffusers {diffusers.__version__}"
                f"{f' with quantize = {quantize!r}' if quantize else ''} ({type(error).__name__}: {error}); give one "
                f"that `{adapter.pipeline}.from_pretrained` loads."
            ) from error
        if lora is not None:
            _add_lora(pipeline, adapter, lora)
        if options.scheduler != "default":
            name, chosen = SCHEDULERS[options.scheduler]
            pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config, **chosen)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.to(device)
    denoiser = getattr(pipeline, adapter.denoiser)
    if adapter.in_batches:
        for module in (denoiser, pipeline.vae):
            module.to(memory_format=torch.channels_last)
    if cache is not None:
        denoiser.enable_cache(diffusers.FirstBlockCacheConfig(threshold=cache))
    if compile:
        denoiser.compile(mode="default", dynamic=False)
    return pipeline


def quantization(adapter: type[Adapter], options: PipelineOptions, name: str) -> Any:
    """diffusers' PipelineQuantizationConfig for one of `QUANTIZATIONS`, of the adapter's large components."""
    import diffusers
    import torch
    import transformers

    def config_of(library: Any) -> Any:
        if name.startswith("torchao"):
            from torchao import quantization as torchao

            kind = torchao.Int8WeightOnlyConfig if name == "torchao-int8" else torchao.Float8WeightOnlyConfig
            return library.TorchAoConfig(kind())
        if name == "bnb-8bit":
            return library.BitsAndBytesConfig(load_in_8bit=True)
        return library.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, options.dtype)
        )

    libraries = {part: transformers if part.startswith("text_encoder") else diffusers for part in adapter.large}
    return diffusers.PipelineQuantizationConfig(
        quant_mapping={part: config_of(library) for part, library in libraries.items()}
    )


def _add_lora(pipeline: Any, adapter: type[Adapter], lora: Lora) -> None:
    file = lora.found()
    try:
        pipeline.load_lora_weights(
            str(file.parent), weight_name=file.name, adapter_name="edit", local_files_only=True, use_safetensors=True
        )
        if "edit" not in pipeline.get_list_adapters().get(adapter.denoiser, ()):
            raise ValueError(f"it has no weights for the {adapter.denoiser}")
        pipeline.set_adapters(["edit"], [lora.scale])
    except Exception as error:  # of many kinds
        raise ConfigError(
            f"lora: {str(file)!r} cannot be added to a {adapter.pipeline} ({type(error).__name__}: {error}); give one "
            "that was made for this model."
        ) from error


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
