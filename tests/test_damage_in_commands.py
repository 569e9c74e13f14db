"""One damaged image ends no command: packed stores fit the edits of their folder, preview, bench and export go on."""

import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from material import encoded, photograph, write_photograph

from dali_diffusemix import (
    DecodeError,
    DiffuseMixDataset,
    DiffuseMixLoader,
    EditStore,
    FractalBank,
    MixSpec,
    QuarantineWarning,
    StoreError,
    TrainCrop,
    cli,
)
from dali_diffusemix.bench import BenchResult, bench
from dali_diffusemix.bench.material import decodable
from dali_diffusemix.catalog import StaleCatalogWarning, index
from dali_diffusemix.errors import ConfigError, DataError
from dali_diffusemix.generate import GenerateConfig, generate
from dali_diffusemix.images.codec import decode
from dali_diffusemix.inspect.export import export
from dali_diffusemix.store import OriginalStore
from dali_diffusemix.store.pack import PackConfig, pack

# As torchvision.datasets.folder.IMG_EXTENSIONS.
LISTED = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

quiet = pytest.mark.filterwarnings("ignore::dali_diffusemix.QuarantineWarning")

WAYS: dict[str, Callable[[bytes], bytes | None]] = {
    "cut": lambda content: content[: len(content) // 2],
    "scrambled": lambda content: content[:400] + bytes(len(content) - 400),
    "empty": lambda content: b"",
    "gone": lambda content: None,
    "page": lambda content: b"<!DOCTYPE html><html>404</html>",
}


@pytest.fixture(params=list(WAYS))
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """8 photographs in 2 classes, listed while all were well; the fourth damaged since."""
    folder = tmp_path / "train"
    for place in range(8):
        file = folder / f"c{place % 2}" / f"{place}.jpg"
        write_photograph(file, place, 120, 160)
    index(folder)
    file = folder / "c1" / "3.jpg"
    content = WAYS[request.param](file.read_bytes())
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    return folder


@pytest.fixture
def edits(root: Path, tmp_path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StaleCatalogWarning)
        generate(root, tmp_path / "edits", GenerateConfig(prompts=("autumn",), size=64, format="jpeg"))
    return tmp_path / "edits"


@pytest.fixture
def packed(root: Path, tmp_path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StaleCatalogWarning)
        assert len(pack(root, tmp_path / "packed", PackConfig(originals_per_shard=3)).left_out) == 1
    return tmp_path / "packed"


def dataset_of(root: Path, edits: Path, bank: FractalBank) -> DiffuseMixDataset:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StaleCatalogWarning)
        return DiffuseMixDataset(root, edits=edits, fractals=bank, mix=MixSpec(probability=1), crop=TrainCrop(32))


@quiet
def test_the_packed_store_gives_the_samples_of_its_folder(
    root: Path, edits: Path, packed: Path, bank: FractalBank
) -> None:
    loose, store = dataset_of(root, edits, bank), dataset_of(packed, edits, bank)
    assert len(loose) == len(store) == 8
    for place in range(8):
        (image, label), (expected, expected_label) = store[place], loose[place]
        assert torch.equal(image, expected) and label == expected_label
    (one,) = store.quarantine.values()
    assert one.path.endswith("c1/3.jpg") and "was left out when this store was packed" in one.reason
    pytest.importorskip("nvidia.dali", reason="DALI is not installed on this machine")
    for visible_parts in (False, True):
        images = [
            torch.cat([batch for batch, _ in DiffuseMixLoader(one, 3, device="cpu", visible_parts=visible_parts)])
            for one in (loose, store)
        ]
        assert torch.equal(*images)


@quiet
def test_what_was_not_packed_is_an_unreadable_original(
    root: Path, edits: Path, packed: Path, bank: FractalBank
) -> None:
    """For `generate` from the packed store into the store of the folder, too; what is only missing is refused."""
    with pytest.warns(StaleCatalogWarning):
        summary = generate(packed, edits, GenerateConfig(prompts=("autumn", "snowy"), size=64))
    assert summary.verdicts["unreadable original"] == 2
    catalog = EditStore.open(edits).catalog
    ordered = OriginalStore.open(packed).reindexed(catalog)
    missing = list(catalog.paths).index("c1/3.jpg")
    assert isinstance(ordered.extents(np.array([missing]))[0], DecodeError)
    with pytest.raises(DecodeError, match=r"'c1/3\.jpg' was left out when this store was packed"):
        ordered.encoded(missing)
    write_photograph(root / "c0" / "new.jpg", 9, 120, 160)
    with pytest.raises(StoreError, match=r"lacks 1 of the \d originals asked for \(for one 'c0/new.jpg'\)"):
        OriginalStore.open(packed).reindexed(index(root, refresh=True))


