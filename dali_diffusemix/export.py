"""Export: originals and edits as an ImageFolder, for other loaders; or mixed once, as the released code mixes.

out/ants/0013035.jpg                     the original, as it is
         0013035.jpg.autumn.0.jpg        its edit under a prompt; the variant
         0013035.jpg.autumn.0.mixed.jpg  with `mixed`: original, edit and fractal, in the edit's place
"""

import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dali_diffusemix.dataset import DiffuseMixDataset
from dali_diffusemix.errors import ConfigError, DecodeError
from dali_diffusemix.pixels import encode
from dali_diffusemix.plan import EvalCrop, MixSpec

__all__ = ["Exported", "export"]

_BATCH = 64  # images written at once


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written."""

    originals: int
    edits: int
    kind: str  # "edits" or "mixed images"
    left_out: int  # that could not be read or decoded


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
        mixed: Whether edits are mixed with their originals and fractals, `MixSpec.release()` at whole images squashed
            to a square. The result is one epoch's; every epoch trains on the same.
        fractals: The fractal bank, for mixing.
        size: Pixels a side of a mixed image.
        seed: Of the mixing.
        quality: Of a mixed image's JPEG, 1 to 100; other files are copied as they are.
        progress: Called with the images done and all images.

    Raises:
        ConfigError: `out` has something in it or cannot be written, or arguments do not fit together.
        StoreError, CatalogError: Originals, store or bank cannot be used.
    """
    out = Path(out).absolute()
    if mixed != (fractals is not None):
        raise ConfigError(f"fractals must be given for mixed images, and for those alone; found {fractals!r}.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"out must be a new or an empty folder, found {str(out)!r}; name another.")
    if not 1 <= quality <= 100:
        raise ConfigError(f"quality must lie in 1 to 100, found {quality}.")
    whole = EvalCrop(size, resize=(size, size))
    mix = MixSpec.release() if mixed else None
    # Samples of 0 to 255: what is written is what a mean and a deviation would be taken of.
    dataset = DiffuseMixDataset(
        root, edits=store, fractals=fractals, mix=mix, crop=whole, normalize=None, seed=seed, on_error="raise"
    )
    edits = dataset.store
    assert edits is not None
    count, total = len(dataset.catalog), len(dataset.catalog) + len(edits)

    def write(place: int) -> bool:
        try:
            if place < count:
                _write_original(dataset, place, out)
            else:
                edit = place - count
                row = edits.index[edit]
                name = f"{dataset.catalog.path(int(row['original']))}.{edits.slug_of(edit)}.{row['variant']}"
                data = (
                    encode(_bytes_of(dataset, place), quality) if mixed else np.asarray(edits.encoded(edit)).tobytes()
                )
                _write(out / (f"{name}.mixed.jpg" if mixed else f"{name}.jpg"), data)
        except DecodeError:
            return False
        return True

    done = np.zeros(total, bool)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            for start in range(0, total, _BATCH):
                places = range(start, min(total, start + _BATCH))
                done[start : places.stop] = list(pool.map(write, places))
                if progress is not None:
                    progress(places.stop, total)
    except OSError as error:
        raise ConfigError(f"out must be a folder that can be written, found {str(out)!r}: {error}") from error
    return Exported(
        originals=int(done[:count].sum()),
        edits=int(done[count:].sum()),
        kind="mixed images" if mixed else "edits",
        left_out=int((~done).sum()),
    )


def _write_original(dataset: DiffuseMixDataset, original: int, out: Path) -> None:
    target = out / dataset.catalog.path(original)
    dataset.decode_original(original)  # what cannot be decoded would end somebody's training
    if dataset.original_store is not None:
        _write(target, dataset.original_store.encoded(original).tobytes())
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(dataset.path_of(original), target)


def _bytes_of(dataset: DiffuseMixDataset, place: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """A sample as an image, (height, width, 3) uint8."""
    sample = dataset[place][0].permute(1, 2, 0).numpy()
    return np.ascontiguousarray(np.rint(np.clip(sample * 255, 0, 255)).astype(np.uint8))


def _write(file: Path, data: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
