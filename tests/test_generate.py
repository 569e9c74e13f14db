"""generate: real files in, a store out; killed, filled up and disturbed, the store is the same in the end."""

import dataclasses
import hashlib
import io
import json
import logging
import os
import pickle
import random
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import warm
from material import write_photograph
from PIL import Image

from dali_diffusemix.catalog import Catalog, index
from dali_diffusemix.errors import CatalogError, ConfigError, StoreError
from dali_diffusemix.generate import GenerateConfig, Summary, generate
from dali_diffusemix.generate.editors import PROMPTS, EditTask
from dali_diffusemix.generate.editors.procedural import ProceduralEditor
from dali_diffusemix.generate.engines import Job, Report
from dali_diffusemix.generate.engines.local import LocalEngine
from dali_diffusemix.generate.worker import edit_seed
from dali_diffusemix.images.codec import Stored, decode
from dali_diffusemix.store import VERDICTS, EditStore, UnfinishedStoreWarning

SHARED = Path(__file__).parents[2] / "shared" / "data"
SMALL = GenerateConfig(prompts=("autumn", "mosaic"), size=24, originals_per_shard=3, batch_size=2)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DALI_DIFFUSEMIX_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes, ten images."""
    for row in range(10):
        put(tmp_path / "train" / ("ants" if row < 5 else "bees") / f"{row}.jpg", row)
    return tmp_path / "train"


def put(file: Path, seed: int) -> None:
    write_photograph(file, 100 + seed, 40, 50, quality=95)  # of seeds from 100 on, all edits are accepted


def counted(summary: Summary) -> dict[str, int]:
    """The verdicts that occur."""
    assert set(summary.verdicts) == set(VERDICTS)
    return {verdict: count for verdict, count in summary.verdicts.items() if count}


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# What is made --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("format", "ending"), [("jpeg", "jpg"), ("png", "png"), ("raw", "ppm"), (None, "ppm")])
def test_an_edit_is_what_the_editor_makes_of_the_squashed_original(
    root: Path, tmp_path: Path, format: Stored | None, ending: str
) -> None:
    config = dataclasses.replace(SMALL, variants=2, seed=7, format=format)
    calls: list[tuple[int, int]] = []
    summary = generate(root, tmp_path / "store", config, progress=lambda done, total: calls.append((done, total)))
    assert counted(summary) == {"accepted": 40} and summary.made == 40
    assert summary.images_per_second == pytest.approx(40 / summary.seconds)
    assert calls[0] == (0, 40) and calls[-1] == (40, 40) and calls == sorted(calls)
    store = EditStore.open(tmp_path / "store")
    assert store.prompts == config.prompts and len(store) == 40
    edit = 0
    for row, path in enumerate(store.catalog.paths):
        original = Image.open(root / path).convert("RGB").resize((24, 24), Image.Resampling.BICUBIC)
        for prompt in config.prompts:
            for variant in range(2):
                task = EditTask(image=0, prompt=prompt, seed=edit_seed(7, os.fsencode(path), prompt, variant))
                (pixels,) = ProceduralEditor(config.prompts).edit([np.asarray(original)], [task])
                stream = io.BytesIO()
                Image.fromarray(pixels).save(stream, "JPEG", quality=90)
                wanted = decode(stream.getvalue()) if format == "jpeg" else pixels
                np.testing.assert_array_equal(decode(store.encoded(edit)), wanted)
                assert (store.originals_of(np.array([edit])), store.prompt_of(edit)) == (row, prompt)
                assert store.sizes(np.array([edit])).tolist() == [[24, 24]]
                edit += 1
    assert store.settings["editor"] == "procedural" and "not diffusion" in str(store.settings["model"])
    assert store.raw == (format in ("raw", None)) and ("quality" in store.settings) == (format == "jpeg")
    with tarfile.open(tmp_path / "store" / "shards" / "edits-000000.tar") as tar:
        assert all(name.endswith(f".{ending}") for name in tar.getnames())


def test_the_seed_of_an_edit_is_frozen() -> None:
    digest = hashlib.sha256(b"3\0ants/\xff.jpg\0ukiyo-e\x0012").digest()
    assert edit_seed(3, b"ants/\xff.jpg", "ukiyo-e", 12) == int.from_bytes(digest[:8], "little")
    assert edit_seed(0, b"a", "b", 1) != edit_seed(0, b"a", "b1", 1)


def test_neither_batches_nor_shards_nor_other_files_change_an_edit(root: Path, tmp_path: Path) -> None:
    def edits(config: GenerateConfig) -> dict[tuple[str, str], bytes]:
        folder = tmp_path / f"store-{time.monotonic_ns()}"
        generate(root, folder, config)
        store = EditStore.open(folder)
        return {
            (store.catalog.path(int(store.index["original"][edit])), store.prompt_of(edit)): store.encoded(
                edit
            ).tobytes()
            for edit in range(len(store))
        }

    some = edits(SMALL)
    assert edits(dataclasses.replace(SMALL, batch_size=7, originals_per_shard=4)) == some
    put(root / "ants" / "0 comes first.jpg", 99)
    (root / "bees" / "7.jpg").unlink()
    index(root, refresh=True)
    others = edits(dataclasses.replace(SMALL, prompts=("snowy", *SMALL.prompts)))
    assert {key: others.get(key) for key in some if not key[0].startswith("bees/7")}.items() <= others.items()
    assert all(others[key] == jpeg for key, jpeg in some.items() if key in others)
    assert len(others) == 30
    assert edits(dataclasses.replace(SMALL, seed=1)).values() != some.values()


def test_an_exif_rotated_original_is_edited_upright(tmp_path: Path) -> None:
    picture = np.zeros((40, 80, 3), np.uint8)
    picture[:20] = (250, 250, 250)
    upright = Image.fromarray(picture)
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "train" / "all").mkdir(parents=True)
    upright.save(tmp_path / "train" / "all" / "a.png")
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "train" / "all" / "b.png", exif=exif)
    generate(tmp_path / "train", tmp_path / "store", SMALL)
    store = EditStore.open(tmp_path / "store")
    bright = [decode(store.encoded(int(start))).astype(float).mean((1, 2)) for start in store.starts[:2]]
    for rows in bright:
        assert rows[:10].mean() > rows[14:].mean() + 50


def test_odd_names_and_kinds_of_files(tmp_path: Path) -> None:
    root = os.fsencode(tmp_path / "train") + b"/class.v2 'a'"
    Path(os.fsdecode(root)).mkdir(parents=True)
    names = [
        b"a.b.c.jpg",
        b"a.b.jpg",
        b"sp ace.png",
        b"quote'\".bmp",
        b"\xff\xfe.jpg",
        b"lies.gif",
        b"grey16.png",
        b"x" * 240,
    ]
    for name in names:
        image = Image.fromarray(np.random.default_rng(len(name)).integers(0, 256, (9, 7, 3), np.uint8))
        form = {b"png": "PNG", b"bmp": "BMP"}.get(name[-3:], "JPEG")
        if name == b"grey16.png":
            image = Image.fromarray(np.arange(63, dtype=np.uint16).reshape(9, 7) * 1000)
        stream = io.BytesIO()
        image.save(stream, form)
        Path(os.fsdecode(root + b"/" + name)).write_bytes(stream.getvalue())
    summary = generate(tmp_path / "train", tmp_path / "store", SMALL)
    assert counted(summary) == {"accepted": 2 * len(names)}
    store = EditStore.open(tmp_path / "store")
    assert {os.fsencode(path) for path in store.catalog.paths} == {b"class.v2 'a'/" + name for name in names}
    for edit in range(len(store)):
        assert decode(store.encoded(edit)).shape == (24, 24, 3)


@pytest.mark.slow
def test_real_photographs_as_people_have_them(tmp_path: Path) -> None:
    folder = SHARED / "ants_bees" / "val"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    summary = generate(folder, tmp_path / "store", dataclasses.replace(SMALL, originals_per_shard=64, batch_size=16))
    store = EditStore.open(tmp_path / "store")
    assert 2 * len(store.catalog) == summary.made and len(store) >= 0.99 * summary.made  # quality may reject some


# Unreadable originals ------------------------------------------------------------------------------------------------


def test_an_unreadable_original_is_a_verdict_and_the_run_goes_on(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    index(root)
    file = root / "ants" / "1.jpg"
    file.write_bytes(file.read_bytes()[:700])
    (root / "bees" / "8.jpg").unlink()
    with caplog.at_level(logging.WARNING), pytest.warns(match="has changed since"):
        summary = generate(root, tmp_path / "store", SMALL)
    assert counted(summary) == {"accepted": 16, "unreadable original": 4} and summary.made == 20
    assert "ants/1.jpg" in caplog.text and "bees/8.jpg" in caplog.text
    store = EditStore.open(tmp_path / "store")
    np.testing.assert_array_equal(np.diff(store.starts), [2, 0, 2, 2, 2, 2, 2, 2, 0, 2])
    rows = np.load(tmp_path / "store" / "shards" / "edits-000000.npy", allow_pickle=False)
    assert rows["verdict"].tolist() == [0, 0, 1, 1, 0, 0] and rows["length"][2] == 0
    record = json.loads((tmp_path / "store" / "shards" / "edits-000000.json").read_text())
    assert record["verdicts"] == {"accepted": 4, "unreadable original": 2}


def test_a_shard_without_a_single_readable_original(root: Path, tmp_path: Path) -> None:
    catalog = index(root)
    for name in ("0", "1", "2"):
        (root / "ants" / f"{name}.jpg").write_bytes(b"")
    generate(root, tmp_path / "store", SMALL, catalog=catalog)
    store = EditStore.open(tmp_path / "store")
    assert len(store) == 14 and store.starts[3] == 0
    assert (store.path / "shards" / "edits-000000.idx").read_text() == "v1.2 0\n"


# Going on ------------------------------------------------------------------------------------------------------------

RUN = """
import json, resource, sys
from dali_diffusemix.generate import GenerateConfig, generate
root, store, config, limit = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
def progress(done, total):
    sys.stdout.write(f"{done}\\n")
    sys.stdout.flush()
