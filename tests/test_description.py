"""What datasets and loaders say of themselves: short, true, from memory, and never an exception."""

import pickle
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Subset, WeightedRandomSampler, get_worker_info

from dali_diffusemix import (
    Catalog,
    DiffuseMixDataset,
    DiffuseMixLoader,
    DiffuseMixSubset,
    EditStore,
    EvalCrop,
    FractalBank,
    MixSpec,
    PackConfig,
    RandAugment,
    RandomErasing,
    Schedule,
    TrainCrop,
    globally_seeded,
    pack,
)
from dali_diffusemix.loading import dataset as dataset_module
from dali_diffusemix.loading.description import few, in_a_line, name_of, table
from dali_diffusemix.plan.spec import MASKS


def rows(text: str) -> dict[str, str]:
    """Of a description, the text in each row."""
    lines = text.splitlines()[1:]
    columns = {len(line) - len(line[4:].split("  ", 1)[1].lstrip()) for line in lines}
    assert len(columns) == 1 and all(line.startswith("    ") for line in lines), text
    (column,) = columns
    return {line[4:column].strip(): line[column:] for line in lines}


def test_a_dataset(dataset: DiffuseMixDataset, photos: Path, edits: Path) -> None:
    assert repr(dataset) == (
        f"DiffuseMixDataset of {photos}\n"
        "    samples    33\n"
        "    classes    3: ants, bees, cats\n"
        "    originals  33 files\n"
        f"    edits      66 in {edits}: autumn 33, snowy 33\n"
        "    mix        MixSpec.paper(), about 67 % of the samples are mixed\n"
        "    crop       TrainCrop(24)\n"
        "    augment    none\n"
        "    fractals   4 of 64 x 64 pixels\n"
        "    seed       3"
    )


def test_a_dataset_without_edits(photos: Path) -> None:
    torch.manual_seed(7)
    found = rows(repr(DiffuseMixDataset(photos, crop=EvalCrop(32))))
    assert {found[name] for name in ("edits", "mix", "augment", "fractals")} == {"none"}
    assert found["seed"] == "7, from torch"


def test_every_setting(photos: Path, edits: Path, bank: FractalBank, tmp_path: Path) -> None:
    pack(photos, tmp_path / "raw", PackConfig(format="raw"))
    options: dict[str, Any] = {"edits": edits, "fractals": bank, "seed": 0, "prompts": ["snowy"]}
    found = rows(
        repr(
            DiffuseMixDataset(
                tmp_path / "raw",
                crop=Schedule({0: TrainCrop(32), 9: TrainCrop(64)}),
                mix=Schedule({0: None, 5: MixSpec.paper()}),
                augment=[RandAugment(), RandomErasing(0.25)],
                targets=np.zeros((33, 5), np.float32),
                **options,
            )
        )
    )
    assert found["originals"] == "33 packed as raw images"
    assert found["edits"] == f"33 in {edits}: snowy 33"
    assert found["crop"] == "Schedule({0: TrainCrop(32), 9: TrainCrop(64)})"
    assert found["mix"] == "Schedule({0: None, 5: MixSpec.paper()})"
    assert found["augment"] == "RandAugment(), RandomErasing(p=0.25)"
    assert found["targets"] == "float32 of shape (33, 5)"
    changing = DiffuseMixDataset(photos, crop=TrainCrop(32), augment=Schedule({0: None, 2: RandAugment()}), seed=0)
    assert rows(repr(changing))["augment"] == "Schedule({0: (), 2: (RandAugment(),)})"
    expanded = DiffuseMixDataset(photos, crop=TrainCrop(32), mix=MixSpec.release(), **options)
    assert rows(repr(expanded))["samples"] == "66 in an epoch"


