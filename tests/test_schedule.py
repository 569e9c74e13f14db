"""Schedules: settings that change with the epoch, in the dataset, the loader, DataLoader, and over a kill."""

import hashlib
import itertools
import json
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.utils.data import ConcatDataset, DataLoader, Subset

from dali_diffusemix import (
    Catalog,
    ColorJitter,
    ConfigError,
    DiffuseMixDataset,
    DiffuseMixLoader,
    EvalCrop,
    FractalBank,
    GaussianBlur,
    MixSpec,
    RandAugment,
    RandomChoice,
    RandomCrop,
    RandomErasing,
    RepeatedEpochWarning,
    Schedule,
    Solarize,
    TimmRandAugment,
    TrainCrop,
    TrivialAugmentWide,
    fn,
)
from dali_diffusemix.inspect.preview import animation, encoded, epochs_sheet
from dali_diffusemix.inspect.preview.canvas import Layout
from dali_diffusemix.loading.memory import BatchMemory
from dali_diffusemix.loading.upload import PieceUpload
from dali_diffusemix.mix.call import piece_table
from dali_diffusemix.plan import Planner
from dali_diffusemix.plan.augment import augmentations
from dali_diffusemix.plan.crops import Draws
from dali_diffusemix.plan.schedule import epochs_of, setting_at, values_of
from dali_diffusemix.plan.written import written
from dali_diffusemix.store.pack import PackConfig, pack

Make = Callable[..., DiffuseMixDataset]

SIZES = {0: 24, 2: 33, 4: 40}
CROPS = Schedule({epoch: TrainCrop(size) for epoch, size in SIZES.items()})
LATER = Schedule({0: None, 3: MixSpec.paper()})
AUGMENT = Schedule({0: None, 2: [TrivialAugmentWide(), RandomErasing(0.5, value="random")], 5: "rand-m9-mstd0.5-inc1"})


@pytest.fixture
def make(photos: Path, edits: Path, bank: FractalBank) -> Make:
    def dataset(**changes: Any) -> DiffuseMixDataset:
        arguments = {"root": photos, "edits": edits, "fractals": bank, "crop": CROPS, "mix": LATER, "seed": 3}
        arguments["augment"] = AUGMENT
        return DiffuseMixDataset(**{**arguments, **changes})

    return dataset


