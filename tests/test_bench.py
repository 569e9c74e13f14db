"""bench: contenders measured on real files in processes of their own, the advice, the text, and the command."""

import json
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import warm
from click.testing import CliRunner

from dali_diffusemix import DiffuseMixDataset, TrainCrop, cli
from dali_diffusemix.bench import (
    BenchResult,
    Contender,
    Material,
    Measurement,
    PillowCrops,
    Trial,
    bench,
    changes,
    extract,
    interleaved,
    measure,
    plain_dali_batches,
)
from dali_diffusemix.bench.result import Spent
from dali_diffusemix.errors import ConfigError, DiffuseMixError, StoreError
from dali_diffusemix.fractals import FractalBank
from dali_diffusemix.store import OriginalStore
from dali_diffusemix.store.pack import PackConfig, pack, packed_bytes, source_to_pack

pytestmark = pytest.mark.slow

CONTENDERS = ["diffusemix", "plain", "plain_dali", "pillow_plain", "pillow_mixed"]
SMALL: dict[str, Any] = {"batch_size": 2, "num_workers": 1, "size": 24, "rounds": 2, "seconds": 0.02}


@pytest.fixture(autouse=True, scope="module")
def forks() -> Iterator[None]:
    """Contenders run in forks of a process that has imported torch and DALI; test_damage_in_commands.py spawns them."""
    get_context = multiprocessing.get_context
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            multiprocessing, "get_context", lambda name=None: warm.CONTEXT if name == "spawn" else get_context(name)
        )
        yield


@pytest.fixture(scope="module")
def result(photos: Path, edits: Path, bank: FractalBank) -> BenchResult:
    """A comparison on a sample of 24 of the 33 photographs, which are much larger than 16 pixels."""
    assert bank.path is not None
    seen: list[tuple[int, int]] = []
    found = bench(
        photos,
        edits=edits,
        fractals=bank.path,
        images=24,
        progress=lambda done, total: seen.append((done, total)),
        **(SMALL | {"batch_size": 1, "size": 16}),
    )
    total = seen[0][1]
    assert seen == [(done, total) for done in range(1, total + 1)]
    return found


def check_json(content: dict[str, Any], contenders: list[str]) -> None:
    assert list(content) == ["machine", "settings", "results", "left_out", "tried", "advice", "verdict"]
    assert {"processor", "cores", "python", "versions", "date"} <= set(content["machine"])
    assert list(content["results"]) == contenders
    assert content["left_out"] == {}
    for measured in content["results"].values():
        assert len(measured["rounds"]) == 2
        assert 0 < measured["lowest"] <= measured["images_per_second"] <= measured["highest"]
        assert measured["cpu_seconds_per_image"] > 0
        assert 20 < measured["peak_memory_mib"] < 5000
        assert measured["what"] and measured["over_plain_dali"] > 0
    assert content["results"]["plain_dali"]["over_plain_dali"] == 1
    for one in content["tried"]:
        assert 0 < one["lowest"] <= one["gain"] <= one["highest"]
    assert all(one in content["tried"] for one in content["advice"])


def test_all_contenders_are_measured_and_changes_tried(result: BenchResult) -> None:
    content = json.loads(json.dumps(result.json()))
    check_json(content, CONTENDERS)
    assert (content["settings"]["originals"], content["settings"]["images"]) == (33, 32)
    changes = " ".join(one["change"] for one in content["tried"])
    assert "prefetch_factor=1 instead of 2" in changes
    assert "pack --max-side 30 (on 32 of your originals)" in changes
    assert "pack, the same pixels (on 32 of your originals)" in changes
    assert 'pack --format raw, resident="host" (on 32 of your originals)' in changes
    for name in ("diffusemix", "plain"):
        spent = content["results"][name]["seconds_per_image"]
        assert list(spent) == ["read", "decode", "mix"] and all(0 < seconds < 0.1 for seconds in spent.values())
    assert content["results"]["plain_dali"]["seconds_per_image"] is None
    assert content["settings"]["median_size"] == [95, 66] and content["settings"]["raw"] is False


