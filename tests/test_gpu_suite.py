"""benchmarks/gpu: the suite's steps end when they must, its archive survives, and the probe tells what works."""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
GPU = ROOT / "benchmarks" / "gpu"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"gpu_{name}", GPU / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


suite, probe = load("suite"), load("decode_probe")


def step(name: str, program: str, *, limit: float = 20.0) -> Any:
    return suite.Step(name=name, group="a", command=(sys.executable, "-c", program), limit=limit, expected=1)


def alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def archived(folder: Path) -> dict[str, bytes]:
    with tarfile.open(folder / "suite.tar.gz") as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


SPAWNS = """
import subprocess, sys, time
for session in (False, True):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=session)
    print(child.pid, flush=True)
time.sleep(60)
"""


def test_a_limit_ends_the_step_and_all_that_it_started(tmp_path: Path) -> None:
    taken = suite.Suite(tmp_path, tmp_path / "suite.tar.gz")
    taken.take(step("slow", SPAWNS, limit=0.6), resume=False)
    assert taken.known["slow"]["state"] == "timed out" and taken.known["slow"]["seconds"] < 5
    children = [int(line) for line in (tmp_path / "slow.log").read_text().splitlines() if line.isdigit()]
    assert len(children) == 2 and not any(alive(child) for child in children)


