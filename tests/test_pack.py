"""pack: packed originals give the samples of the loose ones; killed, damaged or in a wrong place, a store says so."""

import dataclasses
import json
import os
import pickle
import random
import shutil
import signal
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import warm
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from material import MakeStore, encoded, photograph, write_photograph
from PIL import Image

from dali_diffusemix import (
    Catalog,
    ConfigError,
    DecodeError,
    DiffuseMixDataset,
    DiffuseMixLoader,
    EditStore,
    EvalCrop,
    FractalBank,
    MixSpec,
    QuarantineWarning,
    StoreError,
    TrainCrop,
    cli,
)
from dali_diffusemix.catalog import index
from dali_diffusemix.generate import GenerateConfig, generate
from dali_diffusemix.images.codec import decode, tile
from dali_diffusemix.inspect.verify import verify
from dali_diffusemix.store import ORIGINAL_SHARD_ROW, OriginalStore
from dali_diffusemix.store.pack import PackConfig, PackSummary, _fitted, pack

SMALL = PackConfig(originals_per_shard=4)


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs of several formats and orientations, under names of all kinds."""
    root = tmp_path_factory.mktemp("odd") / "train"
    (root / "a.b c").mkdir(parents=True)
    (root / "bees").mkdir()
    picture = Image.fromarray(photograph(3, 83, 61))
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {
        b"a.b c/two.dots.jpeg": encoded(picture),
        b"a.b c/not utf-8 \xff\xfe.jpg": encoded(photograph(4, 40, 90)),
        b"a.b c/no ending": encoded(photograph(5, 30, 31)),
        b"a.b c/LOUD.PNG": encoded(picture, "PNG"),
        b"bees/turned.jpg": encoded(picture, exif=exif),
        b"bees/turned lossless.webp": encoded(picture, "WEBP", exif=exif, lossless=True),  # not for DALI 2.4
        b"bees/grey.png": encoded(picture.convert("L"), "PNG"),
        b"bees/one.png": encoded(picture.resize((1, 1)), "PNG"),
        b"bees/tall.jpg": encoded(picture.resize((3, 500))),
    }
    for name, data in files.items():
        (root / os.fsdecode(name)).write_bytes(data)
    return root


@pytest.fixture(scope="module")
def packed(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photographs as they are."""
    store = tmp_path_factory.mktemp("packed") / "originals"
    summary = pack(photos, store, SMALL)
    assert (summary.images, summary.made, summary.left_out) == (33, 33, ())
    return store


def mixed(root: Path, edits: Path, bank: FractalBank, **options: object) -> DiffuseMixDataset:
    arguments = {"crop": TrainCrop(40), "mix": MixSpec.paper(), "edits": edits, "fractals": bank, **options}
    return DiffuseMixDataset(root, **arguments)  # type: ignore[arg-type]


