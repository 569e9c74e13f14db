"""The similarity of an edit to its original, by the image part of a CLIP model; transformers is imported only here."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dali_diffusemix.errors import ConfigError, MissingDependencyError
from dali_diffusemix.generate.editors.diffusers.files import fetched, is_hub_id, revision_of

__all__ = ["ClipSimilarity"]

_ENDINGS: Final = (".json", ".txt", ".safetensors")  # of a model's files


class ClipSimilarity:
    """The cosine of the angle between CLIP's features of an original and of its edit, -1 to 1.

    On a GPU if there is one. Any model of transformers with `get_image_features` will do, such as SigLIP.

    Args:
        model: Hub id, or the folder of a saved model and its image processor, with safetensors.

    Raises:
        ConfigError: There is no such model, its weights are not safetensors, or it has no image features.
        MissingDependencyError: transformers is not installed.
    """

    model: str  # hub id, or the folder's name
    revision: str  # commit, or a hash of the folder's files

    def __init__(self, model: str) -> None:
        transformers = _transformers()
        import torch

        folder = _folder(model)
        _check_files(folder, model)
        is_folder = Path(model).is_dir()
        self.model = folder.name if is_folder else model
        self.revision = revision_of(folder) if is_folder else folder.name
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            self._processor = transformers.AutoImageProcessor.from_pretrained(str(folder), **options)
            loaded = transformers.AutoModel.from_pretrained(str(folder), use_safetensors=True, **options)
        except Exception as error:  # of many kinds
            raise ConfigError(
                f"scorer: clip:{model} cannot be loaded by transformers {transformers.__version__} "
                f"({type(error).__name__}: {error}); give a CLIP model with its image processor, such as "
                "openai/clip-vit-large-patch14."
            ) from error
        if not hasattr(loaded, "get_image_features"):
            raise ConfigError(
                f"scorer: clip:{model} must have image features as CLIP has, found {type(loaded).__name__}; give a "
                "CLIP or SigLIP model."
            )
        self._network = loaded.eval().to(self._device)

    def __call__(
        self, originals: Sequence[NDArray[np.uint8]], edits: Sequence[NDArray[np.uint8]], labels: Sequence[str]
    ) -> NDArray[np.float32]:
        """The similarities of n pairs, (n,) float32; images are (height, width, 3) uint8. Labels do not matter."""
        import torch

        # An original stands beside each of its edits: its features are computed once.
        places: dict[int, int] = {}
        images: list[NDArray[np.uint8]] = []
        for image in (*originals, *edits):
            if id(image) not in places:
                places[id(image)] = len(images)
                images.append(image)
        with torch.inference_mode():
            pixels = self._processor(images=images, return_tensors="pt", input_data_format="channels_last")
            found = self._network.get_image_features(pixel_values=pixels["pixel_values"].to(self._device))
            found = found if isinstance(found, torch.Tensor) else found.pooler_output
            features = torch.nn.functional.normalize(found.float(), dim=1).cpu().numpy()
        ours, theirs = ([places[id(image)] for image in group] for group in (originals, edits))
        return np.asarray((features[ours] * features[theirs]).sum(axis=1), np.float32)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingDependencyError(
            f"clip:MODEL needs transformers ({error}); run `pip install 'dali-diffusemix[generate]'`."
        ) from error
    return transformers


def _folder(model: str) -> Path:
    """The folder of a model's files; from the hub, only safetensors and configs are fetched."""
    if Path(model).is_dir():
        return Path(model).absolute()
    if not is_hub_id(model):
        raise ConfigError(
            f"scorer: clip:MODEL must be a folder or a hub id (owner/name), found {model!r}, which is no folder; write "
            "clip:openai/clip-vit-large-patch14."
        )
    from huggingface_hub import snapshot_download

    patterns = [f"*{ending}" for ending in _ENDINGS]
    return fetched(
        lambda local: Path(snapshot_download(model, allow_patterns=patterns, local_files_only=local)),
        lambda folder: (folder / "config.json").is_file(),
        f"scorer: clip:{model} is neither a folder nor",
        f"hf download {model}",
    )


def _check_files(folder: Path, model: str) -> None:
    """Refuse models that would run code, or whose weights are pickled."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        own_code = "auto_map" in config
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"scorer: clip:{model} must be a saved model with a config.json ({error}).") from error
    if own_code or any(folder.glob("*.py")):
        raise ConfigError(
            f"scorer: clip:{model} brings code of its own, and no code of a model is run; use one of transformers' own "
            "classes."
        )
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"scorer: clip:{model} must have its weights as safetensors, found none; pickled ones may run code when "
            "they are read. Some models have them in another revision: `hf download` it and give the folder."
        )
