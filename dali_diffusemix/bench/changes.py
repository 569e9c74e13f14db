"""Changes that could make loading faster, to be tried; and the commands that make them."""

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from dali_diffusemix.base.cpus import cpus
from dali_diffusemix.base.memory import free_memory
from dali_diffusemix.bench.contenders import Factory, diffusemix
from dali_diffusemix.bench.material import LEAST_BATCHES, Material, random_rows, reduced
from dali_diffusemix.bench.result import Command, Measurement, Trial, gigabytes
from dali_diffusemix.catalog.table import Catalog
from dali_diffusemix.loading.dataset import DiffuseMixDataset
from dali_diffusemix.loading.resident import Resident
from dali_diffusemix.store.pack import PackConfig, pack

__all__ = ["RawImages", "contenders_of", "of_residence", "packing", "settings", "trials_of"]

_PACKED: Final = 256  # originals that are packed to try packing
_SMALL: Final = 128 * 128  # pixels of images that are small enough to be stored raw, whatever they all take
_RAW_SHARE: Final = 0.25  # of the free memory, in which larger images may be stored raw
_RESIDENT_SHARE: Final = 0.5  # of the free memory, in which raw stores may stay
_RAW: Final = PackConfig(format="raw")


@dataclass(frozen=True, kw_only=True)
class Change:
    """A change to try: this package's loader with it and without it."""

    setting: str  # as in `Trial`
    change: str
    before: str  # the name of `without` among the contenders
    without: Factory
    with_it: Factory
    commands: tuple[Command, ...] = ()
    use: str = ""


@dataclass(frozen=True, kw_only=True)
class RawImages:
    """The images as raw stores: those that are there, or would be."""

    originals_bytes: int
    edits_bytes: int
    originals: bool  # they are raw now
    edits: bool  # they are raw now, or there are none
    small: bool  # worth storing raw: the images are small, or all of them are
    free: int  # bytes of memory
    resident: Resident | None  # where they fit into memory

    @classmethod
    def of(cls, dataset: DiffuseMixDataset, device: str) -> "RawImages":
        """Those of a dataset."""
        packed, store = dataset.original_store, dataset.store
        originals, edits = packed is not None and packed.raw, store is None or store.raw
        of_edits = 0
        if packed is not None and originals:
            of_originals = packed.raw_shards.bytes
        else:
            of_originals = _RAW.bytes_of(dataset.catalog.sizes) or 0
        if store is not None:
            of_edits = store.raw_shards.bytes if edits else _RAW.bytes_of(store.sizes(np.arange(len(store)))) or 0
        size, free = of_originals + of_edits, free_memory()
        resident: Resident | None = "host" if size <= _RESIDENT_SHARE * free else None
        if device != "cpu" and size <= _RESIDENT_SHARE * _free_on(device):
            resident = "device"
        pixels = np.median(dataset.catalog.sizes.prod(axis=1, dtype=np.int64))
        small = bool(pixels <= _SMALL or size <= _RAW_SHARE * free)
        return cls(
            originals_bytes=of_originals,
            edits_bytes=of_edits,
            originals=originals,
            edits=edits,
            small=small,
            free=free,
            resident=resident,
        )

    @property
    def bytes(self) -> int:
        """Of all."""
        return self.originals_bytes + self.edits_bytes

    @property
    def there(self) -> bool:
        """True if nothing has to be decoded now."""
        return self.originals and self.edits


