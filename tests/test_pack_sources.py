"""pack: whatever originals come from, and edits, the store has their pixels; killed or damaged, it says and resumes."""

import json
import pickle
import random
import shutil
import signal
import tarfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import miniature
import numpy as np
import pytest
import torch
import warm
from click.testing import CliRunner
from material import encoded, photograph
from numpy.typing import NDArray
from PIL import Image

from dali_diffusemix import (
    Catalog,
    ConfigError,
    DecodeError,
    DiffuseMixDataset,
    EditStore,
    EvalCrop,
    MixSpec,
    StoreError,
    cli,
)
from dali_diffusemix.catalog import index, read_layout
from dali_diffusemix.errors import CatalogError
from dali_diffusemix.generate import GenerateConfig, generate
from dali_diffusemix.generate.quality import Thresholds
from dali_diffusemix.images.codec import decode, raw_header
from dali_diffusemix.inspect.report import write_report
from dali_diffusemix.inspect.verify import verify
from dali_diffusemix.sources import Content, source_of
from dali_diffusemix.store import VERDICTS, OriginalStore, UnfinishedStoreWarning
from dali_diffusemix.store.pack import PackConfig, pack, packed_bytes, source_to_pack

pytestmark = pytest.mark.slow  # the libraries of all sources; tests/test_sources.py has the quick ones

CLASSES = ("ants", "bees", "cats")
KEPT = PackConfig(tiled=False, originals_per_shard=4)


class Row(NamedTuple):
    path: str
    file: bytes
    label: int