generate(root, store, GenerateConfig(**config), progress=progress)
"""


def script(root: Path, store: Path, config: GenerateConfig, limit: int = 0) -> warm.Script:
    names = ("prompts", "size", "batch_size", "originals_per_shard")
    chosen = {name: getattr(config, name) for name in names}
    return warm.Script("-c", RUN, root, store, json.dumps(chosen), limit)


def stamps(store: Path) -> dict[str, tuple[int, int]]:
    """Finished shards and which files they are."""
    return {
        file.name: ((status := file.with_suffix(".tar").stat()).st_ino, status.st_mtime_ns)
        for file in (store / "shards").glob("*.json")
    }


@pytest.mark.slow
def test_killed_again_and_again_it_ends_with_the_same_store_and_makes_nothing_twice(tmp_path: Path) -> None:
    """Four times; `make soak` kills ten times, with a diffusion editor and several workers."""
    root, rng = tmp_path / "train", random.Random(0)
    for row in range(40):
        put(root / "ants" / f"{row}.jpg", row)
    config = GenerateConfig(prompts=PROMPTS[:4], size=48, originals_per_shard=2, batch_size=1)
    finished: dict[str, tuple[int, int]] = {}
    for kill in range(4):
        with script(root, tmp_path / "killed", config) as run:
            if kill:  # else at its very beginning
                for _ in range(rng.randint(1, 7)):  # within a shard, or between two
                    run.stdout.readline()
            time.sleep(rng.uniform(0, 0.3 if kill == 0 else 0.02))
            run.kill()
        assert run.returncode == -signal.SIGKILL
        now = stamps(tmp_path / "killed")
        assert finished.items() <= now.items()
        finished = now
    assert 0 < len(finished) < 20
    with script(root, tmp_path / "killed", config) as run:
        assert (run.communicate()[1], run.returncode) == ("", 0)
    assert finished.items() <= stamps(tmp_path / "killed").items()
    generate(root, tmp_path / "whole", config)
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
    assert len(EditStore.open(tmp_path / "killed")) == 160


def test_a_second_run_makes_nothing_and_a_larger_one_the_rest(root: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    generate(root, store, SMALL)
    before = content(store)
    again = generate(root, store, SMALL)
    assert again.made == 0 and again.verdicts["accepted"] == 20
    assert content(store) == before
    calls: list[tuple[int, int]] = []
    more = dataclasses.replace(SMALL, prompts=("snowy",), variants=2)
    assert generate(root, store, more, progress=lambda *call: calls.append(call)).made == 20
    assert calls[0] == (20, 40)
    assert before.keys() <= content(store).keys()
    assert EditStore.open(store).prompts == ("autumn", "mosaic", "snowy")


def test_work_left_by_a_run_with_other_prompts_is_done_too(root: Path, tmp_path: Path) -> None:
    class Nothing:
        def run(
            self, start: Callable[[str], Callable[[Job], Iterable[Report]]], jobs: Sequence[Job]
        ) -> Iterator[Report]:
            pickle.dumps((start, jobs))  # other engines send them to other processes
            return iter(())

    with pytest.raises(StoreError, match="none of its 4 shards"):
        generate(root, tmp_path / "store", SMALL, engine=Nothing())
        EditStore.open(tmp_path / "store")
    assert generate(root, tmp_path / "store", dataclasses.replace(SMALL, prompts=("snowy",))).made == 30


def test_reports_of_a_repeated_job_count_once(root: Path, tmp_path: Path) -> None:
    class Twice:
        def run(
            self, start: Callable[[str], Callable[[Job], Iterable[Report]]], jobs: Sequence[Job]
        ) -> Iterator[Report]:
            yield from LocalEngine().run(start, [jobs[1], jobs[1], jobs[0], *jobs[:1:-1]])

    calls: list[tuple[int, int]] = []
    summary = generate(root, tmp_path / "twice", SMALL, engine=Twice(), progress=lambda *call: calls.append(call))
    assert summary.made == 20 and calls[-1] == (20, 20)
    generate(root, tmp_path / "once", SMALL)
    assert content(tmp_path / "twice") == content(tmp_path / "once")


# Full disks ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_file_that_cannot_grow_stops_the_run_and_leaves_no_half_file(tmp_path: Path) -> None:
    for row in range(12):
        put(tmp_path / "train" / "ants" / f"{row}.jpg", row)
    config = dataclasses.replace(SMALL, size=64, originals_per_shard=6)
    with script(tmp_path / "train", tmp_path / "store", config, 20_000) as run:
        errors = run.communicate()[1]
    assert run.returncode == 1
    error = errors.splitlines()[-1]
    assert "StoreError" in error and "Finished shards stay" in error and "same command again" in error
    assert not [name for name in content(tmp_path / "store") if "edits" in name or name.endswith(".tmp")]
    generate(tmp_path / "train", tmp_path / "store", config)
    generate(tmp_path / "train", tmp_path / "whole", config)
    assert content(tmp_path / "store") == content(tmp_path / "whole")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True
    ).returncode:
        pytest.skip("mounting a small disk is not permitted here")
    yield folder
    # Lazily: a test that failed may still hold files open, and what stays mounted breaks every later run.
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_keeps_what_is_finished_and_a_read_only_one_can_be_read(
    root: Path, tmp_path: Path, disk: Path
) -> None:
    config = dataclasses.replace(SMALL, size=96, originals_per_shard=1, prompts=PROMPTS)
    with pytest.raises(StoreError, match=r"No space left on device.*Finished shards stay"):
        generate(root, disk / "store", config)
    finished = stamps(disk / "store")
    assert finished and not [name for name in content(disk) if name.endswith(".tmp")]
    with pytest.warns(UnfinishedStoreWarning, match="shards are missing"):
        assert len(EditStore.open(disk / "store")) == 9 * len(finished)
    subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
    generate(root, disk / "store", config)
    assert finished.items() <= stamps(disk / "store").items()
    generate(root, tmp_path / "whole", config)
    assert content(disk / "store") == content(tmp_path / "whole")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    assert len(EditStore.open(disk / "store")) == 90
    with pytest.raises(StoreError, match=r"cannot be written.*[Rr]ead-only"):
        generate(root, disk / "store", config)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path) -> None:
    for row in range(20):
        put(tmp_path / "train" / "ants" / f"{row}.jpg", row)
    catalog = index(tmp_path / "train")
    many = Catalog.from_arrays([catalog.path(row % 20) for row in range(1000)], [0] * 1000, ["ants"], [[40, 50]] * 1000)
    resident: list[int] = []  # pages

    def measure(done: int, total: int) -> None:
        resident.append(int(Path("/proc/self/statm").read_text().split()[1]))

    config = GenerateConfig(prompts=("sunset",), size=32, originals_per_shard=100)
    generate(tmp_path / "train", tmp_path / "store", config, catalog=many, progress=measure)
    growth = (resident[-1] - resident[len(resident) // 5]) * os.sysconf("SC_PAGE_SIZE")
    assert growth < 4 * 2**20  # 800 decoded originals have 4.6 MiB, their edits 2.3 MiB


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"editor": ""}, "model must be a hub id or a folder, found an empty string"),
        ({"editor": "some/model", "size": 100}, "edit_size must be divisible by 8 for this editor, found 100"),
        ({"retry": -1}, "retry .* found -1"),
        ({"resize": "crop"}, "resize must be 'squash' or 'keep', found 'crop'"),
        ({"deny": {"a": "sleet"}}, "deny must be lists of prompts, found 'sleet'"),
        ({"size": 0}, "size must be a whole number from 1 to 4096, found 0"),
        ({"size": 25.5}, "found 25.5"),
        ({"quality": 101}, "quality .* found 101"),
        ({"seed": -1}, "seed .* found -1"),
        ({"variants": True}, "variants .* found True"),
        ({"batch_size": 0}, "batch_size"),
        ({"originals_per_shard": 0}, "originals_per_shard"),
        ({"prompts": ()}, "prompts must be one or more"),
        ({"prompts": ("snowy", "snowy")}, "all different"),
    ],
)
def test_a_config_checks_itself(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GenerateConfig(**fields)  # type: ignore[arg-type]


def test_an_unknown_prompt_is_refused_before_anything_is_written(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'stormy'"):
        generate(root, tmp_path / "store", dataclasses.replace(SMALL, prompts=("stormy",)))
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("field", ["size", "seed", "quality"])
def test_changed_settings_are_refused_with_the_difference(root: Path, tmp_path: Path, field: str) -> None:
    small = dataclasses.replace(SMALL, quality=90)
    generate(root, tmp_path / "store", small)
    value = getattr(small, field)
    with pytest.raises(StoreError, match=rf"{field}: {value} in the store, {value + 1} asked for$"):
        generate(root, tmp_path / "store", dataclasses.replace(small, **{field: value + 1}))


def test_a_store_that_grows_keeps_its_format(root: Path, tmp_path: Path) -> None:
    """Stores of small edits were JPEG before there were others, and stay so unless another format is asked for."""
    old = tmp_path / "store"
    generate(root, old, dataclasses.replace(SMALL, format="jpeg"))
    generate(root, old, dataclasses.replace(SMALL, prompts=(*SMALL.prompts, "snowy")))
    assert not EditStore.open(old).raw and len(EditStore.open(old)) == 30
    with pytest.raises(StoreError, match="format: None in the store, 'raw' asked for"):
        generate(root, old, dataclasses.replace(SMALL, format="raw"))
    assert GenerateConfig(size=64).stored_format == "raw" and GenerateConfig(size=65).stored_format == "jpeg"
    assert GenerateConfig(size=32, quality=80).stored_format == "jpeg"
    with pytest.raises(ConfigError, match="quality is that of JPEGs"):
        GenerateConfig(format="png", quality=80)
    with pytest.raises(ConfigError, match="format must be one of jpeg, png, raw, found 'webp'"):
        GenerateConfig(format="webp")  # type: ignore[arg-type]


def test_a_store_of_other_originals_is_refused(root: Path, tmp_path: Path) -> None:
    generate(root, tmp_path / "store", SMALL)
    put(tmp_path / "other" / "ants" / "0.jpg", 0)
    with pytest.raises(StoreError, match="other originals: it has 10, given are 1"):
        generate(tmp_path / "other", tmp_path / "store", SMALL)
    # Until the folder is listed anew, the originals are those that were there.
    put(root / "ants" / "new.jpg", 1)
    with pytest.warns(match="has changed since"):
        generate(root, tmp_path / "store", SMALL)
    assert generate(root, tmp_path / "store", SMALL, catalog=EditStore.open(tmp_path / "store").catalog).made == 0


def test_places_that_cannot_be(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="outside the root"):
        generate(root, root / "edits", SMALL)
    with pytest.raises(CatalogError, match="no such folder"):
        generate(tmp_path / "nowhere", tmp_path / "store", SMALL)
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="cannot be written"):
        generate(root, tmp_path / "file" / "store", SMALL)
