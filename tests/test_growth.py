"""Stores that grow, stores that several runs share, and locks that no dead process holds."""

import dataclasses
import os
import shutil
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import warm
from hypothesis import given
from hypothesis import strategies as st
from material import write_photograph

from dali_diffusemix.catalog import StaleCatalogWarning, index
from dali_diffusemix.errors import ConfigError, StoreError
from dali_diffusemix.fractals import FractalBank
from dali_diffusemix.generate import GenerateConfig, PromptFile, generate
from dali_diffusemix.generate.engines import Job, Report
from dali_diffusemix.generate.engines.local import LocalEngine
from dali_diffusemix.inspect.verify import verify
from dali_diffusemix.loading.dataset import DiffuseMixDataset
from dali_diffusemix.plan import MixSpec, TrainCrop
from dali_diffusemix.store import EditStore, Part, StoreWriter, UnfinishedStoreWarning
from dali_diffusemix.store.layout import Segment

CONFIG = GenerateConfig(prompts=("autumn", "mosaic"), size=32, originals_per_shard=3, batch_size=2)


def put(root: Path, name: str, seed: int) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    write_photograph(root / name, seed, 40, 50)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for place in range(7):
        put(tmp_path / "train", f"{'ants' if place < 4 else 'bees'}/{place}.jpg", place)
    return tmp_path / "train"


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def edits_of(store: Path) -> dict[tuple[str, str, int], bytes]:
    edits = EditStore.open(store)
    return {
        (edits.catalog.path(int(row["original"])), edits.prompts[row["prompt"]], int(row["variant"])): edits.encoded(
            place
        ).tobytes()
        for place, row in enumerate(edits.index)
    }


# New originals --------------------------------------------------------------------------------------------------------


def test_new_originals_prompts_and_variants_touch_nothing_that_is_there(root: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    generate(root, store, CONFIG)
    first, shards = EditStore.open(store), content(store / "shards")
    put(root, "ants/00.jpg", 50)  # before all others
    put(root, "asps/1.jpg", 51)  # a class between the two: labels shift
    index(root, refresh=True)
    grown = generate(root, store, dataclasses.replace(CONFIG, prompts=("mosaic", "snowy"), variants=2))
    assert shards.items() <= content(store / "shards").items()
    edits = EditStore.open(store)
    assert list(edits.catalog.paths)[:7] == list(first.catalog.paths)
    assert edits.catalog.classes == ("ants", "asps", "bees") and len(edits.catalog) == 9
    for row, path in enumerate(edits.catalog.paths):
        assert edits.catalog.classes[edits.catalog.labels[row]] == path.split("/")[0]
    # All nine under mosaic and snowy, twice; the first seven under autumn.
    assert sum(grown.verdicts.values()) == 9 * 2 * 2 + 7
    generate(root, tmp_path / "anew", dataclasses.replace(CONFIG, prompts=("mosaic", "snowy"), variants=2))
    ours = edits_of(store)
    assert edits_of(tmp_path / "anew").items() <= ours.items()
    assert not verify(store).problems
    assert generate(root, store, CONFIG).made == 2 * 1  # autumn for the two new ones; mosaic is there


def test_a_data_set_may_be_some_of_a_store(root: Path, tmp_path: Path, bank: FractalBank) -> None:
    """The originals that are left after some were removed keep their own edits."""
    generate(root, tmp_path / "store", CONFIG)
    (root / "ants" / "1.jpg").unlink()
    fewer = index(root, refresh=True)
    mix = MixSpec(probability=1)
    some, alone = (
        DiffuseMixDataset(root, edits=edits, fractals=bank, mix=mix, crop=TrainCrop(32), catalog=fewer)
        for edits in (tmp_path / "store", tmp_path / "alone")
        if edits.name == "store" or generate(root, edits, CONFIG)
    )
    assert len(some) == 6 and some.store is not None and alone.store is not None
    assert [some.path_of(row) for row in range(6)] == [alone.path_of(row) for row in range(6)]
    for row in range(6):
        assert (some[row][0] == alone[row][0]).all() and some[row][1] == alone[row][1]
    put(root, "ants/new.jpg", 3)
    with pytest.raises(StoreError, match=r"lacks 1 \(for one 'ants/new.jpg'\).*take new ones in"):
        DiffuseMixDataset(
            root, edits=tmp_path / "store", crop=TrainCrop(32), catalog=index(root, refresh=True), mix=None
        )


def test_originals_that_vanished_keep_their_edits(root: Path, tmp_path: Path, bank: FractalBank) -> None:
    """Photographs that are removed, a whole class here, stop neither the next run nor new photographs."""
    store = tmp_path / "store"
    generate(root, store, CONFIG)
    before, edits = EditStore.open(store), edits_of(store)
    shutil.rmtree(root / "bees")
    put(root, "moths/new.jpg", 3)
    fewer = index(root, refresh=True)
    with pytest.warns(StaleCatalogWarning, match=r"are not among those given \(for one .*their edits stay"):
        assert generate(root, store, CONFIG, catalog=fewer).made == len(CONFIG.prompts)
    after = EditStore.open(store)
    assert list(after.catalog.paths)[: len(before.catalog)] == list(before.catalog.paths)
    assert after.catalog.classes == ("ants", "bees", "moths")
    for row, path in enumerate(after.catalog.paths):
        assert after.catalog.classes[int(after.catalog.labels[row])] == path.split("/")[0]
    assert edits.items() <= edits_of(store).items()
    # And one that comes back is an original like the others.
    put(root, "bees/4.jpg", 4)
    with pytest.warns(StaleCatalogWarning, match="2 of its 8 originals"):
        assert generate(root, store, CONFIG, catalog=index(root, refresh=True)).made == 0
    dataset = DiffuseMixDataset(root, edits=store, fractals=bank, mix=MixSpec(), crop=TrainCrop(32), catalog=fewer)
    assert len(dataset) == len(fewer)


GROW = """
import shutil, sys
from pathlib import Path
from dali_diffusemix import catalog
from dali_diffusemix.generate import GenerateConfig, generate
root, before, folder, tests = sys.argv[1:]
sys.path.insert(0, tests)
from killing import killed_at_each
def grow(moment):
    store = shutil.copytree(before, Path(folder, f"killed{moment}"))
    generate(root, store, GenerateConfig(prompts=("autumn", "mosaic"), size=32, originals_per_shard=3))
print(killed_at_each(grow))
"""


@pytest.mark.slow
def test_killed_while_it_grows_a_store_can_be_read_and_gone_on_with(root: Path, tmp_path: Path) -> None:
    """At every replacement of a file."""
    generate(root, tmp_path / "before", CONFIG)
    before = edits_of(tmp_path / "before")
    put(root, "ants/00.jpg", 50)
    index(root, refresh=True)
    shutil.copytree(tmp_path / "before", tmp_path / "whole")
    generate(root, tmp_path / "whole", CONFIG)
    whole = content(tmp_path / "whole")
    moments = int(warm.run("-c", GROW, root, tmp_path / "before", tmp_path, Path(__file__).parent).stdout)
    assert moments > 8
    for moment in range(moments):
        store = tmp_path / f"killed{moment}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnfinishedStoreWarning)
            assert before.items() <= edits_of(store).items()
        generate(root, store, CONFIG)
        assert content(store) == whole


# Parts ----------------------------------------------------------------------------------------------------------------


def test_parts_make_the_same_store(root: Path, tmp_path: Path) -> None:
    generate(root, tmp_path / "whole", CONFIG)
    left = []
    for number in (2, 3, 1):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnfinishedStoreWarning)
            left.append(generate(root, tmp_path / "parts", CONFIG, part=Part(number, 3)).missing)
    assert left == [2, 1, 0]
    assert content(tmp_path / "parts") == content(tmp_path / "whole")


