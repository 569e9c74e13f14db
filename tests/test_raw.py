"""Raw images: the same samples as from files, without DALI; damaged, they are replaced as everywhere."""

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from material import write_photograph, write_photographs
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Subset

from dali_diffusemix import (
    ConfigError,
    DecodeError,
    DiffuseMixDataset,
    DiffuseMixLoader,
    EditStore,
    EvalCrop,
    FractalBank,
    MixSpec,
    QuarantineWarning,
    RandomCrop,
    StoreError,
    TrainCrop,
    cli,
)
from dali_diffusemix.images import reading
from dali_diffusemix.images.codec import decode, raw_header
from dali_diffusemix.inspect.export import export
from dali_diffusemix.inspect.verify import discard, verify
from dali_diffusemix.plan.crops import Crop
from dali_diffusemix.store import OriginalStore
from dali_diffusemix.store.pack import PackConfig, pack

Make = Callable[[str, Callable[[Path], object]], Path]
ALWAYS = MixSpec(probability=1)


@pytest.fixture(scope="module")
def stores(photos: Path, edits: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The photographs and their edits as raw images, several shards of each."""
    folder = tmp_path_factory.mktemp("raw")
    pack(photos, folder / "originals", PackConfig(format="raw", originals_per_shard=7))
    pack(edits, folder / "edits", PackConfig(format="raw"))
    return folder / "originals", folder / "edits"


def batches(dataset: Any, batch_size: int = 8, **options: Any) -> list[torch.Tensor]:
    with DiffuseMixLoader(dataset, batch_size, num_workers=2, device="cpu", **options) as loader:
        return [images for images, *_ in loader]


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


# The same samples -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "crop",
    [TrainCrop(64), RandomCrop(56, resize=72, padding=9), EvalCrop(48)],
    ids=lambda crop: type(crop).__name__,
)
def test_raw_packed_and_folder_give_the_same_bits(
    crop: Crop, imagenet_edits: tuple[Path, Path], bank: FractalBank, once: Make
) -> None:
    """256 photographs, with and without visible parts, resident and not, resumed at another place."""
    root, edits = imagenet_edits

    def make(folder: Path) -> None:
        pack(root, folder / "packed")
        pack(root, folder / "raw", PackConfig(format="raw", originals_per_shard=50))
        pack(edits, folder / "edits")

    made = once("imagenet raw", make)

    def dataset(originals: Path, edits: Path) -> DiffuseMixDataset:
        return DiffuseMixDataset(originals, edits=edits, fractals=bank, mix=MixSpec.paper(), crop=crop, seed=5)

    folder = batches(dataset(root, edits), 32, shuffle=True)
    raw, packed = dataset(made / "raw", made / "edits"), dataset(made / "packed", edits)
    assert same(batches(packed, 32, shuffle=True), folder)
    for options in ({}, {"visible_parts": False}, {"resident": "host"}):
        assert same(batches(raw, 32, shuffle=True, **options), folder), options
    # One raw, the other not.
    assert same(batches(dataset(made / "raw", edits), 32, shuffle=True), folder)
    assert same(batches(dataset(root, made / "edits"), 32, shuffle=True), folder)
    # Begun on one, resumed on the other.
    options: dict[str, Any] = {"num_workers": 2, "device": "cpu", "shuffle": True}
    first = DiffuseMixLoader(raw, 32, resident="host", **options)
    for _, _ in zip(range(3), first, strict=False):
        pass
    for other in (dataset(root, edits), packed, raw):
        second = DiffuseMixLoader(other, 32, **options)
        second.load_state_dict(first.state_dict())
        assert same([images for images, _ in second], folder[3:])


def test_loader_and_dataloader_give_the_same(
    photos: Path, edits: Path, stores: tuple[Path, Path], bank: FractalBank
) -> None:
    arguments: dict[str, Any] = {"fractals": bank, "mix": ALWAYS, "crop": TrainCrop(40), "seed": 2}
    loose, raw = (DiffuseMixDataset(root, edits=of, **arguments) for root, of in ((photos, edits), stores))
    assert raw.is_raw and not loose.is_raw
    expected = [images for images, _ in DataLoader(loose, batch_size=8)]
    assert same([images for images, _ in DataLoader(raw, batch_size=8)], expected)
    assert same(batches(raw), expected) and same(batches(loose), expected)
    assert same(batches(raw, resident="host"), expected)


def test_parts_of_raw_and_of_other_datasets(
    photos: Path, edits: Path, stores: tuple[Path, Path], bank: FractalBank
) -> None:
    """One batch of files, raw images and resident ones."""
    arguments: dict[str, Any] = {"fractals": bank, "mix": ALWAYS, "crop": TrainCrop(40)}

    def concatenated(*pairs: tuple[Path, Path]) -> ConcatDataset[Any]:
        return ConcatDataset(
            [
                Subset(DiffuseMixDataset(root, edits=of, seed=seed, **arguments), range(3, 33, 2))
                for seed, (root, of) in enumerate(pairs)
            ]
        )

    expected = batches(concatenated((photos, edits), (photos, edits)), shuffle=True)
    for pair in ((stores, stores), ((photos, edits), stores), ((stores[0], edits), (photos, stores[1]))):
        assert same(batches(concatenated(*pair), shuffle=True), expected)
    assert same(batches(concatenated(stores, stores), shuffle=True, resident="host"), expected)


@pytest.mark.slow
def test_nothing_of_dali_is_needed(stores: tuple[Path, Path], bank: FractalBank) -> None:
    """On a machine without DALI raw stores load."""
    script = """
import sys
sys.modules["nvidia.dali"] = None
import torch
from dali_diffusemix import DiffuseMixDataset, DiffuseMixLoader, MissingDependencyError, TrainCrop
originals, edits, bank, files = sys.argv[1:]
for resident in (None, "host"):
    dataset = DiffuseMixDataset(originals, edits=edits, fractals=bank, crop=TrainCrop(24), seed=0)
    loader = DiffuseMixLoader(dataset, batch_size=8, device="cpu", resident=resident)
    print(len([1 for _ in loader]))
try:
    next(iter(DiffuseMixLoader(DiffuseMixDataset(files, crop=TrainCrop(24)), device="cpu")))
except MissingDependencyError:
    print("files need it")
"""
    root = stores[0].parent / "files"
    write_photographs(root, ["a"], 1)
    arguments = [str(one) for one in (*stores, bank.path, root)]
    found = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
    assert found.stdout.split("\n")[:3] == ["5", "5", "files need it"], found.stderr


# What is stored -------------------------------------------------------------------------------------------------------


def test_a_raw_image_is_plain_pixels_behind_a_header(photos: Path, stores: tuple[Path, Path]) -> None:
    originals = OriginalStore.open(stores[0])
    places = originals.places(np.arange(33))
    assert not places.errors
    for row, path in enumerate(originals.catalog.paths):
        pixels, file = decode(photos / path), originals.encoded(row)
        height, width, _ = pixels.shape
        assert file.tobytes() == raw_header(height, width) + pixels.tobytes()
        tar = (stores[0] / "shards" / f"originals-{places.shards[row]:06d}.tar").read_bytes()
        assert tar[places.offsets[row] :][: pixels.size] == pixels.tobytes()
    assert not verify(stores[0]).problems and not verify(stores[1]).problems


def test_only_rows_that_are_shown_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(4):
        write_photograph(tmp_path / "photos" / "a" / f"{i}.png", i, 400, 300)
    pack(tmp_path / "photos", tmp_path / "raw", PackConfig(format="raw"))
    taken: list[int] = []
    real = reading.read_stretches
    monkeypatch.setattr(
        "dali_diffusemix.loading.pieces.read_stretches",
        lambda files, offsets, lengths, memory: (
            taken.append(int(lengths.sum())),
            real(files, offsets, lengths, memory),
        )[1],
    )
    dataset = DiffuseMixDataset(tmp_path / "raw", crop=EvalCrop(100, resize=300))
    batches(dataset, 4)
    halo = 2
    assert 4 * 3 * 300 * 100 <= sum(taken) <= 4 * 3 * 300 * (100 + 2 * halo) < 4 * 3 * 300 * 400


# Damage ---------------------------------------------------------------------------------------------------------------


def expected_without(whole: torch.Tensor, gone: range) -> torch.Tensor:
    """The samples where those of some originals are replaced by the next one's."""
    expected = whole.clone()
    expected[gone.start : gone.stop] = whole[gone.stop]
    return expected


@pytest.mark.parametrize("resident", [None, "host"])
@pytest.mark.parametrize("how", ["missing", "cut short"])
def test_a_shard_that_is_gone_is_replaced_as_everywhere(photos: Path, tmp_path: Path, how: str, resident: Any) -> None:
    """The originals of a shard are replaced by those behind it, whatever reads them."""
    store = tmp_path / "raw"
    pack(photos, store, PackConfig(format="raw", originals_per_shard=5 if how == "missing" else 6))
    shown, plain = (DiffuseMixDataset(store, mix=None, crop=EvalCrop(24)) for _ in range(2))
    whole = torch.cat(batches(DiffuseMixDataset(photos, mix=None, crop=EvalCrop(24))))
    tar = store / "shards" / "originals-000001.tar"
    if how == "missing":
        tar.unlink()
    else:
        tar.write_bytes(tar.read_bytes()[:30_000])
    gone = range(5, 10) if how == "missing" else range(6, 12)
    loader = DiffuseMixLoader(shown, 8, device="cpu", resident=resident)
    with pytest.warns(QuarantineWarning, match="originals-000001.tar"):
        found = torch.cat([images for images, _ in loader])
    assert torch.equal(found, expected_without(whole, gone))
    assert len(loader.quarantine) == len(gone)
    with pytest.warns(QuarantineWarning):
        assert torch.equal(torch.cat([images for images, _ in DataLoader(plain, batch_size=8)]), found)
    with pytest.raises(StoreError, match=r"originals-000001\.tar"):
        DiffuseMixDataset(store, mix=None, crop=EvalCrop(24))


def test_a_file_cut_while_it_is_read(photos: Path, tmp_path: Path) -> None:
    store = tmp_path / "raw"
    pack(photos, store, PackConfig(format="raw", originals_per_shard=11))
    dataset = DiffuseMixDataset(store, mix=None, crop=EvalCrop(24))
    whole = torch.cat(batches(dataset))  # its tars are open now
    places = OriginalStore.open(store).places(np.arange(33))
    os.truncate(store / "shards" / "originals-000002.tar", int(places.offsets[30]))
    loader = DiffuseMixLoader(dataset, 8, device="cpu")
    with pytest.warns(QuarantineWarning, match="it ends early"):
        found = torch.cat([images for images, _ in loader])
    expected = whole.clone()
    expected[30:] = whole[0]
    assert torch.equal(found, expected)


def test_a_changed_shard_is_found_when_it_becomes_resident(photos: Path, tmp_path: Path) -> None:
    store, config = tmp_path / "raw", PackConfig(format="raw", originals_per_shard=4)
    pack(photos, store, config)
    dataset = DiffuseMixDataset(store, mix=None, crop=EvalCrop(24))
    whole = torch.cat(batches(dataset))
    tar = store / "shards" / "originals-000002.tar"
    content = bytearray(tar.read_bytes())
    content[5000] ^= 1
    tar.write_bytes(content)
    loader = DiffuseMixLoader(dataset, 8, device="cpu", resident="host")
    with pytest.warns(QuarantineWarning, match="000002"):
        found = torch.cat([images for images, _ in loader])
    assert torch.equal(found, expected_without(whole, range(8, 12))) and len(loader.quarantine) == 4
    loader.close()
    problems = verify(store)
    assert problems.damaged == (2,)
    discard(store, problems)
    assert pack(photos, store, config).made == 4
    # Whoever shares the memory of the damaged shard shares what is wrong with it, until nobody has it any more.
    del loader
    gc.collect()
    dataset = DiffuseMixDataset(store, mix=None, crop=EvalCrop(24))
    assert torch.equal(torch.cat(batches(dataset, resident="host")), whole)


def test_a_damaged_header_changes_nothing(photos: Path, tmp_path: Path) -> None:
    """Nobody looks at it, neither loader nor dataset; `verify` finds it."""
    store = tmp_path / "raw"
    pack(photos, store, PackConfig(format="raw"))
    dataset = DiffuseMixDataset(store, mix=None, crop=EvalCrop(24))
    expected = torch.cat(batches(dataset))
    row = dataset.original_store.index[7]  # type: ignore[union-attr]
    with (store / "shards" / "originals-000000.tar").open("r+b") as tar:
        tar.seek(int(row["offset"]))
        tar.write(b"XX")
    assert torch.equal(torch.cat(batches(dataset)), expected) and torch.equal(dataset[7][0], expected[7])
    assert verify(store).damaged == (0,)


def test_a_damaged_index_names_the_row(photos: Path, tmp_path: Path) -> None:
    store = tmp_path / "raw"
    pack(photos, store, PackConfig(format="raw"))
    table = np.load(store / "index.npy")
    table["height"][4] += 1  # not the pixels that there are
    table["offset"][9] = 2**40
    np.save(store / "index.npy", table)
    opened = OriginalStore.open(store)
    places = opened.places(np.arange(33))
    assert sorted(places.errors) == [4, 9] and "index.npy: is damaged" in str(places.errors[9])
    dataset = DiffuseMixDataset(store, mix=None, crop=EvalCrop(24), on_error="raise")
    for resident in (None, "host"):
        with pytest.raises(DecodeError, match=r"index\.npy: is damaged"):
            batches(dataset, resident=resident)
    with pytest.raises(DecodeError):
        dataset[9]


@pytest.mark.parametrize("native", [True, False])
def test_stretches_of_files(tmp_path: Path, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setattr(reading.native, "library", lambda: None)
    content = np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8)
    (tmp_path / "file").write_bytes(content.tobytes())
    file = reading.OpenFile(tmp_path / "file")
    closed = os.open(tmp_path / "file", os.O_RDONLY)
    os.close(closed)
    offsets, lengths = np.array([0, 4000, 100, 4999, 0]), np.array([10, 2000, 0, 1, 3])
    files = np.array([*[file.descriptor] * 4, closed], dtype=np.int32)
    memory, begins, errors = reading.read_stretches(files, offsets, lengths)
    assert begins.tolist() == [0, 10, 2010, 2010, 2011] and sorted(errors) == [1, 4]
    assert errors[1] == "it ends early" and "descriptor" in errors[4]
    assert memory[:10].tobytes() == content[:10].tobytes() and memory[2010] == content[4999]
    again, _, _ = reading.read_stretches(files[:1], offsets[:1], lengths[:1], memory)
    assert again is memory


def test_refusals(photos: Path, edits: Path, stores: tuple[Path, Path], bank: FractalBank) -> None:
    dataset = DiffuseMixDataset(photos, edits=edits, fractals=bank, mix=ALWAYS, crop=TrainCrop(24))
    with pytest.raises(ConfigError, match=r"needs raw images, found .*pack .* STORE --format raw"):
        DiffuseMixLoader(dataset, resident="host")
    mixed = DiffuseMixDataset(stores[0], edits=edits, fractals=bank, mix=ALWAYS, crop=TrainCrop(24))
    with pytest.raises(ConfigError, match=r"found edits in .* which must be decoded"):
        DiffuseMixLoader(mixed, resident="host")
    raw = DiffuseMixDataset(stores[0], edits=stores[1], fractals=bank, mix=ALWAYS, crop=TrainCrop(24))
    with pytest.raises(ConfigError, match=r"resident must be 'host', 'device' or None, found 'gpu'"):
        DiffuseMixLoader(raw, resident="gpu")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="resident='device' is the memory of a GPU"):
        DiffuseMixLoader(raw, device="cpu", resident="device")
    loader = DiffuseMixLoader(raw, device="cpu")
    with pytest.raises(ConfigError, match="resident of a loader cannot be changed"):
        loader.resident = "host"
    assert EditStore.open(stores[1]).raw and not EditStore.open(edits).raw
    with pytest.raises(StoreError, match="made with other settings"):
        pack(edits, stores[1], PackConfig(format="png"))


