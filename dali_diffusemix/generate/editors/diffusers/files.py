"""The files of models and LoRAs: found in a folder, in the hub's cache or on the hub; checked; hashed."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from dali_diffusemix.base.words import did_you_mean
from dali_diffusemix.errors import ConfigError, MissingDependencyError

_ENDINGS: Final = (".json", ".txt", ".model", ".jinja", ".safetensors")  # of a model's files
_LEFT_OUT: Final = ("safety_checker", "feature_extractor")  # components that are not loaded


def require_diffusers() -> Any:
    """The module. Raises MissingDependencyError."""
    try:
        import diffusers

        import_module("transformers")  # most pipelines need it for prompts
    except ImportError as error:
        raise MissingDependencyError(
            f"the diffusers editor needs diffusers and transformers ({error}); run `pip install "
            "'dali-diffusemix[generate]'`."
        ) from error
    return diffusers


# Models --------------------------------------------------------------------------------------------------------------


@lru_cache(8)
def folder_of(model: str, revision: str | None) -> Path:
    """The folder of a model's files; from the hub, only safetensors and configs of its components are fetched.

    Raises:
        ConfigError: There is no such model.
        MissingDependencyError: It is a hub id, and diffusers or transformers is not installed.
    """
    if Path(model).is_dir():
        if revision is not None:
            raise ConfigError(f"revision must be left out for a model in a folder, found {revision!r}.")
        return Path(model).absolute()
    if not is_hub_id(model):
        raise ConfigError(
            f"model must be a folder or a hub id (owner/name), unless the editor is 'procedural'; found {model!r}, "
            f"which is no folder{did_you_mean(model, ['procedural'])}"
        )
    require_diffusers()
    from huggingface_hub import hf_hub_download, snapshot_download

    def of_components(local: bool) -> Path:
        index = Path(hf_hub_download(model, "model_index.json", revision=revision, local_files_only=local))
        parts = components(read_index(index.parent))
        patterns = ["model_index.json", *(f"{name}/*{ending}" for name in parts for ending in _ENDINGS)]
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns, local_files_only=local))

    # A local copy is used as it is: a cluster's nodes need no network.
    return fetched(of_components, _is_whole, f"model: {model!r} is neither a folder nor", f"hf download {model}")


def local_index(model: str, revision: str | None) -> dict[str, Any] | None:
    """A model's model_index.json if it is on this machine; else None. Reads no network."""
    if Path(model).is_dir():
        folder = Path(model)
    else:
        try:
            from huggingface_hub import try_to_load_from_cache
        except ImportError:
            return None
        if not is_hub_id(model):
            return None
        found = try_to_load_from_cache(model, "model_index.json", revision=revision)
        if not isinstance(found, str):
            return None
        folder = Path(found).parent
    with suppress(ConfigError):
        return read_index(folder)
    return None


def read_index(folder: Path) -> dict[str, Any]:
    """A model's model_index.json. Raises ConfigError."""
    file = folder / "model_index.json"
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(index, dict):
            return index
        error: Exception = ValueError("no object")
    except (OSError, ValueError) as caught:
        error = caught
    raise ConfigError(f"model: {str(folder)!r} must be a saved pipeline with a model_index.json ({error}).") from error


def components(index: Mapping[str, Any]) -> list[str]:
    """The names of the components that a model_index.json names, and that are loaded."""
    return [
        name
        for name, source in index.items()
        if isinstance(source, list) and source and source[0] is not None and name not in (*_LEFT_OUT, "_class_name")
    ]


def _is_whole(folder: Path) -> bool:
    """False if a download was interrupted: a component is missing, or a part of its weights."""
    try:
        folders = [folder / name for name in components(read_index(folder))]
        for listing in (file for part in folders for file in part.glob("*.safetensors.index.json")):
            parts = set(json.loads(listing.read_text(encoding="utf-8"))["weight_map"].values())
            if not all((listing.parent / part).is_file() for part in parts):
                return False
    except (ConfigError, OSError, ValueError, KeyError, AttributeError):
        return False
    return all(part.is_dir() for part in folders)