def test_raw_packing_is_advised_by_its_commands(result: BenchResult, photos: Path, edits: Path) -> None:
    raw = next(trial for trial in result.trials if 'resident="host"' in trial.change)
    targets = [f"{photos}-raw", f"{edits}-raw"]
    found = [(shlex.split(line), size) for line, size in raw.commands]
    assert [words for words, _ in found] == [
        ["dali-diffusemix", "pack", str(source), target, "--format", "raw"]
        for source, target in zip((photos, edits), targets, strict=True)
    ]
    for source, (_, size) in zip((photos, edits), found, strict=True):
        assert size == packed_bytes(source_to_pack(source), PackConfig(format="raw")) or source == edits
    assert all(target in raw.use for target in targets) and 'resident="host"' in raw.use
    assert result.json()["tried"][-1]["commands"] == [{"command": line, "bytes": size} for line, size in raw.commands]


@pytest.mark.parametrize("columns", [60, 80, 100])
def test_the_text_fits_a_terminal(result: BenchResult, columns: int) -> None:
    lines = list(result.lines(columns))
    assert all(len(line) <= columns for line in lines if "/" not in line)  # paths are whole, to be copied
    for name in CONTENDERS:
        [at] = [i for i, line in enumerate(lines) if line.startswith(f"{name} ")]
        assert lines[at + 1] == f"  {result.json()['results'][name]['what']}"
    assert any(line.startswith("Advice: ") for line in lines)
    assert " ".join(lines).endswith(" " + result.verdict)


def test_the_command_without_edits(photos: Path, tmp_path: Path) -> None:
    pack(photos, tmp_path / "packed")
    options = "--batch-size 8 --workers 1 --size 48 --rounds 2 --seconds 0.02 --json"
    arguments = ["bench", str(tmp_path / "packed"), *options.split()]
    shown = CliRunner().invoke(cli.main, arguments, catch_exceptions=False)
    assert shown.exit_code == 0, shown.output
    assert shown.stderr == ""
    content = json.loads(shown.stdout)
    check_json(content, ["plain", "plain_dali", "pillow_plain"])
    packing = [one for one in content["tried"] if "pack" in one["change"]]
    assert [one["change"].partition(" (")[0] for one in packing] == [
        "pack --format raw",  # the rest it is already
        'pack --format raw, resident="host"',
    ]
    assert packing[0]["commands"][0]["command"].startswith("dali-diffusemix pack SOURCE ")
    assert "where SOURCE is what that was packed from" in packing[0]["use"]


