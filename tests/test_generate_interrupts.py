"""Ctrl-C in `generate`: real processes, real signals. What was judged is kept, and the store is the same in the end."""

import os
import re
import signal
import time
import warnings
from pathlib import Path

import pytest
import warm
from material import encoded, photograph, write_photograph

from dali_diffusemix import EditStore
from dali_diffusemix.generate import GenerateConfig, Interrupted, generate
from dali_diffusemix.generate.engines.local import LocalEngine
from dali_diffusemix.inspect.verify import verify
from dali_diffusemix.store import UnfinishedStoreWarning

PROMPTS = ("autumn", "mosaic")
CONFIG = GenerateConfig(prompts=PROMPTS, variants=3, size=96, batch_size=2, originals_per_shard=15)
COUNT = 30  # originals: two shards
EDITS = 6 * COUNT

RUN = """
import logging, signal, sys
from dali_diffusemix.generate import GenerateConfig, Interrupted, generate
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    logging.basicConfig(level=logging.WARNING)
    root, store, engine, batch_size = sys.argv[1:]
    if engine == "ray":
        from dali_diffusemix.generate.engines.ray import RayEngine
        engine = RayEngine(workers=2)
    else:
        from dali_diffusemix.generate.engines.local import LocalEngine
        engine = LocalEngine(("cpu",) * int(engine))
    sizes = dict(size=96, batch_size=int(batch_size), originals_per_shard=15)
    config = GenerateConfig(prompts=("autumn", "mosaic"), variants=3, **sizes)
    def progress(done, total):
        print(done, flush=True)
    try:
        generate(root, store, config, engine=engine, progress=progress)
    except Interrupted as error:
        print("kept", error.kept, "again", error.again, flush=True)
        sys.exit(130)
"""


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("interrupts") / "train"
    for place in range(COUNT):
        write_photograph(root / "ants" / f"{place:02}.jpg", place, 60, 80)
    (root / "ants" / "03.jpg").write_bytes(encoded(photograph(3, 60, 80))[:900])  # a verdict, kept as any other
    return root


@pytest.fixture(scope="module")
def whole(originals: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    store = tmp_path_factory.mktemp("whole") / "edits"
    generate(originals, store, CONFIG)
    return content(store)


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def interrupted(
    originals: Path, store: Path, engine: str, after: int, *, batch_size: int = 2, twice: bool = False
) -> tuple[list[int], int, int]:
    """Run until so many edits are done, and interrupt: what was said was done, what is kept and made again."""
    with warm.Script("-c", RUN, originals, store, engine, batch_size, session=True) as run:
        said: list[int] = []
        sent, line, errors = False, "", ""
        for line in run.stdout:
            if not line.strip().isdecimal():
                break
            said.append(int(line))
            if said[-1] >= after and not sent:
                sent = True
                os.killpg(run.pid, signal.SIGINT)  # as a terminal sends it
                if twice:
                    while "Ctrl-C again stops at once" not in (error := run.stderr.readline()):
                        errors += error
                        assert error
                    errors += error
                    os.killpg(run.pid, signal.SIGINT)
        errors += run.stderr.read()
        assert run.wait(60) == 130, errors
    assert errors.count("Ctrl-C again stops at once") == 1
    found = re.fullmatch(r"kept (\d+) again (\d+)\n", line)
    assert found is not None, errors
    return said, int(found[1]), int(found[2])


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["1", "2", "ray"])
def test_what_is_judged_is_kept(originals: Path, whole: dict[str, bytes], tmp_path: Path, engine: str) -> None:
    if engine == "ray":
        pytest.importorskip("ray")
    store = tmp_path / "edits"
    said, kept, again = interrupted(originals, store, engine, 20)
    assert again == 0 and kept == said[-1] and 20 <= kept < EDITS
    with pytest.warns(UnfinishedStoreWarning, match=r"edits of the others"):
        edits = EditStore.open(store)
    assert kept / 2 < len(edits) <= kept  # quality rejects some, and one original cannot be read
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnfinishedStoreWarning)
        checked = verify(store)
    assert not checked.problems and checked.missing in (1, 2)
    # Again and again, elsewhere: nothing is made twice, and nothing of it is seen in the end.
    said, more, again = interrupted(originals, store, "1", kept + 10)
    assert said[0] == kept and again == 0 and kept + more == said[-1]
    summary = generate(originals, store, CONFIG, engine=LocalEngine())
    assert summary.made == EDITS - kept - more
    assert content(store) == whole


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["1", "2"])
def test_the_second_stops_at_once(originals: Path, whole: dict[str, bytes], tmp_path: Path, engine: str) -> None:
    store = tmp_path / "edits"
    said, kept, again = interrupted(originals, store, engine, 1, batch_size=16, twice=True)
    assert kept == 0 and again == said[-1] > 0
    if engine == "1":  # a worker may just have closed its shard, which is then kept
        assert not list((store / "shards").glob("*.json"))
    generate(originals, store, CONFIG)
    assert content(store) == whole


@pytest.mark.slow
def test_the_command_says_what_is_kept(originals: Path, tmp_path: Path) -> None:
    command = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    command += "from dali_diffusemix.cli import main; main()"
    options = ["--variants", "20", "--batch-size", "1", "--device", "cpu"]  # 5,400 edits
    store = tmp_path / "edits"
    with warm.Script("-c", command, "generate", originals, store, *options) as run:
        until = time.monotonic() + 60
        while not any(file.stat().st_size for file in (store / "shards").glob(".*.tmp")) and time.monotonic() < until:
            time.sleep(0.02)
        run.send_signal(signal.SIGINT)
        said = run.communicate(timeout=60)[1]
    assert run.returncode == 130
    found = re.search(r"Interrupted: kept (\d+) edits, to be made again 0; run the same command again to resume", said)
    assert found is not None and int(found[1]) > 0, said


@pytest.mark.slow
def test_users_handlers_are_left_alone(originals: Path, tmp_path: Path) -> None:
    """Where somebody handles the signal already, that stays so; and an `Interrupted` is a KeyboardInterrupt."""
    caught: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: caught.append(number))
    try:
        sent = False

        def progress(done: int, total: int) -> None:
            nonlocal sent
            if done and not sent:
                sent = True
                os.kill(os.getpid(), signal.SIGINT)

        summary = generate(originals, tmp_path / "edits", CONFIG, engine=LocalEngine(), progress=progress)
    finally:
        signal.signal(signal.SIGINT, before)
    assert caught == [signal.SIGINT] and summary.made == EDITS
    assert issubclass(Interrupted, KeyboardInterrupt)


@pytest.mark.slow
def test_a_part_that_was_damaged_since_is_made_anew(originals: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    store = tmp_path / "edits"
    interrupted(originals, store, "1", 20)
    (tar,) = (store / "shards").glob("*.tar")
    with tar.open("r+b") as file:
        file.seek(2000)
        file.write(b"\0" * 600)
    generate(originals, store, CONFIG)
    assert content(store) == whole


def test_shards_are_smaller_where_an_edit_takes_long() -> None:
    assert CONFIG.shard_length == 15 and GenerateConfig().shard_length == 512
    assert GenerateConfig(editor="some/model").shard_length == 64
