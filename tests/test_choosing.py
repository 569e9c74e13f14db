"""Edits that are chosen: prompts of some classes, rules that change, edits that people reject, edits made again."""

import dataclasses
import os
import pickle
import shutil
import signal
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import warm
from material import encoded, photograph, write_photograph
from numpy.typing import NDArray

from dali_diffusemix.catalog import index
from dali_diffusemix.errors import ConfigError, StoreError
from dali_diffusemix.fractals import FractalBank
from dali_diffusemix.generate import GenerateConfig, Interrupted, generate
from dali_diffusemix.generate.config import class_name
from dali_diffusemix.generate.editors import EditTask
from dali_diffusemix.generate.engines.local import LocalEngine
from dali_diffusemix.generate.estimate import estimate
from dali_diffusemix.generate.run import edits_to_make
from dali_diffusemix.images.codec import decode
from dali_diffusemix.inspect.export import export
from dali_diffusemix.inspect.gallery import current_rows
from dali_diffusemix.inspect.scoring import score
from dali_diffusemix.inspect.verify import verify
from dali_diffusemix.loading.dataset import DiffuseMixDataset
from dali_diffusemix.plan import MixSpec, TrainCrop
from dali_diffusemix.store import (
    VERDICTS,
    Decisions,
    EditName,
    EditStore,
    Part,
    Redo,
    Selection,
    ShardWriter,
    StoreWriter,
    UnfinishedStoreWarning,
)
from dali_diffusemix.store.layout import NOT_YET, Header
from dali_diffusemix.store.scores import Scores

CONFIG = GenerateConfig(prompts=("autumn", "mosaic"), size=32, originals_per_shard=3, batch_size=2)
ANTS, BEES = 4, 3


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for place in range(ANTS + BEES):
        write_photograph(tmp_path / "train" / f"{'ants' if place < ANTS else 'bees'}" / f"{place}.jpg", place, 40, 50)
    return tmp_path / "train"


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def with_fields(**fields: Any) -> GenerateConfig:
    return dataclasses.replace(CONFIG, **fields)


def counts(edits: EditStore) -> dict[tuple[str, str], int]:
    """Class and prompt to the number of edits."""
    found: dict[tuple[str, str], int] = {}
    for row in edits.index:
        key = edits.catalog.classes[edits.catalog.labels[row["original"]]], edits.prompts[row["prompt"]]
        found[key] = found.get(key, 0) + 1
    return found


def seeds(edits: EditStore) -> dict[tuple[str, str, int], int]:
    """Of the edits that are used: from the shards that hold them."""
    found = {}
    for row in edits.index:
        for other in edits.shard_rows(int(row["shard"])):
            if all(other[name] == row[name] for name in ("original", "prompt", "variant")):
                key = (edits.catalog.path(int(row["original"])), edits.prompts[row["prompt"]], int(row["variant"]))
                found[key] = int(other["seed"])
    return found


def names(edits: EditStore) -> list[EditName]:
    return [
        EditName(
            edits.catalog.path(int(row["original"])),
            edits.prompts[row["prompt"]],
            int(row["variant"]),
            int(row["shard"]),
        )
        for row in edits.index
    ]


# Classes --------------------------------------------------------------------------------------------------------------


def test_prompts_of_some_classes(root: Path, tmp_path: Path) -> None:
    """Only theirs are made and stored: a thousand classes may have a thousand prompts."""
    store = tmp_path / "store"
    summary = generate(root, store, with_fields(prompts=("autumn",), class_prompts={"b*": ("mosaic", "snowy")}))
    edits = EditStore.open(store)
    assert counts(edits) == {("ants", "autumn"): ANTS, ("bees", "autumn"): BEES} | {
        ("bees", prompt): BEES for prompt in ("mosaic", "snowy")
    }
    assert sum(summary.verdicts.values()) == len(edits) == ANTS + 3 * BEES
    assert not verify(store).problems
    # They are the edits that all classes would have.
    generate(root, tmp_path / "all", with_fields(prompts=("autumn", "mosaic", "snowy")))
    assert seeds(edits).items() <= seeds(EditStore.open(tmp_path / "all")).items()
    # More originals, more variants, more classes: only what is missing.
    write_photograph(root / "bees" / "new.jpg", 50, 40, 50)
    index(root, refresh=True)
    before = content(store / "shards")
    grown = with_fields(prompts=("autumn",), class_prompts={"b*": ("mosaic", "snowy"), "ants": ("snowy",)}, variants=2)
    made = generate(root, store, grown).made
    assert before.items() <= content(store / "shards").items()
    assert made == 1 + 8 + 2 * (1 + 4) + 2 * 1 + ANTS * 2 - 2 + 0  # see below
    edits = EditStore.open(store)
    assert counts(edits) == {
        ("ants", "autumn"): 2 * ANTS,
        ("bees", "autumn"): 2 * (BEES + 1),
        ("bees", "mosaic"): 2 * (BEES + 1),
        ("bees", "snowy"): 2 * (BEES + 1),
        ("ants", "snowy"): 2 * ANTS,
    }
    assert generate(root, store, grown).made == 0
    # A prompt that all classes get at last.
    assert generate(root, store, with_fields(prompts=("mosaic",))).made == ANTS
    assert counts(EditStore.open(store))["ants", "mosaic"] == ANTS


