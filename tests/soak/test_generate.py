"""Generation with a diffusion pipeline, small but real: killed ten times, and on Ray with an actor killed.

Then memory: it must not depend on how many images there are. DALI_DIFFUSEMIX_SOAK_EDITS (200) is how many edits the
killed runs make.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from browsing import browse
from material import write_photograph

from dali_diffusemix.catalog import Catalog, index
from dali_diffusemix.generate import GenerateConfig, generate
from dali_diffusemix.generate.editors import PROMPTS as PROCEDURAL
from dali_diffusemix.generate.editors.diffusers import DiffusersConfig
from dali_diffusemix.generate.engines.local import LocalEngine
from dali_diffusemix.inspect.report import write_report
from dali_diffusemix.store import EditStore

EDITS = int(os.environ.get("DALI_DIFFUSEMIX_SOAK_EDITS", "200"))
KILLS = 10
PROMPTS = ("autumn", "snowy")
Measured = Callable[..., None]
# The libraries' own.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def config_of(model: Path) -> GenerateConfig:
    return GenerateConfig(
        editor=DiffusersConfig(model=str(model), steps=3, dtype="float32"),
        prompts=PROMPTS,
        size=64,
        format="jpeg",
        batch_size=4,
        originals_per_shard=5,
    )


# --- the process that is killed -------------------------------------------------------------------------------------

RUN = """
import logging, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_generate import config_of
from dali_diffusemix.generate.engines.local import LocalEngine
from dali_diffusemix.generate.engines.ray import RayEngine
from dali_diffusemix.generate import generate

def main():
    model, root, store, engine = map(Path, sys.argv[2:6])
    engine = {"one": LocalEngine(), "two": LocalEngine(("cpu", "cpu")), "ray": RayEngine(workers=2)}[engine.name]

    def progress(done, total):
        sys.stdout.write(f"{done} {total}\\n")
        sys.stdout.flush()

    print(generate(root, store, config_of(model), engine=engine, progress=progress).made, flush=True)

if __name__ == "__main__":
    main()