def load(dataset: DiffuseMixDataset, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed on this machine")
    with DiffuseMixLoader(dataset, batch_size=8, num_workers=2, device="cpu", **options) as loader:
        images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def assert_same_samples(loose: DiffuseMixDataset, other: DiffuseMixDataset) -> None:
    """Bit for bit, under DataLoader and in the loader, decoding what is seen or all."""
    assert len(loose) == len(other)
    for i in range(len(loose)):
        (image, label), (expected, expected_label) = other[i], loose[i]
        assert torch.equal(image, expected) and label == expected_label, loose.samples[i % len(loose.samples)]
    expected_images, expected_labels = load(loose)
    for visible_parts in (True, False):
        images, labels = load(other, visible_parts=visible_parts)
        assert torch.equal(images, expected_images if visible_parts else load(loose, visible_parts=False)[0])
        assert torch.equal(labels, expected_labels)


# As they are ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tiled", [False, True])
def test_pixels_are_stored_as_they_are(photos: Path, packed: Path, tmp_path: Path, tiled: bool) -> None:
    if not tiled:
        packed = tmp_path / "untouched"
        pack(photos, packed, dataclasses.replace(SMALL, tiled=False))
    store, catalog = OriginalStore.open(packed), index(photos)
    assert store.path == packed and (store.settings["max_side"], store.settings["quality"]) == (None, None)
    assert (store.settings["restarts"] is not None) == tiled
    assert store.catalog.fingerprint == catalog.fingerprint and list(store.catalog.paths) == list(catalog.paths)
    np.testing.assert_array_equal(store.catalog.sizes, catalog.sizes)
    np.testing.assert_array_equal(store.catalog.labels, catalog.labels)
    for row, path in enumerate(catalog.paths):
        image = store.encoded(row)
        content = (photos / path).read_bytes()
        assert image.tobytes() == (tile(content) if tiled else content)
        np.testing.assert_array_equal(decode(image), decode(content))
        assert image.dtype == np.uint8 and not image.flags.writeable and not image.flags.owndata
    assert isinstance(store.index.base, np.ndarray)  # mapped, not read
    again = pickle.loads(pickle.dumps(store))
    assert len(pickle.dumps(store)) < 1000 and len(again) == len(store) == 33
    assert again.encoded(32).tobytes() == store.encoded(32).tobytes()


def test_samples_are_those_of_the_folder(photos: Path, packed: Path, edits: Path, bank: FractalBank) -> None:
    loose, dataset = mixed(photos, edits, bank), mixed(packed, edits, bank)
    assert loose.original_store is None and dataset.original_store is not None
    assert dataset.planner.batch(0, range(33)).mixed.any()
    assert dataset.samples[5] == (str(packed / "ants" / "05.jpg"), 0)
    assert_same_samples(loose, dataset)
    again = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(again[7][0], dataset[7][0]) and len(pickle.dumps(dataset)) < 20_000
    assert_same_samples(DiffuseMixDataset(photos, crop=EvalCrop(32)), DiffuseMixDataset(str(packed), crop=EvalCrop(32)))


def test_every_kind_of_file(odd: Path, make_store: MakeStore, bank: FractalBank, tmp_path: Path) -> None:
    pack(odd, tmp_path / "packed", SMALL)
    edits = make_store(odd, prompts=("autumn",), size=40)
    mix = MixSpec(probability=0.5)
    assert_same_samples(mixed(odd, edits, bank, mix=mix), mixed(tmp_path / "packed", edits, bank, mix=mix))
    members = []
    for file in sorted((tmp_path / "packed" / "shards").glob("*.tar")):
        with tarfile.open(file) as tar:
            members += [member.name for member in tar.getmembers()]
    assert sorted(members) == sorted(
        [
            "a%2Eb%20c/LOUD%2EPNG.png",
            "a%2Eb%20c/no%20ending.jpg",
            "a%2Eb%20c/not%20utf-8%20%FF%FE%2Ejpg.jpg",
            "a%2Eb%20c/two%2Edots%2Ejpeg.jpeg",
            "bees/grey%2Epng.png",
            "bees/one%2Epng.png",
            "bees/tall%2Ejpg.jpg",
            "bees/turned%2Ejpg.jpg",
            "bees/turned%20lossless%2Ewebp.webp",
        ]
    )


@pytest.mark.filterwarnings("ignore")
def test_webdataset_reads_a_shard(packed: Path) -> None:
    webdataset = pytest.importorskip("webdataset", reason="webdataset is not installed")
    samples = list(webdataset.WebDataset(str(packed / "shards" / "originals-000000.tar"), shardshuffle=False))
    store = OriginalStore.open(packed)
    assert [sample["__key__"] for sample in samples] == [f"ants/0{row}%2Ejpg" for row in range(4)]
    assert [sample["jpg"] for sample in samples] == [store.encoded(row).tobytes() for row in range(4)]


def test_a_shards_index_is_the_one_that_dali_makes(packed: Path, tmp_path: Path) -> None:
    tool = pytest.importorskip("wds2idx", reason="DALI is not installed")
    tar = packed / "shards" / "originals-000001.tar"
    with tool.IndexCreator(str(tar), str(tmp_path / "theirs.idx"), verbose=False) as creator:
        creator.create_index()
    assert tar.with_suffix(".idx").read_text().split() == (tmp_path / "theirs.idx").read_text().split()


def test_generate_makes_the_same_edits_of_a_packed_store(photos: Path, packed: Path, tmp_path: Path) -> None:
    config = GenerateConfig(prompts=("autumn",), size=24)
    generate(photos, tmp_path / "loose", config)
    assert generate(packed, tmp_path / "packed", config).made == 33
    assert content(tmp_path / "loose" / "shards") == content(tmp_path / "packed" / "shards")
    assert generate(packed, tmp_path / "loose", config).made == 0  # and either goes on with the other's store
    with pytest.raises(ConfigError, match="store must lie outside the root"):
        generate(packed, packed / "edits", config)
    # Edits of the packed store serve the folder.
    crop, mix = TrainCrop(32), MixSpec(fractal_weight=0)
    pair = [DiffuseMixDataset(root, crop=crop, mix=mix, edits=tmp_path / "packed") for root in (photos, packed)]
    assert_same_samples(*pair)


# Smaller --------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 70_000), st.integers(1, 70_000), st.integers(1, 65_500))
def test_the_law_of_the_longest_side(height: int, width: int, most: int) -> None:
    fitted = tuple(_fitted(np.array([[height, width]], dtype=np.int32), most)[0].tolist())
    if max(height, width) <= most:
        assert fitted == (height, width)
        return
    assert max(fitted) == most and min(fitted) >= 1
    for side, whole in zip(fitted, (height, width), strict=True):
        assert side == 1 or abs(side - whole * most / max(height, width)) <= 0.5 + 1e-9


def test_longest_sides_orientations_and_qualities(odd: Path, tmp_path: Path) -> None:
    pack(odd, tmp_path / "packed", PackConfig(max_side=60))
    store, listed = OriginalStore.open(tmp_path / "packed"), index(odd)
    assert store.settings["quality"] == 90 and store.catalog.fingerprint == listed.fingerprint
    sizes = {path: tuple(size) for path, size in zip(store.catalog.paths, store.catalog.sizes.tolist(), strict=True)}
    assert sizes["a.b c/two.dots.jpeg"] == (60, 44) and sizes["bees/turned.jpg"] == (44, 60)
    assert sizes["a.b c/no ending"] == (30, 31) and sizes["bees/one.png"] == (1, 1)
    assert sizes["bees/tall.jpg"] == (60, 1) and sizes[os.fsdecode(b"a.b c/not utf-8 \xff\xfe.jpg")] == (27, 60)
    for row, path in enumerate(store.catalog.paths):
        height, width = store.catalog.sizes[row].tolist()
        pixels = Image.fromarray(decode(odd / path))
        smaller = pixels if pixels.size == (width, height) else pixels.resize((width, height), Image.Resampling.LANCZOS)
        expected = decode(encoded(smaller, quality=90, subsampling="4:2:0"))
        np.testing.assert_array_equal(decode(store.encoded(row)), expected)
        assert expected.shape == (height, width, 3)
    pack(odd, tmp_path / "quality", PackConfig(quality=30))
    rough = OriginalStore.open(tmp_path / "quality")
    np.testing.assert_array_equal(rough.catalog.sizes, listed.sizes)
    expected = decode(encoded(decode(odd / rough.catalog.path(2)), quality=30, subsampling="4:2:0"))
    np.testing.assert_array_equal(decode(rough.encoded(2)), expected)


def test_edits_of_the_folder_serve_smaller_originals(
    photos: Path, edits: Path, bank: FractalBank, tmp_path: Path
) -> None:
    pack(photos, tmp_path / "packed", PackConfig(max_side=70))
    dataset = mixed(tmp_path / "packed", edits, bank)
    assert dataset.catalog.sizes.max() == 70
    images, labels = load(dataset)
    assert torch.equal(labels, torch.tensor(dataset.targets))
    for i in range(33):
        torch.testing.assert_close(images[i], dataset[i][0], atol=2e-5, rtol=0)


# Pairing by path ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_another_order_of_rows_is_paired_by_path(photos: Path, edits: Path, bank: FractalBank, tmp_path: Path) -> None:
    listed = index(photos)
    rows = np.random.default_rng(0).permutation(33)
    labels = (2 - listed.labels)[rows]
    other = Catalog.from_arrays([listed.path(row) for row in rows], labels, listed.classes[::-1], listed.sizes[rows])
    assert other.fingerprint == listed.fingerprint
    pack(photos, tmp_path / "packed", SMALL, catalog=other)
    dataset = mixed(tmp_path / "packed", edits, bank)
    assert_same_samples(mixed(photos, edits, bank), dataset)
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[9][0], dataset[9][0])
    config = GenerateConfig(prompts=("autumn", "snowy"), size=48, variants=2)
    shutil.copytree(edits, tmp_path / "edits")
    generate(tmp_path / "packed", tmp_path / "edits", config)
    generate(photos, tmp_path / "whole", GenerateConfig(prompts=("autumn", "snowy"), size=48, format="jpeg"))
    generate(photos, tmp_path / "whole", config)
    assert content(tmp_path / "whole" / "shards") == content(tmp_path / "edits" / "shards")