@pytest.fixture(scope="module")
def raw(photos: Path, edits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The photographs and their edits as raw images."""
    folder = tmp_path_factory.mktemp("raw")
    pack(photos, folder / "originals", PackConfig(format="raw", originals_per_shard=7))
    pack(edits, folder / "edits", PackConfig(format="raw"))
    return {"root": folder / "originals", "edits": folder / "edits"}


def loader_of(dataset: Any, **options: Any) -> DiffuseMixLoader:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed on this machine")
    return DiffuseMixLoader(dataset, 7, **{"device": "cpu", "num_workers": 2, **options})


def digest(batch: tuple[torch.Tensor, ...]) -> str:
    """Identifies the bits, shapes and types of a batch."""
    found = hashlib.sha256()
    for part in batch:
        found.update(f"{tuple(part.shape)} {part.dtype} ".encode() + part.contiguous().numpy().tobytes())
    return found.hexdigest()


def epochs(loader: DiffuseMixLoader, count: int) -> list[list[str]]:
    return [[digest(batch) for batch in loader] for _ in range(count)]


# --- a Schedule


def test_a_value_holds_from_its_epoch_on() -> None:
    schedule = Schedule({30: "b", 0: "a", np.int64(60): "c"})
    assert [schedule.at(epoch) for epoch in (0, 29, 30, 59, 60, 10**9)] == ["a", "a", "b", "b", "c", "c"]
    assert schedule.epochs == (0, 30, 60) and type(schedule.epochs[2]) is int
    for wrong in (-1, 1.5, float("nan"), True, None):
        with pytest.raises(ConfigError, match=f"epoch must be a whole number, at least 0, found {wrong}"):
            schedule.at(wrong)  # type: ignore[arg-type]


def test_schedules_of_the_same_values_are_the_same() -> None:
    one, other = Schedule({0: TrainCrop(8), 5: TrainCrop(9)}), Schedule({5: TrainCrop(9), 0: TrainCrop(8)})
    assert one == other and hash(one) == hash(other) and repr(one) == repr(other)
    assert pickle.loads(pickle.dumps(one)) == one
    assert one != Schedule({0: TrainCrop(8), 6: TrainCrop(9)}) and one != Schedule({0: TrainCrop(8)})
    assert repr(Schedule({2: None, 0: 0.5})) == "Schedule({0: 0.5, 2: None})"
    assert eval(repr(one), {"Schedule": Schedule, "TrainCrop": TrainCrop}) == one
    with pytest.raises(AttributeError):
        one.steps = ()  # type: ignore[misc]


def test_a_setting_is_a_value_or_a_schedule() -> None:
    schedule = Schedule({0: "a", 2: "b", 4: "a"})
    assert values_of(schedule) == ("a", "b", "a") and epochs_of(schedule) == (0, 2, 4)
    assert [setting_at(schedule, epoch) for epoch in (1, 2, 4)] == ["a", "b", "a"]
    assert (setting_at("a", 7), values_of("a"), epochs_of("a")) == ("a", ("a",), (0,))
    assert values_of(None) == (None,)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, r"epochs of a Schedule must begin with 0, found \[\]"),
        ({1: 2, 5: 3}, r"must begin with 0, found \[1, 5\]; add the value from epoch 0 on"),
        ({0: 1, -1: 2}, "must be whole numbers, at least 0, found -1"),
        ({0: 1, 1.5: 2}, "must be whole numbers, at least 0, found 1.5"),
        ({False: 1}, "must be whole numbers, at least 0, found False"),
        ({0: 1, "3": 2}, "must be whole numbers, at least 0, found '3'"),
        ([TrainCrop(8)], "Schedule must be given values by epoch, found"),
        ({0: Schedule({0: 1})}, r"cannot be Schedules, found Schedule\(\{0: 1\}\)"),
    ],
)
def test_what_is_no_schedule_is_refused(values: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Schedule(values)


# --- the plan


def test_the_plan_of_an_epoch_is_that_of_its_values(make: Make) -> None:
    dataset = make()
    for epoch in range(6):
        plain = make(crop=CROPS.at(epoch), mix=LATER.at(epoch), augment=AUGMENT.at(epoch)).planner
        found, expected = (one.batch(epoch, range(33)) for one in (dataset.planner, plain))
        assert found.output_size == (SIZES[epoch // 2 * 2],) * 2
        for name in type(found)._columns():
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), name)
        assert found.mixed.any() == (epoch >= 3) and found.seam_width == expected.seam_width


def test_epochs_of_different_lengths_are_refused(make: Make) -> None:
    release = MixSpec.release()
    for values in ({0: MixSpec.paper(), 1: release}, {0: release, 4: None}):
        with pytest.raises(ConfigError, match=r"mix must give all epochs one length, found .* in Schedule\(\{0: "):
            make(mix=Schedule(values))
    expanded = make(mix=Schedule({0: release, 1: MixSpec(epoch="expanded", fractal_weight=0.5)}))
    assert len(expanded) == 99
    plan = expanded.planner.batch(1, range(99))
    assert plan.mixed.sum() == 66 and set(plan.fractal_weight.tolist()) == {0, 0.5}


def test_every_value_is_checked(make: Make, photos: Path) -> None:
    with pytest.raises(ConfigError, match="edits must be given with mix"):
        make(edits=None)
    with pytest.raises(ConfigError, match=r"fractal_weight 0.2 needs a fractal bank"):
        make(fractals=None, mix=Schedule({0: MixSpec(fractal_weight=0.0), 9: MixSpec.paper()}))
    with pytest.raises(ConfigError, match=r"crop must be a TrainCrop.*found 192; write TrainCrop\(192\)"):
        make(crop=Schedule({0: TrainCrop(128), 5: 192}))
    with pytest.raises(ConfigError, match="mix must be a MixSpec or None, found <bound method"):
        make(mix=Schedule({0: None, 5: MixSpec.paper}))
    with pytest.raises(ConfigError, match=r"at most 16 settings of a kind, found more of TrivialAugmentWide"):
        make(augment=Schedule({0: None, 5: [TrivialAugmentWide()] * 17}))
    with pytest.raises(ConfigError, match=r"at most 16 settings of a kind"):
        make(augment=["ThreeAugment"] * 17)
    for name, value in (("crop", TrainCrop(8)), ("mix", None), ("augment", TrivialAugmentWide())):
        with pytest.raises(
            ConfigError, match=rf"{name} must be .*; write Schedule\(\{{\.\.\.\}}\) around the dictionary"
        ):
            make(**{name: {0: value, np.int64(5): value}})
    sizes = np.ones((1, 2), dtype=np.int32)
    with pytest.raises(ConfigError, match="edits must be given with mix"):
        Planner(seed=0, crop=TrainCrop(8), sizes=sizes, mix=LATER)
    for options in ({"crop": CROPS}, {"crop": TrainCrop(8), "mix": LATER}):
        with pytest.raises(ConfigError, match=r"must be one value in your own pipeline, found Schedule"):
            fn.plan(0, (1, 1), **options)


def test_a_setting_that_shall_change_needs_a_schedule(make: Make) -> None:
    dataset = make(crop=TrainCrop(24), mix=None)
    for name, value in (("crop", TrainCrop(32)), ("mix", MixSpec.paper())):
        with pytest.raises(ConfigError, match=rf"{name} of a dataset cannot be changed.*give {name}=Schedule\("):
            setattr(dataset, name, value)
    with pytest.raises(ConfigError, match="seed of a dataset cannot be changed") as error:
        dataset.seed = 4
    assert "Schedule" not in str(error.value)


def test_what_decides_samples_cannot_be_changed_anywhere_else(make: Make) -> None:
    """A part or a loader keeps none of it, so that a new value would do nothing."""
    dataset = make()
    part = dataset.subset([0, 1])
    for one in (part, part.subset([0]), dataset.split(0.5, 0.5)[1], DiffuseMixLoader(dataset, device="cpu"), dataset):
        for name in ("crop", "mix", "augment", "normalize", "seed", "targets"):
            with pytest.raises(ConfigError, match=f"{name} of a dataset cannot be changed, found None: it decides"):
                setattr(one, name, None)
            with pytest.raises(ConfigError, match=f"{name} of a dataset cannot be changed or deleted: it decides"):
                delattr(one, name)
        for name in ("transform", "target_transform"):
            with pytest.raises(ConfigError, match=f"{name} must be left out"):
                setattr(one, name, str)
        one.owner = "a user's own attribute"  # type: ignore[attr-defined]
        del one.owner  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="batch_size of a loader cannot be changed or deleted"):
        del DiffuseMixLoader(dataset, device="cpu").batch_size
    for other in (Subset(dataset, [0]), ConcatDataset([dataset])):  # torch's own take any attribute
        other.augment = None  # type: ignore[union-attr]
        with pytest.raises(ConfigError, match=f"augment of a dataset .*, found None on a {type(other).__name__}"):
            DiffuseMixLoader(other, device="cpu")
    assert dataset.augment and pickle.loads(pickle.dumps(part)).dataset.augment == dataset.augment


# --- samples


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_the_loader_delivers_what_dataloader_delivers(make: Make, workers: int) -> None:
    """Six epochs with three sizes, mixed from the fourth on; worker processes live through all of them."""
    dataset = make()
    torchs: Any = DataLoader(dataset, 7, num_workers=workers, persistent_workers=workers > 0)
    expected = []
    for epoch in range(6):
        dataset.set_epoch(epoch)
        batches = list(torchs)
        assert {tuple(images.shape[1:]) for images, _ in batches} == {(3, *CROPS.at(epoch).output_size)}
        assert torch.equal(dataset[8][0], batches[1][0][1])
        expected.append([digest(batch) for batch in batches])
    assert epochs(loader_of(make()), 6) == expected
    assert len(set(itertools.chain(*expected))) == 6 * 5


@pytest.mark.parametrize("options", [{}, {"resident": "host"}, {"visible_parts": False}], ids=str)
def test_raw_images_give_the_same(make: Make, raw: dict[str, Path], options: dict[str, Any]) -> None:
    dataset = make(**raw)
    assert dataset.is_raw and len(dataset.stores) == 2
    for epoch, found in enumerate(epochs(loader_of(dataset, **options), 5)):
        plain = loader_of(make(crop=CROPS.at(epoch), mix=LATER.at(epoch)))
        plain.set_epoch(epoch)
        assert found == [digest(batch) for batch in plain]


@pytest.mark.slow
def test_iterators_in_different_epochs_do_not_disturb_each_other(make: Make, raw: dict[str, Path]) -> None:
    for dataset, options in ((make(), {}), (make(**raw), {}), (make(**raw), {"resident": "host"})):
        loader = loader_of(dataset, **options)
        expected = epochs(loader, 5)
        for order in ((0, 4, 2), (4, 2, 0)):
            iterators = []
            for epoch in order:
                loader.set_epoch(epoch)
                iterators.append(iter(loader))
                next(iterators[-1])  # so that setting the epoch does not move it
            found = [[digest(batch) for batch in step] for step in zip(*iterators, strict=True)]
            assert [list(one) for one in zip(*found, strict=True)] == [expected[epoch][1:] for epoch in order]


def test_images_that_fail_are_replaced_in_the_size_of_the_epoch(make: Make, tmp_path: Path, photos: Path) -> None:
    root = shutil.copytree(photos, tmp_path / "photos")
    (root / make().catalog.path(4)).write_bytes(b"no image")
    with pytest.warns(UserWarning, match="left out of sample 4"):
        expected, broken = [], make(root=root)
        for epoch in range(6):
            broken.set_epoch(epoch)
            expected.append([digest(batch) for batch in DataLoader(broken, 7)])
        assert epochs(loader_of(make(root=root)), 6) == expected


class Plain:
    """A user's own crop: the whole image, squashed; it has no repr of its own."""

    def __init__(self, side: int) -> None:
        self.output_size = (side, side)

    def boxes(self, sizes: NDArray[np.int32], draws: Draws) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        return np.tile([0.0, 0.0, 1.0, 1.0], (len(sizes), 1)), np.zeros(len(sizes), dtype=np.bool_)


def test_a_crop_of_ones_own(make: Make) -> None:
    def own(last: int = 20) -> DiffuseMixLoader:
        return loader_of(make(crop=Schedule({0: Plain(16), 1: Plain(last)}), mix=None))

    loader = own()
    assert [next(iter(loader))[0].shape[-1] for _ in range(2)] == [16, 20]
    own().load_state_dict(loader.state_dict())  # other objects of the same kind
    with pytest.raises(ConfigError, match="crop of the state is"):
        own(24).load_state_dict(loader.state_dict())


def test_the_second_pass_over_an_epoch_warns_where_epochs_differ(photos: Path) -> None:
    changing = DiffuseMixDataset(photos, crop=Schedule({0: EvalCrop(16), 1: EvalCrop(24)}))
    for _ in DataLoader(changing, 40):
        pass
    with pytest.warns(RepeatedEpochWarning):
        list(DataLoader(changing, 40))
    for crop in (EvalCrop(16), Schedule({0: EvalCrop(16)})):
        same = DiffuseMixDataset(photos, crop=crop)
        assert len([*DataLoader(same, 40), *DataLoader(same, 40)]) == 2


def test_datasets_of_a_loader_have_one_size_in_every_epoch(make: Make, photos: Path) -> None:
    fitting = DiffuseMixDataset(photos, crop=Schedule({0: EvalCrop(24), 2: EvalCrop(33), 4: RandomCrop(40)}), seed=1)
    both = loader_of(ConcatDataset([make(), fitting]))
    assert [next(iter(both))[0].shape[-1] for _ in range(5)] == [24, 24, 33, 33, 40]
    for crop, epoch in (
        (EvalCrop(24), 2),
        (Schedule({0: EvalCrop(24), 2: EvalCrop(33)}), 4),
        (Schedule({0: EvalCrop(24), 1: EvalCrop(33), 4: EvalCrop(40)}), 1),
    ):
        other = DiffuseMixDataset(photos, crop=crop, seed=1)
        for datasets in ([make(), other], [other, make()]):
            with pytest.raises(ConfigError, match=rf"crop must give one size in all datasets .* in epoch {epoch}"):
                loader_of(ConcatDataset(datasets))


# --- memory


def test_memory_of_another_sample_size_is_not_kept() -> None:
    memory, kind = BatchMemory(), np.dtype(np.float32)

    def take(size: int, count: int) -> list[Any]:
        return [memory.take((4, 3, size, size), kind) for _ in range(count)]

    def kept() -> set[int]:
        return {block.nbytes for block in memory._kept[1]}

    for size in (8, 16, 8):  # growing and shrinking
        arrays = take(size, 3)
        places = {array.ctypes.data for array in arrays}
        del arrays
        assert kept() == {4 * 3 * size * size * 4}
        again = take(size, 3)
        assert {array.ctypes.data for array in again} == places  # used again
        late = again.pop()
        del again
        take(size + 1, 1)
        assert kept() == {4 * 3 * (size + 1) ** 2 * 4}
        del late  # given back after the size has changed
        assert kept() == {4 * 3 * (size + 1) ** 2 * 4}


def test_a_loader_keeps_no_memory_of_an_earlier_size(make: Make) -> None:
    loader = loader_of(make(mix=None))
    maker, seen = loader._maker, []
    for size in (24, 24, 33, 33, 40):
        for images, _ in loader:
            assert images.shape[-1] == size
            del images
        assert maker._memory._kept[0] == 3 * size * size * 4
        assert all(block.nbytes <= 7 * 3 * size * size * 4 for block in maker._memory._kept[1])
        ((decoder, of),) = maker._free
        assert of == (size, size)
        seen.append(decoder)
    assert [decoder.intact for decoder in seen] == [False, False, False, False, True]  # the others are closed
    assert seen[0] is seen[1] and seen[1] is not seen[2] and seen[2] is seen[3]


def test_blocks_of_an_upload_follow_the_size() -> None:
    upload = PieceUpload(torch.device("cpu"), 1)

    def uploaded(side: int, samples: int) -> int:
        image = np.zeros((side, side, 3), dtype=np.uint8)
        table = piece_table(np.array([image.ctypes.data], dtype=np.uint64), np.array([[side, side]], dtype=np.int32))
        _, block = upload(table, np.ones(1, dtype=np.bool_), (samples, samples))
        assert isinstance(block, torch.Tensor)
        return len(block)

    large = uploaded(2000, 224)
    assert uploaded(10, 224) == large
    assert uploaded(10, 128) < large


# --- resuming


def states(dataset: Any) -> Any:
    loader = loader_of(dataset)
    next(iter(loader))
    return json.loads(json.dumps(loader.state_dict()))


def test_a_state_without_schedules_is_what_it_was(make: Make) -> None:
    plain = make(crop=TrainCrop(24), mix=MixSpec.paper(), augment=TrivialAugmentWide())
    keys = ["version", "seed", "epoch", "places", "length", "shuffle", "fingerprint"]
    assert list(states(plain)) == keys
    assert list(states(make())) == [*keys, "schedules"]
    augment = Schedule({epoch: augmentations(AUGMENT.at(epoch)) for epoch in AUGMENT.epochs})
    assert states(make())["schedules"] == [{"crop": repr(CROPS), "mix": repr(LATER), "augment": repr(augment)}]
    assert states(make(mix=None, augment=None))["schedules"] == [{"crop": repr(CROPS)}]


EQUAL: list[tuple[str, Any, Any]] = [
    ("augment", ColorJitter(0.4), ColorJitter(np.float64(0.4))),
    ("augment", RandAugment(2, 9), RandAugment(np.int8(2), np.int64(9))),
    ("augment", RandomErasing(1), RandomErasing(1.0)),
    ("augment", RandomErasing(value=(1, 1, 1)), RandomErasing(value=np.ones(3))),
    ("augment", GaussianBlur(5, 1), GaussianBlur(np.int64(5), [1.0, np.float32(1)])),
    ("augment", "rand-m9-inc1", TimmRandAugment(np.int64(9), increasing=np.bool_(True))),
    ("augment", RandomChoice((Solarize(9),), p=(2,)), RandomChoice([Solarize(9.0)], p=np.array([2.0]))),
    ("mix", MixSpec(fractal_weight=0.5), MixSpec(fractal_weight=np.float64(0.5), seam_width=0)),
    ("mix", MixSpec(masks=("left",), probability=1), MixSpec(masks=np.array(["left"]), probability=np.float32(1))),
    ("crop", TrainCrop(24), TrainCrop((np.int64(24), 24), scale=[0.08, 1])),
    ("crop", EvalCrop(24, resize=30), EvalCrop([24, 24], resize=np.int64(30))),
    ("crop", RandomCrop(24, padding=2, flip=1), RandomCrop(24, padding=np.int8(2), flip=np.float64(1))),
]


@pytest.mark.parametrize(("name", "one", "other"), EQUAL)
def test_equal_settings_are_one_in_a_state(make: Make, name: str, one: Any, other: Any) -> None:
    first, second = (make(**{name: Schedule({0: value})}) for value in (one, other))
    assert getattr(first, name) == getattr(second, name)
    DiffuseMixLoader(second, device="cpu").load_state_dict(DiffuseMixLoader(first, device="cpu").state_dict())


def test_a_state_of_other_schedules_is_refused(make: Make) -> None:
    others = {
        "crop": (TrainCrop(24), Schedule({0: TrainCrop(24), 1: TrainCrop(33), 4: TrainCrop(40)})),
        "mix": (None, MixSpec.paper(), Schedule({0: None, 4: MixSpec.paper()})),
        "augment": ((), (TrivialAugmentWide(),), Schedule({0: (), 2: (RandomErasing(0.4),)})),
    }
    state = states(make())
    for name, values in others.items():
        for value in values:
            other = make(**{name: value})
            there, here = (repr(one) if isinstance(one, Schedule) else "no Schedule" for one in (state_of(name), value))
            for into, of, message in (
                (other, state, f"{name} of the state is {there}, here it is {here}; give the dataset the same {name}."),
                (make(), states(other), f"{name} of the state is {here}, here it is {there}; give"),
            ):
                loader = loader_of(into)
                before = loader.state_dict()
                with pytest.raises(ConfigError) as error:
                    loader.load_state_dict(of)
                assert str(error.value).startswith(message)
                assert loader.state_dict() == before
    again = loader_of(make())
    again.load_state_dict(state)
    assert again.state_dict() == state
    for wrong in ("mix", [1], 5):
        with pytest.raises(ConfigError, match="state must hold a table of each dataset as schedules"):
            again.load_state_dict({**state, "schedules": wrong})


def state_of(name: str) -> Schedule[Any]:
    augment = Schedule({epoch: augmentations(value) for epoch, value in AUGMENT.steps})
    schedules: dict[str, Schedule[Any]] = {"crop": CROPS, "mix": LATER, "augment": augment}
    return schedules[name]


def test_all_datasets_of_a_loader_are_checked(make: Make) -> None:
    plain, changing, earlier = (
        make(crop=TrainCrop(24), mix=mix, augment=None) for mix in (None, LATER, Schedule({0: None}))
    )
    state = states(ConcatDataset([plain, changing]))
    assert state["schedules"] == [{}, {"mix": repr(LATER)}]
    loader_of(ConcatDataset([plain, changing])).load_state_dict(state)
    for other, found in ((earlier, "Schedule({0: None})"), (plain.subset(range(33)).dataset, "no Schedule")):
        other = make(crop=TrainCrop(24), mix=other.mix, augment=None)
        with pytest.raises(ConfigError) as error:
            loader_of(ConcatDataset([plain, other])).load_state_dict(state)
        assert f"mix of dataset 1 of the state is {LATER!r}, here it is {found}" in str(error.value)


# Prints the digest of each batch of five epochs. Kills itself after a batch; the state is in a file by then.
RUN = """
import json, os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from test_schedule import AUGMENT, CROPS, LATER, digest
from dali_diffusemix import DiffuseMixDataset, DiffuseMixLoader

_, _, root, edits, bank, resident, file, last = sys.argv
dataset = DiffuseMixDataset(root, edits=edits, fractals=bank, crop=CROPS, mix=LATER, augment=AUGMENT, seed=3)
loader = DiffuseMixLoader(
    dataset, 7, shuffle=True, drop_last=True, device="cpu", num_workers=2, resident=resident or None
)
state = Path(file)
if state.exists():
    loader.load_state_dict(json.loads(state.read_text()))
delivered = 0
while loader.state_dict()["epoch"] < 5:
    for batch in loader:
        print(loader.state_dict()["epoch"], digest(batch), flush=True)
        state.write_text(json.dumps(loader.state_dict()))
        delivered += 1
        if delivered == int(last):
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["files", "raw", "host"])
def test_progressive_resizing_killed_in_the_middle_epoch(
    kind: str, make: Make, raw: dict[str, Path], photos: Path, edits: Path, bank: FractalBank, tmp_path: Path
) -> None:
    """Four batches an epoch: killed after the 10th, in the first epoch of the second size, and after the 14th."""
    stores = {"root": photos, "edits": edits} if kind == "files" else raw
    whole = list(itertools.chain(*epochs(loader_of(make(mix=LATER), shuffle=True, drop_last=True), 5)))
    assert len(whole) == 20

    def run(last: int) -> list[str]:
        resident = "host" if kind == "host" else ""
        arguments = [Path(__file__).parent, stores["root"], stores["edits"], bank.path, resident, tmp_path / "s", last]
        done = subprocess.run(
            [sys.executable, "-c", RUN, *map(str, arguments)], capture_output=True, text=True, check=False
        )
        assert done.returncode == (-signal.SIGKILL if last else 0), done.stderr
        return [line.split()[1] for line in done.stdout.splitlines()]

    assert run(10) == whole[:10]
    assert json.loads((tmp_path / "s").read_text())["epoch"] == 2
    assert run(4) == whole[10:14]
    assert run(0) == whole[14:]


# --- pictures


def test_sheets_and_animations_show_all_sizes(make: Make) -> None:
    dataset, largest = make(), make(crop=TrainCrop(40))
    sheet, other = (epochs_sheet(one, epochs=[0, 2, 4], indices=[1, 2]) for one in (dataset, largest))
    layout = Layout.of((40, 40), rows=2, columns=4, groups=(1,), notes=3)
    for column in (0, 3):  # the originals, and the epoch with the largest samples
        (left, top), (height, width) = layout.corner(1, column), layout.cell
        cell = (left, top, left + width, top + height)
        assert sheet.crop(cell) == other.crop(cell)
    frames = animation(dataset, index=3, epochs=[0, 3, 4])
    assert len({frame.size for frame in frames}) == 1
    assert encoded(frames, ".webp") and encoded(frames, ".gif")


def test_it_says_what_it_is(make: Make) -> None:
    assert {written(LATER), written(CROPS)} <= {line[4:].split("  ")[-1].strip() for line in repr(make()).splitlines()}
    assert isinstance(make().catalog, Catalog)
