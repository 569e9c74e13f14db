"""verify, report and export; and that other people's readers read our shards."""

import base64
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browsing import browse
from click.testing import CliRunner, Result
from material import write_photograph
from PIL import Image

from dali_diffusemix.catalog import index
from dali_diffusemix.cli import main
from dali_diffusemix.errors import CatalogError, ConfigError
from dali_diffusemix.fractals import FractalBank
from dali_diffusemix.generate import GenerateConfig, generate
from dali_diffusemix.generate.quality import Thresholds
from dali_diffusemix.images.codec import decode
from dali_diffusemix.inspect.export import export
from dali_diffusemix.inspect.report import write_report
from dali_diffusemix.inspect.verify import verify
from dali_diffusemix.loading.dataset import DiffuseMixDataset
from dali_diffusemix.plan import EvalCrop, MixSpec
from dali_diffusemix.store import VERDICTS, EditStore
from dali_diffusemix.store.decisions import Decisions, EditName
from dali_diffusemix.store.pack import pack

NASTY = "<img src=x onerror=alert(1)>'\" & 100%"
CONFIG = GenerateConfig(
    prompts=("autumn", "snowy", "mosaic"),
    size=48,
    format="jpeg",
    originals_per_shard=4,
    deny={"b*": ("mosaic",)},
    thresholds=Thresholds(unlike=0.75),  # strict enough that some are rejected
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten photographs in three classes, one of them cut short, one class and one file with an evil name."""
    root = tmp_path_factory.mktemp("tools") / "train"
    for place in range(10):
        name = f"{NASTY}.jpg" if place == 4 else f"photo.{place}.jpg"
        file = root / ("ants", "bees", NASTY)[place % 3] / name
        write_photograph(file, place, 60 + 3 * place, 80, quality=92)
    index(root)
    file = root / "ants" / "photo.3.jpg"
    file.write_bytes(file.read_bytes()[:900])
    return root


@pytest.fixture(scope="module")
def made(root: Path) -> Path:
    generate(root, root.with_name("edits"), CONFIG)
    return root.with_name("edits")


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Path:
    """One that a test may damage."""
    return Path(shutil.copytree(made, tmp_path / "edits"))


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


def rows_of(store: Path) -> np.ndarray:
    edits = EditStore.open(store)
    return np.concatenate([edits.shard_rows(shard) for shard in edits.shards])


# Verdicts in the store ------------------------------------------------------------------------------------------------


def test_what_is_rejected_or_denied_is_not_trained_on_but_can_be_looked_at(made: Path) -> None:
    edits, rows = EditStore.open(made), rows_of(made)
    verdicts = [VERDICTS[place] for place in rows["verdict"]]
    assert {"accepted", "unreadable original", "structure_lost", "denied"} <= set(verdicts)
    assert len(edits) == verdicts.count("accepted")
    for shard in edits.shards:
        for row in edits.shard_rows(shard):
            name = edits.catalog.classes[edits.catalog.labels[row["original"]]]
            unreadable = edits.catalog.path(int(row["original"])) == "ants/photo.3.jpg"
            denied = edits.prompts[row["prompt"]] == "mosaic" and name.startswith("b")
            assert (VERDICTS[row["verdict"]] == "denied") == (denied and not unreadable)
            data = edits.encoded_row(shard, row)
            assert (data is None) == (denied or unreadable)
            if data is not None:
                assert decode(data).shape == (48, 48, 3)
                assert (row["score"] < 0.75) == (row["verdict"] != 0)
    accepted = {(row["original"], row["prompt"]) for row in edits.index}
    assert accepted == {(row["original"], row["prompt"]) for row in rows[rows["verdict"] == 0]}


def test_a_rejected_edit_is_tried_again_from_other_seeds(root: Path, made: Path, tmp_path: Path) -> None:
    import dataclasses

    generate(root, tmp_path / "again", dataclasses.replace(CONFIG, retry=3))
    once, again = rows_of(made), rows_of(tmp_path / "again")
    kept = once["verdict"] == 0
    np.testing.assert_array_equal(once["seed"][kept], again["seed"][kept])
    tried = np.isin(once["verdict"], [VERDICTS.index("structure_lost")])
    assert (once["seed"][tried] != again["seed"][tried]).all()
    assert (again["verdict"] == 0).sum() >= kept.sum()


# verify ---------------------------------------------------------------------------------------------------------------


def test_a_sound_store_has_nothing_wrong(store: Path) -> None:
    found = verify(store)
    assert not found.problems and found.shards == 3 and found.missing == 0
    assert found.images == (rows_of(store)["length"] > 0).sum()
    assert "nothing is wrong" in run("verify", store).stdout


def test_a_packed_store_too(root: Path, tmp_path: Path) -> None:
    pack(root, tmp_path / "packed")
    found = verify(tmp_path / "packed")
    assert not found.problems and found.images == 9
    flip(next((tmp_path / "packed" / "shards").glob("*.tar")), 2000)
    assert [problem.what for problem in verify(tmp_path / "packed").problems] == ["has changed: its SHA-256 differs"]


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 0xFF
    file.write_bytes(data)


def test_every_kind_of_damage_is_said_of_its_shard(root: Path, store: Path) -> None:
    shards = store / "shards"
    flip(shards / "edits-000000.tar", 1500)
    (shards / "edits-000001.idx").write_bytes((shards / "edits-000001.idx").read_bytes()[:-3])
    rejected = sorted((store / "rejected").glob("*.tar"))[-1]
    rejected.unlink()
    found = verify(store)
    assert [(problem.shard, problem.file, problem.what.split(",")[0]) for problem in found.problems] == [
        (0, "shards/edits-000000.tar", "has changed: its SHA-256 differs"),
        (1, "shards/edits-000001.idx", f"must have {(shards / 'edits-000001.idx').stat().st_size + 3} bytes"),
        (2, f"rejected/{rejected.name}", "cannot be read (No such file or directory)"),
        *[(None, "store.json", found.problems[-1].what.split(",")[0])] * (len(found.problems) - 3),
    ]
    assert found.damaged == (0, 1, 2)
    said = json.loads(run("verify", store, "--json", code=1).stdout)
    assert said["damaged"] == [0, 1, 2]
    assert "3 damaged shards discarded" in run("verify", store, "--discard", code=1).stdout
    generate(root, store, CONFIG)
    assert not verify(store).problems


def test_an_image_that_was_spoiled_before_it_was_hashed(store: Path) -> None:
    """Bytes that agree with their hash and are no image: a faulty memory, a faulty editor."""
    import hashlib

    tar, record = store / "shards" / "edits-000000.tar", store / "shards" / "edits-000000.json"
    row = EditStore.open(store).shard_rows(0)[0]
    data = bytearray(tar.read_bytes())
    data[row["offset"] : row["offset"] + row["length"]] = bytes(row["length"])
    tar.write_bytes(data)
    content = json.loads(record.read_text())
    content["files"]["tar"]["sha256"] = hashlib.sha256(data).hexdigest()
    record.write_text(json.dumps(content))
    (problem,) = verify(store).problems
    assert problem.shard == 0 and "the image of original 0" in problem.what
    assert not verify(store, decoding=False).problems


def test_an_index_of_other_shards(store: Path) -> None:
    table = np.load(store / "index.npy")
    table["score"][0] += 1
    np.save(store / "index.npy", table)
    (problem,) = verify(store).problems
    assert problem.file == "index.npy" and "run the command that made the store again" in problem.what


def test_what_is_no_store(tmp_path: Path) -> None:
    assert "there is no edit store" in run("verify", tmp_path, code=1).stderr


# Others' readers ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_the_accepted_edits_and_no_others(made: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    edits = EditStore.open(made)
    tars = [str(file) for file in sorted(made.rglob("shards/*.tar"))]
    found = {}
    for sample in webdataset.WebDataset(tars, shardshuffle=False):
        found |= {f"{sample['__key__']}.{name}": data for name, data in sample.items() if name.endswith("jpg")}
    ours = {edits.encoded(edit).tobytes() for edit in range(len(edits))}
    assert len(found) == len(edits) and set(found.values()) == ours


def test_dali_reads_the_accepted_edits_and_no_others(made: Path) -> None:
    fn = pytest.importorskip("nvidia.dali.fn")
    from nvidia.dali import pipeline_def

    tars = sorted(map(str, made.glob("shards/*.tar")))

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def reader() -> object:
        autumn, snowy = fn.readers.webdataset(
            paths=tars,
            index_paths=[tar.replace(".tar", ".idx") for tar in tars],
            ext=["autumn.0.jpg", "snowy.0.jpg"],
            missing_component_behavior="empty",
        )
        return autumn, snowy

    edits, pipe, found = EditStore.open(made), reader(), []
    groups = sum(int((made / "shards" / f"edits-{n:06}.idx").read_text().split()[1]) for n in range(3))
    for _ in range(groups):
        found += [np.asarray(output.at(0)).tobytes() for output in pipe.run()]
    wanted = [
        edits.encoded(edit).tobytes() for edit in range(len(edits)) if edits.prompt_of(edit) in ("autumn", "snowy")
    ]
    assert sorted(filter(None, found)) == sorted(wanted)


def test_a_plain_tar_reader_finds_the_rejected_ones_apart(made: Path) -> None:
    names = []
    for file in sorted(made.glob("rejected/*.tar")):
        with tarfile.open(file) as tar:
            names += tar.getnames()
    rows = rows_of(made)
    assert len(names) == ((rows["verdict"] != 0) & (rows["length"] > 0)).sum() > 0


# export ---------------------------------------------------------------------------------------------------------------


def test_an_exported_folder_is_an_image_folder(root: Path, made: Path, tmp_path: Path) -> None:
    exported = export(root, made, tmp_path / "out")
    edits = EditStore.open(made)
    assert (exported.originals, exported.edits, exported.left_out) == (9, len(edits), 1)
    files = index(tmp_path / "out")
    assert files.classes == edits.catalog.classes and len(files) == 9 + len(edits)
    one = next(file for file in (tmp_path / "out").rglob("*.autumn.0.jpg"))
    assert decode(one).shape == (48, 48, 3)
    original = tmp_path / "out" / "ants" / "photo.0.jpg"
    assert original.read_bytes() == (root / "ants" / "photo.0.jpg").read_bytes()
    with pytest.raises(ConfigError, match="out must be a new or an empty folder"):
        export(root, made, tmp_path / "out")


def test_a_store_that_somebody_changed_writes_nothing_elsewhere(root: Path, store: Path, tmp_path: Path) -> None:
    (array,) = (store / "catalog").glob("path_bytes-*.npy")
    array.write_bytes(array.read_bytes().replace(b"ants/photo", b"../../phot"))
    with pytest.raises(CatalogError, match=r"paths must be relative to the root.*'\.\./"):
        export(root, store, tmp_path / "deep" / "out")
    assert not list(tmp_path.glob("*phot.*")) and not list((tmp_path / "deep").glob("*phot.*"))


def test_exported_mixed_it_is_the_released_codes_set(root: Path, made: Path, tmp_path: Path, bank: FractalBank) -> None:
    run(
        "export",
        root,
        made,
        "--out",
        tmp_path / "out",
        "--mixed",
        "--fractals",
        bank.path,
        "--size",
        64,
        "--quality",
        100,
    )
    edits = EditStore.open(made)
    mixed = sorted((tmp_path / "out").rglob("*.mixed.jpg"))
    assert len(mixed) == len(edits)
    dataset = DiffuseMixDataset(
        root, edits=made, fractals=bank, mix=MixSpec.release(), crop=EvalCrop(64, resize=(64, 64)), normalize=None
    )
    for edit in range(0, len(edits), 3):
        row = edits.index[edit]
        name = f"{edits.catalog.path(int(row['original']))}.{edits.slug_of(edit)}.{row['variant']}.mixed.jpg"
        sample = dataset[len(edits.catalog) + edit][0].permute(1, 2, 0).numpy()
        assert sample.min() >= 0 and 0.5 < sample.max() <= 1
        difference = np.abs(decode(tmp_path / "out" / name).astype(float) - 255 * sample)
        assert difference.mean() < 6  # a JPEG with colours of half resolution
    with pytest.raises(ConfigError, match="fractals must be given for mixed images"):
        export(root, made, tmp_path / "other", mixed=True)


# report ---------------------------------------------------------------------------------------------------------------


def test_the_gallery_in_a_browser(made: Path, tmp_path: Path, browser: Any) -> None:
    report = write_report(made, tmp_path / "report")
    rows = rows_of(made)
    edits = EditStore.open(made)
    wanted = [("class", "ants"), ("class", NASTY), ("prompt", "mosaic"), ("verdict", "rejected by quality"),
              ("verdict", "denied")]  # fmt: skip
    found = browse(browser, report.page, wanted)
    assert found["console"] == [] and found["broken"] == [] and found["injected"] == 0
    assert found["all"] == len(rows) == report.edits == report.of == 30
    labels = edits.catalog.labels[rows["original"]]
    names = [VERDICTS[place] for place in rows["verdict"]]
    assert found["filtered"] == {
        "class ants": int((labels == edits.catalog.class_to_idx["ants"]).sum()),
        f"class {NASTY}": int((labels == edits.catalog.class_to_idx[NASTY]).sum()),
        "prompt mosaic": 10,
        "verdict rejected by quality": names.count("structure_lost"),
        "verdict denied": names.count("denied"),
    }
    assert report.originals and "30 edits of 10 originals in 3 classes" in str(found["facts"])


def test_a_gallery_loads_nothing_from_elsewhere_and_escapes_names(made: Path, tmp_path: Path) -> None:
    write_report(made, tmp_path / "report")
    for file in (tmp_path / "report").rglob("*"):
        if file.suffix in (".html", ".js", ".css"):
            text = file.read_text(encoding="utf-8")
            assert "http://" not in text and "https://" not in text
    assert "<img src=x" not in (tmp_path / "report" / "index.html").read_text()
    again = write_report(made, tmp_path / "report", most=7)
    assert 0 < again.edits <= 7 and again.of == 30  # whole originals
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    assert "new or empty folder" in run("report", made, "--out", tmp_path / "mine", code=1).stderr


def test_without_its_originals_a_store_has_a_gallery_all_the_same(store: Path, root: Path, tmp_path: Path) -> None:
    assert not write_report(store, tmp_path / "one").originals  # a copy: nobody noted where its originals are
    assert write_report(store, tmp_path / "two", root=root).originals
    with pytest.raises(ConfigError, match="root must be the folder of the originals"):
        write_report(store, tmp_path / "three", root=tmp_path / "nothing")


def test_pictures_are_of_the_right_images(root: Path, made: Path, tmp_path: Path) -> None:
    page = write_report(made, tmp_path / "report").page.read_text()
    content = json.loads(page.split('<script id="content" type="application/json">')[1].split("</script>")[0])
    shards, places = (np.frombuffer(base64.b64decode(content["columns"][name]), "<i4") for name in ("shard", "row"))
    text = (tmp_path / "report" / "data" / "rows-0000.js").read_text()
    shown = json.loads(text[len("gallery.loaded(0,") : -len(");\n")])
    assert len(shown) == content["count"] == 30
    edits, drawn = EditStore.open(made), 0
    for shard, place, edit in zip(shards.tolist(), places.tolist(), shown, strict=True):
        row = edits.shard_rows(shard)[place]
        assert row["original"] == edit["original"]
        sheet = Image.fromarray(decode(tmp_path / "report" / "data" / f"sheet-{edit['sheet']:04}.jpg"))
        assert sheet.height == edit["sheetHeight"] and sheet.width == content["sheets"]["width"]
        original = root / edits.catalog.path(edit["original"])
        assert edit["path"].startswith(original.parent.name)
        pictures = [(edit["edit"], edits.encoded_row(shard, row)), (edit["originalAt"], original.read_bytes())]
        for where, data in pictures:
            if where is None:
                assert row["length"] == 0
                continue
            assert data is not None
            left, top, width, height = where
            wanted = Image.fromarray(decode(data))
            assert wanted.size == (width, height)  # small enough to be as they are
            found = sheet.crop((left, top, left + width, top + height))
            assert np.abs(np.asarray(found, float) - np.asarray(wanted, float)).mean() < 12
            drawn += 1
    assert drawn == 27 + (rows_of(made)["length"] > 0).sum()


def test_a_report_shows_what_was_rejected_by_hand(store: Path, root: Path, tmp_path: Path, browser: Any) -> None:
    edits = EditStore.open(store)
    first = edits.index[0]
    name = EditName(edits.catalog.path(int(first["original"])), edits.prompt_of(0), 0, int(first["shard"]))
    Decisions.of(store).add("reject", [name])
    found = browse(browser, write_report(store, tmp_path / "report", root=root).page, [("decision", "rejected")])
    assert found["filtered"] == {"decision rejected": 1} and found["console"] == []
    assert "1 was rejected by hand." in found["facts"]
    buttons = browser.execute_script("return [...document.querySelectorAll('.mark, #undo, #reject-all')]"
                                     ".filter((one) => one.offsetHeight).length")  # fmt: skip
    assert buttons == 0


def test_small_images_lose_nothing_in_a_report(tmp_path: Path) -> None:
    for place in range(3):
        write_photograph(tmp_path / "train" / "a" / f"{place}.png", place, 32, 32)
    generate(tmp_path / "train", tmp_path / "edits", GenerateConfig(prompts=("autumn",), size=32))
    write_report(tmp_path / "edits", tmp_path / "report")
    sheet = decode(tmp_path / "report" / "data" / "sheet-0000.png")
    edits = EditStore.open(tmp_path / "edits")
    np.testing.assert_array_equal(sheet[:32, :32], decode(tmp_path / "train" / edits.catalog.path(0)))
    np.testing.assert_array_equal(sheet[:32, 48:80], decode(edits.encoded(0)))