def test_a_catalog_may_choose_some(photos: Path, packed: Path) -> None:
    paths = ["cats/03.jpg", "ants/07.jpg"]
    catalog = Catalog.from_arrays(paths, [0, 1], ["feline", "insect"], root=photos)
    pair = [DiffuseMixDataset(root, crop=EvalCrop(32), catalog=catalog) for root in (photos, packed)]
    assert pair[1].targets == [0, 1]
    assert_same_samples(*pair)


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """Eight images, of which two cannot be decoded and one has gone, since they were listed."""
    root = tmp_path / "train"
    (root / "a").mkdir(parents=True)
    for i in range(8):
        write_photograph(root / "a" / f"{i}.jpg", i, 50 + i, 60)
    index(root)
    for i, data in ((1, b""), (4, (root / "a" / "4.jpg").read_bytes()[:900])):
        (root / "a" / f"{i}.jpg").write_bytes(data)
    return root


@pytest.mark.filterwarnings("ignore::dali_diffusemix.StaleCatalogWarning")
@pytest.mark.parametrize("quality", [None, 80])
def test_what_cannot_be_decoded_is_left_out_and_reported(
    damaged: Path, tmp_path: Path, quality: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    (damaged / "a" / "6.jpg").unlink()
    config = PackConfig(quality=quality, originals_per_shard=3)
    summary = pack(damaged, tmp_path / "packed", config)
    assert (summary.images, summary.made) == (5, 8)
    assert [one.path for one in summary.left_out] == ["a/1.jpg", "a/4.jpg", "a/6.jpg"]
    assert all(f"'a/{i}.jpg' is left out" in caplog.text for i in (1, 4, 6))
    store = OriginalStore.open(tmp_path / "packed")
    assert list(store.catalog.paths) == [f"a/{i}.jpg" for i in (0, 2, 3, 5, 7)]
    assert store.catalog.sizes[:, 0].tolist() == [50, 52, 53, 55, 57]
    for row, i in enumerate((0, 2, 3, 5, 7)):
        file = (damaged / "a" / f"{i}.jpg").read_bytes()
        assert quality is not None or store.encoded(row).tobytes() in (file, tile(file))
    rows = np.load(tmp_path / "packed" / "shards" / "originals-000001.npy", allow_pickle=False)
    assert rows.dtype == ORIGINAL_SHARD_ROW and rows["verdict"].tolist() == [0, 1, 0]
    before = content(tmp_path / "packed")
    again = pack(damaged, tmp_path / "packed", config)
    assert again.made == 0 and again.left_out == summary.left_out and content(tmp_path / "packed") == before
    # A catalog, or edits, of the whole folder name originals that are not in here: they are damaged here as there.
    dataset = DiffuseMixDataset(tmp_path / "packed", crop=EvalCrop(32), catalog=index(damaged))
    with pytest.warns(QuarantineWarning, match=r"a/1\.jpg"):
        assert torch.equal(dataset[1][0], dataset[2][0])
    assert len(dataset) == 8 and dataset.catalog.sizes[:, 0].tolist() == [50 + i for i in range(8)]


def test_nothing_that_can_be_decoded_is_an_error(damaged: Path, tmp_path: Path) -> None:
    for file in (damaged / "a").iterdir():
        file.write_bytes(b"")
    with pytest.raises(StoreError, match="none of the 8 originals could be packed"):
        pack(damaged, tmp_path / "packed")


@pytest.mark.parametrize("damage", ["bytes", "size"])
def test_a_damaged_packed_original_is_named_and_the_loader_lives_on(photos: Path, tmp_path: Path, damage: str) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed on this machine")
    pack(photos, tmp_path / "packed")
    dataset = DiffuseMixDataset(tmp_path / "packed", crop=EvalCrop(32), on_error="raise")
    loader = DiffuseMixLoader(dataset, batch_size=11, device="cpu")
    good = [images for images, _ in loader]
    assert dataset.original_store is not None
    row = dataset.original_store.index[13]
    (tar,) = (tmp_path / "packed" / "shards").glob("*.tar")
    if damage == "size":
        os.truncate(tar, 1024)
        with pytest.raises(StoreError, match=r"originals-000000\.tar.*found 1024.*pack"):
            DiffuseMixDataset(tmp_path / "packed", crop=EvalCrop(32))
        return
    with tar.open("r+b") as file:
        file.seek(int(row["offset"]))
        file.write(bytes(int(row["length"])))
    loader.set_epoch(0)
    batches = iter(loader)
    assert torch.equal(next(batches)[0], good[0])
    with pytest.raises(DecodeError) as caught:
        next(batches)
    assert any(str(tmp_path / "packed" / "bees" / "02.jpg") in note for note in caught.value.__notes__)
    with pytest.raises(DecodeError, match=r"bees/02\.jpg") as caught_too:
        dataset[13]
    for error in (caught.value, caught_too.value):
        assert "verify STORE --discard" in str(error) and "in memory" not in str(error)
    loader.set_epoch(0)
    assert torch.equal(next(iter(loader))[0], good[0])


def test_stores_in_each_others_places(photos: Path, packed: Path, edits: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"'magic' must be 'dali_diffusemix.originals', found .*\.store'.* as edits"):
        DiffuseMixDataset(edits, crop=EvalCrop(32))
    with pytest.raises(StoreError, match=r"'magic' must be 'dali_diffusemix.store', found .*originals'.* in place of"):
        DiffuseMixDataset(photos, crop=EvalCrop(32), edits=packed, mix=None)
    with pytest.raises(StoreError, match="'magic' must be"):
        EditStore.open(packed)
    with pytest.raises(StoreError, match="'magic' must be"):
        generate(photos, packed)
    before = content(edits)
    with pytest.raises(StoreError, match="'magic' must be"):
        pack(photos, edits)
    assert content(edits) == before
    with pytest.raises(ConfigError, match="found a packed store"):
        pack(packed, tmp_path / "again")
    with pytest.raises(StoreError, match="there is no packed store"):
        OriginalStore.open(tmp_path)
    with pytest.raises(ConfigError, match="outside the root"):
        pack(photos, photos / "packed")


def test_other_settings_originals_and_versions_are_refused(photos: Path, odd: Path, tmp_path: Path) -> None:
    store = tmp_path / "packed"
    pack(odd, store, PackConfig(max_side=50))
    with pytest.raises(StoreError, match="max_side: 50 in the store, 60 asked for"):
        pack(odd, store, PackConfig(max_side=60))
    with pytest.raises(StoreError, match=r"built from other originals.* Pack into a new folder") as caught:
        pack(photos, store, PackConfig(max_side=50))
    assert "welcome" not in str(caught.value) and f"Catalog.open({str(store / 'listed')!r})" in str(caught.value)
    for name in ("store.json", "index.json"):
        text = (store / name).read_text()
        (store / name).write_text(text.replace('"version": 1', '"version": 2'))
        with pytest.raises(StoreError, match="'version' must be 1, found 2"):
            OriginalStore.open(store)
        (store / name).write_text(text)


def test_what_is_derived_is_derived_anew(odd: Path, tmp_path: Path) -> None:
    store = tmp_path / "packed"
    pack(odd, store, SMALL)
    before = content(store)
    for damage, message in (("index.json", "not finished"), ("index.npy", "index.npy.*pack"), ("catalog", "catalog")):
        if damage == "catalog":
            shutil.rmtree(store / damage)
        else:
            (store / damage).unlink()
        with pytest.raises(StoreError, match=message):
            OriginalStore.open(store)
        assert pack(odd, store, SMALL).made == 0
        assert content(store) == before
    (store / "shards" / "originals-000001.tar").unlink()
    with pytest.raises(StoreError, match=r"originals-000001\.tar.*missing.*pack"):
        OriginalStore.open(store)
    assert pack(odd, store, SMALL).made == 4
    assert content(store) == before


def test_a_wrong_index_is_found_and_made_anew(odd: Path, tmp_path: Path) -> None:
    store = tmp_path / "packed"
    pack(odd, store, SMALL)
    before = content(store)
    table = np.load(store / "index.npy")
    table["offset"][:2] = table["offset"][1::-1]
    np.save(store / "index.npy", table)
    OriginalStore.open(store)  # sees nothing of it
    (problem,) = verify(store).problems
    assert problem.file == "index.npy" and "run the command that made the store again" in problem.what
    assert pack(odd, store, SMALL).made == 0
    assert content(store) == before and not verify(store).problems
    inodes = [file.stat().st_ino for file in sorted(store.rglob("*"))]
    pack(odd, store, SMALL)  # and where nothing is wrong, nothing is written
    assert [file.stat().st_ino for file in sorted(store.rglob("*"))] == inodes


@pytest.mark.parametrize(
    "fields", [{"max_side": 0}, {"quality": 101}, {"quality": True}, {"originals_per_shard": None}]
)
def test_a_config_checks_itself(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(fields))} must be a whole number from 1 to"):
        PackConfig(**fields)