def test_exported_raw_images_are_pngs(photos: Path, stores: tuple[Path, Path], tmp_path: Path) -> None:
    """Other loaders list them, and get the same pixels."""
    done = export(stores[0], stores[1], tmp_path / "out")
    originals, edits = OriginalStore.open(stores[0]), EditStore.open(stores[1])
    assert (done.originals, done.edits, done.left_out) == (33, len(edits), 0)
    for row, path in enumerate(originals.catalog.paths):
        file = tmp_path / "out" / f"{path}.png"
        with Image.open(file) as image:
            assert image.format == "PNG"
        np.testing.assert_array_equal(decode(file), decode(photos / path))
        for edit in range(edits.starts[row], edits.starts[row + 1]):
            name = f"{path}.{edits.slug_of(edit)}.{edits.index['variant'][edit]}.png"
            np.testing.assert_array_equal(decode(tmp_path / "out" / name), decode(edits.encoded(edit)))


@pytest.mark.slow
def test_every_tool_takes_raw_stores(stores: tuple[Path, Path], bank: FractalBank, tmp_path: Path) -> None:
    originals, edits = stores
    arguments = ["--edits", edits, "--fractals", bank.path, "--out", tmp_path / "sheet.png"]
    for command in (
        ["report", edits, "--out", tmp_path / "report", "--root", originals],
        ["preview", originals, *arguments],
        ["verify", edits],
        ["generate", originals, tmp_path / "more", "--prompts", "autumn", "--size", "24"],
    ):
        result = CliRunner().invoke(cli.main, list(map(str, command)), prog_name="dali-diffusemix")
        assert result.exit_code == 0, result.output
    assert len(EditStore.open(tmp_path / "more")) == 33 and EditStore.open(tmp_path / "more").raw