def test_rules_change_and_no_file_does(root: Path, tmp_path: Path, bank: FractalBank) -> None:
    store = tmp_path / "store"
    generate(root, store, with_fields(deny={"ants": ("mosaic",)}))
    assert counts(EditStore.open(store)) == {
        ("ants", "autumn"): ANTS,
        ("bees", "autumn"): BEES,
        ("bees", "mosaic"): BEES,
    }
    shards = content(store / "shards")

    def uses(**fields: Any) -> int:
        made = generate(root, store, with_fields(**fields)).made
        assert shards.items() <= content(store / "shards").items()
        assert not verify(store).problems
        mix = MixSpec(probability=1)
        dataset = DiffuseMixDataset(root, edits=store, fractals=bank, mix=mix, crop=TrainCrop(32), seed=0)
        assert dataset.store is not None and counts(dataset.store) == counts(EditStore.open(store))
        return made

    # Less is wanted: nothing is deleted, nothing of it is used.
    assert uses(deny={"*": ("autumn",), "ants": ("mosaic",)}) == 0
    assert counts(EditStore.open(store)) == {("bees", "mosaic"): BEES}
    # A later run that says nothing about it leaves it as it is.
    assert uses() == 0 and counts(EditStore.open(store)) == {("bees", "mosaic"): BEES}
    shown = current_rows(EditStore.open(store))
    assert sum(VERDICTS[code] == "denied" for code in shown["shown"]) == len(shown) - BEES
    # What was denied is wanted: it is made, from the seeds that it would have had.
    assert uses(deny={}) == ANTS
    generate(root, tmp_path / "anew", CONFIG)
    assert seeds(EditStore.open(store)) == seeds(EditStore.open(tmp_path / "anew"))
    assert uses(deny={}) == 0
    # All classes, then some.
    assert uses(prompts=("autumn",), class_prompts={"bees": ("mosaic",)}) == 0
    assert ("ants", "mosaic") not in counts(EditStore.open(store))
    with pytest.raises(ConfigError, match="deny must name prompts of this run or of the store, found 'snow'"):
        generate(root, store, with_fields(deny={"ants": ("snow",)}))


