"""Where a loader on a GPU decodes: what is asked for, how ways are tried, what is remembered."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from dali_diffusemix import ConfigError, DataError, DiffuseMixDataset, DiffuseMixLoader, EvalCrop, GpuDecoding
from dali_diffusemix.loading import auto
from dali_diffusemix.loading.auto import Choice

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DALI_DIFFUSEMIX_CACHE", str(tmp_path / "cache"))


def test_what_is_asked_for_is_done_and_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "choose", lambda *_: pytest.fail("nothing is to be tried"))
    regions = GpuDecoding(regions=True, hardware_load=0)
    assert auto.resolve("cpu", GPU, 1) is None
    assert auto.resolve("gpu", GPU, 1) == GpuDecoding()
    assert auto.resolve(regions, GPU, 1) is regions
    assert auto.resolve("auto", CPU, 1) is None


def test_what_cannot_be_asked_for(photos: Path) -> None:
    dataset = DiffuseMixDataset(photos, crop=EvalCrop(32))
    with pytest.raises(ConfigError, match=r"decode must be 'auto', 'cpu', 'gpu' or a GpuDecoding, found 'hardware'"):
        DiffuseMixLoader(dataset, device="cpu", decode="hardware")  # type: ignore[arg-type]
    for decode in ("gpu", GpuDecoding()):
        with pytest.raises(ConfigError, match=r"decode must be 'auto' or 'cpu' for device='cpu'.*leave it out"):
            DiffuseMixLoader(dataset, device="cpu", decode=decode)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"hardware_load must be a number from 0 to 1, found 1\.5; leave it out"):
        GpuDecoding(hardware_load=1.5)
    with pytest.raises(ConfigError, match="hardware_load must be a number from 0 to 1, found 'x'"):
        GpuDecoding(hardware_load="x")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="regions must be True or False, found 'yes'"):
        GpuDecoding(regions="yes")  # type: ignore[arg-type]


def test_a_loader_on_the_cpu_says_so(photos: Path) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed on this machine")
    loader = DiffuseMixLoader(DiffuseMixDataset(photos, crop=EvalCrop(32)), 8, device="cpu", decode="cpu")
    next(iter(loader))
    assert loader.stats().decoded_on == "cpu" and loader.decode == "cpu"


@pytest.mark.parametrize(
    ("child", "error"),
    [
        ("import os; os.abort()", "the process that tried it was ended by SIGABRT"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "the process that tried it was ended by SIGSEGV"),
        ("import time; time.sleep(60)", "no answer within 0.5 s"),
        ("print('half an ans')", "the process that tried it ended with exit code 0"),
        ("raise SystemExit(3)", "the process that tried it ended with exit code 3"),
    ],
)
def test_a_crash_is_an_answer(child: str, error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "_CHILD", child)
    monkeypatch.setattr(auto, "_SECONDS", 0.5 if "sleep" in child else 60.0)
    assert auto._trial("gpu", 0, 1) == {"error": error}


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_a_trial_says_why() -> None:
    """The real thing, up to the point where a driver is needed."""
    pytest.importorskip("nvidia.dali", reason="DALI is not installed on this machine")
    assert "error" in auto._trial("gpu", 0, 1)


@pytest.mark.slow
def test_a_trial_measures_and_compares(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it but the GPU: photographs, decoder, one copy, Pillow's pixels."""
    pytest.importorskip("nvidia.dali", reason="DALI is not installed on this machine")
    assert auto.rate(None, CPU, 2, 0.01) > 0
    monkeypatch.setattr(auto, "_pixels_of", lambda piece, _: _black(piece))
    with pytest.raises(DataError, match=r"the pixels must be Pillow's.*they are from 0 to 0"):
        auto.rate(None, CPU, 2, 0.01)


