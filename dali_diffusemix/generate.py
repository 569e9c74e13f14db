"""Generation: from a folder of originals, or a packed store of them, to an edit store.

    original --decode, upright--> RGB --squash to size x size--> editor, all prompts at once --JPEG--> shard

Each original is read once. A shard is made whole by one job; jobs know nothing of each other, so any engine may run
them, in any order, on any number of processes.
"""

import hashlib
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dali_diffusemix.catalog import Catalog, index
from dali_diffusemix.editors import PROMPTS, EditTask
from dali_diffusemix.editors.procedural import ProceduralEditor
from dali_diffusemix.engines import Engine
from dali_diffusemix.engines.local import LocalEngine
from dali_diffusemix.errors import ConfigError, DecodeError
from dali_diffusemix.pixels import RESTARTS, decode, encode
from dali_diffusemix.remote import is_url
from dali_diffusemix.store import VERDICTS, OriginalStore, Shard, ShardWriter, StoreWriter

__all__ = ["GenerateConfig", "Summary", "edit_seed", "generate", "list_originals"]

_log = logging.getLogger(__name__)

_ACCEPTED, _UNREADABLE = VERDICTS


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Which edits to make, and how.

    Raises ConfigError where a field breaks its rule.
    """

    editor: str = "procedural"
    prompts: tuple[str, ...] = PROMPTS  # without the template
    size: int = 256  # pixels of an edit's side; the aspect ratio is squashed, as in the released code
    variants: int = 1  # edits of an original under one prompt, from different seeds
    seed: int = 0
    quality: int = 90  # of the JPEG
    batch_size: int = 16  # originals given to the editor at once; changes no edit
    originals_per_shard: int = 512

    _LIMITS: ClassVar[Mapping[str, tuple[int, int]]] = {
        "size": (1, 4096),
        "variants": (1, 32768),
        "seed": (0, 2**32 - 1),
        "quality": (1, 100),
        "batch_size": (1, 2**20),
        "originals_per_shard": (1, 2**20),
    }

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", tuple(self.prompts))
        if self.editor != "procedural":
            raise ConfigError(
                f"editor must be 'procedural', found {self.editor!r}; the diffusers editor is not there yet."
            )
        for name, (least, most) in self._LIMITS.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise ConfigError(f"{name} must be a whole number from {least} to {most}, found {value!r}.")
        if not self.prompts or len(set(self.prompts)) != len(self.prompts):
            raise ConfigError(f"prompts must be one or more, all different, found {list(self.prompts)}.")

    def settings(self) -> dict[str, str | int | float]:
        """What an edit store records: all that decides an edit besides its original, prompt and variant."""
        return {
            **_editor(self).settings,
            "size": self.size,
            "resize": "bicubic, aspect ratio squashed",
            "quality": self.quality,
            "subsampling": "4:2:0",
            "restarts": RESTARTS,
            "seed": self.seed,
        }


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a run did."""

    verdicts: Mapping[str, int]  # of all edits in the store
    made: int  # edits by this run, rejected ones included
    seconds: float

    @property
    def images_per_second(self) -> float:
        """Edits that this run made in a second."""
        return self.made / self.seconds