@pytest.mark.slow
def test_parts_at_the_same_time(root: Path, tmp_path: Path) -> None:
    generate(root, tmp_path / "whole", CONFIG)
    script = (
        "import sys; from dali_diffusemix.generate import GenerateConfig, generate\n"
        "from dali_diffusemix.store import Part\n"
        "generate(sys.argv[1], sys.argv[2], GenerateConfig(prompts=('autumn', 'mosaic'), size=32, "
        "originals_per_shard=3, batch_size=2), part=Part.parse(sys.argv[3]))"
    )
    for run in [warm.Script("-c", script, root, tmp_path / "parts", f"{number}/3") for number in (1, 2, 3)]:
        with run:
            assert (run.communicate()[1], run.returncode) == ("", 0)
    assert content(tmp_path / "parts") == content(tmp_path / "whole")


@given(shards=st.integers(0, 60), counts=st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_parts_share_all_shards_and_overlap_only_where_their_locks_do(shards: int, counts: tuple[int, int]) -> None:
    segment = Segment(rows=range(shards), prompts=(0,), variants=range(1), originals_per_shard=1, first_shard=5)
    parts = [[Part(number + 1, count) for number in range(count)] for count in counts]
    for several in parts:
        made = [shard for part in several for shard in segment.numbers(part)]
        assert made == list(range(5, 5 + shards))
    for one in parts[0]:
        for other in parts[1]:
            if set(segment.numbers(one)) & set(segment.numbers(other)):
                ours, theirs = one.share(2**40), other.share(2**40)
                assert max(ours.start, theirs.start) < min(ours.stop, theirs.stop)


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "a/b", "-1/2", "1/0", ""])
def test_a_part_is_checked(text: str) -> None:
    with pytest.raises(ConfigError, match="part must be i/n"):
        Part.parse(text)


# Locks ----------------------------------------------------------------------------------------------------------------


class Pausing:
    """An engine that, half way, lets another run try."""

    def __init__(self, meanwhile: Callable[[], None]) -> None:
        self._meanwhile = meanwhile

    def run(self, start: Callable[[str], Callable[[Job], Iterable[Report]]], jobs: Sequence[Job]) -> Iterator[Report]:
        for place, report in enumerate(LocalEngine().run(start, jobs)):
            if place == 1:
                self._meanwhile()
            yield report