def test_what_a_run_does_not_name_stays(root: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    generate(
        root, store, with_fields(prompts=("autumn",), class_prompts={"bees": ("mosaic",)}, deny={"ants": ("autumn",)})
    )
    before = dict(Header.read(store).rules)
    assert generate(root, store, with_fields(prompts=("snowy",), deny={"bees": ("snowy",)})).verdicts["accepted"] > 0
    assert before.items() <= Header.read(store).rules.items() and set(before) == {"autumn", "mosaic"}
    assert counts(EditStore.open(store)) == {
        ("bees", "autumn"): BEES,
        ("bees", "mosaic"): BEES,
        ("ants", "snowy"): ANTS,
    }


def test_only_what_the_rules_want_is_made_again(root: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    generate(root, store, CONFIG)
    whole = EditStore.open(store)
    Decisions.of(store).add("reject", [name for name in names(whole) if name.prompt == "mosaic"])
    assert generate(root, store, with_fields(deny={"ants": ("mosaic",)}), redo=["rejected"]).made == BEES
    assert Header.read(store).orders[0].edits == BEES


def test_what_was_denied_is_ordered_once(root: Path, tmp_path: Path) -> None:
    """Also if the run that ordered it was stopped before it was made."""
    store = tmp_path / "store"
    generate(root, store, with_fields(deny={"ants": ("mosaic",)}))
    assert generate(root, store, with_fields(deny={})).made == ANTS
    files, (order,) = content(store), Header.read(store).orders
    for number in range(order.first_shard, order.first_shard + order.shard_count):
        (store / "shards" / f"edits-{number:06d}.json").unlink()
    assert generate(root, store, CONFIG).made == ANTS
    assert Header.read(store).orders == (order,) and content(store) == files


def test_names_of_no_class_are_said(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They may come to be classes; but a typo in `deny` would train on edits that show another class."""
    config = with_fields(deny={"antz": ("mosaic",)}, class_prompts={"w*": ("snowy",)}, class_names={"bee": "a bee"})
    generate(root, tmp_path / "store", config)
    texts = [record.getMessage() for record in caplog.records]
    for name in ("deny: 'antz'", "class_prompts: 'w*'", "class_names: 'bee'"):
        assert f"{name} is no class of these originals; their classes are 'ants', 'bees'." in texts
    caplog.clear()
    write_photograph(root / "wasps" / "0.jpg", 60, 40, 50)
    index(root, refresh=True)
    right = with_fields(deny={"ant?": ("mosaic",)}, class_prompts={"w*": ("snowy",)}, class_names={"bees": "a bee"})
    generate(root, tmp_path / "store", right)
    assert not caplog.records


class Words:
    """An editor that writes down what it is told, and shifts colours by it."""

    accelerated, multiple = False, 1
    template = "{prompt}, with {class}"

    def settings(self) -> Mapping[str, str]:
        return {"editor": "words", "template": self.template}

    def check(self, prompts: Sequence[str]) -> None:
        pass

    def load(self, prompts: Sequence[str], *, device: str, batch_size: int) -> "Words":
        return self

    def edit(self, images: Sequence[NDArray[np.uint8]], tasks: Sequence[EditTask]) -> list[NDArray[Any]]:
        TOLD.extend((task.prompt, task.class_name) for task in tasks)
        return [np.roll(images[task.image], 1, axis=2) for task in tasks]


TOLD: list[tuple[str, str]] = []


def test_the_class_in_words(root: Path, tmp_path: Path) -> None:
    TOLD.clear()
    (root / "bees").rename(root / "007.Honey_bees")
    config = with_fields(editor=Words(), prompts=("a", "b"), class_names={"ants": "black ants"})
    generate(root, tmp_path / "store", config)
    assert set(TOLD) == {(prompt, words) for prompt in "ab" for words in ("black ants", "Honey bees")}
    assert Header.read(tmp_path / "store").class_names == {"ants": "black ants", "007.Honey_bees": "Honey bees"}
    # They decide pixels: the store keeps them, and refuses others.
    TOLD.clear()
    generate(root, tmp_path / "store", dataclasses.replace(config, prompts=("c",), class_names={}))
    assert set(TOLD) == {("c", "black ants"), ("c", "Honey bees")}
    with pytest.raises(StoreError, match="class_names: 'ants' is 'black ants' in the store, 'ants!' asked for"):
        generate(root, tmp_path / "store", dataclasses.replace(config, class_names={"ants": "ants!"}))
    assert [class_name(name) for name in ("001.Black_footed_Albatross", "n01440764", "12", "_")] == [
        "Black footed Albatross",
        "n01440764",
        "12",
        "_",
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"class_prompts": {"ants": ("autumn",)}},
            "class_prompts: 'ants' must have prompts of its own, found 'autumn'",
        ),
        ({"prompts": ()}, "prompts must be one or more, found none"),
        ({"prompts": "autumn"}, "prompts must be lists of prompts, found 'autumn'"),
        ({"deny": {"ants": "autumn"}}, "deny must be lists of prompts"),
        ({"prompts": ("a", "a")}, "prompts must be all different"),
        ({"prompts": ("a {clas}",)}, r"prompts may have \{class\}, found \{clas\} in 'a \{clas\}'"),
    ],
)
def test_prompts_that_contradict(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        with_fields(**fields)


# People ---------------------------------------------------------------------------------------------------------------


def test_what_people_reject_is_not_used_and_can_be_made_again(root: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    generate(root, store, CONFIG)
    whole, files = EditStore.open(store), content(store)
    bad = names(whole)[2:5]
    Decisions.of(store).add("reject", bad)
    left = EditStore.open(store)
    assert content(store) == files and names(left) == [name for name in names(whole) if name not in bad]
    assert left.starts[-1] == len(left) == len(whole) - 3 and np.diff(left.starts).min() >= 0
    for edit in range(len(left)):
        place = names(whole).index(names(left)[edit])
        assert np.array_equal(left.encoded(edit), whole.encoded(place))
        assert left.originals_of(np.array([edit])) == whole.originals_of(np.array([place]))
        assert (left.sizes(np.array([edit])) == whole.sizes(np.array([place]))).all()
        assert left.prompt_of(edit) == whole.prompt_of(place) and left.variant_of(edit) == whole.variant_of(place)
    # Another process sees the same edits, whatever people do meanwhile.
    pickled = pickle.dumps(left)
    Decisions.of(store).add("undo", bad[:1])
    assert names(pickle.loads(pickled)) == names(left)
    assert len(EditStore.open(store)) == len(left) + 1
    # Made again, from other seeds; what was undone is not.
    assert generate(root, store, CONFIG).used == len(whole) - 2
    summary = generate(root, store, CONFIG, redo=["rejected"])
    assert summary.used == len(whole)
    assert summary.made == 2 and sum(summary.verdicts.values()) == len(whole)
    again = EditStore.open(store)
    assert {name[:3] for name in names(again)} == {name[:3] for name in names(whole)}
    before, now = seeds(whole), seeds(again)
    assert {key for key in now if now[key] != before[key]} == {name[:3] for name in bad[1:]}
    assert files.items() - content(store).items() == {
        (name, files[name]) for name in ("store.json", "index.json", "index.npy")
    } | ({("starts.npy", files["starts.npy"])} & (files.items() - content(store).items()))
    assert not verify(store).problems
    shown = current_rows(again)  # as `review` has them
    assert [(row["shard"], row["shown"]) for row in shown] == [(name.shard, 0) for name in names(again)]
    rows = {shard: again.shard_rows(shard) for shard in again.shards}
    replaced = {shard: again.is_replaced(shard, rows[shard]) for shard in again.shards}
    assert sum(map(np.count_nonzero, replaced.values())) == 2 == len(rows[max(rows)])
    assert len(again) == sum(np.count_nonzero(~one) for one in replaced.values())
    # Nothing is left to do, and the new ones can be rejected in their turn.
    files = content(store)
    assert generate(root, store, CONFIG, redo=["rejected"]).made == 0 and content(store) == files
    Decisions.of(store).add("reject", [name for name in names(again) if name[:3] == bad[1][:3]])
    assert generate(root, store, CONFIG, redo=["rejected"]).made == 1
    third = seeds(EditStore.open(store))[bad[1][:3]]
    assert third not in (before[bad[1][:3]], now[bad[1][:3]])


def test_what_quality_rejected_and_what_could_not_be_read(root: Path, tmp_path: Path) -> None:
    store, broken = tmp_path / "store", root / "ants" / "1.jpg"
    whole = broken.read_bytes()
    index(root, refresh=True)
    broken.write_bytes(encoded(photograph(1, 40, 50))[:900])
    strict = with_fields(thresholds=dataclasses.replace(CONFIG.thresholds, unlike=0.9))
    first = generate(root, store, strict)
    rejected = first.verdicts["structure_lost"]
    assert first.verdicts["unreadable original"] == 2 and 0 < rejected < 12
    # Nothing can be read that could not before; nothing is ordered.
    files = content(store)
    assert generate(root, store, strict, redo=["unreadable"]).made == 0 and content(store) == files
    broken.write_bytes(whole)
    second = generate(root, store, strict, redo=["unreadable"])
    assert second.made == 2 and second.verdicts["unreadable original"] == 0
    generate(root, tmp_path / "anew", strict)
    assert seeds(EditStore.open(store)) == seeds(EditStore.open(tmp_path / "anew"))
    # From new seeds, with more attempts than the store was begun with.
    rejected = second.verdicts["structure_lost"]
    third = generate(root, store, dataclasses.replace(strict, retry=5), redo=["rejected"])
    assert third.made == rejected and third.verdicts["structure_lost"] < rejected
    assert not verify(store).problems and EditStore.open(store).settings["retry"] == 5
    with pytest.raises(ConfigError, match="redo must be of rejected, unreadable, found 'all'"):
        generate(root, store, strict, redo=["all"])  # type: ignore[list-item]


@pytest.mark.parametrize("harm", ["lost", "changed"])
def test_the_file_of_an_order_that_is_lost(root: Path, tmp_path: Path, harm: str) -> None:
    """What is there can be trained on; no run can go on, and `verify` says so."""
    store = tmp_path / "store"
    generate(root, store, with_fields(prompts=("autumn",), class_prompts={"bees": ("mosaic",)}))
    (file,) = (store / "orders").iterdir()
    whole = file.read_bytes()
    if harm == "lost":
        file.unlink()
    else:
        file.write_bytes(whole[:-1] + b"\x07")
    (problem,) = verify(store).problems
    what = "cannot be read" if harm == "lost" else "has changed since it was written"
    assert problem.shard is None and problem.file == f"orders/{file.name}" and what in problem.what
    assert len(EditStore.open(store)) == ANTS + 2 * BEES
    with pytest.raises(StoreError, match=f"{file.name}.*{what}.*bring back a copy of it, or make a new store"):
        generate(root, store, CONFIG)
    file.write_bytes(whole)
    assert not verify(store).problems and generate(root, store, CONFIG).made == ANTS


def test_a_packed_store_keeps_what_was_chosen(root: Path, tmp_path: Path) -> None:
    from dali_diffusemix import pack

    store = tmp_path / "store"
    generate(root, store, with_fields(prompts=("autumn",), class_prompts={"bees": ("mosaic",)}))
    Decisions.of(store).add("reject", names(EditStore.open(store))[:2])
    generate(root, store, with_fields(prompts=("autumn",), class_prompts={"bees": ("mosaic",)}), redo=["rejected"])
    Decisions.of(store).add("reject", names(EditStore.open(store))[:1])
    pack(store, tmp_path / "raw")
    assert names(EditStore.open(tmp_path / "raw")) == names(EditStore.open(store))
    assert not verify(tmp_path / "raw").problems
    generate(root, store, CONFIG)
    pack(store, tmp_path / "raw")
    assert names(EditStore.open(tmp_path / "raw")) == names(EditStore.open(store))


def test_a_store_without_an_edit_in_use_is_said(
    root: Path, tmp_path: Path, bank: FractalBank, caplog: pytest.LogCaptureFixture
) -> None:
    generate(root, tmp_path / "store", CONFIG)
    Decisions.of(tmp_path / "store").add("reject", names(EditStore.open(tmp_path / "store")))
    dataset = DiffuseMixDataset(root, edits=tmp_path / "store", fractals=bank, crop=TrainCrop(32), seed=0)
    assert "no edit of it is in use, so no sample is mixed" in caplog.text
    assert not dataset.planner.batch(0, np.arange(len(dataset))).mixed.any()


def test_an_order_that_is_not_made_yet_replaces_nothing(root: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    generate(root, store, CONFIG)
    whole = names(EditStore.open(store))
    Decisions.of(store).add("reject", whole)
    with StoreWriter.open(store, index(root), CONFIG.settings()) as writer:
        writer.order(CONFIG.wish(writer.catalog.classes, {}), redo=Redo(rejected=True))
        shards = [shard for shard in writer.shards() if shard.number not in writer.done()]
        assert len(shards) == 3 and sum(map(len, shards)) == len(whole)
        for shard in shards:  # as a run that was stopped before its first edit of each
            with ShardWriter(store, writer.catalog, shard) as files:
                for edit in shard.edits():
                    files.add(*edit[:3], seed=0, image=None, verdict=NOT_YET)
        writer.finish()
    Decisions.of(store).add("undo", whole[:5])
    with pytest.warns(UnfinishedStoreWarning, match=f"{len(whole)} edits of the others"):
        assert names(EditStore.open(store)) == whole[:5]
    # It is made before more is ordered.
    summary = generate(root, store, CONFIG, redo=["rejected"])
    assert len(Header.read(store).orders) == 1 and summary.made == summary.used == len(whole)
    edits = EditStore.open(store)
    replaced = {shard: int(edits.is_replaced(shard, edits.shard_rows(shard)).sum()) for shard in edits.shards}
    assert sum(replaced.values()) == len(whole) and not any(replaced[shard.number] for shard in shards)


def test_one_part_orders_for_all(root: Path, tmp_path: Path) -> None:
    """Otherwise a part that starts late would order a second round of what was rejected again."""
    store = tmp_path / "store"
    generate(root, store, CONFIG)
    Decisions.of(store).add("reject", names(EditStore.open(store)))
    with pytest.raises(ConfigError, match=r"redo must be given to part 1 alone.*, found rejected for part 2/3"):
        generate(root, store, CONFIG, redo=["rejected"], part=Part(2, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnfinishedStoreWarning)
        made = [generate(root, store, CONFIG, redo=["rejected"], part=Part(1, 3)).made]
        made += [generate(root, store, CONFIG, part=Part(number, 3)).made for number in (3, 2)]
    assert sum(made) == len(EditStore.open(store)) == 14 and all(made)
    assert len(Header.read(store).orders) == 1 and not verify(store).problems


def test_a_store_without_edits_takes_other_settings(root: Path, tmp_path: Path) -> None:
    """As after a run whose editor failed at once."""
    store = tmp_path / "store"
    with StoreWriter.open(store, index(root), CONFIG.settings()) as writer:
        writer.order(CONFIG.wish(writer.catalog.classes, {}))
    assert estimate(root, store, with_fields(size=48)).edits == 2 * (ANTS + BEES)
    generate(root, store, with_fields(size=48))
    assert EditStore.open(store).settings["size"] == 48
    with pytest.raises(StoreError, match="size: 48 in the store, 32 asked for"):
        generate(root, store, CONFIG)


def test_an_export_has_what_is_used(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = tmp_path / "store"
    generate(root, store, with_fields(deny={"ants": ("mosaic",)}, variants=2))
    Decisions.of(store).add("reject", names(EditStore.open(store))[1:3])
    generate(root, store, with_fields(deny={"b*": ("mosaic",)}), redo=["rejected"])
    edits = EditStore.open(store)
    whole, copies = EditStore.index.fget, []

    def counted(edits: EditStore) -> Any:
        copies.append(edits)
        return whole(edits)

    monkeypatch.setattr(EditStore, "index", property(counted))
    made = export(root, store, tmp_path / "out")
    assert (made.originals, made.edits, made.left_out) == (ANTS + BEES, len(edits), 0)
    assert len(copies) < 5  # of a million edits each takes tenths of a second
    for edit in range(len(edits)):
        original = edits.catalog.path(int(edits.originals_of(np.array([edit]))[0]))
        file = tmp_path / "out" / f"{original}.{edits.slug_of(edit)}.{edits.variant_of(edit)}.png"
        assert np.array_equal(decode(file), decode(edits.encoded(edit)))


# A run that was stopped -----------------------------------------------------------------------------------------------


def stopped(root: Path, store: Path, config: GenerateConfig) -> None:
    """Begin a store and press Ctrl-C after the first batch: its open shard has edits that are not made yet."""
    pressed: list[int] = []

    def progress(done: int, total: int) -> None:
        if done and not pressed:
            pressed.append(done)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        generate(root, store, config, engine=LocalEngine(("cpu",)), progress=progress)


def test_an_estimate_of_a_shard_that_was_begun(root: Path, tmp_path: Path) -> None:
    """What the rules deny is neither made nor counted."""
    store, config = tmp_path / "store", with_fields(originals_per_shard=100, deny={"ants": ("mosaic",)})
    stopped(root, store, config)
    with pytest.warns(UnfinishedStoreWarning):
        left = int((EditStore.open(store).shard_rows(0)["verdict"] == VERDICTS.index(NOT_YET)).sum())
    assert 0 < left < 2 * (ANTS + BEES)
    counted = edits_to_make(root, store, config, catalog=index(root))
    before = generate(root, tmp_path / "other", config).verdicts["accepted"]
    with pytest.warns(UnfinishedStoreWarning):
        there = len(EditStore.open(store))
    assert counted == before - there
    anew = dataclasses.replace(config, deny={})
    counted = edits_to_make(root, store, anew, catalog=index(root))
    assert counted == generate(root, store, anew).made == 2 * (ANTS + BEES) - there


def test_a_pickled_store_whose_shard_was_gone_on_with(root: Path, tmp_path: Path) -> None:
    """Its rows would be those of other originals: it is refused."""
    store, config = tmp_path / "store", with_fields(originals_per_shard=100)
    stopped(root, store, config)
    with pytest.warns(UnfinishedStoreWarning):
        begun = EditStore.open(store)
    some = begun.select(Selection(prompts=["mosaic"]))
    assert 0 < len(some) < len(begun)
    assert names(pickle.loads(pickle.dumps(some))) == names(some)
    pickled = [pickle.dumps(one) for one in (begun, some)]
    generate(root, store, config)
    for one in pickled:
        with pytest.raises(StoreError, match=r"shard 0 has other edits than when .* build the dataset again"):
            pickle.loads(one)


# Before a run ---------------------------------------------------------------------------------------------------------


def test_an_estimate_writes_nothing_and_counts_right(root: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    some = with_fields(prompts=("autumn",), class_prompts={"bees": ("mosaic", "snowy")}, variants=2)
    for config in (some, CONFIG, with_fields(deny={"a*": ("mosaic", "snowy")}, class_prompts={"ants": ("snowy",)})):
        before = content(store) if store.exists() else {}
        found = estimate(root, store, config, devices=("cpu", "cpu"))
        assert (content(store) if store.exists() else {}) == before
        beside = {"train"} | ({"store", "store.runs.jsonl"} if before else set())
        assert {file.name for file in tmp_path.iterdir()} == beside
        made = generate(root, store, config).made
        assert found.edits == made
        assert (found.bytes > 0) == (found.seconds > 0) == (found.tried > 0) == (made > 0)
    # The bytes of all of them are near.
    found = estimate(root, tmp_path / "new", CONFIG)
    generate(root, tmp_path / "new", CONFIG)
    size = sum(file.stat().st_size for file in (tmp_path / "new" / "shards").iterdir())
    assert found.edits == 2 * (ANTS + BEES) and 0.5 * size < found.bytes < 1.5 * size
    # What a run is refused for, its estimate is refused for.
    with pytest.raises(StoreError, match="size: 32 in the store, 64 asked for"):
        estimate(root, store, with_fields(size=64))
    Decisions.of(store).add("reject", names(EditStore.open(store))[:3])
    assert estimate(root, store, CONFIG).edits == 0
    assert estimate(root, store, CONFIG, redo=["rejected"]).edits == 3


# At load time ---------------------------------------------------------------------------------------------------------


def test_some_edits_at_load_time(
    root: Path, tmp_path: Path, bank: FractalBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = tmp_path / "store"
    generate(root, store, with_fields(prompts=("autumn", "mosaic", "snowy"), variants=2))
    whole = EditStore.open(store)

    def used(**options: Any) -> EditStore:
        mix = MixSpec(probability=1)
        dataset = DiffuseMixDataset(root, edits=store, fractals=bank, mix=mix, crop=TrainCrop(32), seed=0, **options)
        assert dataset.store is not None
        plan = dataset.planner.batch(0, np.arange(len(dataset)))
        mixed = plan.edit[plan.mixed]
        # Every original is mixed that has an edit left, with one of its own.
        has = np.diff(dataset.store.starts)[plan.original] > 0
        assert (plan.mixed == has).all()
        assert (dataset.store.originals_of(mixed) == plan.original[plan.mixed]).all()
        assert len(dataset[0]) == 2
        return dataset.store

    assert {prompt for _, prompt in counts(used(prompts=["mosaic"]))} == {"mosaic"}
    assert {prompt for _, prompt in counts(used(exclude=["mosaic"]))} == {"autumn", "snowy"}
    some = counts(used(exclude={"b*": ["mosaic", "autumn"], "ants": ["snowy"]}))
    assert set(some) == {("bees", "snowy"), ("ants", "autumn"), ("ants", "mosaic")}
    least = float(np.median(whole.index["score"]))
    good = used(min_score=least)
    assert len(good) == (whole.index["score"] >= least).sum() and good.index["score"].min() >= least
    assert len(used(min_score={"quality": least}, prompts=["autumn"])) < len(good)
    with pytest.raises(ConfigError, match=r"prompts must be prompts of .*store', found 'winter'; these are"):
        used(prompts=["winter"])
    with pytest.raises(ConfigError, match="must leave some of the 42 edits of"):
        used(min_score=2)
    with pytest.raises(ConfigError, match="exclude must be prompts, found the text 'mosaic'"):
        used(exclude="mosaic")
    with pytest.raises(StoreError, match="there are no scores 'clip', it has none; run `dali-diffusemix score STORE"):
        used(min_score={"clip": 0.5})
    Path("how_bright.py").write_text("def of(originals, edits, labels):\n    return [edit.mean() for edit in edits]\n")
    score(store, "how_bright:of", name="bright")
    values = Scores.open(store, "bright").values(whole.index)
    least = float(np.sort(values)[10])
    bright = used(min_score={"bright": least, "quality": 0}, prompts=["snowy", "autumn"])
    assert 0 < len(bright) == ((values >= least) & (whole.index["prompt"] != 1)).sum()
    # What was added since has no score, and says so.
    generate(root, store, with_fields(prompts=("rainbow",)))
    edits = EditStore.open(store)
    with pytest.raises(StoreError, match=r"3 of 6 shards have no scores 'bright'.*it scores these alone"):
        used(min_score={"bright": least})
    with pytest.raises(ConfigError, match=r"min_score must be numbers, found '0.5'"):
        used(min_score="0.5")
    assert len(used(min_score=np.float32(0))) == len(used(min_score=0)) == len(edits)
    for nothing in ({"prompts": []}, {"min_score": 2}, {"exclude": edits.prompts}, {"min_score": {"quality": 2}}):
        with pytest.raises(ConfigError, match=r"must leave some of the \d+ edits of .* which leaves none"):
            used(**nothing)
    for field, value in (("exclude", None), ("prompts", 5), ("exclude", {"ants": None})):
        with pytest.raises(ConfigError, match=f"{field} must be prompts, found .*; write a list"):
            used(**{field: value})
    # A typo would train on what was to be left out.
    with pytest.raises(ConfigError, match=r"exclude must name classes of .*, found 'antz'; these are 'ants', 'bees'\."):
        used(exclude={"antz": ["mosaic"]})
    with pytest.raises(ConfigError, match="prompts, exclude and min_score must be left out without edits"):
        DiffuseMixDataset(root, crop=TrainCrop(32), prompts=["autumn"])


def test_scores_of_a_store_at_a_url(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fsspec", reason="needs fsspec: pip install -e '.[s3]'")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DALI_DIFFUSEMIX_MIRROR", str(tmp_path / "mirrors"))
    store = tmp_path / "store"
    generate(root, store, CONFIG)
    Path("how_dark.py").write_text("def of(originals, edits, labels):\n    return [-edit.mean() for edit in edits]\n")
    score(store, "how_dark:of", name="dark")
    index = EditStore.open(store).index
    values = Scores.open(store, "dark").values(index)
    least = float(np.median(values))
    edits = EditStore.open(f"file://{store}").select(Selection(min_score={"dark": least}))
    assert 0 < len(edits) < len(index) and np.array_equal(edits.index, index[values >= least])
    with pytest.raises(StoreError, match="there are no scores 'other', it has 'dark'"):
        EditStore.open(f"file://{store}").select(Selection(min_score={"other": 0}))


def test_a_selection_under_another_catalog(root: Path, tmp_path: Path) -> None:
    """In either order."""
    generate(root, tmp_path / "store", CONFIG)
    edits = EditStore.open(tmp_path / "store")
    some = edits.catalog.take([5, 0, 2])
    one = edits.reindexed(some).select(Selection(prompts=["mosaic"]))
    other = edits.select(Selection(prompts=["mosaic"])).reindexed(some)
    assert np.array_equal(one.index, other.index) and np.array_equal(one.starts, other.starts) and len(one) == 3
    assert one.index["original"].tolist() == [0, 1, 2] == one.originals_of(np.arange(3)).tolist()
    restored = pickle.loads(pickle.dumps(one))
    assert np.array_equal(restored.index, one.index)
    assert [restored.encoded(edit).tobytes() for edit in range(3)] == [one.encoded(edit).tobytes() for edit in range(3)]
    assert one.shard_rows(0)["original"].max() == 2  # rows of the store's own catalog


# Killed ---------------------------------------------------------------------------------------------------------------

STEPS = """
import sys
from pathlib import Path
root, folder, tests = map(Path, sys.argv[1:])
sys.path.insert(0, str(tests))
from killing import killed_at_each
from test_choosing import steps
print(killed_at_each(lambda moment: steps(root, folder / f"killed{moment}"), 2))
"""


def steps(root: Path, store: Path) -> list[str]:
    """Take the steps that are left: a store grows, loses prompts, has edits made again, gets prompts back."""
    fields: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("begun", {"deny": {"ants": ("mosaic",)}}, {}),
        ("grown", {"prompts": ("autumn", "snowy"), "class_prompts": {"bees": ("rainbow",)}}, {}),
        ("lost", {"prompts": ("autumn",), "deny": {"*": ("snowy",), "ants": ("mosaic",)}}, {}),
        ("again", {}, {"redo": ["rejected"]}),
        ("back", {"deny": {}}, {}),
    ]
    done = store.with_name(f"{store.name}.steps")
    taken = done.read_text().split() if done.exists() else []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnfinishedStoreWarning)
        for name, of_config, options in fields[len(taken) :]:
            if name == "again" and not Decisions.of(store).rejected():
                Decisions.of(store).add("reject", names(EditStore.open(store))[1::3])
            generate(root, store, with_fields(**of_config), **options)
            taken.append(name)
            done.write_text(" ".join(taken))
    return taken


@pytest.mark.slow
def test_killed_at_each_step(root: Path, tmp_path: Path) -> None:
    """At every second replacement of a file; gone on with, the store is that of a run that nobody killed."""
    whole = tmp_path / "whole"
    assert steps(root, whole) == ["begun", "grown", "lost", "again", "back"]
    assert not verify(whole).problems
    expected, used = content(whole), names(EditStore.open(whole))
    assert used == names(EditStore.open(whole)) and len({name[:3] for name in used}) == len(used)
    moments = int(warm.run("-c", STEPS, root, tmp_path, Path(__file__).parent).stdout)
    assert moments > 60
    for moment in range(0, moments, 2):
        store = tmp_path / f"killed{moment}"
        steps(root, store)
        assert content(store) == expected, moment
        assert names(EditStore.open(store)) == used and not verify(store, decoding=False).problems
        shutil.rmtree(store)
    files = content(whole)
    assert generate(root, whole, CONFIG).made == 0 and content(whole) == files
    assert len(list((whole / "orders").iterdir())) == 3
