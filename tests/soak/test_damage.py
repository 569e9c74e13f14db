"""Damaged images: the epoch completes, and every sample without a damaged image is what it would have been.

What is delivered is compared with two things that do not substitute: an epoch of the undamaged set, and one of plain
samples. A failed original's sample must be the undamaged one of the next index whose original does not fail; a failed
edit's must be the plain one.

Everything is loaded in another process, which may not read what its owner may not read, and which is seen to live.
"""

import ctypes
import platform
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from material import encoded, photograph
from test_tampered import exchange_values, make_stores

from dali_diffusemix import (
    DecodeError,
    DiffuseMixDataset,
    DiffuseMixLoader,
    FractalBank,
    MixSpec,
    QuarantineWarning,
    TrainCrop,
)
from dali_diffusemix.generate import GenerateConfig, generate
from dali_diffusemix.images.codec import decode, encode
from dali_diffusemix.store import EditStore

COUNT: Final = 1000
MIXES: Final = {
    "default": MixSpec.paper(),
    "always": MixSpec(probability=1.0),
    "expanded": MixSpec(epoch="expanded"),
}
# How the same samples are delivered: (batch_size, num_workers).
DELIVERIES: Final = ((64, 2), (7, 1))
CAPSET: Final = {"x86_64": 126, "aarch64": 91}[platform.machine()]  # Linux's number of the call


# --- the material ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Material:
    root: Path
    edits: Path | None
    fractals: Path

    def dataset(self, mix: MixSpec | None) -> DiffuseMixDataset:
        crop = TrainCrop(48)
        given = {"edits": self.edits, "fractals": self.fractals, "mix": mix, "crop": crop}
        return DiffuseMixDataset(self.root, **given, seed=3, normalize=None)


# What the photographs are: JPEGs as cameras make them, as this package makes them, progressive ones; PNGs.
KINDS: Final[tuple[tuple[str, Callable[[np.ndarray], bytes]], ...]] = (
    ("jpg", lambda image: encoded(image, quality=90)),
    ("jpg", lambda image: encode(image, 90)),
    ("jpeg", lambda image: encoded(image, quality=85, progressive=True)),
    ("png", lambda image: encoded(image, "PNG")),
)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory, bank: FractalBank) -> Material:
    folder = tmp_path_factory.mktemp("damage")
    for i in range(COUNT):
        extension, encode_as = KINDS[i % len(KINDS)]
        file = folder / "train" / f"class{i * 10 // COUNT}" / f"{i:04}.{extension}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode_as(photograph(i, 70 + i % 53, 120 - i % 47)))
    # Small shards, so that several have damage in them.
    config = GenerateConfig(prompts=("autumn", "snowy"), size=64, format="jpeg", originals_per_shard=250)
    generate(folder / "train", folder / "edits", config)
    assert bank.path is not None
    return Material(folder / "train", folder / "edits", bank.path)


# --- loading --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Epoch:
    images: np.ndarray  # (n, 3, 48, 48) float32
    labels: np.ndarray  # (n,)
    indices: np.ndarray  # (n,) which sample stands at each place
    quarantine: dict[str, Any]
    warned: list[str]

    def check_sample(self, place: int, other: "Epoch", index: int) -> None:
        """The sample at a place is another epoch's sample of an index."""
        assert np.array_equal(self.images[place], other.images[index])
        assert self.labels[place] == other.labels[index]


def load(
    material: Material, mix: MixSpec | None, *, visible_parts: bool, batch_size: int = 64, num_workers: int = 2
) -> Epoch:
    """An epoch of the loader, in order."""
    loader = DiffuseMixLoader(
        material.dataset(mix),
        batch_size,
        num_workers=num_workers,
        device="cpu",
        return_index=True,
        visible_parts=visible_parts,
    )
    with warnings.catch_warnings(record=True) as caught, loader:
        warnings.simplefilter("always")
        images, labels, indices = (np.concatenate(part) for part in zip(*loader, strict=True))
    warned = [str(warning.message) for warning in caught if warning.category is QuarantineWarning]
    return Epoch(images, labels, indices, dict(loader.quarantine), warned)


def load_by_pillow(material: Material, mix: MixSpec | None, indices: Sequence[int]) -> Epoch:
    """The same of some indices, by the dataset alone."""
    dataset = material.dataset(mix)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QuarantineWarning)
        images, labels = zip(*(dataset[index] for index in indices), strict=True)
    return Epoch(np.stack(images), np.array(labels), np.array(indices), dict(dataset.quarantine), [])