@pytest.mark.parametrize(
    ("first", "second", "refused"),
    [
        (Part(1, 1), Part(1, 1), True),
        (Part(1, 1), Part(2, 3), True),
        (Part(2, 3), Part(1, 1), True),
        (Part(2, 3), Part(2, 3), True),
        (Part(1, 3), Part(1, 2), True),
        (Part(1, 3), Part(2, 2), False),
        (Part(1, 2), Part(2, 2), False),
    ],
    ids=str,
)
def test_two_runs_into_one_part(root: Path, tmp_path: Path, first: Part, second: Part, refused: bool) -> None:
    said: list[StoreError] = []

    def meanwhile() -> None:
        try:
            generate(root, tmp_path / "store", CONFIG, part=second)
        except StoreError as error:
            said.append(error)

    generate(root, tmp_path / "store", CONFIG, part=first, engine=Pausing(meanwhile))
    assert bool(said) == refused
    if refused:
        assert f"process {os.getpid()} on" in str(said[0]) and f"(part {first})" in str(said[0])
    generate(root, tmp_path / "store", CONFIG)
    assert (tmp_path / "store" / ".lock").read_bytes() == b""


HOLD = """
import sys, time
from dali_diffusemix.catalog import StaleCatalogWarning, index
from dali_diffusemix.store import Part, StoreWriter, Wish
with StoreWriter.open(sys.argv[2], index(sys.argv[1]), {}, Part.parse(sys.argv[3])) as writer:
    writer.order(Wish(prompts={"autumn": None}, variants=1, originals_per_shard=3))
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
def test_a_process_that_is_dead_holds_nothing_whatever_the_clock_says(root: Path, tmp_path: Path) -> None:
    with warm.Script("-c", HOLD, root, tmp_path / "store", "1/2") as run:
        assert run.stdout.readline() == "held\n"
        os.utime(tmp_path / "store" / ".lock", (0, 0))
        message = rf"process {run.pid} on .*\(part 1/2\) is writing"
        with pytest.raises(StoreError, match=message), StoreWriter.open(tmp_path / "store", index(root), {}):
            pass
        with StoreWriter.open(tmp_path / "store", index(root), {}, Part(2, 2)) as writer:
            assert len(writer.shards()) == 2
        run.kill()
        run.wait()
        os.utime(tmp_path / "store" / ".lock", (2**33, 2**33))
        with StoreWriter.open(tmp_path / "store", index(root), {}) as writer:
            assert len(writer.shards()) == 3
    assert (tmp_path / "store" / ".lock").read_bytes() == b""


def test_threads_of_one_process_exclude_each_other_too(root: Path, tmp_path: Path) -> None:
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with StoreWriter.open(tmp_path / "store", index(root), {}):
            held.set()
            done.wait(30)

    index(root)
    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(30)
    message = "is writing to this store"
    with pytest.raises(StoreError, match=message), StoreWriter.open(tmp_path / "store", index(root), {}):
        pass
    done.set()
    thread.join()


# Prompts --------------------------------------------------------------------------------------------------------------


def test_prompts_from_a_file(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.toml"
    file.write_text(
        'template = "make it {prompt}"\nprompts = ["autumn", "snowy"]\n'
        '[deny]\n"b*" = ["autumn"]\nants = ["autumn", "snowy"]\n'
    )
    read = PromptFile.read(file)
    assert read == PromptFile(
        prompts=("autumn", "snowy"),
        class_prompts={},
        deny={"b*": ("autumn",), "ants": ("autumn", "snowy")},
        class_names={},
        template="make it {prompt}",
    )
    config = dataclasses.replace(CONFIG, prompts=read.prompts, deny=read.deny)
    summary = generate(root, tmp_path / "store", config)
    assert summary.verdicts["denied"] == 4 + 4 + 3 and summary.verdicts["accepted"] == 3
    assert summary.by_class["ants"] == {"denied": 8} and summary.by_prompt["autumn"] == {"denied": 7}
    # What is not said stays as the store has it.
    assert generate(root, tmp_path / "store", dataclasses.replace(config, deny=None)).made == 0
    assert generate(root, tmp_path / "store", dataclasses.replace(config, prompts=("mosaic",), deny=None)).made == 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompts = [", "must be a TOML file"),
        ('prompt = ["a"]', "may have prompts, template, class_prompts, deny, class_names, found 'prompt'"),
        ("prompts = [1]", "prompts must be a list of strings"),
        ('prompts = ["a"]\n[deny]\nx = "b"', "deny 'x' must be a list of strings"),
        ("deny = 3", r"\[deny\] must be a table"),
        ("[class_names]\nx = 3", r"\[class_names\] must be a table of strings"),
        ("template = 3", "template must be a string"),
    ],
)
def test_a_bad_prompt_file(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "prompts.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        PromptFile.read(tmp_path / "prompts.toml")


def test_many_processes_make_the_same_store(root: Path, tmp_path: Path) -> None:
    generate(root, tmp_path / "one", CONFIG)
    generate(root, tmp_path / "two", CONFIG, engine=LocalEngine(("cpu", "cpu")))
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert np.diff(EditStore.open(tmp_path / "two").starts).sum() == 14