def run(*arguments: object) -> str:
    result = CliRunner().invoke(cli.main, [str(one) for one in arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.slow
@pytest.mark.parametrize("options", ["", "--decoded", "--epochs 0-2", "--preset paper,release", "--indices 5"])
def test_preview_goes_on(root: Path, edits: Path, bank: FractalBank, tmp_path: Path, options: str) -> None:
    said = run(
        *("preview", root, "--edits", edits, "--fractals", bank.path, "--out", tmp_path / "sheet.png"),
        *options.split(),
    )
    assert "c1/3.jpg" in said and (tmp_path / "sheet.png").is_file()


def test_an_animation_goes_on(root: Path, edits: Path, bank: FractalBank, tmp_path: Path) -> None:
    place = list(EditStore.open(edits).catalog.paths).index("c1/3.jpg")
    more = ("--epochs", "0-1", "--indices", place, "--out", tmp_path / "x.gif")
    assert "c1/3.jpg" in run("preview", root, "--edits", edits, "--fractals", bank.path, *more)


@quiet
def test_export_leaves_out_damaged_edits_too(root: Path, edits: Path, bank: FractalBank, tmp_path: Path) -> None:
    store = EditStore.open(edits)
    row = store.index[2]
    with (edits / "shards" / f"edits-{row['shard']:06}.tar").open("r+b") as tar:
        tar.seek(int(row["offset"]) + 300)
        tar.write(bytes(int(row["length"]) - 300))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StaleCatalogWarning)
        exported = export(root, edits, tmp_path / "out")
    assert (exported.originals, exported.edits, exported.left_out) == (7, len(store) - 1, 2)
    for file in (tmp_path / "out").rglob("*.jpg"):
        decode(file)


@pytest.mark.slow
@pytest.mark.parametrize("root", ["cut"], indirect=True)
def test_bench_leaves_out_what_cannot_be_decoded(
    root: Path, edits: Path, packed: Path, bank: FractalBank, tmp_path: Path
) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed on this machine")
    result: BenchResult = bench(
        root, edits=edits, fractals=bank.path, batch_size=4, size=32, rounds=1, seconds=0.1, num_workers=1
    )
    assert set(result.results) == {"diffusemix", "plain", "plain_dali", "pillow_plain", "pillow_mixed"}
    assert not result.left_out and result.settings["undecodable"] == 1 and result.settings["images"] == 7
    assert "1 left out: they cannot be decoded" in list(result.lines())
    rows, undecodable = decodable(dataset_of(packed, edits, bank), np.arange(8))
    assert len(rows) == 7 and undecodable == 1
    for file in root.rglob("*.jpg"):
        file.write_bytes(b"")
    with pytest.raises(DataError, match="root must have images that can be decoded, found none among 8"):
        bench(root, batch_size=4, size=32, rounds=1, seconds=0.1)


# Names ----------------------------------------------------------------------------------------------------------------


def test_export_writes_names_that_imagefolder_lists(tmp_path: Path) -> None:
    root, out = tmp_path / "train", tmp_path / "out"
    (root / "x").mkdir(parents=True)
    names = [
        *(
            "a.jpg",
            "b.jfif",
            "b.jfif.jpg",
            "c.jpe",
            "none",
            "dots.in.name",
            "LOUD.JPG",
            "lies.gif",
            "\u732b" * 83 + ".jpg",
        ),
        *("z" * 251 + ".jpg", "y" * 255, "x" * 250 + ".jfif", "\u732b" * 83 + ".png", "scan.pnm", "real.tif"),
    ]
    for place, name in enumerate(names):
        form = {"png": "PNG", "pnm": "PPM", "tif": "TIFF"}.get(name[-3:], "JPEG")
        (root / "x" / name).write_bytes(encoded(photograph(place, 30, 40), form))
    os.link(root / "x" / "a.jpg", os.fsencode(root) + b"/x/" + b"\xff\xfe" * 120 + b".jpg")  # not UTF-8
    generate(root, tmp_path / "edits", GenerateConfig(prompts=("watercolor art",), size=24, resize="keep"))
    exported = export(root, tmp_path / "edits", out)
    count = len(names) + 1
    assert (exported.originals, exported.left_out) == (count, 0) and exported.edits >= count - 2
    files = [file for file in out.rglob("*") if file.is_file()]
    assert len(files) == exported.originals + exported.edits
    assert all(file.name.lower().endswith(LISTED) for file in files)
    assert (out / "x" / "a.jpg").read_bytes() == (root / "x" / "a.jpg").read_bytes()
    assert (out / "x" / "none.jpg").is_file() and (out / "x" / "lies.gif.jpg").is_file()
    assert (out / "x" / "b.jfif.jpg").read_bytes() == (root / "x" / "b.jfif.jpg").read_bytes()
    (renamed,) = (out / "x").glob("b.jfif~*.jpg")
    assert renamed.read_bytes() == (root / "x" / "b.jfif").read_bytes()
    # The same names again, whoever asks first.
    before = sorted(file.name for file in files)
    shutil.rmtree(out)
    export(root, tmp_path / "edits", out)
    assert sorted(file.name for file in out.rglob("*") if file.is_file()) == before


def test_an_original_deleted_from_a_folder_with_edits_is_said(photos: Path, tmp_path: Path, bank: FractalBank) -> None:
    root = tmp_path / "train"
    shutil.copytree(photos, root)
    generate(root, tmp_path / "edits", GenerateConfig(prompts=("autumn",), size=32))
    options = {"edits": tmp_path / "edits", "fractals": bank, "mix": MixSpec.paper(), "crop": TrainCrop(16)}
    DiffuseMixDataset(root, **options)  # type: ignore[arg-type]
    (root / "bees" / "04.jpg").unlink()
    with pytest.warns(
        StaleCatalogWarning, match=r"1 of the 33 originals .* gone \(for one 'bees/04.jpg'\).*--refresh"
    ) as said:
        DiffuseMixDataset(root, **options)  # type: ignore[arg-type]
    assert len(said) == 1
    write_photograph(root / "ants" / "new.jpg", 1, 40, 40)
    catalog = index(root, refresh=True)
    with pytest.raises(StoreError, match="lacks 1"):
        DiffuseMixDataset(root, catalog=catalog, **options)  # type: ignore[arg-type]  # the new one has no edits yet
    with pytest.warns(StaleCatalogWarning, match="not among those given"):
        generate(root, tmp_path / "edits", GenerateConfig(prompts=("autumn",), size=32))
    assert len(DiffuseMixDataset(root, catalog=catalog, **options)) == 33  # type: ignore[arg-type]
    with pytest.warns(StaleCatalogWarning, match="gone"):  # still so, where the new list is not given
        DiffuseMixDataset(root, **options)  # type: ignore[arg-type]


def test_swapped_stores_and_a_folder_too_high_are_understood(photos: Path, tmp_path: Path, bank: FractalBank) -> None:
    shutil.copytree(photos, tmp_path / "data/train")
    root, edits, fractals = tmp_path / "data/train", tmp_path / "edits", tmp_path / "fractals.npy"
    np.save(fractals, np.zeros((1, 32, 32, 3), np.uint8))
    generate(root, edits, GenerateConfig(prompts=("autumn",), size=32))
    crop = TrainCrop(16)
    with pytest.raises(StoreError, match=r"fractals.npy' must be an edit store.* are edits and fractals swapped\?"):
        DiffuseMixDataset(root, edits=fractals, fractals=edits, crop=crop)
    with pytest.raises(StoreError, match=r"readable \.npy file.* are edits and fractals swapped\?"):
        DiffuseMixDataset(root, edits=edits, fractals=edits, crop=crop)
    with pytest.raises(ConfigError, match=r"only root is given by position, found .*; write edits=, fractals="):
        DiffuseMixDataset(root, edits, fractals, crop)  # type: ignore[arg-type]
    with pytest.raises(StoreError, match="has none of 32 that were looked for") as raised:
        DiffuseMixDataset(tmp_path / "data", edits=edits, fractals=bank, crop=crop)
    assert raised.value.instead == {str(tmp_path / "data"): str(root)}


def test_images_that_are_new_in_a_folder_with_edits_are_said(photos: Path, tmp_path: Path, bank: FractalBank) -> None:
    root = tmp_path / "train"
    shutil.copytree(photos, root)
    (root / "ants" / "broken.jpg").write_bytes(b"no image")
    config = GenerateConfig(prompts=("autumn",), size=32)
    generate(root, tmp_path / "edits", config)
    options: dict[str, Any] = {
        "edits": tmp_path / "edits",
        "fractals": bank,
        "mix": MixSpec.paper(),
        "crop": TrainCrop(16),
    }
    (root / "ants" / "notes.txt").write_text("not an image")
    before = len(DiffuseMixDataset(root, **options))
    write_photograph(root / "ants" / "new.jpg", 1, 40, 40)
    write_photograph(root / "wasps" / "1.jpg", 2, 40, 40)
    for _ in range(2):  # listed again or not: what counts is that they have no edits
        with pytest.warns(StaleCatalogWarning, match=r"of the edits: 2, such as 'ants/new.jpg'.*--refresh") as said:
            assert len(DiffuseMixDataset(root, **options)) == before
        assert len(said) == 1
        index(root, refresh=True)
    generate(root, tmp_path / "edits", config)
    assert len(DiffuseMixDataset(root, **options)) == before + 2


@pytest.mark.slow
def test_a_thin_picture_is_drawn(tmp_path: Path, bank: FractalBank) -> None:
    root = tmp_path / "train"
    (root / "x").mkdir(parents=True)
    for width, height in ((500, 1), (1, 500), (300, 200), (1, 1), (1, 9000)):
        (root / f"x/{width}x{height}.png").write_bytes(encoded(photograph(width, height, width), "PNG"))
    generate(root, tmp_path / "edits", GenerateConfig(prompts=("autumn",), size=64))
    for options in ("", "--decoded", "--epochs 0-2", "--preset paper,release", "--size 1", "--size 1 --decoded"):
        run(
            "preview",
            root,
            "--edits",
            tmp_path / "edits",
            "--fractals",
            bank.path,
            *options.split(),
            "--out",
            tmp_path / "s.png",
        )


def test_the_warnings_name_the_file(root: Path, edits: Path, bank: FractalBank) -> None:
    dataset = dataset_of(root, edits, bank)
    with pytest.warns(QuarantineWarning, match=r"c1/3\.jpg"):
        for place in range(8):
            dataset[place]