def _black(piece):  # type: ignore[no-untyped-def]
    import numpy as np

    return np.zeros((int(piece["height"]), int(piece["width"]), 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("answers", "way"),
    [
        ({"cpu": 1000.0, "gpu": 1200.0, "gpu, regions": 1150.0, "gpu, edits on the cpu": 900.0}, "gpu"),
        ({"cpu": 1000.0, "gpu": 1200.0, "gpu, regions": 1300.0, "gpu, edits on the cpu": None}, "gpu, regions"),
        ({"cpu": 1000.0, "gpu": 1050.0, "gpu, regions": None, "gpu, edits on the cpu": None}, "cpu"),
        ({"cpu": 1000.0, "gpu": None, "gpu, regions": None, "gpu, edits on the cpu": None}, "cpu"),
        ({"cpu": None, "gpu": 100.0, "gpu, regions": None, "gpu, edits on the cpu": 1.0}, "gpu"),
        ({"cpu": None, "gpu": None, "gpu, regions": None, "gpu, edits on the cpu": None}, "cpu"),
    ],
)
def test_the_gpu_is_chosen_where_it_is_clearly_faster(
    answers: dict[str, float | None], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert answers.keys() == auto.WAYS.keys()

    def trial(name: str, *_: object) -> dict[str, object]:
        rate = answers[name]
        return {"error": "it crashed"} if rate is None else {"images_per_second": rate}

    monkeypatch.setattr(auto, "_trial", trial)
    choice = auto._tried(0, 1)
    assert choice.way == way
    assert str(choice).startswith(f"decode={way}: ")
    for name, rate in answers.items():
        assert (f"{name} does not work (it crashed)" if rate is None else f"{name} {rate:.0f} images/s") in str(choice)


CHOICE = Choice(way="gpu", images_per_second={"cpu": 1.0, "gpu": 2.0}, errors={"gpu, regions": "it crashed"})


def test_it_is_remembered_for_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    here, elsewhere = {"gpu": "A", "driver": "1"}, {"gpu": "A", "driver": "2"}
    assert auto.remembered(here) is None
    auto._file().parent.mkdir()
    auto._remember(here, CHOICE)
    assert auto.remembered(here) == CHOICE and auto.remembered(elsewhere) is None
    auto._remember(elsewhere, CHOICE)
    assert auto.remembered(here) == CHOICE
    file = auto._file()
    for damaged in ("", "[]", '{"x": 1}', file.read_text().replace("images_per_second", "speed")):
        file.write_text(damaged)
        assert auto.remembered(here) is None
    auto._remember(here, CHOICE)  # over the damage
    assert auto.remembered(here) == CHOICE


def test_of_several_ranks_one_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads here: the lock is the open file's, so they wait for each other as processes do."""
    tried = []

    def try_once(*_: object) -> Choice:
        tried.append(1)
        time.sleep(0.2)
        return CHOICE

    monkeypatch.setattr(auto, "_facts", lambda *_: {"gpu": "A"})
    monkeypatch.setattr(auto, "_tried", try_once)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "A")
    with ThreadPoolExecutor(3) as ranks:
        assert [choice.way for choice in ranks.map(auto.choose, [0] * 3, [1] * 3)] == ["gpu"] * 3
    assert tried == [1]
    assert [entry["machine"] for entry in json.loads(auto._file().read_text()).values()] == [{"gpu": "A"}]


def test_a_machine_on_which_nothing_works_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    nothing = Choice(way="cpu", images_per_second={}, errors={"cpu": "no memory"})
    monkeypatch.setattr(auto, "_facts", lambda *_: {"gpu": "A"})
    monkeypatch.setattr(auto, "_tried", lambda *_: tried.append(1) or nothing)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "A")
    assert auto.choose(0, 1) == auto.choose(0, 1) == nothing and tried == [1, 1]


def test_a_folder_that_cannot_be_written_costs_the_memory_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DALI_DIFFUSEMIX_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(auto, "_facts", lambda *_: {"gpu": "A"})
    monkeypatch.setattr(auto, "_tried", lambda *_: CHOICE)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "A")
    assert auto.choose(0, 1) == CHOICE