@pytest.fixture(scope="module")
def raw(photos: Path, edits: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The originals and their edits in raw stores."""
    folder = tmp_path_factory.mktemp("raw")
    pack(photos, folder / "originals", PackConfig(format="raw"))
    pack(edits, folder / "edits", PackConfig(format="raw"))
    return folder / "originals", folder / "edits"


def test_raw_stores_are_measured_from_disk_and_from_memory(raw: tuple[Path, Path], bank: FractalBank) -> None:
    assert bank.path is not None
    originals, edits = raw
    found = bench(originals, edits=edits, fractals=bank.path, images=24, **(SMALL | {"batch_size": 1}))
    content = found.json()
    check_json(content, [CONTENDERS[0], "diffusemix_resident", *CONTENDERS[1:]])
    assert content["settings"]["images"] == 32 and content["settings"]["raw"] is True
    for name in ("diffusemix", "diffusemix_resident"):
        assert content["results"][name]["seconds_per_image"]["decode"] == 0
    assert not any("pack" in one["change"] for one in content["tried"])
    assert content["tried"][-1]["change"] == 'resident="host"'


def test_only_what_is_not_raw_is_packed(raw: tuple[Path, Path], photos: Path, edits: Path, bank: FractalBank) -> None:
    assert bank.path is not None
    for root, store, packed in ((raw[0], edits, edits), (photos, raw[1], photos)):
        found = bench(root, edits=store, fractals=bank.path, **(SMALL | {"rounds": 1, "seconds": 0.01}))
        [line] = {line for trial in found.trials if "raw" in trial.change for line, _ in trial.commands}
        assert shlex.split(line)[2] == str(packed)
        assert not any("resident" in name for name in found.results)


def test_without_room_nothing_is_resident_and_large_images_stay_jpegs(
    raw: tuple[Path, Path], photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(changes, "free_memory", lambda: 2**20)
    found = bench(raw[0], **(SMALL | {"rounds": 1, "seconds": 0.01}))
    assert list(found.results) == ["plain", "plain_dali", "pillow_plain"]
    assert found.left_out["plain_resident"].endswith("1.0 MB of memory are free")
    dataset = DiffuseMixDataset(photos, mix=None, crop=TrainCrop(24))
    assert changes.RawImages.of(dataset, "cpu").small
    monkeypatch.setattr(changes, "_SMALL", 64 * 64)
    large = changes.RawImages.of(dataset, "cpu")
    assert not large.small and large.resident is None and not large.there


def test_raw_stores_are_measured_without_dali(raw: tuple[Path, Path], tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "sys.modules['nvidia.dali'] = None\n"
        "from dali_diffusemix import cli\n"
        "if __name__ == '__main__':\n"
        "    cli.main()\n"
    )
    options = ["--batch-size", "8", "--workers", "1", "--size", "24", "--rounds", "1", "--seconds", "0.01", "--json"]
    run = subprocess.run(
        [sys.executable, script, "bench", raw[0], *options], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    content = json.loads(run.stdout)
    assert list(content["results"]) == ["plain", "plain_resident", "pillow_plain"]
    assert "DALI" in content["left_out"]["plain_dali"]
    assert content["results"]["plain"]["over_plain_dali"] is None
    assert "plain DALI" not in content["verdict"] and "Pillow" in content["verdict"]


def measured(*rates: float) -> Measurement:
    return Measurement(images_per_second=rates, cpu_seconds_per_image=(1e-3,) * len(rates), peak_memory_mib=300)


def test_only_a_gain_in_every_round_is_advice_and_one_for_each_setting() -> None:
    result = BenchResult(
        machine={},
        settings={},
        results={"plain": measured(3, 1, 2)},
        trials=(
            Trial(setting="num_workers", change="2 workers", gains=(1.6, 1.7, 1.8)),
            Trial(setting="num_workers", change="4 workers", gains=(1.9, 1.8, 2.0)),
            Trial(setting="prefetch_factor", change="4 ahead", gains=(0.9, 1.2, 1.3)),
            Trial(setting="pack", change="pack", gains=(1.01, 1.04, 1.2)),
        ),
    )
    assert [str(trial) for trial in result.advice] == ["4 workers: 1.90x"]
    assert result.json()["results"]["plain"]["images_per_second"] == 2


@pytest.mark.parametrize(
    ("gains", "advised"), [((1.2, 1.5), ["smaller", "raw"]), ((3.0, 1.5), ["raw"]), ((1.2, 1.0), ["raw"])]
)
def test_smaller_images_are_advised_if_nothing_else_gains_as_much(
    gains: tuple[float, float], advised: list[str]
) -> None:
    raw, smaller = gains
    trials = (
        Trial(setting="pack", change="same pixels", gains=(1.1,)),
        Trial(setting="pack smaller", change="smaller", gains=(smaller,)),
        Trial(setting="pack", change="raw", gains=(raw,)),
    )
    result = BenchResult(machine={}, settings={}, results={"plain": measured(1)}, trials=trials)
    assert [trial.change for trial in result.advice] == advised


def test_long_reasons_are_wrapped() -> None:
    settings = {"images": 10**6, "originals": 10**7, "size": 224, "batch_size": 1024, "num_workers": 128}
    result = BenchResult(
        machine={},
        settings={**settings, "device": "cuda:10", "rounds": 5},
        results={"diffusemix": measured(123456.7)},
        left_out={"plain_dali": "word " * 40},
    )
    lines = list(result.lines())
    assert max(map(len, lines)) <= 80
    assert lines[-1] == "Advice: nothing to change"


@pytest.mark.parametrize(
    ("ours", "dali", "spent", "words"),
    [
        (300, 100, (1e-4, 7e-4, 1e-4), "faster than plain DALI, which does not mix (3.00x)"),
        (
            300,
            100,
            (1e-4, 7e-4, 1e-4),
            "only the parts of images (median 500 x 375 pixels) that samples show are decoded",
        ),
        (50, 100, (1e-4, 7e-4, 1e-4), "slower than plain DALI, which does not mix (0.50x)"),
        (50, 100, (1e-4, 7e-4, 1e-4), "decoding takes most: an original and an edit have to be decoded"),
        (101, 100, (7e-4, 1e-4, 1e-4), "about as fast as plain DALI, which does not mix (1.01x)"),
        (101, 100, (7e-4, 1e-4, 1e-4), "reading takes most"),
        (50, 100, (1e-4, 1e-4, 7e-4), "mixing takes most"),
        (50, 100, (1e-4, 1e-4, 1e-4), "are so small that the work around decoding, of each file and batch, takes most"),
        (50, 100, (1e-4, 0, 7e-4), "1.00 ms of CPU time (reading 0.10 ms, mixing 0.70 ms and the rest 0.20 ms"),
    ],
)
def test_the_verdict_is_honest_and_says_why(
    ours: float, dali: float, spent: tuple[float, float, float], words: str
) -> None:
    result = BenchResult(
        machine={},
        settings={"median_size": [375, 500], "device": "cpu"},
        results={"diffusemix": replace(measured(ours), spent=Spent(*spent)), "plain_dali": measured(dali)},
    )
    assert words in result.verdict
    slower = ours < dali / 1.05
    assert result.verdict.endswith(".") and result.verdict.count(". ") == slower
    if slower:
        assert "None of the changes that were tried makes it faster; docs/performance.md says when" in result.verdict
        packed = Trial(setting="pack", change="pack --format raw", gains=(1.5, 1.6))
        assert replace(result, trials=(packed,)).verdict.endswith(
            "To make it faster, try pack --format raw, as advised above."
        )


def test_a_loader_that_ran_alone_has_no_verdict() -> None:
    assert BenchResult(machine={}, settings={}, results={"plain": measured(1)}).verdict == ""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, found 0"),
        ({"num_workers": 0}, "num_workers must be at least 1, found 0"),
        ({"rounds": 0}, "rounds must be at least 1, found 0"),
        ({"images": -1}, "images must be at least 1, found -1"),
        ({"seconds": 0.0}, r"seconds must be greater than 0, found 0\.0"),
        ({"device": "tpu"}, "device must be 'cpu', 'cuda' or 'cuda:N', found 'tpu'"),
        ({"edits": "edits"}, "found edits alone; give fractals too"),
        ({"fractals": "bank.npy"}, "found fractals alone; give edits too"),
    ],
)
def test_wrong_settings_are_refused(photos: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bench(photos, **settings)


def test_edits_that_are_not_there(photos: Path, tmp_path: Path) -> None:
    arguments = ["bench", str(photos), "--edits", str(tmp_path / "none"), "--fractals", str(tmp_path / "none.npy")]
    shown = CliRunner().invoke(cli.main, arguments)
    assert shown.exit_code == 1
    assert str(tmp_path / "none") in shown.stderr
    with pytest.raises(StoreError):
        bench(photos, edits=tmp_path / "none", fractals=tmp_path / "none.npy")


def broken() -> Contender:
    raise RuntimeError("it does not work\nand this is the second line")


def empty() -> Contender:
    return Contender(epoch=lambda: iter(()), ahead=1)


def refused() -> Contender:
    error = StoreError("the store must be whole, found half of it")
    error.add_note("found where it was looked for")
    raise error


def waiting() -> Contender:
    def epoch() -> Any:
        for _ in range(4):
            time.sleep(0.01)
            yield 5

    return Contender(epoch=epoch, ahead=2)


def test_a_turn_counts_every_image_of_its_time() -> None:
    found, _ = interleaved({"waiting": waiting}, rounds=3, seconds=0.1)
    assert all(200 < rate < 500 for rate in found["waiting"].images_per_second)
    assert all(cpu < 0.01 for cpu in found["waiting"].cpu_seconds_per_image)


def test_what_fails_is_left_out_with_its_reason_or_ends_the_run() -> None:
    factories = {"waiting": waiting, "broken": broken, "empty": empty}
    found, left_out = interleaved(factories, rounds=1, optional=("broken", "empty"), together=True)
    assert list(found) == ["waiting"]
    assert 200 < found["waiting"].images_per_second[0] < 500
    assert left_out["broken"] == "RuntimeError: it does not work"
    assert "at least one image, found none" in left_out["empty"]
    with pytest.raises(DiffuseMixError, match="it does not work") as caught:
        interleaved({"broken": broken}, rounds=1)
    assert "in broken" in "".join(caught.value.__notes__)
    with pytest.raises(StoreError, match="found half of it") as caught:
        interleaved({"refused": refused}, rounds=1)
    assert caught.value.__notes__ == ["found where it was looked for"]


def dying() -> Contender:
    def epoch() -> Any:
        yield 5
        os.kill(os.getpid(), signal.SIGSEGV)

    return Contender(epoch=epoch, ahead=1)


def hanging() -> Contender:
    def epoch() -> Any:
        for _ in range(3):  # the uncounted turn takes two or three of them
            time.sleep(0.03)
            yield 5
        time.sleep(60)

    return Contender(epoch=epoch, ahead=1)


def test_one_that_dies_or_hangs_costs_only_its_own_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_START", 40)  # four processes at once, on a machine that may be busy
    factories = {"dying": dying, "waiting": waiting, "hanging": hanging, "broken": broken}
    rounds: list[tuple[list[str], list[str]]] = []
    found, left_out = interleaved(
        factories,
        rounds=2,
        seconds=0.05,
        optional=tuple(factories),
        begin_together=True,
        patience=3,
        each_round=lambda results, reasons: rounds.append((list(results), sorted(reasons))),
    )
    assert list(found) == ["waiting"] and len(found["waiting"].images_per_second) == 2
    assert f"found exit code {-signal.SIGSEGV}" in left_out["dying"]
    assert "must end within 3 s" in left_out["hanging"]
    assert left_out["broken"] == "RuntimeError: it does not work"
    assert rounds == [(["waiting"], ["broken", "dying", "hanging"])] * 2


@pytest.mark.parametrize("form", ["region", "whole"])
def test_plain_dali_by_itself_gives_whole_batches_for_training(photos: Path, form: str) -> None:
    material = Material(root=photos, files=photos, size=24, batch_size=8, num_workers=1)
    batches = plain_dali_batches(material, form=form, drop_last=True)
    for _ in range(6):  # more than an epoch of 33
        images, labels = next(batches)
        assert images.shape == (8, 3, 24, 24) and labels.shape == (8,) and set(labels.tolist()) <= {0, 1, 2}
        assert images.std() > 0.1
    with pytest.raises(ConfigError, match="found 'half'"):
        plain_dali_batches(material, form="half")


def test_packed_originals_are_extracted_as_they_are(photos: Path, tmp_path: Path) -> None:
    pack(photos, tmp_path / "packed", PackConfig(tiled=False))
    store = OriginalStore.open(tmp_path / "packed")
    extract(store, range(len(store)), tmp_path / "files")
    for path in store.catalog.paths:
        assert (tmp_path / "files" / path).read_bytes() == (photos / path).read_bytes()


def test_pillow_makes_the_samples_of_the_dataset(photos: Path, edits: Path, bank: FractalBank) -> None:
    material = Material(root=photos, files=photos, edits=edits, fractals=bank.path, size=32)
    for mixed in (False, True):
        crops = PillowCrops(material, mixed=mixed)
        theirs, ours = crops.__getitems__(range(33)), material.dataset(mixed=mixed).__getitems__(range(33))
        for (image, label), (expected, same) in zip(theirs, ours, strict=True):
            assert label == same
            assert abs(image - expected).max() < 0.06  # Pillow rounds to whole levels twice: 3 of 255, normalised