"""


@pytest.fixture
def command(tmp_path: Path, tiny_model: Path, root: Path) -> Callable[[Path, str], list[str]]:
    script = tmp_path / "run.py"
    script.write_text(RUN)
    here = Path(__file__).parent
    os.environ["PYTHONPATH"] = f"{here}{os.pathsep}{here.parent}"
    return lambda store, engine: [sys.executable, *map(str, (script, here, tiny_model, root, store, engine))]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for place in range(EDITS // len(PROMPTS)):
        file = tmp_path / "train" / f"class{place % 4}" / f"{place:04}.jpg"
        write_photograph(file, place, 90, 120)
    index(tmp_path / "train")
    return tmp_path / "train"


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def finished(store: Path) -> dict[str, tuple[int, int]]:
    """Shards that are there and which files they are: one that was made again would be another file."""
    return {
        file.name: ((status := file.with_suffix(".tar").stat()).st_ino, status.st_mtime_ns)
        for file in (store / "shards").glob("*.json")
    }


@pytest.fixture
def whole(tmp_path: Path, tiny_model: Path, root: Path) -> dict[str, bytes]:
    """The store of a run that nothing happened to."""
    assert generate(root, tmp_path / "whole", config_of(tiny_model)).made == EDITS
    return content(tmp_path / "whole")


@pytest.mark.parametrize("engine", ["one", "two"])
def test_killed_ten_times_the_store_is_the_same(
    tmp_path: Path,
    whole: dict[str, bytes],
    command: Callable[[Path, str], list[str]],
    engine: str,
    measured: Measured,
) -> None:
    store, rng = tmp_path / "killed", random.Random(engine)
    before: dict[str, tuple[int, int]] = {}
    moments = []
    for kill in range(KILLS):
        with subprocess.Popen(command(store, engine), stdout=subprocess.PIPE, text=True) as run:
            assert run.stdout is not None
            lines = rng.randint(1, 5) if kill else 0
            for _ in range(lines):  # a batch each, but for the first
                run.stdout.readline()
            moment = rng.uniform(0, 0.15 if lines else 4)  # within a batch; or while it begins
            time.sleep(moment)
            run.kill()
        assert run.returncode == -signal.SIGKILL
        moments.append((lines, round(moment, 3)))
        now = finished(store)
        assert before.items() <= now.items()  # nothing that was finished was made again
        before = now
    done = subprocess.run(command(store, engine), stdout=subprocess.PIPE, text=True, check=True)
    last = int(done.stdout.splitlines()[-1])
    assert before and before.items() <= finished(store).items()
    per_shard = EDITS // (len(whole_shards := [name for name in whole if name.endswith(".json") and "edits-" in name]))
    assert last == EDITS - per_shard * len(before)  # exactly what was missing
    assert content(store) == whole
    measured(kills=KILLS, lines_and_seconds=moments, shards_before_the_last_run=len(before), shards=len(whole_shards))


def test_on_ray_with_an_actor_killed_the_store_is_the_same(
    tmp_path: Path, whole: dict[str, bytes], command: Callable[[Path, str], list[str]], measured: Measured
) -> None:
    pytest.importorskip("ray")
    with subprocess.Popen(
        command(tmp_path / "ray", "ray"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None and run.stderr is not None
        for _ in range(4):
            run.stdout.readline()
        actors = actors_of(run.pid)
        assert len(actors) == 2
        os.kill(actors[0], signal.SIGKILL)
        out, err = run.communicate(timeout=300)
    assert run.returncode == 0, err
    assert "started again" in err
    assert int(out.splitlines()[-1]) == EDITS
    assert content(tmp_path / "ray") == whole
    measured(edits=EDITS, killed="one of two actors, in its shard")


def actors_of(process: int) -> list[int]:
    """Processes of Ray actors below a process."""
    found, parents = [], {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status = (folder / "stat").read_text()
            line = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        parents[int(folder.name)] = int(status.rpartition(")")[2].split()[1])
        if line.startswith(b"ray::_Actor"):
            found.append(int(folder.name))

    def below(one: int) -> bool:
        while one in parents and one != process:
            one = parents[one]
        return one == process

    return [one for one in found if below(one)]


# --- memory -----------------------------------------------------------------------------------------------------------

PEAK = """
import json, sys
from pathlib import Path
from dali_diffusemix.catalog import Catalog
from dali_diffusemix.generate.engines.local import LocalEngine
from dali_diffusemix.generate import GenerateConfig, generate
from dali_diffusemix.inspect.report import write_report
root, store, catalog = sys.argv[1:]
summary = generate(root, store, GenerateConfig(prompts=("autumn",), size=256), catalog=Catalog.open(catalog))
# Not ru_maxrss, which a process inherits from the one that it was started by.
peak = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024
print(json.dumps({"edits": summary.made, "peak_mib": peak, "seconds": summary.seconds}))
"""


def test_memory_does_not_depend_on_the_number_of_images(tmp_path: Path, measured: Measured) -> None:
    file = tmp_path / "train" / "class" / "0.jpg"
    file.parent.mkdir(parents=True)
    paths = []
    for place in range(40):
        paths.append(f"class/{place}.jpg")
        write_photograph(tmp_path / "train" / paths[-1], place, 375, 500)
    found: dict[int, dict[str, Any]] = {}
    for count in (500, 5000):
        # The same files again and again, under as many names as there are edits.
        names = [f"class/{place}.jpg" for place in range(count)]
        for name in names[40:]:
            link = tmp_path / "train" / name
            if not link.exists():
                link.symlink_to(tmp_path / "train" / paths[int(link.stem) % 40])
        Catalog.from_arrays(names, [0] * count, ["class"], [[375, 500]] * count).save(tmp_path / f"catalog{count}")
        run = subprocess.run(
            [sys.executable, "-c", PEAK, tmp_path / "train", tmp_path / f"store{count}", tmp_path / f"catalog{count}"],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        found[count] = json.loads(run.stdout)
        assert found[count]["edits"] == count
    measured(**{f"peak_mib_of_{count}_edits": round(one["peak_mib"], 1) for count, one in found.items()})
    assert found[5000]["peak_mib"] <= found[500]["peak_mib"] + 20


def test_five_thousand_procedural_edits(tmp_path: Path, measured: Measured) -> None:
    """The command as people type it, all cores: at least 60 images/s at 256 px."""
    for place in range(625):
        file = tmp_path / "train" / f"class{place % 5}" / f"{place}.jpg"
        write_photograph(file, place, 375, 500)
    program = Path(sys.executable).with_name("dali-diffusemix")
    prompts = "autumn,snowy,sunset,watercolor art,rainbow,aurora,mosaic,ukiyo-e"
    arguments = ["generate", tmp_path / "train", tmp_path / "edits", "--prompts", prompts, "--json"]
    run = subprocess.run([program, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    summary = json.loads(run.stdout)
    measured(images_per_second=round(summary["images_per_second"], 1), verdicts=summary["verdicts"])
    assert summary["made"] == 5000
    assert summary["images_per_second"] >= 60
    assert len(EditStore.open(tmp_path / "edits")) == summary["verdicts"]["accepted"]


# --- the gallery ------------------------------------------------------------------------------------------------------


def test_a_gallery_of_ten_thousand_edits(tmp_path: Path, browser: Any, measured: Measured) -> None:
    """Opens at once, is filtered, and all of it can be scrolled through, in a real Chromium."""
    for place in range(1250):
        file = tmp_path / "train" / f"class{place % 10}" / f"{place}.jpg"
        write_photograph(file, place, 64, 80)
    config = GenerateConfig(prompts=PROCEDURAL[:8], size=64, format="jpeg")
    generate(tmp_path / "train", tmp_path / "edits", config, engine=LocalEngine(("cpu", "cpu")))
    begin = time.monotonic()
    report = write_report(tmp_path / "edits", tmp_path / "report")
    written = time.monotonic() - begin
    begin = time.monotonic()
    browser.get(report.page.as_uri())
    opened = time.monotonic() - begin
    found = browse(browser, report.page, [("class", "class3"), ("prompt", "snowy")])
    size = sum(file.stat().st_size for file in (tmp_path / "report").rglob("*") if file.is_file())
    assert found["all"] == report.edits == 10_000
    assert found["filtered"] == {"class class3": 1000, "prompt snowy": 1250}
    assert found["console"] == [] and found["broken"] == []
    assert found["scripts_at_first"] < 5 and opened < 5
    measured(
        seconds_to_write=round(written, 1),
        seconds_to_open=round(opened, 2),
        seconds_to_scroll_through_all_three_times=round(found["seconds"], 1),
        megabytes=round(size / 1e6, 1),
    )