# Going on -------------------------------------------------------------------------------------------------------------

RUN = """
import sys
from dali_diffusemix.store.pack import PackConfig, pack
def progress(done, total):
    sys.stdout.write(f"{done}\\n")
    sys.stdout.flush()
    sys.stdin.readline()
pack(sys.argv[1], sys.argv[2], PackConfig(max_side=300, originals_per_shard=2), progress=progress)
"""


@pytest.mark.slow
def test_killed_again_and_again_it_ends_with_the_same_store_and_makes_nothing_twice(tmp_path: Path) -> None:
    root, store, rng = tmp_path / "train", tmp_path / "killed", random.Random(0)
    (root / "a").mkdir(parents=True)
    data = [encoded(photograph(i, 500, 400)) for i in range(4)]
    for i in range(60):
        (root / "a" / f"{i:02}.jpg").write_bytes(data[i % 4])
    finished: dict[str, tuple[int, int]] = {}
    for kill in range(6):
        with warm.Script("-c", RUN, root, store) as run:
            for _ in range(kill and rng.randint(1, 6)):  # first at its very beginning
                run.stdout.readline()
                run.stdin.write("\n")  # it waits for this: however slow we are, it cannot come to its end
                run.stdin.flush()
            time.sleep(rng.uniform(0, 0.3 if kill == 0 else 0.02))
            run.kill()
        assert run.returncode == -signal.SIGKILL
        now = {
            file.name: ((status := file.with_suffix(".tar").stat()).st_ino, status.st_mtime_ns)
            for file in (store / "shards").glob("*.json")
        }
        assert finished.items() <= now.items()
        finished = now
        with pytest.raises(StoreError, match=r"not finished|no packed store"):
            OriginalStore.open(store)
    assert finished  # all of them, where this process was kept waiting
    config = PackConfig(max_side=300, originals_per_shard=2)
    assert pack(root, store, config).made == 60 - 2 * len(finished)
    pack(root, tmp_path / "whole", config)
    assert {name: data for name, data in content(store).items() if name != ".lock"} == {
        name: data for name, data in content(tmp_path / "whole").items() if name != ".lock"
    }