def fetched(fetch: Callable[[bool], Path], is_whole: Callable[[Path], bool], problem: str, remedy: str) -> Path:
    """The path that `fetch` finds in the hub's cache, else on the hub; `problem` and `remedy` are for the message."""
    failure: Exception | None = None
    for local in (True, False):
        try:
            if is_whole(found := fetch(local)):
                return found
            failure = FileNotFoundError(f"parts of it are missing in {found}")
        except Exception as error:  # of the network, of the hub, of the disk
            failure = error
    raise ConfigError(
        f"{problem} available from the hub ({type(failure).__name__}: {failure}). On a machine with a network, "
        f"`{remedy}` fetches it; or give the folder of a copy."
    ) from failure


def is_hub_id(name: str) -> bool:
    """True for owner/name, and not for a path."""
    return not name.startswith(("/", ".", "~")) and name.count("/") == 1


def check_files(folder: Path, model: str) -> None:
    """Refuse models that would run code: modules in the folder, and pickled weights. Raises ConfigError."""
    for name, source in read_index(folder).items():
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
def revision_of(folder: Path) -> str:
    """The revision of a model in a folder: a hash of its files' names and contents."""
    whole = hashlib.sha256()
    for file in sorted(file for file in folder.rglob("*") if file.suffix in _ENDINGS):
        whole.update(f"{file.relative_to(folder)}\0{_sha256(file)}\n".encode())
    return f"sha256:{whole.hexdigest()}"


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# LoRAs ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Lora:
    """A LoRA as a config names it: `NAME[:FILE][@SCALE]`, where NAME is a file, a folder or a hub id."""

    name: str
    file: str | None
    scale: float

    @classmethod
    def parse(cls, text: str) -> "Lora":
        """Take it from its text. Raises ConfigError."""
        name, at, number = text.rpartition("@")
        scale = 1.0
        if at and not Path(text).exists():
            try:
                scale = float(number)
            except ValueError:
                name = text  # an @ of the name
        else:
            name = text
        if not math.isfinite(scale) or scale == 0:
            raise ConfigError(f"lora: its scale must be a number other than 0, found {number!r} in {text!r}.")
        colon = file = ""
        if not Path(name).exists():
            name, colon, file = name.partition(":")
        if not name or (colon and not file):
            raise ConfigError(f"lora must be a file, folder or hub id, as NAME[:FILE][@SCALE]; found {text!r}.")
        return cls(name=name, file=file or None, scale=scale)

    def found(self) -> Path:
        """The file, fetched from the hub if need be. Raises ConfigError."""
        return _lora_file(self.name, self.file)

    def settings(self) -> dict[str, str | float]:
        """The settings that an edit store records: a local file may be moved. Raises ConfigError."""
        file = self.found()
        shown = file.name if Path(self.name).exists() else f"{self.name}:{self.file or _LORA}"
        return {
            "lora": shown,
            "lora_revision": f"sha256:{_hash(file, file.stat().st_mtime_ns)}",
            "lora_scale": self.scale,
        }


_LORA: Final = "pytorch_lora_weights.safetensors"  # as `save_lora_weights` names it


@lru_cache(8)
def _lora_file(name: str, file: str | None) -> Path:
    path = Path(name)
    if path.is_file() and file is None:
        found = path
    elif path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        if file is None and len(files) != 1:
            raise ConfigError(
                f"lora: {name!r} must hold one file of safetensors, found {len(files)}; name one as {name}:FILE."
            )
        found = path / file if file is not None else files[0]
    elif is_hub_id(name):
        require_diffusers()
        from huggingface_hub import hf_hub_download

        def fetch(local: bool) -> Path:
            return Path(hf_hub_download(name, file or _LORA, local_files_only=local))

        found = fetched(
            fetch, Path.is_file, f"lora: {file or _LORA} of {name!r} is not", f"hf download {name} {file or _LORA}"
        )
    else:
        found = path
    if found.suffix != ".safetensors" or not found.is_file():
        raise ConfigError(
            "lora must be a file of safetensors, a folder with one, or a hub id (owner/name:FILE); found "
            f"{str(found)!r}{'' if found.is_file() else ', which is no file'}."
        )
    return found.absolute()


@lru_cache(8)
def _hash(file: Path, changed: int) -> str:
    """Of a file's content; `changed` is its time of change."""
    return _sha256(file)