def test_a_crash_is_kept_as_its_signal_and_the_next_step_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = suite.Suite(tmp_path, tmp_path / "suite.tar.gz")
    taken.take(step("crash", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"), resume=False)
    taken.take(step("status", "print('before'); raise SystemExit(3)"), resume=False)
    taken.take(step("sound", "print('it works')"), resume=False)
    known = taken.known
    assert [known[name]["exit"] for name in ("crash", "status", "sound")] == [-signal.SIGSEGV, 3, 0]
    assert known["crash"]["reason"] == "SIGSEGV" and known["status"]["reason"] == "exit status 3"
    assert known["sound"]["state"] == "passed" and "it works" in capsys.readouterr().out
    assert archived(tmp_path)["suite/status.log"] == b"before\n"
    assert json.loads(archived(tmp_path)["suite/steps.json"]) == known
    assert [line.split()[1] for line in taken.table()] == ["crash", "status", "sound"]
    absent = suite.Step(name="absent", group="a", command=(str(tmp_path / "none"),), limit=1, expected=1)
    taken.take(absent, resume=False)
    assert known["absent"]["state"] == "failed" and "none" in known["absent"]["reason"]


DRIVER = """
import sys, importlib.util
from pathlib import Path
spec = importlib.util.spec_from_file_location("suite", sys.argv[1])
suite = sys.modules["suite"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(suite)
folder = Path(sys.argv[2])
taken = suite.Suite(folder, folder / "suite.tar.gz")
sleeper = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
for name, program in (("first", "print(1)"), ("second", sleeper)):
    command = (sys.executable, "-c", program)
    taken.take(suite.Step(name=name, group="a", command=command, limit=90, expected=1), resume=False)
"""


def test_the_archive_survives_when_the_suite_is_killed_and_the_rest_is_resumed(tmp_path: Path) -> None:
    runner = subprocess.Popen([sys.executable, "-c", DRIVER, str(GPU / "suite.py"), str(tmp_path)])
    log = tmp_path / "second.log"
    end = time.monotonic() + 20
    while not (log.exists() and log.read_text().endswith("\n")):
        assert time.monotonic() < end
        time.sleep(0.01)
    orphan = int(log.read_text())
    runner.kill()
    runner.wait()
    content = archived(tmp_path)
    states = {name: row["state"] for name, row in json.loads(content["suite/steps.json"]).items()}
    assert states == {"first": "passed", "second": "running"} and content["suite/first.log"] == b"1\n"
    assert alive(orphan)
    (tmp_path / ".suite.tar.gz.tmp").write_bytes(b"half")  # a kill while it was written

    taken = suite.Suite(tmp_path, tmp_path / "suite.tar.gz")
    assert not alive(orphan)
    for name in ("first", "second"):
        taken.take(step(name, "print('again')"), resume=True)
    assert archived(tmp_path)["suite/first.log"] == b"1\n"
    assert archived(tmp_path)["suite/second.log"] == b"again\n"
    assert {row["state"] for row in taken.known.values()} == {"passed"}


def test_a_step_that_does_not_fit_is_left_out_and_says_so(tmp_path: Path) -> None:
    taken = suite.Suite(tmp_path, tmp_path / "suite.tar.gz", deadline=time.monotonic() + 10)
    taken.take(step("long", "raise SystemExit(1)", limit=9), resume=False)
    taken.take(step("short", "print(1)", limit=3), resume=False)
    assert [row["state"] for row in taken.known.values()] == ["left out", "passed"]
    assert "its limit is 9 s" in taken.known["long"]["reason"]


def test_long_logs_keep_both_ends_and_the_cache_stays_out(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "store.json").write_text("{}")
    (tmp_path / "weights.bin").write_bytes(b"0")
    (tmp_path / "long.log").write_bytes(b"first\n" + bytes(3 << 20) + b"\nlast")
    suite.archive(tmp_path, tmp_path / "suite.tar.gz")
    content = archived(tmp_path)
    assert list(content) == ["suite/long.log"]
    assert content["suite/long.log"].startswith(b"first") and content["suite/long.log"].endswith(b"last")
    assert len(content["suite/long.log"]) < (1 << 20) + 100


def options(tmp_path: Path, device: str) -> Any:
    import argparse

    return argparse.Namespace(out=tmp_path, photographs=tmp_path, device=device, rounds=None, only="")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_steps_use_options_that_exist_and_take_ten_minutes(tmp_path: Path, device: str) -> None:
    steps = [make() for make in suite.steps(options(tmp_path, device))]
    assert tuple(one.name for one in steps) == suite.NAMES
    assert [one.group for one in steps] == sorted(one.group for one in steps)
    assert sum(one.expected for one in steps) <= 10 * 60
    for one in steps:
        assert one.expected < one.limit
        if one.command[1] == "-m":
            continue
        source = Path(one.command[1]).read_text()
        for option in one.command[2:]:
            assert not option.startswith("--") or f'"{option}"' in source, (one.name, option)


def test_the_suite_names_its_steps_when_it_is_asked_for_another(tmp_path: Path) -> None:
    command = [sys.executable, str(GPU / "suite.py"), "z", "--out", str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 2 and "there is no step z" in found.stderr and "loader-bench" in found.stderr


def test_later_steps_follow_what_earlier_ones_found(tmp_path: Path) -> None:
    assert suite.choice(tmp_path) == {"loader": None, "plain_dali": None}
    (tmp_path / "choice.json").write_text(json.dumps({"loader": "gpu", "plain_dali": "whole"}))
    assert suite.choice(tmp_path) == {"loader": "gpu", "plain_dali": "whole"}
    rows = {name: {"images_per_second": rate} for name, rate in (("diffusemix_cpu", 2), ("diffusemix_gpu", 1))}
    (tmp_path / "loader.json").write_text(json.dumps({"results": rows}))
    assert suite.choice(tmp_path) == {"loader": "cpu", "plain_dali": "whole"}
    made = {one.name: one.command for one in (make() for make in suite.steps(options(tmp_path, "cuda")))}
    overhead = made["overhead"]
    assert overhead[overhead.index("--decode") + 1] == "cpu"


# The probe ------------------------------------------------------------------------------------------------------------


def results(**changes: Any) -> dict[str, Any]:
    found = {kind: {"ok": True, "mean": 0.5} for kind in probe.NEEDED}
    return {**found, **changes}


def speeds(rate: float) -> dict[str, Any]:
    return {f"speed of {kind}": {"ok": True, "images_per_second": rate} for kind in ("photographs", "cut")}


def test_the_choice_is_the_fastest_way_that_works() -> None:
    crash = {"ok": False, "error": "the process ended: SIGSEGV", "crashed": True}
    black = {"ok": False, "worst_mean": 110.0, "black": 3}
    found = {
        "cpu_region": results(**speeds(900)),
        "gpu_whole": results(**speeds(2000), damaged={"ok": False, "outcome": "delivered"}),
        "gpu_region": results(**speeds(9000), photographs=crash),
        "gpu_region_0": results(**speeds(9000), together=black),
        "kernels": {"kernels": {"ok": True, "largest": 0.1}},
    }
    chosen = probe.choice(found)
    assert {way: row["works"] for way, row in chosen["ways"].items()} == {
        "cpu_region": True,
        "gpu_whole": True,  # what it makes of a damaged file is told, and does not decide
        "gpu_region": False,
        "gpu_region_0": False,
    }
    assert chosen["ways"]["gpu_region"]["wrong"] == {"photographs": "the process ended: SIGSEGV"}
    assert "black 3" in chosen["ways"]["gpu_region_0"]["wrong"]["together"]
    assert (chosen["fastest"], chosen["loader"], chosen["plain_dali"]) == ("gpu_whole", "gpu", "whole")
    assert chosen["driver_refuses"] is None and chosen["kernels"]["ok"]
    del found["gpu_whole"]
    found["gpu_region"] = results(**speeds(9000))
    chosen = probe.choice(found | {"gpu_whole": results(one=crash)})
    assert (chosen["fastest"], chosen["loader"], chosen["plain_dali"]) == ("gpu_region", "cpu", "region")


def test_a_driver_that_refuses_the_device_code_is_named() -> None:
    refused = {"ok": False, "error": "RuntimeError: CUDA error: no kernel image is available for execution"}
    chosen = probe.choice({"cpu_whole": {"start": refused}, "kernels": {"kernels": refused}})
    assert chosen["fastest"] is None and chosen["plain_dali"] is None
    assert "no kernel image" in chosen["driver_refuses"][0]


def test_black_pictures_are_found_even_where_the_mean_is_small() -> None:
    dark = np.zeros((40, 40, 3), dtype=np.uint8)
    dark[0, 0] = 9
    items = [probe.Item(dark.reshape(-1), np.array([0, 0, 40, 40]), dark)]
    assert probe.compared([dark], items)["ok"]
    found = probe.compared([np.zeros_like(dark)], items)
    assert not found["ok"] and found["black"] == 1 and found["mean"] < 1
    assert not probe.compared([dark[:20]], items)["ok"]


FAKE_WAY = """
import json, os, signal, sys, time
def say(**content): print(json.dumps(content), flush=True)
print("a library's own word", flush=True)
for kind in ("one", "photographs", "cut", "progressive", "together"):
    if kind in sys.argv[1].split(","):
        continue
    say(kind=kind, state="begin")
    if kind == "photographs":
        os.kill(os.getpid(), signal.SIGSEGV)
    if kind == "progressive":
        time.sleep(60)
    say(kind=kind, state="done", ok=True)
say(kind="ready", state="done")
sys.stdin.readline()
say(kind="speed of photographs", state="begin")
os.abort()
"""


def test_a_way_that_crashes_or_hangs_goes_on_behind_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import argparse

    monkeypatch.setattr(probe, "SILENCE", 1.5)
    monkeypatch.setattr(
        probe.Probe, "command", lambda self, way, skip: [sys.executable, "-c", FAKE_WAY, ",".join(skip)]
    )
    with contextlib.closing(probe.Probe(argparse.Namespace(out=tmp_path, limit=60))) as taken:
        taken.decode("gpu_region")
        taken.time("gpu_region")
    found = taken.found["gpu_region"]
    assert {kind: row["ok"] for kind, row in found.items()} == {
        "one": True,
        "photographs": False,
        "cut": True,
        "progressive": False,
        "together": True,
        "speed of photographs": False,
    }
    assert found["photographs"]["error"].endswith("SIGSEGV") and found["progressive"]["error"].endswith("for 2 s")
    assert found["speed of photographs"]["error"].endswith("SIGABRT")
    assert taken.write()["ways"]["gpu_region"]["works"] is False
    lines = (tmp_path / "decode-probe.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines] == list(found)


# The calls ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", sorted(path.name for path in GPU.glob("*.sh")))
def test_scripts_are_bash(script: str) -> None:
    subprocess.run(["bash", "-n", str(GPU / script)], check=True)


def test_what_is_carried_is_laid_out_and_an_incomplete_bundle_is_refused(tmp_path: Path) -> None:
    photographs, bundle = tmp_path / "photographs", tmp_path / "bundle"
    for number in range(9):
        folder = photographs / f"class{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.jpg").write_bytes(bytes(20_000))
    bundle.mkdir()
    for name in ("part-00", "part-01"):
        (bundle / name).write_bytes(bytes(100))
    (bundle / "bundle.json").write_text('{"parts": 2, "sha256": "0"}')
    unpacker = tmp_path / "bundle.py"
    unpacker.write_text("import sys; sys.exit('the parts do not add up')")
    environment = {**os.environ, "MOST": "90000", "CXX": "true"}
    prepare = [str(GPU / "prepare.sh"), str(tmp_path / "carried"), str(photographs), str(bundle), str(unpacker)]
    subprocess.run(prepare, check=True, env=environment, capture_output=True)
    carried = tmp_path / "carried"
    assert {file.name for file in (carried / "1").iterdir() if file.is_file()} >= {
        "part-00",
        "bundle.json",
        "bundle.py",
    }
    found = sorted(file.name for file in carried.rglob("*.jpg"))
    assert len(found) == len(set(found)) >= 6
    assert all(list((carried / part / "photographs").rglob("*.jpg")) for part in ("1", "2"))

    (bundle / "part-01").unlink()
    assert "holds 1 parts" in subprocess.run(prepare, env=environment, capture_output=True, text=True).stdout
    repository = tmp_path / "repository" / "benchmarks" / "gpu"  # as the host has it: the calls write into it
    repository.mkdir(parents=True)
    (repository.parents[1] / "kernels").mkdir()
    (repository.parents[1] / "dali_diffusemix").mkdir()
    for script in GPU.glob("*"):
        if script.is_file():
            (repository / script.name).write_bytes(script.read_bytes())
    environment |= {"HOST_FOLDER": str(tmp_path / "host"), "OUT": str(tmp_path / "out"), "PYTHON": sys.executable}
    call = ["bash", str(repository / "call-2.sh"), str(carried / "1")]
    answer = subprocess.run(call, env=environment, capture_output=True, text=True)
    assert answer.returncode == 1 and "the parts do not add up" in answer.stderr
    assert "DALI is not unpacked" in answer.stdout and (tmp_path / "out" / "suite.tar.gz").exists()