def test_edits_that_are_too_many_to_count(
    photos: Path, edits: Path, bank: FractalBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table is read where a selection has read it anyway, or where it is short."""
    monkeypatch.setattr(dataset_module, "_COUNTED", 10)
    options: dict[str, Any] = {"crop": TrainCrop(24), "edits": edits, "fractals": bank}
    assert rows(repr(DiffuseMixDataset(photos, **options)))["edits"] == f"66 in {edits}: 2 prompts: autumn, snowy"
    chosen = DiffuseMixDataset(photos, exclude={"ants": ["snowy"]}, **options)
    assert rows(repr(chosen))["edits"] == f"55 in {edits}: autumn 33, snowy 22"


def test_counts_of_a_store(photos: Path, edits: Path) -> None:
    store = EditStore.open(edits)
    assert store.count_by_prompt() == {"autumn": 33, "snowy": 33}
    some = store.reindexed(store.catalog.take([0, 5, 30]))
    assert some.count_by_prompt() == {"autumn": 3, "snowy": 3}


def test_parts(dataset: DiffuseMixDataset, photos: Path) -> None:
    part = dataset.subset([3, 1])
    first, rest = repr(part).split("\n", 1)
    assert first == "DiffuseMixSubset, 2 samples of" and rest == repr(dataset)
    whole = f"DiffuseMixDataset of {photos} (33 samples, 3 classes, 66 edits)"
    assert in_a_line(dataset) == whole
    assert in_a_line(part) == f"DiffuseMixSubset, 2 samples of {whole}"
    assert in_a_line(Subset(part, [0])) == f"Subset, 1 sample of DiffuseMixSubset, 2 samples of {whole}"
    plain = DiffuseMixDataset(photos, crop=EvalCrop(24))
    line = in_a_line(ConcatDataset([plain, plain, plain]))
    one = f"DiffuseMixDataset of {photos} (33 samples, 3 classes, no edits)"
    assert f"ConcatDataset of 3: {one} + {one} + ...".startswith(line.removesuffix("...")) and len(line) <= 240
    deep: Any = dataset
    for _ in range(50):
        deep = Subset(deep, range(len(deep)))
    assert in_a_line(deep).endswith(" of Subset")


def test_a_loader(dataset: DiffuseMixDataset, photos: Path) -> None:
    assert repr(DiffuseMixLoader(dataset, 8, shuffle=True, num_workers=2, device="cpu")) == (
        "DiffuseMixLoader\n"
        f"    dataset     DiffuseMixDataset of {photos} (33 samples, 3 classes, 66 edits)\n"
        "    batch size  8\n"
        "    batches     5\n"
        "    order       shuffled\n"
        "    device      cpu, float32\n"
        "    decoding    on the CPU\n"
        "    workers     2 threads, 2 batches decoded ahead\n"
        "    resident    no"
    )


def double(images: torch.Tensor, labels: torch.Tensor, generator: torch.Generator) -> Any:
    return 2 * images, labels


class Unsized:
    def __iter__(self) -> Iterator[int]:
        return iter([0, 1])


def test_ways_of_delivery(photos: Path, dataset: DiffuseMixDataset, tmp_path: Path) -> None:
    def described(of: Any = dataset, **options: Any) -> dict[str, str]:
        return rows(repr(DiffuseMixLoader(of, device="cpu", **options)))

    given = described(batch_sampler=[[0, 1], [2]], prefetch_factor=1)
    assert (given["batch size"], given["batches"], given["order"]) == ("given by the batch sampler", "2", "list")
    assert given["workers"] == "1 thread, 1 batch decoded ahead"
    ranks = described(batch_size=4, rank=1, world_size=2, drop_last=True)
    assert (ranks["batch size"], ranks["batches"]) == ("4, full batches only", "4, on rank 1 of 2")
    assert ranks["order"] == "not shuffled"
    sampled = described(sampler=WeightedRandomSampler([1.0] * 33, 33), batch_size=4, dtype=torch.bfloat16)
    assert (sampled["order"], sampled["device"]) == ("WeightedRandomSampler", "cpu, bfloat16")
    assert described(sampler=Unsized(), batch_size=4)["batches"] == "unknown: the sampler has no length"
    last = described(memory_format=torch.channels_last, pin_memory=True, batch_transform=double)
    assert last["device"] == "cpu, float32, channels last, page-locked" and last["batch_transform"] == "double"
    assert described(batch_transform=globally_seeded(double))["batch_transform"] == "globally_seeded(double)"
    pack(photos, tmp_path / "raw", PackConfig(format="raw"))
    raw = described(DiffuseMixDataset(tmp_path / "raw", crop=TrainCrop(24)), resident="host")
    assert (raw["decoding"], raw["resident"]) == ("nothing to decode: raw images", "in memory")


def test_at_any_time(dataset: DiffuseMixDataset) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed on this machine")
    loader = DiffuseMixLoader(dataset.split(0.5, 0.5)[0], 4, device="cpu", num_workers=1)
    before = repr(loader)
    batches = iter(loader)
    next(batches)
    assert repr(loader) == repr(pickle.loads(pickle.dumps(loader))) == before
    loader.close()
    assert repr(loader) == before
    assert repr(pickle.loads(pickle.dumps(dataset))) == repr(dataset)


def report(_: Any) -> str:
    info = get_worker_info()
    assert info is not None
    return repr(info.dataset)


def test_in_a_worker(dataset: DiffuseMixDataset) -> None:
    (text,) = DataLoader(Subset(dataset, [0]), num_workers=1, collate_fn=report)
    assert text.startswith("<torch")  # torch's own Subset has no description
    (text,) = DataLoader(dataset.subset([0]), num_workers=1, collate_fn=report)
    assert text == repr(dataset.subset([0]))


class Mean:
    """A user's crop that cannot be described."""

    output_size = (8, 8)

    def boxes(self, sizes: Any, draws: Any) -> Any:
        return np.tile([0.0, 0, 1, 1], (len(sizes), 1)), np.zeros(len(sizes), dtype=bool)

    def __repr__(self) -> str:
        raise RuntimeError("no")


def test_nothing_raises(photos: Path, dataset: DiffuseMixDataset) -> None:
    for kind in (DiffuseMixDataset, DiffuseMixLoader, DiffuseMixSubset):
        half_made: Any = object.__new__(kind)  # as a debugger sees it inside the constructor
        assert kind.__name__ in repr(half_made) and "?" in repr(half_made)
    assert rows(repr(DiffuseMixDataset(photos, crop=Mean())))["crop"] == "?"
    broken = DiffuseMixLoader(dataset, 4, device="cpu")
    del broken.__dict__["_maker"], broken.__dict__["_order"]
    assert rows(repr(broken))["batch size"] == "4" and rows(repr(broken))["order"] == "?"
    assert in_a_line(None) == "?" and name_of(Mean().boxes) == "Mean.boxes"


_asked: list[str] = []
_watching = False


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching and event.split(".")[0] in ("open", "os", "socket", "subprocess", "mmap"):
        _asked.append(event)


def test_no_file_is_asked(photos: Path, edits: Path, bank: FractalBank, tmp_path: Path) -> None:
    global _watching
    root, store = shutil.copytree(photos, tmp_path / "photos"), shutil.copytree(edits, tmp_path / "edits")
    dataset = DiffuseMixDataset(root, crop=TrainCrop(24), edits=store, fractals=bank, seed=0)
    loader = DiffuseMixLoader(dataset, 4, device="cpu")
    before = repr(dataset), repr(loader)
    for folder in (root, store):
        shutil.rmtree(folder)
    sys.addaudithook(watch)  # it cannot be removed again
    _watching = True
    try:
        after = repr(dataset), repr(loader)
        assert not _asked
        (tmp_path / "asked").touch()
        assert _asked
    finally:
        _watching = False
    assert after == before


def test_many_originals_and_classes_take_few_lines(tmp_path: Path) -> None:
    count, classes = 1_280_000, [f"n{number:08}" for number in range(1000)]
    labels = np.arange(count) % 1000
    catalog = Catalog.from_arrays(
        paths=[b"%d" % number for number in range(count)],
        labels=np.sort(labels),
        sizes=np.full((count, 2), 400),
        classes=classes,
    )
    dataset = DiffuseMixDataset(tmp_path, catalog=catalog, crop=TrainCrop(224), seed=0)
    seconds = []
    for _ in range(3):
        begin = time.process_time()
        text = repr(dataset)
        seconds.append(time.process_time() - begin)
    assert min(seconds) < 0.05
    found = rows(text)
    assert found["samples"] == "1,280,000" and found["originals"] == "1,280,000 files"
    assert found["classes"].startswith("1,000: n00000000, n00000001, ") and found["classes"].endswith(
        ", ..., n00000999"
    )
    assert max(map(len, text.splitlines())) < 160


def test_few_names() -> None:
    assert few([]) == "" and few(["ants"]) == "ants" and few(["ants", "bees"]) == "ants, bees"
    fifty = [f"in the style of painter {number}" for number in range(50)]
    assert few(fifty) == f"{fifty[0]}, {fifty[1]}, ..., {fifty[49]}"
    assert few(["x" * 500, "y" * 500]) == f"{'x' * 37}..., {'y' * 37}..."
    assert few(["a\nb"]) == "'a\\nb'"
    assert len(few([str(number) for number in range(10**6)])) < 120


def test_a_table() -> None:
    assert table("a", {}) == "a"
    assert (
        table("a", {"b": lambda: "1", "left out": lambda: None, "cc": lambda: str(1 // 0)}) == "a\n    b   1\n    cc  ?"
    )


def test_a_plan_is_a_table(dataset: DiffuseMixDataset, photos: Path) -> None:
    plan = dataset.planner.batch(2, range(30))
    first, head, *lines, last = repr(plan).splitlines()
    assert first == "BatchPlan of 30 samples of epoch 2, 24 x 24 pixels" and last == "    ..." and len(lines) == 12
    assert head.split() == ["index", "original", "edit", "mask", "fractal", "weight", "flip", "box"]
    for row, line in enumerate(lines):
        index, original, edit, mask, fractal, weight, flip, *box = line.split()
        assert (int(index), int(original)) == (row, row) and (flip == "yes") == plan.flip[row]
        assert (edit == "-") == (mask == "-") == (plan.edit[row] < 0)
        if plan.mixed[row]:
            assert (int(edit), mask, int(fractal)) == (plan.edit[row], MASKS[plan.mask[row]], plan.fractal[row])
        assert np.allclose([float(weight), *map(float, box)], [plan.fractal_weight[row], *plan.box[row]], atol=0.006)
    augmented = DiffuseMixDataset(photos, crop=TrainCrop(24), augment=RandAugment(), seed=0)
    views = repr(augmented.planner.batch(0, [4, 4], [0, 1])).splitlines()
    assert len(views) == 4 and views[1].split()[:2] == ["index", "view"] and views[1].endswith("  operations")
    assert views[3].split()[:2] == ["4", "1"]
    assert len(repr(dataset.planner.batch(0, [])).splitlines()) <= 2
    assert repr(dataset.samples) == f"<33 (path, label), the first {(str(photos / 'ants' / '00.jpg'), 0)}>"