# The command ----------------------------------------------------------------------------------------------------------


def run(*arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(cli.main, [str(argument) for argument in arguments], prog_name="dali-diffusemix")
    assert result.exit_code == code, result.output
    return result


@pytest.mark.filterwarnings("ignore::dali_diffusemix.StaleCatalogWarning")
def test_the_command(damaged: Path, tmp_path: Path) -> None:
    shown = run("pack", damaged, tmp_path / "packed", "--max-side", 40)
    assert shown.stdout.startswith("6 images, 0.0 MB\n2 left out\n  a/1.jpg: ")
    assert "8 done now, in " in shown.stdout and shown.stdout.endswith(f"kept in {tmp_path / 'packed'}\n")
    assert shown.stderr == ""
    again = run("pack", damaged, tmp_path / "packed", "--max-side", 40, "--json")
    found = json.loads(again.stdout)
    assert again.stderr == "" and found["images"] == 6 and found["made"] == 0
    assert [one["path"] for one in found["left_out"]] == ["a/1.jpg", "a/4.jpg"]
    store = OriginalStore.open(tmp_path / "packed")
    assert found["bytes"] == sum(store.encoded(row).size for row in range(6)) and store.catalog.sizes.max() == 40
    made = run("generate", tmp_path / "packed", tmp_path / "edits", "--prompts", "autumn", "--size", 32, "--json")
    assert json.loads(made.stdout)["verdicts"]["accepted"] == 6
    refused = run("index", tmp_path / "packed", code=1)
    assert "found a packed store" in refused.stderr and "index the folder that it was made from" in refused.stderr
    assert "found a packed store" in run("pack", tmp_path / "packed", tmp_path / "x", code=1).stderr
    assert "max_side must be a whole number" in run("pack", damaged, tmp_path / "x", "--max-side", 0, code=1).stderr
    assert not (tmp_path / "x").exists()


def test_a_summary_is_what_the_store_holds(odd: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    summary = pack(
        odd, tmp_path / "packed", dataclasses.replace(SMALL, tiled=False), progress=lambda *call: calls.append(call)
    )
    assert isinstance(summary, PackSummary) and summary.seconds > 0
    assert summary.bytes == sum(file.stat().st_size for file in odd.rglob("*") if file.is_file())
    assert calls == [(0, 9), (4, 9), (8, 9), (9, 9)]