def undecodable_of(material: Material, originals: Sequence[int]) -> set[int]:
    dataset, found = material.dataset(None), set()
    for original in originals:
        try:
            dataset.decode_original(original)
        except DecodeError:
            found.add(original)
    return found


class Elsewhere:
    """Another process."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._process = ProcessPoolExecutor(1, get_context("spawn"), give_up_capabilities)

    def __call__(self, function: Callable[..., Any], *arguments: object, **options: object) -> Any:
        try:
            return self._process.submit(function, *arguments, **options).result()
        except BrokenProcessPool:
            self._begin()
        pytest.fail(f"the process died in {function.__name__}, {options}")

    def close(self) -> None:
        self._process.shutdown()


def give_up_capabilities() -> None:
    """The superuser, whom tests often run as, may read every file by these."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this thread and those that it starts
    if ctypes.CDLL(None, use_errno=True).syscall(ctypes.c_long(CAPSET), header, (ctypes.c_uint32 * 6)()):
        raise OSError(ctypes.get_errno(), "capset")


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Elsewhere]:
    process = Elsewhere()
    yield process
    process.close()


# --- originals ------------------------------------------------------------------------------------------------------


def truncated(file: Path, draw: np.random.Generator) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * draw.uniform(0.3, 0.9))])


def zero_byte(file: Path, draw: np.random.Generator) -> None:
    file.write_bytes(b"")


def garbage_header(file: Path, draw: np.random.Generator) -> None:
    content = file.read_bytes()
    file.write_bytes(draw.bytes(64) + content[64:])


def flipped_bytes(file: Path, draw: np.random.Generator) -> None:
    file.write_bytes(flipped(file.read_bytes(), draw))