def content(folder: Path) -> dict[str, bytes]:
    """The files of a store; a lock file's content is only for messages."""
    files = (file for file in folder.rglob("*") if file.is_file() and file.name != ".lock")
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def run(*arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(cli.main, [str(argument) for argument in arguments], prog_name="dali-diffusemix")
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """18 small images in 3 classes: JPEGs, one of them turned, and PNGs, grey, with alpha, wide and tiny."""
    root = tmp_path_factory.mktemp("kinds")
    turned = Image.Exif()
    turned[0x112] = 6
    for label, name in enumerate(CLASSES):
        picture = Image.fromarray(photograph(label, 40 + label, 57))
        files = {
            "00.jpg": encoded(picture, quality=90),
            "01.png": encoded(picture, "PNG"),
            "02.jpg": encoded(picture, exif=turned),
            "03.png": encoded(picture.convert("LA" if label else "RGBA"), "PNG"),
            "04.jpg": encoded(picture.convert("L"), progressive=True),
            "05.png": encoded(picture.resize(((1, 1), (1200, 2), (9, 101))[label]), "PNG"),
        }
        (root / name).mkdir()
        for file, data in files.items():
            (root / name / file).write_bytes(data)
    return root


@pytest.fixture(scope="module")
def rows(folder: Path) -> list[Row]:
    catalog = index(folder)
    return [
        Row(path, (folder / path).read_bytes(), int(label))
        for path, label in zip(catalog.paths, catalog.labels, strict=True)
    ]


# Sources: (folder to write into, rows) to what `pack` is given, its options, and whether files are kept ---------------


def class_folder(path: Path, rows: Sequence[Row]) -> tuple[Any, dict[str, Any]]:
    for row in rows:
        (path / "root" / row.path).parent.mkdir(parents=True, exist_ok=True)
        (path / "root" / row.path).write_bytes(row.file)
    return path / "root", {}


def tars(path: Path, rows: Sequence[Row]) -> tuple[Any, dict[str, Any]]:
    webdataset = pytest.importorskip("webdataset")
    with webdataset.ShardWriter(f"{path}/data-%03d.tar", maxcount=7, verbose=0) as writer:
        for row in rows:
            key, _, ending = row.path.partition(".")
            writer.write({"__key__": key, ending: row.file, "txt": CLASSES[row.label], "cls": row.label})
    return f"{path}/data-*.tar", {"label": "txt"}


def parquet_of_datasets(path: Path, rows: Sequence[Row]) -> tuple[Any, dict[str, Any]]:
    dataset(path, rows)[0].to_parquet(path / "train-00000-of-00001.parquet", batch_size=5)
    return path, {}


def parquet(path: Path, rows: Sequence[Row]) -> tuple[Any, dict[str, Any]]:
    pyarrow, files = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    images = pyarrow.array([row.file for row in rows], pyarrow.binary())
    table = pyarrow.table({"picture": images, "kind": [CLASSES[row.label] for row in rows], "note": ["x"] * len(rows)})
    files.write_table(table.slice(0, 11), path / "a.parquet")
    files.write_table(table.slice(11), path / "b.parquet", row_group_size=3)
    return [path / "a.parquet", path / "b.parquet"], {"image": "picture", "label": "kind"}


def dataset(path: Path, rows: Sequence[Row]) -> tuple[Any, dict[str, Any]]:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    images = [{"bytes": row.file, "path": None} for row in rows]
    columns = {"image": images, "label": [row.label for row in rows]}
    return datasets.Dataset.from_dict(columns, features=features), {}


class Pictures(torch.utils.data.Dataset):
    """A map-style dataset of Pillow images."""

    classes = CLASSES

    def __init__(self, path: Path, rows: Sequence[Row]) -> None:
        self.files, _ = class_folder(path, rows)
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return Image.open(self.files / self.rows[i].path), self.rows[i].label


def pictures(path: Path, rows: Sequence[Row]) -> tuple[Any, dict[str, Any]]:
    return Pictures(path, rows), {}


FILES = (class_folder, tars, parquet_of_datasets, parquet, dataset)
SOURCES = (*FILES, pictures)
Make = Callable[[Path, Sequence[Row]], tuple[Any, dict[str, Any]]]


def check(store: Path, rows: Sequence[Row]) -> OriginalStore:
    """The store has these rows: pixels, sizes, labels and classes."""
    packed = OriginalStore.open(store)
    assert len(packed) == len(rows) and packed.catalog.classes == CLASSES
    assert packed.catalog.labels.tolist() == [row.label for row in rows]
    for number, row in enumerate(rows):
        found, expected = decode(packed.encoded(number)), decode(row.file)
        np.testing.assert_array_equal(found, expected)
        assert tuple(packed.catalog.sizes[number].tolist()) == expected.shape[:2]
    assert not verify(store).problems
    return packed


# Pixels and labels ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", [None, "raw", "png"])
@pytest.mark.parametrize("make", SOURCES)
def test_the_pixels_are_those_of_the_folder(
    make: Make, format: Any, folder: Path, rows: list[Row], tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    source, options = make(tmp_path / "in", rows)
    summary = pack(source, tmp_path / "packed", PackConfig(format=format, originals_per_shard=5), **options)
    assert (summary.images, summary.made, summary.left_out) == (18, 18, ())
    packed = check(tmp_path / "packed", rows)
    paths = list(packed.catalog.paths)
    if make in (class_folder, tars):
        assert paths == [row.path for row in rows]
    assert packed.raw == (format == "raw" or (format is None and make is pictures))
    crop = EvalCrop(32)
    for one, other in zip(
        DiffuseMixDataset(tmp_path / "packed", crop=crop), DiffuseMixDataset(folder, crop=crop), strict=True
    ):
        assert torch.equal(one[0], other[0]) and one[1] == other[1]
    again = pack(source, tmp_path / "packed", PackConfig(format=format, originals_per_shard=5), **options)
    assert (again.made, again.bytes) == (0, summary.bytes)


@pytest.mark.parametrize("make", FILES)
def test_files_are_kept_to_the_byte(make: Make, rows: list[Row], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    source, options = make(tmp_path / "in", rows)
    pack(source, tmp_path / "packed", KEPT, **options)
    packed = check(tmp_path / "packed", rows)
    assert [packed.encoded(row).tobytes() for row in range(18)] == [row.file for row in rows]
    turned = [row.path for row in rows].index("ants/02.jpg")
    assert packed.catalog.sizes[turned].tolist() == [57, 40]  # upright
    names: list[str] = []
    for file in sorted((tmp_path / "packed" / "shards").glob("*.tar")):
        with tarfile.open(file) as tar:
            names += tar.getnames()
    assert [Path(name).suffix for name in names] == [Path(row.path).suffix for row in rows]


def test_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DALI_DIFFUSEMIX_CACHE", str(tmp_path / "own"))
    root = miniature.cifar100(tmp_path / "cifar-100-python")
    train = read_layout("cifar100", root, "train")
    for format in (None, "raw", "png"):
        store = tmp_path / f"packed {format}"
        pack(root, store, PackConfig(format=format, originals_per_shard=7), kind="cifar100")
        packed = OriginalStore.open(store)
        assert list(packed.catalog.paths) == list(train.catalog.paths)
        assert packed.catalog.classes == train.catalog.classes == ("apple", "aquarium_fish", "baby")
        np.testing.assert_array_equal(packed.catalog.labels, train.catalog.labels)
        for row, path in enumerate(train.catalog.paths):
            np.testing.assert_array_equal(decode(packed.encoded(row)), decode(train.root / path))
        first = np.asarray(miniature.picture(5, 0, 32))
        row = next(row for row, path in enumerate(packed.catalog.paths) if path.endswith("apple/00000.png"))
        np.testing.assert_array_equal(decode(packed.encoded(row)), first)
    pack(root, tmp_path / "test", kind="cifar100", split="test")
    assert len(OriginalStore.open(tmp_path / "test")) == 6
    shown = run("pack", root, tmp_path / "command", "--layout", "cifar100", "--split", "train+test", "--format", "raw")
    assert "the whole store will take 0.2 MB" in shown.stdout and "42 images" in shown.stdout


@pytest.mark.parametrize("ending", ["gz", "xz"])
def test_compressed_tars(ending: str, rows: list[Row], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    tars(tmp_path / "in", rows)
    for file in sorted((tmp_path / "in").iterdir()):
        with tarfile.open(file) as plain, tarfile.open(f"{file}.{ending}", f"w:{ending}") as packed:  # type: ignore[call-overload]
            for member in plain:
                packed.addfile(member, plain.extractfile(member))
        file.unlink()
    pack(tmp_path / "in", tmp_path / "packed", KEPT, label="txt")
    before = content(tmp_path / "packed")
    for number in (0, 3, 4):
        (tmp_path / "packed" / "shards" / f"originals-00000{number}.json").unlink()
    assert pack(tmp_path / "in", tmp_path / "packed", KEPT, label="txt").made == 10
    assert content(tmp_path / "packed") == before
    check(tmp_path / "packed", rows)


class Interrupted(Exception):
    pass


def test_an_interrupted_run_leaves_no_threads(rows: list[Row], tmp_path: Path) -> None:
    root, _ = class_folder(tmp_path, rows)
    threads = threading.active_count()

    def progress(done: int, total: int) -> None:
        if done:
            raise Interrupted

    with pytest.raises(Interrupted) as caught:
        pack(root, tmp_path / "packed", KEPT, progress=progress)
    assert caught.tb and threading.active_count() == threads


@pytest.mark.parametrize("grey", [False, True])
def test_arrays(grey: bool, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (13, 9, 11) if grey else (13, 9, 11, 3), dtype=np.uint8)
    labels = np.arange(13) % 3
    for format in (None, "raw", "png"):
        pack((images, labels), tmp_path / f"{format}", PackConfig(format=format, originals_per_shard=5))
        packed = OriginalStore.open(tmp_path / f"{format}")
        assert packed.catalog.labels.tolist() == labels.tolist() and packed.catalog.classes == ("0", "1", "2")
        for row in range(13):
            found = decode(packed.encoded(row))
            np.testing.assert_array_equal(found, np.repeat(images[row][..., None], 3, 2) if grey else images[row])
    assert content(tmp_path / "None") == content(tmp_path / "raw")
    pack((images, None), tmp_path / "unlabelled")
    assert OriginalStore.open(tmp_path / "unlabelled").catalog.classes == ("unlabelled",)
    with pytest.raises(ConfigError, match="tiled=False leaves files as they are, and arrays and edits become raw"):
        pack((images, labels), tmp_path / "files", PackConfig(tiled=False))
    assert not (tmp_path / "files").exists()


def test_generate_from_a_packed_store(folder: Path, rows: list[Row], tmp_path: Path) -> None:
    config = GenerateConfig(prompts=("autumn", "snowy"), size=16)
    generate(folder, tmp_path / "loose", config)
    loose = EditStore.open(tmp_path / "loose")
    for make in (tars, parquet, pictures):
        (path := tmp_path / make.__name__).mkdir()
        source, options = make(path, rows)
        pack(source, path / "packed", PackConfig(format="raw"), **options)
        generate(path / "packed", path / "edits", config)
        edits = EditStore.open(path / "edits")
        assert len(edits) == len(loose) > 30 and list(edits.catalog.labels) == list(loose.catalog.labels)
        if make is tars:  # the same paths
            assert content(path / "edits" / "shards") == content(tmp_path / "loose" / "shards")
        DiffuseMixDataset(path / "packed", crop=EvalCrop(16), mix=None, edits=path / "edits")[0]


# Killed ---------------------------------------------------------------------------------------------------------------

RUN = """
import pickle, sys
sys.path.insert(0, sys.argv[3])
from dali_diffusemix.store.pack import PackConfig, pack
def progress(done, total):
    sys.stdout.write(f"{done}\\n")
    sys.stdout.flush()
    sys.stdin.readline()
source, options = pickle.load(open(sys.argv[1], "rb"))
pack(source, sys.argv[2], PackConfig(format="raw", originals_per_shard=3), progress=progress, **options)
"""


def killed_and_resumed(given: Path, store: Path, count: int, resume: Callable[[Path], int], whole: Path) -> None:
    """Kill packing again and again; what was finished stays as it is, and the end is that of an uninterrupted run."""
    rng = random.Random(0)
    finished: dict[str, tuple[int, int]] = {}
    for kill in range(4):
        with warm.Script("-c", RUN, given, store, Path(__file__).parent) as script:
            for _ in range(kill and rng.randint(2, 3)):  # first at its very beginning
                script.stdout.readline()
                script.stdin.write("\n")  # it waits for this
                script.stdin.flush()
            time.sleep(rng.uniform(0, 0.3 if kill == 0 else 0.02))
            script.kill()
        assert script.returncode == -signal.SIGKILL
        now = {
            file.name: ((status := file.with_suffix(".tar").stat()).st_ino, status.st_mtime_ns)
            for file in (store / "shards").glob("*.json")
        }
        assert finished.items() <= now.items()
        finished = now
    assert finished
    left = count - sum(len(np.load((store / "shards" / name).with_suffix(".npy"))) for name in finished)
    assert resume(store) == left > 0
    resume(whole)
    assert content(store) == content(whole)


def arrays(path: Path, rows: Sequence[Row]) -> tuple[Any, dict[str, Any]]:
    images = np.stack([photograph(number, 24, 30) for number in range(len(rows))])
    return (images, [row.label for row in rows]), {}


def cifar(path: Path, rows: Sequence[Row]) -> tuple[Any, dict[str, Any]]:
    return miniature.cifar100(path / "cifar-100-python"), {"kind": "cifar100"}


@pytest.mark.slow
@pytest.mark.parametrize("make", [*SOURCES, arrays, cifar])
def test_killed_it_ends_with_the_same_store(make: Make, rows: list[Row], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    many = [row._replace(path=row.path.replace("/", f"/{turn}")) for turn in range(3) for row in rows]
    source, options = make(tmp_path / "in", many)
    given, config = tmp_path / "given.pickle", PackConfig(format="raw", originals_per_shard=3)
    given.write_bytes(pickle.dumps((source, options)))
    count, whole = len(source_of(source, **options).catalog()), tmp_path / "whole"
    killed_and_resumed(
        given, tmp_path / "killed", count, lambda store: pack(source, store, config, **options).made, whole
    )


# Rows that cannot be used ---------------------------------------------------------------------------------------------


def test_rows_that_cannot_be_used_are_named(rows: list[Row], tmp_path: Path) -> None:
    """Listed or found while packing: by file and row, with the reason, in the summary and in the command's output."""
    pyarrow, files = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    cut = rows[1].file[:-60]  # a PNG with a good header
    images = [rows[0].file, None, rows[0].file[:30], rows[0].file, b"GIF89a", cut, rows[1].file]
    labels = ["ants", "ants", "ants", None, "ants", "bees", "cats"]
    table = pyarrow.table({"image": pyarrow.array(images, pyarrow.binary()), "label": labels})
    files.write_table(table, tmp_path / "train.parquet")
    expected = {
        "train.parquet, row 1": "It has no usable image: neither its bytes nor a path",
        "train.parquet, row 2": "Its JPEG header",
        "train.parquet, row 3": "Its label is missing; add one, or list the source with label=False",
        "train.parquet, row 4": "unsupported: it is a GIF",
        "train/5": "cannot be decoded",
    }

    def check_left_out(found: Sequence[tuple[str, str]]) -> None:
        assert [path for path, _ in found] == list(expected)
        assert all(reason.startswith(expected[path]) for path, reason in found), found

    summary = pack(tmp_path / "train.parquet", tmp_path / "packed", PackConfig(originals_per_shard=2))
    check_left_out([(one.path, one.reason) for one in summary.left_out])
    assert (summary.images, summary.made) == (2, 3)
    for made in ("3 done now", "all were there already"):
        shown = run("pack", tmp_path / "train.parquet", tmp_path / "command")
        assert "5 left out" in shown.stdout and made in shown.stdout
        assert all(f"  {path}: {reason}" in shown.stdout for path, reason in expected.items())
    found = json.loads(run("pack", tmp_path / "train.parquet", tmp_path / "command", "--json").stdout)
    check_left_out([(one["path"], one["reason"]) for one in found["left_out"]])
    found = json.loads(run("pack", tmp_path / "train.parquet", tmp_path / "all", "--label", "none", "--json").stdout)
    assert found["images"] == 3 and OriginalStore.open(tmp_path / "all").catalog.classes == ("unlabelled",)


def test_samples_of_tars_that_cannot_be_used_are_named(rows: list[Row], tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        writer.write({"__key__": "good", "jpg": rows[0].file, "cls": 1})
        writer.write({"__key__": "no label", "jpg": rows[0].file})
        writer.write({"__key__": "no image", "cls": 1})
        writer.write({"__key__": "damaged", "jpg": rows[0].file[:50], "cls": 0})
        writer.write({"__key__": "cut", "png": rows[1].file[:-60], "cls": 0})
    summary = pack(tmp_path / "a.tar", tmp_path / "packed")
    assert summary.images == 1
    assert [(one.path, one.reason.split(" ")[0]) for one in summary.left_out] == [
        ("a.tar, no label.jpg", "Its"),
        ("a.tar, no image", "It"),
        ("a.tar, damaged.jpg", "Its"),
        ("cut.png", "cannot"),
    ]
    shown = run("pack", tmp_path / "a.tar", tmp_path / "command")
    assert shown.stdout.startswith("1 images, ") and "  a.tar, no label.jpg: Its label is missing" in shown.stdout


class Given:
    """A source of a user's own."""

    name, pixels, folders = "a source of one's own", True, ()

    def __init__(self, contents: Sequence[Content]) -> None:
        self.contents = contents

    def catalog(self, progress: object = None) -> Catalog:
        paths = [str(row) for row in range(len(self.contents))]
        return Catalog.from_arrays(paths, [0] * len(paths), ["one"], [[4, 5]] * len(paths))

    def read(self, rows: range) -> Iterator[Content]:
        return iter(self.contents[rows.start : rows.stop])


def test_a_source_of_ones_own(tmp_path: Path) -> None:
    good = photograph(0, 4, 5)
    contents = [good, DecodeError("is torn; mend it."), encoded(photograph(1, 4, 5), "PNG"), b"noise", good]
    summary = pack(Given(contents), tmp_path / "packed", PackConfig(originals_per_shard=2))
    assert [(one.path, one.reason[:8]) for one in summary.left_out] == [("1", "is torn;"), ("3", "is no im")]
    packed = OriginalStore.open(tmp_path / "packed")
    np.testing.assert_array_equal(decode(packed.encoded(1)), photograph(1, 4, 5))
    with pytest.raises(StoreError, match="none of the 2 originals could be packed"):
        pack(Given([b"", DecodeError("is torn; mend it.")]), tmp_path / "none")
    for name, options in {"kind": {"kind": "folder"}, "image": {"image": "x"}, "label": {"label": False}}.items():
        with pytest.raises(ConfigError, match=f"{name} does not apply to a source of one's own, found .*; leave it"):
            pack(Given(contents), tmp_path / "other", **options)


# Edit stores ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An edit store of JPEGs in several shards, with rejected edits and denied ones."""
    store = tmp_path_factory.mktemp("drawn") / "edits"
    generate(photos, store, config_of())
    edits = EditStore.open(store)
    verdicts = {VERDICTS[row["verdict"]] for shard in edits.shards for row in edits.shard_rows(shard)}
    assert verdicts == {"accepted", "structure_lost", "denied"}
    return store


def config_of(**options: Any) -> GenerateConfig:
    options = {"prompts": ("autumn", "snowy"), "size": 40, "format": "jpeg", "originals_per_shard": 4, **options}
    denied = {"cats": ("snowy",)} if "snowy" in options["prompts"] else {}
    return GenerateConfig(deny=denied, thresholds=Thresholds(unlike=0.85), **options)


def assert_same_edits(found: Path, expected: Path) -> None:
    """Of all rows everything but their places; of accepted edits the pixels, of rejected ones the bytes."""
    ours, theirs = EditStore.open(found), EditStore.open(expected)
    assert ours.shards == theirs.shards and ours.prompts == theirs.prompts and len(ours) == len(theirs)
    assert list(ours.catalog.paths) == list(theirs.catalog.paths)  # rows name them
    for shard in ours.shards:
        for row, other in zip(ours.shard_rows(shard), theirs.shard_rows(shard), strict=True):
            for name in ("original", "prompt", "variant", "seed", "height", "width", "verdict"):
                assert row[name] == other[name]
            np.testing.assert_equal(row["score"], other["score"])
            data, wanted = ours.encoded_row(shard, row), theirs.encoded_row(shard, other)
            assert (data is None) == (wanted is None)
            if data is not None and wanted is not None:
                np.testing.assert_array_equal(decode(data), decode(wanted))
                assert row["verdict"] == 0 or data == wanted
    assert not verify(found).problems


@pytest.mark.parametrize("format", [None, "raw", "png"])
def test_edits_keep_their_pixels_rows_and_verdicts(format: Any, drawn: Path, photos: Path, tmp_path: Path) -> None:
    store = tmp_path / "packed"
    summary = pack(drawn, store, PackConfig(format=format))
    assert_same_edits(store, drawn)
    packed = EditStore.open(store)
    assert packed.raw == (format != "png") and packed.settings["editor"] == EditStore.open(drawn).settings["editor"]
    assert summary.images == len(packed) and summary.made == sum(len(packed.shard_rows(one)) for one in packed.shards)
    assert pack(EditStore.open(drawn), store, PackConfig(format=format)).made == 0
    write_report(store, tmp_path / "report", root=photos)
    for tar in store.rglob("*.tar"):  # names tell what is inside
        with tarfile.open(tar) as opened:
            for member in opened:
                start = opened.extractfile(member).read(2)  # type: ignore[union-attr]
                wanted = {".jpg": b"\xff\xd8", ".png": b"\x89P", ".ppm": b"P6"}
                assert start == wanted[Path(member.name).suffix], (tar, member.name)


def test_smaller_edits_as_jpegs(drawn: Path, tmp_path: Path) -> None:
    pack(drawn, tmp_path / "packed", PackConfig(max_side=20, quality=80))
    packed, edits = EditStore.open(tmp_path / "packed"), EditStore.open(drawn)
    assert packed.settings["packed_max_side"] == 20 and packed.settings["packed_quality"] == 80
    assert packed.sizes(np.arange(len(packed))).max() == 20 and len(packed) == len(edits)
    assert not verify(tmp_path / "packed").problems
    with pytest.raises(StoreError, match="packed_quality: 80 in the store, 70 asked for"):
        pack(drawn, tmp_path / "packed", PackConfig(max_side=20, quality=70))


def test_the_command_packs_edits(drawn: Path, tmp_path: Path) -> None:
    shown = run("pack", drawn, tmp_path / "packed")
    assert "the whole store will take 0.2 MB" in shown.stdout and "done now" in shown.stdout
    assert_same_edits(tmp_path / "packed", drawn)
    assert "all were there already" in run("pack", drawn, tmp_path / "packed").stdout
    shown = run("pack", drawn, tmp_path / "other", "--label", "none", code=1)
    assert "label does not apply to the edit store" in shown.stderr
    assert "tiled=False" in run("pack", drawn, tmp_path / "other", "--no-tiles", code=1).stderr
    assert not (tmp_path / "other").exists()


def test_an_edit_store_that_grew_is_packed_further(photos: Path, tmp_path: Path) -> None:
    root, store, config = tmp_path / "root", tmp_path / "packed", PackConfig(format="raw")
    shutil.copytree(photos / "bees", root / "bees")
    generate(root, tmp_path / "edits", config_of(prompts=("autumn",)))
    before = EditStore.open(tmp_path / "edits")
    assert pack(before, store, config).made == 11
    tars = {file.name: file.stat().st_ino for file in (store / "shards").iterdir()}
    for name in ("ants", "cats"):  # before and behind
        shutil.copytree(photos / name, root / name)
    index(root, refresh=True)
    generate(root, tmp_path / "edits", config_of(variants=2))
    assert pack(before, store, config).made > 11  # opened before it grew
    assert_same_edits(store, tmp_path / "edits")
    assert tars.items() <= {file.name: file.stat().st_ino for file in (store / "shards").iterdir()}.items()
    pack(tmp_path / "edits", tmp_path / "whole", config)
    assert content(tmp_path / "whole" / "shards") == content(store / "shards")
    backwards = tmp_path / "small"
    generate(photos, backwards, config_of(prompts=("sunset",)))
    with pytest.raises(StoreError, match="ordered otherwise"):
        pack(backwards, store, config)


def test_edits_of_another_order_of_rows_stay_with_their_originals(photos: Path, drawn: Path, tmp_path: Path) -> None:
    listed = index(photos)
    rows = np.arange(33)[::-1]
    other = Catalog.from_arrays(
        [listed.path(row) for row in rows], listed.labels[rows], listed.classes, listed.sizes[rows]
    )
    pack(EditStore.open(drawn).reindexed(other), tmp_path / "packed")
    assert_same_edits(tmp_path / "packed", drawn)


def test_unfinished_and_damaged_edits_are_refused(drawn: Path, tmp_path: Path) -> None:
    unfinished = tmp_path / "unfinished"
    shutil.copytree(drawn, unfinished)
    (unfinished / "shards" / "edits-000002.json").unlink()
    with (
        pytest.warns(UnfinishedStoreWarning),
        pytest.raises(StoreError, match=r"not finished \(1 shards and 0 edits.*run the `dali-diffusemix generate`"),
    ):
        pack(unfinished, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()
    shutil.copytree(drawn, tmp_path / "damaged")
    edits = EditStore.open(tmp_path / "damaged")
    row = edits.index[5]
    with (tmp_path / "damaged" / "shards" / f"edits-{row['shard']:06}.tar").open("r+b") as file:
        file.seek(int(row["offset"]))
        file.write(bytes(int(row["length"])))
    path = edits.catalog.path(int(row["original"]))
    with pytest.raises(StoreError, match=rf"the edit of '{path}' under '\w+' is damaged .*verify --discard"):
        pack(tmp_path / "damaged", tmp_path / "packed")
    pack(drawn, tmp_path / "packed")  # and from a whole copy it goes on
    assert_same_edits(tmp_path / "packed", drawn)


def test_what_is_derived_is_derived_anew(drawn: Path, tmp_path: Path) -> None:
    store = tmp_path / "packed"
    pack(drawn, store)
    before = content(store)
    for name in ("index.json", "index.npy", "starts.npy"):
        (store / name).unlink()
        assert pack(drawn, store).made == 0 and content(store) == before
    (store / "shards" / "edits-000001.tar").write_bytes(b"")
    rejected = next((store / "rejected").glob("*.tar"))
    rejected.unlink()
    made = {"edits-000001.tar", rejected.name}
    assert pack(drawn, store).made == 8 * len(made) and content(store) == before
    inodes = [file.stat().st_ino for file in sorted(store.rglob("*"))]
    pack(drawn, store)
    assert [file.stat().st_ino for file in sorted(store.rglob("*"))] == inodes


def test_wrong_combinations_are_refused(drawn: Path, photos: Path, tmp_path: Path) -> None:
    pack(photos, tmp_path / "originals")
    with pytest.raises(StoreError, match="'magic' must be"):
        pack(drawn, tmp_path / "originals")
    with pytest.raises(StoreError, match="'magic' must be"):
        pack(photos, drawn)
    with pytest.raises(ConfigError, match="outside the root"):
        pack(drawn, drawn / "packed")
    for options in ({"kind": "webdataset"}, {"image": "jpg"}, {"split": "val"}, {"catalog": index(photos)}):
        with pytest.raises(ConfigError, match=f"{next(iter(options))} does not apply to the edit store"):
            pack(drawn, tmp_path / "packed", **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="image does not apply to a catalog"):
        pack(photos, tmp_path / "packed", catalog=index(photos), image="jpg")
    with pytest.raises(ConfigError, match="catalog is of a local folder, found it beside a tuple"):
        pack((np.zeros((1, 2, 2, 3), np.uint8), [0]), tmp_path / "packed", catalog=index(photos))
    with pytest.raises(ConfigError, match="found a packed store"):
        pack(tmp_path / "originals", tmp_path / "packed", kind="folder")
    pack(drawn, tmp_path / "png", PackConfig(format="png"))
    with pytest.raises(StoreError, match="format: 'png' in the store, 'raw' asked for"):
        pack(drawn, tmp_path / "png", PackConfig(format="raw"))
    generate(photos, tmp_path / "others", config_of(prompts=("snowy", "autumn")))
    with pytest.raises(StoreError, match="ordered otherwise"):
        pack(tmp_path / "others", tmp_path / "png", PackConfig(format="png"))
    assert_same_edits(tmp_path / "png", drawn)


def test_packed_edits_give_the_same_samples(drawn: Path, photos: Path, tmp_path: Path) -> None:
    pack(drawn, tmp_path / "packed")
    mix = MixSpec(fractal_weight=0)
    samples = [
        [DiffuseMixDataset(photos, crop=EvalCrop(32), mix=mix, edits=edits, seed=1)[i][0] for i in range(0, 33, 3)]
        for edits in (drawn, tmp_path / "packed")
    ]
    assert all(torch.equal(one, other) for one, other in zip(*samples, strict=True))


@pytest.mark.slow
def test_killed_packing_of_edits_ends_with_the_same_store(drawn: Path, tmp_path: Path) -> None:
    (tmp_path / "given").write_bytes(pickle.dumps((drawn, {})))
    config = PackConfig(format="raw")

    def resume(store: Path) -> int:
        return pack(drawn, store, config).made

    killed_and_resumed(tmp_path / "given", tmp_path / "killed", 66, resume, tmp_path / "whole")


# Disk -----------------------------------------------------------------------------------------------------------------


def on_disk(store: Path) -> int:
    return sum(file.stat().st_size for file in store.rglob("*") if file.is_file())


@pytest.mark.parametrize(("count", "side"), [(3, 700), (40, 200), (600, 64), (1500, 32)])
def test_what_is_told_beforehand_is_what_is_written(count: int, side: int, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (count, side, side + 1, 3), dtype=np.uint8)
    source = source_of((images, np.arange(count) % 7))
    needed = packed_bytes(source, PackConfig())
    pack(source, tmp_path / "packed")
    assert needed is not None and abs(needed / on_disk(tmp_path / "packed") - 1) < 0.01
    assert packed_bytes(source, PackConfig(format="png")) is None
    smaller = packed_bytes(source, PackConfig(format="raw", max_side=side // 2))
    assert smaller is not None and smaller < needed


def test_edits_told_beforehand(photos: Path, tmp_path: Path) -> None:
    generate(photos, tmp_path / "edits", GenerateConfig(prompts=("autumn",), size=200, format="jpeg"))
    needed = packed_bytes(EditStore.open(tmp_path / "edits"), PackConfig())
    pack(tmp_path / "edits", tmp_path / "packed")
    assert needed is not None and abs(needed / on_disk(tmp_path / "packed") - 1) < 0.01


@pytest.mark.parametrize("edits", [False, True])
def test_a_disk_that_is_too_small(
    edits: bool, drawn: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, config = tmp_path / "packed", PackConfig(format="raw", originals_per_shard=4)
    source = source_to_pack(drawn if edits else photos)
    whole = packed_bytes(source, config)
    assert whole is not None
    free = whole - 1000
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free))
    with pytest.raises(
        StoreError, match=rf"will take 0\.00 GB \({whole} bytes\) more, and 0\.00 GB are free.*make room"
    ):
        pack(source, store, config)
    assert not list((store / "shards").iterdir())
    assert "make room" in run("pack", drawn if edits else photos, store, "--format", "raw", code=1).stderr
    free = whole
    summary = pack(source, store, config)
    for number in (1, 3):
        next((store / "shards").glob(f"*-00000{number}.json")).unlink()
    free = whole // 2
    assert 0 < pack(source, store, config).made < summary.made  # the rest alone needs room
    free = 0
    assert pack(source, store, config).made == 0
    pack(source, tmp_path / "png", PackConfig(format="png"))  # of which nobody knows


# Odd inputs -----------------------------------------------------------------------------------------------------------


def test_the_store_inside_the_source_and_the_reverse(rows: list[Row], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    tars(tmp_path / "in", rows)
    with pytest.raises(ConfigError, match="store must lie outside the root"):  # it would be a class of the next run
        pack(tmp_path / "in", tmp_path / "in" / "packed", label="txt")
    pack(f"{tmp_path}/in/data-*.tar", tmp_path / "in" / "packed", label="txt")  # a pattern stays the same
    assert pack(f"{tmp_path}/in/data-*.tar", tmp_path / "in" / "packed", label="txt").made == 0
    root, _ = class_folder(tmp_path / "store", rows)
    with pytest.raises(StoreError, match="is no packed store, but has other files in it"):
        pack(root, tmp_path / "store")
    with pytest.raises(ConfigError, match="outside the root"):
        pack(root, root)
    assert len(index(root)) == 18


def test_nothing_one_and_only_bad(rows: list[Row], tmp_path: Path) -> None:
    pyarrow, files = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CatalogError, match="no"):
        pack(tmp_path / "empty", tmp_path / "packed")
    files.write_table(
        pyarrow.table({"image": pyarrow.array([], pyarrow.binary()), "label": []}), tmp_path / "a.parquet"
    )
    with pytest.raises((CatalogError, ConfigError)):
        pack(tmp_path / "a.parquet", tmp_path / "packed")
    bad = pyarrow.table({"image": pyarrow.array([b"", b"GIF89a"], pyarrow.binary()), "label": ["x", "y"]})
    files.write_table(bad, tmp_path / "b.parquet")
    with pytest.raises(CatalogError, match=r"no usable image in it. 2 left out, the first 'b.parquet, row 0'"):
        pack(tmp_path / "b.parquet", tmp_path / "packed")
    assert "no usable image" in run("pack", tmp_path / "b.parquet", tmp_path / "packed", code=1).stderr
    assert not (tmp_path / "packed").exists()
    for number, make in enumerate(SOURCES):
        path = tmp_path / f"one {number}"
        (path / "in").mkdir(parents=True)
        source, options = make(path / "in", rows[:1])
        if make is parquet:
            source = source[:1]
        assert pack(source, path / "packed", **options).images == 1
        np.testing.assert_array_equal(decode(OriginalStore.open(path / "packed").encoded(0)), decode(rows[0].file))


def test_odd_keys(rows: list[Row], tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    keys = ["ünïcødé/猫", "a b/c%2Ed", "x" * 120 + "/" + "y" * 90, 'q"uote', "line\nbreak", "UPPER/é", "UPPER/e\u0301"]
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for number, key in enumerate(keys):
            writer.write({"__key__": key, "seg.png": rows[1].file, "jpg": rows[0].file, "cls": number})
    for format in ("raw", None):
        pack(tmp_path / "a.tar", tmp_path / f"{format}", PackConfig(format=format), image="jpg")
        packed = OriginalStore.open(tmp_path / f"{format}")
        assert list(packed.catalog.paths) == [f"{key}.jpg" for key in keys]
        assert packed.catalog.labels.tolist() == list(range(7))
        assert not verify(tmp_path / f"{format}").problems
        np.testing.assert_array_equal(decode(packed.encoded(6)), decode(rows[0].file))
        DiffuseMixDataset(tmp_path / f"{format}", crop=EvalCrop(8))[3]
    pack(tmp_path / "a.tar", tmp_path / "dots", image="seg.png")  # keys end at the first dot
    assert OriginalStore.open(tmp_path / "dots").catalog.path(0) == "ünïcødé/猫.seg.png"


def test_sizes_of_all_lengths_as_raw_images(tmp_path: Path) -> None:
    sizes = [
        (1, 1),
        (1, 10),
        (10, 1),
        (9, 99),
        (1, 1000),
        (1000, 1),
        (2, 99_999),
        (1, 100_000),
        (100_000, 2),
        (1, 10**6),
    ]
    images = [np.full((height, width, 3), number, np.uint8) for number, (height, width) in enumerate(sizes)]
    pack(Items(images), tmp_path / "packed", PackConfig(originals_per_shard=3))
    packed = OriginalStore.open(tmp_path / "packed")
    assert [tuple(size) for size in packed.catalog.sizes.tolist()] == sizes
    found = packed.stretches(np.arange(len(sizes)))
    assert not found.errors
    crop = EvalCrop(8)
    for number, (image, size) in enumerate(zip(images, sizes, strict=True)):
        data = packed.encoded(number)
        assert data.tobytes() == raw_header(*size) + image.tobytes()
        assert torch.isfinite(DiffuseMixDataset(tmp_path / "packed", crop=crop)[number][0]).all()
    estimated = PackConfig(format="raw").bytes_of(packed.catalog.sizes)
    assert estimated is not None and abs(estimated / on_disk(tmp_path / "packed") - 1) < 0.01


class Items:
    """A map-style dataset of arrays."""

    def __init__(self, images: Sequence[NDArray[np.uint8]]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[NDArray[np.uint8], int]:
        return self.images[i], 0


def test_folder_named_on_a_root_that_has_tars(rows: list[Row], tmp_path: Path) -> None:
    root, _ = class_folder(tmp_path, rows)
    tars(root, rows)
    run("pack", root, tmp_path / "packed", "--layout", "folder")
    check(tmp_path / "packed", rows)
    shown = run("pack", root, tmp_path / "other", "--layout", "folder", "--label", "none", code=1)
    assert "label names columns and extensions" in shown.stderr
    run("pack", root, tmp_path / "tars", "--layout", "webdataset", "--label", "txt")
    check(tmp_path / "tars", rows)
    run("pack", f"{root}/data-*.tar", tmp_path / "png", "--image", "png", "--label", "cls")
    assert len(OriginalStore.open(tmp_path / "png")) == 9


def test_a_source_that_changed_between_two_runs(rows: list[Row], tmp_path: Path) -> None:
    for number, make in enumerate((class_folder, tars, dataset)):
        (path := tmp_path / str(number)).mkdir()
        source, options = make(path, rows)
        pack(source, path / "packed", KEPT, **options)
        before = content(path / "packed")
        (other := path / "other").mkdir()
        source, options = make(other, rows[:-1])
        with pytest.raises(StoreError, match=r"it has 18, given are 17; 1 only in the store .*Pack into a new folder"):
            pack(source, path / "packed", KEPT, **options)
        assert content(path / "packed") == before
        rows_too = [*rows[:-1], rows[-1]._replace(label=0)]
        source, options = make(path / "other", rows_too)
        if make is not class_folder:
            with pytest.raises(StoreError, match="the same files in other classes"):
                pack(source, path / "packed", KEPT, **options)


def test_a_source_that_changes_after_it_was_listed(rows: list[Row], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    given, options = tars(tmp_path / "in", rows)
    source = source_of(given, **options)
    source.catalog()
    (tmp_path / "in" / "data-001.tar").write_bytes(b"")
    summary = pack(source, tmp_path / "packed")
    assert summary.images == 11 and all("has changed since it was listed" in one.reason for one in summary.left_out)


def test_another_order_of_the_same_files_is_paired_by_path(rows: list[Row], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    tars(tmp_path / "in", rows)
    files = sorted((tmp_path / "in").iterdir())
    pack(files, tmp_path / "packed", KEPT, label="txt")
    before = content(tmp_path / "packed")
    for number in (0, 3):
        (tmp_path / "packed" / "shards" / f"originals-00000{number}.json").unlink()
    again = pack(files[::-1], tmp_path / "packed", KEPT, label="txt")
    assert again.made == 8 and content(tmp_path / "packed") == before
