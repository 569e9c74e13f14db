"""Export of originals and edits as an ImageFolder, for other loaders; or of images mixed once, as in the released code.

out/ants/0013035.jpg                     the original, unchanged
         0013035.jpg.autumn.0.jpg        its edit under a prompt; the variant
         0013035.jpg.autumn.0.mixed.jpg  with `mixed`, instead of the edit: original, edit and fractal

ImageFolder lists files by their endings, and file systems take names of 255 bytes: an original with an ending that
ImageFolder does not list gets that of its format (scan.jfif.jpg), and a name that is too long is cut, with a hash of
its path.
"""

import functools
import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dali_diffusemix.base.cpus import cpus
from dali_diffusemix.base.workers import Workers
from dali_diffusemix.errors import ConfigError, DecodeError
from dali_diffusemix.images.codec import encode, encode_as
from dali_diffusemix.images.formats import format_of
from dali_diffusemix.loading.dataset import DiffuseMixDataset, decode_edit
from dali_diffusemix.plan.crops import EvalCrop
from dali_diffusemix.plan.spec import MixSpec
from dali_diffusemix.store import EditStore, OriginalStore

__all__ = ["Exported", "export"]

_BATCH = 64  # images written at once
# Endings that torchvision's ImageFolder lists, and the ending that each format gets otherwise.
_LISTED = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_ENDINGS = {"JPEG": ".jpg", "PNG": ".png", "BMP": ".bmp", "TIFF": ".tif", "PPM": ".ppm", "WEBP": ".webp"}


@dataclass(frozen=True, kw_only=True)
class Exported:
    """Counts of what was written."""

    originals: int
    edits: int
    kind: str  # "edits" or "mixed images"
    left_out: int  # originals and edits that could not be read or decoded