def flipped(content: bytes, draw: np.random.Generator) -> bytes:
    """With 20 other bytes behind the headers."""
    found = np.frombuffer(content, np.uint8).copy()
    found[draw.integers(len(found) * 2 // 5, len(found), 20)] ^= draw.integers(1, 256, 20).astype(np.uint8)
    return found.tobytes()


def deleted(file: Path, draw: np.random.Generator) -> None:
    file.unlink()


def permission_denied(file: Path, draw: np.random.Generator) -> None:
    file.chmod(0)


def swapped_type(file: Path, draw: np.random.Generator) -> None:
    """A GIF, a text, or another image that can be decoded, of another size."""
    other = photograph(int(draw.integers(1 << 30)), 150, 160)
    content = [encoded(other, "GIF"), b"<html>404</html>" * 50, encoded(other), encoded(other, "PNG")]
    file.write_bytes(content[draw.integers(len(content))])


def directory(file: Path, draw: np.random.Generator) -> None:
    file.unlink()
    file.mkdir()


WAYS: Final = (
    truncated,
    zero_byte,
    garbage_header,
    flipped_bytes,
    deleted,
    permission_denied,
    swapped_type,
    directory,
)


# "flipped" has many files of the one way that leaves some of them decodable.
LAYOUTS: Final = ("spread", "neighbours", "a tenth", "flipped")


def damage(root: Path, catalog_paths: list[str], layout: str) -> dict[int, str]:
    """Damage originals: index to the way."""
    seed = LAYOUTS.index(layout)
    some = (flipped_bytes,) if layout == "flipped" else WAYS
    draw = np.random.default_rng(seed)
    if layout == "spread":  # 1 %, the last one among them, whose substitute is the first
        places = [*draw.choice(COUNT - 1, COUNT // 100 - 1, replace=False).tolist(), COUNT - 1]
    elif layout == "neighbours":  # 1 %, all in one batch of 64, next to each other
        places = list(range(520, 520 + COUNT // 100))
    else:
        places = draw.choice(COUNT, COUNT // 10, replace=False).tolist()
    ways = {}
    for number, place in enumerate(places):
        way = some[(number + seed) % len(some)]
        way(root / catalog_paths[place], draw)
        ways[place] = way.__name__
    assert set(ways.values()) == {way.__name__ for way in some}
    return ways


@pytest.fixture(scope="module")
def undamaged(material: Material, elsewhere: Elsewhere) -> dict[str, Epoch]:
    """Epochs of the undamaged set, by the way of mixing; "plain" is without."""
    return {
        name: elsewhere(load, material, mix, visible_parts=False) for name, mix in (MIXES | {"plain": None}).items()
    }


@pytest.mark.parametrize(
    ("layout", "mix", "visible_parts"),
    list(product(LAYOUTS, ("default", "always"), (False, True))),
)
def test_damaged_originals(
    material: Material,
    elsewhere: Elsewhere,
    undamaged: dict[str, Epoch],
    tmp_path: Path,
    layout: str,
    mix: str,
    visible_parts: bool,
    measured: Callable[..., None],
) -> None:
    root, reference = tmp_path / "train", undamaged[mix]
    shutil.copytree(material.root, root)
    here = replace(material, root=root)
    dataset = here.dataset(MIXES[mix])
    ways = damage(root, list(dataset.catalog.paths), layout)
    undecodable = elsewhere(undecodable_of, here, list(ways))
    # Flipped bytes often leave an image that can be decoded, wrong as it looks.
    assert undecodable >= {index for index, way in ways.items() if way != "flipped_bytes"}
    found = elsewhere(load, here, MIXES[mix], visible_parts=visible_parts)
    failed = set(np.flatnonzero(found.indices != np.arange(COUNT)).tolist())
    measured(
        damaged=len(ways),
        undecodable=len(undecodable),
        quarantined=len(found.quarantine),
        by_way={way: sum(index in failed for index in ways if ways[index] == way) for way in set(ways.values())},
    )
    problems = []

    # Nothing else is touched.
    for index in set(range(COUNT)) - set(ways):
        if not (found.indices[index] == index and np.array_equal(found.images[index], reference.images[index])):
            problems.append(f"undamaged sample {index} is another one")
    # What fails is what cannot be decoded; of parts a part of it.
    for index in sorted(failed - undecodable):
        problems.append(f"{ways[index]} {dataset.path_of(index)} can be decoded, but was left out")
    for index in sorted(undecodable - failed):
        if not visible_parts:
            problems.append(f"{ways[index]} {dataset.path_of(index)} cannot be decoded, but was not left out")
        elif ways[index] != "flipped_bytes" and not np.array_equal(found.images[index], reference.images[index]):
            problems.append(f"{ways[index]} {dataset.path_of(index)}: what is seen of it is not what was there")
    assert not problems, "\n".join(problems)

    # The substitute is the sample of the next index that does not fail.
    for index in failed:
        substitute = index
        while substitute in failed:
            substitute = (substitute + 1) % COUNT
        assert found.indices[index] == substitute
        found.check_sample(index, found if substitute in ways else reference, substitute)
    check_log(found, {dataset.path_of(index): 1 for index in failed}, "original")

    # However it is delivered, and by Pillow.
    check_other_ways(elsewhere, here, mix, found, sorted(ways), visible_parts)


def check_other_ways(
    elsewhere: Elsewhere, here: Material, mix: str, found: Epoch, touched: list[int], visible_parts: bool
) -> None:
    for batch_size, num_workers in DELIVERIES:
        delivery = {"batch_size": batch_size, "num_workers": num_workers}
        again = elsewhere(load, here, MIXES[mix], visible_parts=visible_parts, **delivery)
        assert np.array_equal(again.images, found.images)
        assert np.array_equal(again.indices, found.indices)
        assert {path: entry.count for path, entry in again.quarantine.items()} == {
            path: entry.count for path, entry in found.quarantine.items()
        }
    if not visible_parts:
        by_pillow = elsewhere(load_by_pillow, here, MIXES[mix], touched)
        assert np.array_equal(by_pillow.images, found.images[touched])
        assert np.array_equal(by_pillow.labels, found.labels[touched])
        assert {path: entry.count for path, entry in by_pillow.quarantine.items()} == {
            path: entry.count for path, entry in found.quarantine.items()
        }


def check_log(epoch: Epoch, counts: dict[str, int], kind: str) -> None:
    """The quarantine has these images, each with its reason and one warning."""
    assert {path: entry.count for path, entry in epoch.quarantine.items()} == counts
    assert all(
        entry.path == path and entry.kind == kind and entry.epoch == 0 for path, entry in epoch.quarantine.items()
    )
    assert all(len(entry.reason) > 10 for entry in epoch.quarantine.values())
    assert len(epoch.warned) == len(counts)
    for path in counts:
        assert sum(repr(path) in message for message in epoch.warned) == 1


# --- other images ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "change", "visible_parts"),
    list(product(("JPEG", "PNG", "BMP", "TIFF", "PPM", "WEBP"), ("larger", "smaller", "turned"), (False, True))),
)
def test_an_image_of_another_size_in_its_place(
    material: Material, elsewhere: Elsewhere, tmp_path: Path, form: str, change: str, visible_parts: bool
) -> None:
    """It counts as undecodable: no sample may show pixels of it."""
    root, extension = tmp_path / "train", {"JPEG": "jpg", "TIFF": "tif"}.get(form, form.lower())
    files = [root / "class" / f"{i:02}.{extension}" for i in range(16)]
    files[0].parent.mkdir(parents=True)
    for i, file in enumerate(files):
        file.write_bytes(encoded(photograph(i, 80, 110), form))
    here = replace(material, root=root, edits=None)
    reference = elsewhere(load, here, None, visible_parts=False)
    height, width = {"larger": (150, 160), "smaller": (40, 55), "turned": (110, 80)}[change]
    replaced = range(1, 16, 2)
    for i in replaced:
        files[i].write_bytes(encoded(photograph(100 + i, height, width), form))

    assert elsewhere(undecodable_of, here, range(16)) == set(replaced)
    found = elsewhere(load, here, None, visible_parts=visible_parts)
    assert found.indices.tolist() == [(i + i % 2) % 16 for i in range(16)]
    for i in range(16):
        found.check_sample(i, reference, (i + i % 2) % 16)


# --- edits ----------------------------------------------------------------------------------------------------------


def zeroed(content: bytes, draw: np.random.Generator) -> bytes:
    return bytes(len(content))


def cut(content: bytes, draw: np.random.Generator) -> bytes:
    return content[: len(content) // 2] + bytes(len(content) - len(content) // 2)


def new_header(content: bytes, draw: np.random.Generator) -> bytes:
    return draw.bytes(64) + content[64:]


def other_size(content: bytes, draw: np.random.Generator) -> bytes:
    return encode(photograph(1, 20, 24), 50).ljust(len(content), b"\0")


EDIT_WAYS: Final = (zeroed, cut, new_header, flipped, other_size)


@pytest.mark.parametrize(("mix", "visible_parts"), list(product(MIXES, (False, True))))
def test_damaged_edits(
    material: Material,
    elsewhere: Elsewhere,
    undamaged: dict[str, Epoch],
    tmp_path: Path,
    mix: str,
    visible_parts: bool,
    measured: Callable[..., None],
) -> None:
    """2 % of the edits, inside their shards, whose sizes stay; half of them next to each other."""
    edits, reference = tmp_path / "edits", undamaged[mix]
    shutil.copytree(material.edits, edits)
    store, draw = EditStore.open(edits), np.random.default_rng(5)
    ways = {}
    for number, edit in enumerate([*draw.choice(1000, 20, replace=False).tolist(), *range(1500, 1520)]):
        way = EDIT_WAYS[number % len(EDIT_WAYS)]
        row = store.index[edit]
        with (edits / "shards" / f"edits-{row['shard']:06}.tar").open("r+b") as tar:
            tar.seek(row["offset"])
            content = tar.read(row["length"])
            changed = way(content, draw)
            assert len(changed) == len(content) and changed != content
            tar.seek(row["offset"])
            tar.write(changed)
        ways[edit] = way.__name__
    here = replace(material, edits=edits)
    dataset = here.dataset(MIXES[mix])
    undecodable = {edit for edit in ways if not edit_decodes(store, edit)}
    assert undecodable >= {edit for edit, way in ways.items() if way != "flipped"}

    plan = dataset.planner.batch(0, np.arange(len(dataset)))
    of_edit: dict[int, list[int]] = {}
    for index, edit in enumerate(plan.edit.tolist()):
        of_edit.setdefault(edit, []).append(index)
    plain = undamaged["plain"]
    found = elsewhere(load, here, MIXES[mix], visible_parts=visible_parts)
    names = {
        edit: f"{store.path}/{store.catalog.path(int(store.index['original'][edit]))}: "
        f"{store.prompt_of(edit)}, variant {store.index['variant'][edit]}"
        for edit in ways
    }
    failed = {edit for edit, name in names.items() if name in found.quarantine}
    measured(
        damaged=len(ways),
        undecodable=len(undecodable & set(of_edit)),
        quarantined=len(found.quarantine),
        by_way={way.__name__: sum(ways[edit] == way.__name__ for edit in failed) for way in EDIT_WAYS},
    )
    problems = []
    assert np.array_equal(found.indices, np.arange(len(dataset)))
    assert np.array_equal(found.labels, reference.labels)
    touched = {index: edit for edit in ways for index in of_edit.get(edit, [])}
    for index in set(range(len(dataset))) - set(touched):
        if not np.array_equal(found.images[index], reference.images[index]):
            problems.append(f"undamaged sample {index} is another one")
    for index, edit in touched.items():
        is_plain = mix != "expanded" and np.array_equal(found.images[index], plain.images[index])
        if mix == "expanded":  # its crop is another than its original's
            is_plain = np.array_equal(found.images[index], unmixed(dataset, index))
        if edit in failed and not is_plain:
            problems.append(f"{ways[edit]} edit {edit} failed, but sample {index} is not its original unmixed")
        if edit in failed - undecodable:
            problems.append(f"{ways[edit]} edit {edit} can be decoded, but was left out")
        if edit in undecodable - failed:
            if not visible_parts:
                problems.append(f"{ways[edit]} edit {edit} cannot be decoded, but was not left out")
            elif ways[edit] != "flipped" and not np.array_equal(found.images[index], reference.images[index]):
                problems.append(f"{ways[edit]} edit {edit}: what is seen of it is not what was there")
    assert not problems, "\n".join(problems)
    check_log(found, {names[edit]: len(of_edit[edit]) for edit in failed}, "edit")

    check_other_ways(elsewhere, here, mix, found, sorted(touched), visible_parts)


def edit_decodes(store: EditStore, edit: int) -> bool:
    """Whether it can be decoded, and has the size that it is listed with."""
    try:
        return decode(store.encoded(edit)).shape[:2] == tuple(store.sizes(np.array([edit]))[0])
    except DecodeError:
        return False


def unmixed(dataset: DiffuseMixDataset, index: int) -> np.ndarray:
    """Its original alone, cropped and flipped as the sample is, by Pillow's resampling of the box."""
    from dali_diffusemix.mix import TensorFormat
    from dali_diffusemix.mix.call import mix, piece_table

    plan = dataset.planner.batch(0, [index]).unmixed()
    original = dataset.decode_original(int(plan.original[0]))
    pieces = piece_table(
        np.array([[original.ctypes.data], [0]], np.uint64), np.array([[original.shape[:2]], [(0, 0)]], np.int32)
    )
    format = TensorFormat(normalize=None)
    out = np.empty(format.shape(1, plan.output_size), dtype=np.float32)
    mix(plan, pieces, None, out=out, format=format)
    return out[0]


def test_originals_and_their_edits_damaged_together(
    material: Material, elsewhere: Elsewhere, undamaged: dict[str, Epoch], tmp_path: Path
) -> None:
    """An original that fails with its edit counts as the original; a substitute whose edit fails is unmixed."""
    root, edits = tmp_path / "train", tmp_path / "edits"
    shutil.copytree(material.root, root)
    shutil.copytree(material.edits, edits)
    store = EditStore.open(edits)
    here = replace(material, root=root, edits=edits)
    dataset = here.dataset(MIXES["always"])
    chosen = dataset.planner.batch(0, np.arange(COUNT)).edit
    for index in (300, 301):  # of both the edit that the epoch shows
        row = store.index[chosen[index]]
        with (edits / "shards" / f"edits-{row['shard']:06}.tar").open("r+b") as tar:
            tar.seek(row["offset"])
            tar.write(bytes(row["length"]))
    (root / dataset.catalog.path(300)).unlink()

    found, reference, plain = (
        elsewhere(load, here, MIXES["always"], visible_parts=False),
        undamaged["always"],
        undamaged["plain"],
    )
    assert found.indices.tolist() == [301 if index == 300 else index for index in range(COUNT)]
    for index in range(COUNT):
        if index in (300, 301):
            found.check_sample(index, plain, 301)
        else:
            found.check_sample(index, reference, index)
    assert sorted(entry.count for entry in found.quarantine.values()) == [1, 1]
    check_other_ways(elsewhere, here, "always", found, [299, 300, 301, 302], False)


# --- stores ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["edits", "packed"])
def test_any_value_in_any_json(photos: Path, tmp_path: Path, kind: str, measured: Callable[..., None]) -> None:
    stores = make_stores(photos, tmp_path / "stores")
    measured(values=exchange_values(photos, stores, tmp_path / "here", kind, first=0, every=1))