def generate(
    root: str | os.PathLike[str],
    store: str | os.PathLike[str],
    config: GenerateConfig | None = None,
    *,
    catalog: Catalog | None = None,
    engine: Engine | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """Make the edits that a store lacks; begin the store if there is none.

    An unfinished run, however it ended, is gone on with by calling this again. More prompts or variants add to a store.
    An original that cannot be read gets a verdict, and the run goes on.

    Args:
        root: The folder of originals, or a packed store.
        store: The edit store, a folder outside `root`.
        config: Which edits to make; all defaults unless given.
        catalog: The originals to use, with paths relative to `root`; unless given, `list_originals(root)`.
        engine: Where the work is done; in this process unless given.
        progress: Called with the edits done, those of earlier runs included, and the edits there will be.

    Raises:
        ConfigError: The store lies inside the root, or the editor does not know a prompt.
        CatalogError: The originals cannot be listed.
        StoreError: The store is of other originals or settings, another run writes to it, or the disk is full: then
            finished shards stay, and the same call goes on from there.
    """
    begin = time.perf_counter()
    for name, given in (("root", root), ("store", store)):
        if isinstance(given, str) and is_url(given):
            raise ConfigError(
                f"{name} must be a local folder, found {given!r}; work on a copy, and upload the store after."
            )
    root, store = Path(root).absolute(), Path(store).absolute()
    config = config or GenerateConfig()
    settings = config.settings()
    if store.resolve().is_relative_to(root.resolve()):
        raise ConfigError(
            f"store must lie outside the root, where it would pass for a class; found {str(store)!r} in {str(root)!r}."
        )
    originals = list_originals(root) if catalog is None else catalog
    with StoreWriter.open(store, originals, settings) as writer:
        writer.order(config.prompts, config.variants, config.originals_per_shard)
        shards, verdicts = writer.shards(), writer.done()
        before = sum(count.total() for count in verdicts.values())
        total, made = sum(map(len, shards)), 0
        if progress is not None:
            progress(before, total)
        missing = [shard for shard in shards if shard.number not in verdicts]
        start = partial(_Worker, root, store, replace(config, prompts=writer.prompts))
        for report in (engine or LocalEngine()).run(start, missing):
            made += report.verdicts.total() - verdicts.get(report.shard, Counter()).total()
            verdicts[report.shard] = report.verdicts
            if progress is not None:
                progress(before + made, total)
        writer.finish()
    counted = sum(verdicts.values(), Counter[str]())
    return Summary(
        verdicts={verdict: counted[verdict] for verdict in VERDICTS},
        made=made,
        seconds=time.perf_counter() - begin,
    )


def list_originals(root: str | os.PathLike[str], *, progress: Callable[[int, int], None] | None = None) -> Catalog:
    """A packed store's own catalog, or `index(root)` of a folder.

    Raises:
        CatalogError: The folder's originals cannot be listed.
        StoreError: The root is an edit store, or a packed one that cannot be opened.
    """
    packed = OriginalStore.find(root)
    return index(root, progress=progress) if packed is None else packed.catalog


def edit_seed(seed: int, path: bytes, prompt: str, variant: int) -> int:
    """An edit's seed, 0 ≤ seed < 2⁶⁴: a function of nothing but its arguments, so that adding files shifts nothing.

    The first 8 bytes, little-endian, of SHA-256 over the store's seed, the original's relative path, the prompt and the
    variant, the numbers in decimal, joined by NUL.
    """
    parts = (str(seed).encode(), path, prompt.encode("utf-8", "surrogateescape"), str(variant).encode())
    return int.from_bytes(hashlib.sha256(b"\0".join(parts)).digest()[:8], "little")


@dataclass(frozen=True, kw_only=True)
class _Progress:
    """How far a shard has come."""

    shard: int
    verdicts: Counter[str]  # of its edits so far


class _Worker:
    """Makes shards, one at a time; an editor is made once for all of them."""

    def __init__(self, root: Path, store: Path, config: GenerateConfig) -> None:
        """`config.prompts` are the store's, which may be more than were asked for today."""
        self._root = root
        self._store = store
        self._config = config
        self._editor = _editor(config)
        self._catalog = Catalog.open(store / "catalog")
        packed = OriginalStore.find(root)
        self._packed = None if packed is None else packed.in_order_of(self._catalog)

    def __call__(self, shard: Shard) -> Iterator[_Progress]:
        """Make one shard; yield after each batch how far it has come."""
        verdicts: Counter[str] = Counter()
        size = self._config.batch_size
        with ShardWriter(self._store, self._catalog, shard) as writer:
            for start in range(0, len(shard.rows), size):
                verdicts += self._add_batch(writer, shard, shard.rows[start : start + size])
                yield _Progress(shard=shard.number, verdicts=verdicts.copy())

    def _add_batch(self, writer: ShardWriter, shard: Shard, originals: range) -> Counter[str]:
        """Edit some originals of a shard, all their prompts and variants in one call; return what became of them."""
        images: list[NDArray[np.uint8]] = []
        tasks: list[EditTask] = []
        rows: list[tuple[int, int, int, int, bool]] = []  # original, prompt, variant, seed, readable; the tasks' order
        for original in originals:
            image = self._read(original)
            if image is not None:
                images.append(image)
            path = self._catalog.encoded_path(original)
            for place in shard.prompts:
                prompt = self._config.prompts[place]
                for variant in shard.variants:
                    seed = edit_seed(self._config.seed, path, prompt, variant)
                    rows.append((original, place, variant, seed, image is not None))
                    if image is not None:
                        tasks.append(EditTask(image=len(images) - 1, prompt=prompt, seed=seed))
        edits = iter(self._editor.edit(images, tasks))
        verdicts: Counter[str] = Counter()
        for original, place, variant, seed, readable in rows:
            if readable:
                edit = next(edits)
                height, width = edit.shape[:2]
                jpeg, verdict = encode(edit, self._config.quality), _ACCEPTED
            else:
                height, width, jpeg, verdict = 0, 0, None, _UNREADABLE
            writer.add(original, place, variant, seed=seed, jpeg=jpeg, height=height, width=width, verdict=verdict)
            verdicts[verdict] += 1
        return verdicts

    def _read(self, original: int) -> NDArray[np.uint8] | None:
        """An original as the editor gets it, (size, size, 3) uint8; None if it cannot be read."""
        path = self._catalog.path(original)
        try:
            pixels = decode(self._root / path if self._packed is None else self._packed.encoded(original))
        except DecodeError as error:
            _log.warning("No edits are made of the original %r: %s", path, error)
            return None
        side = (self._config.size, self._config.size)
        return np.asarray(Image.fromarray(pixels).resize(side, Image.Resampling.BICUBIC))


def _editor(config: GenerateConfig) -> ProceduralEditor:
    return ProceduralEditor(config.prompts)