def export(
    root: str | os.PathLike[str],
    store: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    mixed: bool = False,
    fractals: str | os.PathLike[str] | None = None,
    size: int = 256,
    seed: int = 0,
    quality: int = 95,
    progress: Callable[[int, int], None] | None = None,
) -> Exported:
    """Write originals and accepted edits as an ImageFolder.

    Args:
        root: The folder of originals, or a packed store.
        store: The edit store.
        out: A folder that is new or empty.
        mixed: Mix edits with their originals and fractals, by `MixSpec.release()`, with whole images squashed to a
            square. The result is one epoch; training on it repeats the same images.
        fractals: The fractal bank, for mixing.
        size: Side length of a mixed image in pixels.
        seed: Seed of the mixing.
        quality: JPEG quality of mixed images, 1 to 100; other files are copied.
        progress: Called with the number of images done, and of all images.

    Raises:
        ConfigError: `out` is not empty or cannot be written, or arguments do not fit together.
        StoreError, CatalogError: Originals, store or bank cannot be used.
    """
    out = Path(out).absolute()
    if mixed != (fractals is not None):
        raise ConfigError(f"fractals must be given for mixed images and only for them, found {fractals!r}.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"out must be a new or an empty folder, found {str(out)!r}; name another.")
    if not 1 <= quality <= 100:
        raise ConfigError(f"quality must lie in 1 to 100, found {quality}.")
    whole = EvalCrop(size, resize=(size, size))
    mix = MixSpec.release() if mixed else None
    # Without normalisation: the samples are written as images.
    dataset = DiffuseMixDataset(
        root, edits=store, fractals=fractals, mix=mix, crop=whole, normalize=None, seed=seed, on_error="raise"
    )
    edits = dataset.store
    assert edits is not None
    count, total = len(dataset.catalog), len(dataset.catalog) + len(edits)

    def write(index: int) -> bool:
        """Write an original, or one of the edits, which follow them."""
        try:
            if index < count:
                _write_original(dataset, index, names)
            else:
                edit = index - count
                original = int(edits.originals_of(np.array([edit]))[0])
                if mixed:
                    data, ending = encode(_bytes_of(dataset, index), quality), ".mixed.jpg"
                else:
                    data, ending = _file_of(edits, edit, decode_edit(edits, edit))
                suffix = f".{edits.slug_of(edit)}.{edits.variant_of(edit)}{ending}"
                _write(names.of(original, suffix), data)
        except DecodeError:
            return False
        return True

    done = np.zeros(total, bool)
    try:
        out.mkdir(parents=True, exist_ok=True)
        names = _Names(dataset, out)
        with Workers(cpus(), "dali-diffusemix-export") as pool:
            for start in range(0, total, _BATCH):
                indices = range(start, min(total, start + _BATCH))
                done[start : indices.stop] = list(pool.map(write, indices))
                if progress is not None:
                    progress(indices.stop, total)
    except OSError as error:
        raise ConfigError(
            f"out must be a folder that can be written, found {str(out)!r}: {error}; name another."
        ) from error
    return Exported(
        originals=int(done[:count].sum()),
        edits=int(done[count:].sum()),
        kind="mixed images" if mixed else "edits",
        left_out=int((~done).sum()),
    )


class _Names:
    """Distinct names of files that ImageFolder lists, in the folders of their classes.

    Each name depends only on the catalog, so that threads may ask for them in any order.
    """

    def __init__(self, dataset: DiffuseMixDataset, out: Path) -> None:
        self._catalog = dataset.catalog
        self._out = out
        self._most = os.pathconf(out, "PC_NAME_MAX")  # bytes

    def of(self, original: int, suffix: str, *, needed: bool = True) -> Path:
        """Return the path of a file that is named after an original.

        Args:
            original: A row of the catalog.
            suffix: The end of the name.
            needed: Always add the suffix; if False, only to a name that ImageFolder does not list.
        """
        path = self._catalog.path(original)
        name = self._catalog.classes[int(self._catalog.labels[original])]
        # A layout may have all images in one folder; here each class has one folder, whatever its name.
        folder = name.replace("/", "%2F")
        path = path if path.startswith(f"{folder}/") and folder == name else f"{folder}/{path}"
        added = suffix if needed or not path.lower().endswith(_LISTED) else ""
        parent, _, last = f"{path}{added}".rpartition("/")
        taken = added and os.fsencode(self._catalog.path(original) + added) in self._taken
        if taken or len(os.fsencode(last)) > self._most:
            mark = f"~{hashlib.sha256(os.fsencode(path)).hexdigest()[:12]}"
            ending = added or Path(last).suffix
            stem = last.removesuffix(ending)
            last = _cut(stem, self._most - len(os.fsencode(mark + ending))) + mark + ending
        return self._out / parent / last

    @functools.cached_property
    def _taken(self) -> frozenset[bytes]:
        """The paths of all originals."""
        return frozenset(map(os.fsencode, self._catalog.paths))


def _cut(name: str, most: int) -> str:
    """The beginning of a name, at most so many bytes, without splitting a character."""
    encoded = os.fsencode(name)
    if len(encoded) <= most:
        return name
    end = most
    while end > max(0, most - 4) and encoded[end] & 0xC0 == 0x80:
        end -= 1
    return os.fsdecode(encoded[:end])


def _write_original(dataset: DiffuseMixDataset, original: int, names: _Names) -> None:
    pixels = dataset.decode_original(original)  # raises if it cannot be decoded: the file would end a training run
    packed = dataset.original_store
    if packed is not None:
        data, ending = _file_of(packed, original, pixels)
        needed = packed.raw and not dataset.catalog.path(original).lower().endswith(ending)
        _write(names.of(original, ending, needed=needed), data)
        return
    with Path(dataset.path_of(original)).open("rb") as file:
        target = names.of(original, _ENDINGS[format_of(file.read(12)) or "JPEG"], needed=False)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(dataset.path_of(original), target)


def _file_of(store: EditStore | OriginalStore, row: int, pixels: NDArray[np.uint8]) -> tuple[bytes, str]:
    """The file of a stored image and its ending; of a raw image, which few programs open, a PNG."""
    if store.raw:
        return encode_as("png", pixels), ".png"
    data = store.encoded(row).tobytes()
    return data, _ENDINGS[format_of(data[:12]) or "JPEG"]


def _bytes_of(dataset: DiffuseMixDataset, index: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """A sample as an image, (height, width, 3) uint8."""
    sample = dataset[index][0].permute(1, 2, 0).numpy()
    return np.ascontiguousarray(np.rint(np.clip(sample * 255, 0, 255)).astype(np.uint8))


def _write(file: Path, data: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