def settings(material: Material, mixed: bool) -> list[Change]:
    """Return other values of num_workers and prefetch_factor."""
    now, cores, base = material.num_workers, cpus(), partial(diffusemix, material, mixed=mixed)
    variants: list[tuple[str, int, int, Factory]] = [
        ("num_workers", count, now, partial(diffusemix, replace(material, num_workers=count), mixed=mixed))
        for count in sorted({max(1, cores // 2), cores} - {now})
    ]
    variants += [("prefetch_factor", ahead, 2, partial(base, prefetch_factor=ahead)) for ahead in (1, 4)]
    return [
        Change(
            setting=name, change=f"{name}={value} instead of {old}", before="as it is", without=base, with_it=variant
        )
        for name, value, old, variant in variants
    ]


def contenders_of(changes: Sequence[Change]) -> dict[str, Factory]:
    """Return the contenders that have to run to try these changes."""
    return {one.before: one.without for one in changes} | {one.change: one.with_it for one in changes}


def trials_of(changes: Sequence[Change], found: Mapping[str, Measurement]) -> Iterator[Trial]:
    """Yield the gains of the changes, round by round."""
    for one in changes:
        pairs = zip(found[one.change].images_per_second, found[one.before].images_per_second, strict=True)
        yield Trial(
            setting=one.setting,
            change=one.change,
            gains=tuple(after / before for after, before in pairs),
            commands=one.commands,
            use=one.use,
        )


def of_residence(raw: RawImages, found: Mapping[str, Measurement]) -> Iterator[Trial]:
    """Yield the gain of raw stores that stay in memory, which is measured among the contenders."""
    for name in ("diffusemix", "plain"):
        if (kept := found.get(f"{name}_resident")) is not None:
            pairs = zip(kept.images_per_second, found[name].images_per_second, strict=True)
            yield Trial(
                setting="resident",
                change=f'resident="{raw.resident}"',
                gains=tuple(after / before for after, before in pairs),
                use=_residence(raw),
            )


def packing(
    material: Material,
    dataset: DiffuseMixDataset,
    rows: NDArray[np.int64],
    folder: Path,
    edits: Path | None,
    raw: RawImages,
) -> list[Change]:
    """Return packing, with the same pixels, smaller and raw, tried on some originals; only what is not done already."""
    mixed = edits is not None
    as_jpegs = dataset.original_store is None
    as_raw = raw.small and not raw.there
    if not as_jpegs and not as_raw:
        return []
    side = 10 * math.ceil(material.size * 16 / 9 / 10)  # 400 for 224: few random crops are then enlarged
    longest = dataset.catalog.sizes[rows].max(axis=1)
    sides = [None, side] if np.median(longest) >= 1.2 * side else [None]
    chosen = rows[random_rows(len(rows), _PACKED, material.seed)]
    some = reduced(material, dataset, chosen, folder, epoch=LEAST_BATCHES * material.batch_size)
    assert some.catalog is not None
    changes = []
    for most in sides if as_jpegs else []:
        name = "pack, the same pixels" if most is None else f"pack --max-side {most}"
        store = folder / f"packed-{most}"
        pack(material.root, store, PackConfig(max_side=most), catalog=Catalog.open(some.catalog))
        packed = replace(some, root=store, catalog=None)  # its own catalog has the packed sizes
        target = _beside(material.root, "packed" if most is None else str(most))
        options = [] if most is None else ["--max-side", str(most)]
        changes.append(
            Change(
                setting="pack" if most is None else "pack smaller",
                change=f"{name} (on {len(chosen)} of your originals)",
                before="not packed",
                without=partial(diffusemix, some, mixed=mixed),
                with_it=partial(diffusemix, packed, mixed=mixed),
                commands=(_command(material.root, target, *options),),
                use=f"{target} instead of {material.root}",
            )
        )
    if as_raw:
        changes += _raw_packing(material, some, dataset, raw, folder, edits, len(chosen))
    return changes


def _raw_packing(
    material: Material,
    some: Material,
    dataset: DiffuseMixDataset,
    raw: RawImages,
    folder: Path,
    edits: Path | None,
    count: int,
) -> list[Change]:
    """Return packing raw, read from disk and kept in memory, tried on `some`, `count` originals."""
    packed, commands, uses, root = some, [], [], material.root
    if not raw.originals:
        # Those of a packed store are files by now. What it was packed from is not known.
        source = root if dataset.original_store is None else "SOURCE"
        pack(material.files, folder / "raw", _RAW, catalog=Catalog.open(some.catalog or ""))
        packed = replace(packed, root=folder / "raw", catalog=None)
        commands.append(_command(source, _beside(root, "raw"), "--format", "raw", size=raw.originals_bytes))
        uses.append(f"{_beside(root, 'raw')} instead of {root}")
        if source == "SOURCE":
            uses[-1] += ", where SOURCE is what that was packed from"
    if not raw.edits:
        assert some.edits is not None and edits is not None
        pack(some.edits, folder / "raw-edits", _RAW)
        packed = replace(packed, edits=folder / "raw-edits")
        commands.append(_command(edits, _beside(edits, "raw"), "--format", "raw", size=raw.edits_bytes))
        uses.append(f"{_beside(edits, 'raw')} instead of {edits}")
    before = partial(diffusemix, some, mixed=edits is not None)
    changes = []
    for resident in (None, raw.resident) if raw.resident else (None,):
        name = "pack --format raw" + ("" if resident is None else f', resident="{resident}"')
        use = uses if resident is None else [*uses, _residence(raw)]
        changes.append(
            Change(
                setting="pack",
                change=f"{name} (on {count} of your originals)",
                before="not packed",
                without=before,
                with_it=partial(diffusemix, packed, mixed=edits is not None, resident=resident),
                commands=tuple(commands),
                use="; ".join(use),
            )
        )
    return changes


def _beside(path: Path, name: str) -> Path:
    """A folder beside this one."""
    path = path if path.name else path.absolute()
    return path.with_name(f"{path.name}-{name}")


def _residence(raw: RawImages) -> str:
    where = f" of {gigabytes(raw.free)} that are free" if raw.resident == "host" else ""
    return f'DiffuseMixLoader(..., resident="{raw.resident}"), which takes {gigabytes(raw.bytes)}{where}'


def _command(source: Path | str, target: Path, *options: str, size: int | None = None) -> Command:
    return Command(shlex.join(["dali-diffusemix", "pack", str(source), str(target), *options]), size)


def _free_on(device: str) -> int:
    """Free bytes in the memory of a GPU."""
    return torch.cuda.mem_get_info(torch.device(device))[0] if torch.cuda.is_available() else 0
