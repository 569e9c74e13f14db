"""The dataset under plain DataLoader: ImageFolder's attributes, epochs that persistent workers see, bad input."""

import os
import pickle
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import warm
from material import shared, write_photograph
from torch.utils.data import DataLoader

from dali_diffusemix import (
    Catalog,
    CatalogError,
    ConfigError,
    DecodeError,
    DiffuseMixDataset,
    EditStore,
    EvalCrop,
    FractalBank,
    MixSpec,
    QuarantineWarning,
    RandomCrop,
    RepeatedEpochWarning,
    StoreError,
    TrainCrop,
)
from dali_diffusemix.images.codec import decode
from dali_diffusemix.mix import IMAGENET
from dali_diffusemix.mix import TensorFormat as Format
from dali_diffusemix.mix.pixel import encode, mixed_image


def mixed(photos: Path, edits: Path, bank: FractalBank, **options: object) -> DiffuseMixDataset:
    arguments = {"crop": TrainCrop(40), "mix": MixSpec.paper(), "edits": edits, "fractals": bank, **options}
    return DiffuseMixDataset(photos, **arguments)  # type: ignore[arg-type]


def test_it_has_image_folders_attributes(photos: Path) -> None:
    dataset = DiffuseMixDataset(photos, crop=EvalCrop(32))
    assert len(dataset) == 33
    assert dataset.classes == ["ants", "bees", "cats"]
    assert dataset.class_to_idx == {"ants": 0, "bees": 1, "cats": 2}
    assert dataset.targets == [0] * 11 + [1] * 11 + [2] * 11
    assert list(dataset.samples) == [
        (os.path.join(photos, name, f"{i:02}.jpg"), label)  # noqa: PTH118 - as ImageFolder makes them
        for label, name in enumerate(dataset.classes)
        for i in range(11)
    ]
    assert dataset.imgs[-1] == dataset.samples[32] == dataset.samples[31:][1]


def test_a_sample_is_the_specification_of_its_plan(photos: Path, edits: Path, bank: FractalBank) -> None:
    dataset = mixed(photos, edits, bank)
    dataset.set_epoch(4)
    plan = dataset.planner.batch(4, range(33))
    assert 0 < plan.mixed.sum() < 33
    store = EditStore.open(edits)
    for i in range(33):
        image, label = dataset[i]
        assert image.shape == (3, 40, 40) and image.dtype == torch.float32
        assert label == i // 11 and isinstance(label, int)
        edit = decode(store.encoded(int(plan.edit[i]))) if plan.edit[i] >= 0 else None
        fractal = bank.images[plan.fractal[i]] if plan.fractal[i] >= 0 else None
        expected = encode(mixed_image(plan, i, decode(dataset.path_of(i)), edit, fractal), Format(normalize=IMAGENET))
        np.testing.assert_allclose(image.numpy(), expected, atol=2e-5)


def test_an_expanded_epoch_is_longer_and_labels_follow_the_originals(
    photos: Path, edits: Path, bank: FractalBank
) -> None:
    dataset = mixed(photos, edits, bank, mix=MixSpec.release())
    assert len(dataset) == 33 * 3
    assert [dataset[33 + j][1] for j in range(66)] == [j // 22 for j in range(66)]


def test_indices_behave_as_a_lists(photos: Path) -> None:
    dataset = DiffuseMixDataset(photos, crop=EvalCrop(32))
    assert torch.equal(dataset[-1][0], dataset[32][0])
    for index in (33, -34):
        with pytest.raises(IndexError, match="out of range for a dataset of 33"):
            dataset[index]
    assert sum(1 for _ in dataset) == 33  # the old protocol ends by IndexError
    with pytest.raises(TypeError):
        dataset[1.5]  # type: ignore[index]


def test_indices_of_a_batch_behave_as_a_lists(photos: Path) -> None:
    """As ImageFolder's under DataLoader, and as in the loader."""
    dataset = DiffuseMixDataset(photos, crop=EvalCrop(32))
    last, first = dataset.__getitems__([-1, torch.tensor(-33)])  # type: ignore[list-item]
    assert torch.equal(last[0], dataset[32][0]) and torch.equal(first[0], dataset[0][0])
    for index in (33, 305, -34):
        with pytest.raises(IndexError, match=f"index {index} is out of range for a dataset of 33"):
            dataset.__getitems__([0, index])
        with pytest.raises(IndexError, match=f"index {index} is out of range"):
            list(DataLoader(dataset, sampler=[0, index], batch_size=2))


def test_targets_are_made_once(photos: Path) -> None:
    dataset = DiffuseMixDataset(photos, crop=EvalCrop(32))
    assert dataset.targets is dataset.targets
    assert pickle.loads(pickle.dumps(dataset)).targets == dataset.targets


def test_workers_and_batches_change_nothing(photos: Path, edits: Path, bank: FractalBank) -> None:
    dataset = mixed(photos, edits, bank)
    alone = [dataset[i] for i in range(33)]
    for workers, batch_size in ((0, 7), (2, 4)):
        images, labels = zip(*DataLoader(dataset, batch_size=batch_size, num_workers=workers), strict=True)
        dataset.set_epoch(0)
        assert torch.equal(torch.cat(images), torch.stack([image for image, _ in alone]))
        assert torch.cat(labels).tolist() == [label for _, label in alone]


def test_persistent_workers_see_a_new_epoch(photos: Path, edits: Path, bank: FractalBank) -> None:
    dataset = mixed(photos, edits, bank)
    loader = DataLoader(dataset, batch_size=11, num_workers=2, persistent_workers=True)
    epochs = []
    for epoch in range(3):
        dataset.set_epoch(epoch)
        epochs.append(torch.cat([images for images, _ in loader]))
    for epoch in range(3):
        dataset.set_epoch(epoch)
        assert torch.equal(epochs[epoch], torch.stack([dataset[i][0] for i in range(33)]))
    assert not torch.equal(epochs[0], epochs[1]) and not torch.equal(epochs[1], epochs[2])


EPOCHS_IN_WORKERS = """
import sys, warnings
from torch.utils.data import DataLoader
from dali_diffusemix import DiffuseMixDataset, TrainCrop

warnings.simplefilter("always")
for persistent in (False, True):
    dataset = DiffuseMixDataset(sys.argv[1], crop=TrainCrop(16))
    loader = DataLoader(dataset, batch_size=4, num_workers=2, persistent_workers=persistent)
    for epoch in (0, 1, 1):
        if epoch != dataset.epoch:
            dataset.set_epoch(epoch)
        for _ in loader:
            pass
        print("done", file=sys.stderr)
"""


@pytest.mark.slow
def test_an_epoch_never_repeats_silently_in_workers(photos: Path) -> None:
    """Neither in workers that are made for each epoch nor in persistent ones."""
    said = warm.run("-c", EPOCHS_IN_WORKERS, photos).stderr.split("done")
    assert len(said) == 7
    for epochs in (said[:3], said[3:6]):
        assert "Repeated" not in epochs[0] + epochs[1]
        assert "RepeatedEpochWarning: epoch 1 has been drawn once already" in epochs[2]


def test_a_repeated_epoch_warns_in_a_real_loop(photos: Path) -> None:
    dataset = DiffuseMixDataset(photos, crop=TrainCrop(16))
    loader = DataLoader(dataset, batch_size=11)
    for _ in loader:
        pass
    with pytest.warns(RepeatedEpochWarning, match="epoch 0 has been drawn once already"):
        for _ in loader:
            pass
    dataset.set_epoch(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in loader:
            pass


def test_a_validation_set_may_repeat(photos: Path, edits: Path, bank: FractalBank) -> None:
    """All its epochs are the same, and nothing is lost by that."""
    loader = DataLoader(DiffuseMixDataset(photos, crop=EvalCrop(16)), batch_size=11)
    first, second = (torch.cat([images for images, _ in loader]) for _ in range(2))
    assert torch.equal(first, second)
    varied = DataLoader(mixed(photos, edits, bank, crop=EvalCrop(16)), batch_size=11)
    with pytest.warns(RepeatedEpochWarning):
        for _ in [*varied, *varied]:
            pass


def test_it_is_picklable(photos: Path, edits: Path, bank: FractalBank) -> None:
    dataset = mixed(photos, edits, bank)
    dataset.set_epoch(2)
    again = pickle.loads(pickle.dumps(dataset))
    assert again.epoch == 2
    assert torch.equal(again[5][0], dataset[5][0])
    assert len(pickle.dumps(dataset)) < 20_000


@pytest.mark.slow
def test_spawned_workers_give_the_same(photos: Path, edits: Path, bank: FractalBank) -> None:
    dataset = mixed(photos, edits, bank)
    loader = DataLoader(dataset, batch_size=33, num_workers=1, multiprocessing_context="spawn")
    dataset.set_epoch(3)
    (images, _) = next(iter(loader))
    assert torch.equal(images, torch.stack([dataset[i][0] for i in range(33)]))


def test_the_edits_lie_with_the_photographs_they_are_of(photos: Path, edits: Path) -> None:
    """Pairing is by path: an edit looks like its original, downsampled to nothing but colours."""
    store = EditStore.open(edits)
    for edit in range(0, len(store), 7):
        original = int(store.originals_of(np.array([edit]))[0])
        assert store.starts[original] <= edit < store.starts[original + 1]


# --- bad input ------------------------------------------------------------------------------------------------------


def test_a_real_folder_as_people_have_it(tmp_path: Path) -> None:
    root = shared("ants_bees") / "train"
    dataset = DiffuseMixDataset(root, crop=EvalCrop(64))
    assert len(dataset) == 244
    (rejected,) = dataset.catalog.rejected
    assert rejected.path == "ants/imageNotFound.gif" and "unsupported" in rejected.reason
    assert sum(len(labels) for _, labels in DataLoader(dataset, batch_size=61)) == 244


def test_edits_of_other_originals_are_refused(tmp_path: Path, edits: Path) -> None:
    (tmp_path / "dogs").mkdir()
    write_photograph(tmp_path / "dogs" / "a.jpg", 0, 50, 50)
    with pytest.raises(StoreError, match="the edits belong to other originals"):
        DiffuseMixDataset(tmp_path, crop=EvalCrop(32), edits=edits, mix=None)
    catalog = Catalog.from_arrays(["dogs/a.jpg"], [0], ["dogs"], [(50, 50)])
    with pytest.raises(StoreError, match="built from other originals"):
        DiffuseMixDataset(tmp_path, crop=EvalCrop(32), edits=edits, catalog=catalog, mix=None)


def test_a_catalog_takes_other_layouts(tmp_path: Path, photos: Path) -> None:
    shutil.copytree(photos, tmp_path / "flat")
    paths = [f"{name}/{i:02}.jpg" for i in range(11) for name in ("cats", "ants")]
    catalog = Catalog.from_arrays(paths, [0, 1] * 11, ["feline", "insect"], root=tmp_path / "flat")
    dataset = DiffuseMixDataset(tmp_path / "flat", crop=EvalCrop(32), catalog=catalog)
    assert dataset.classes == ["feline", "insect"] and dataset.targets == [0, 1] * 11
    assert dataset.samples[2][0].endswith("cats/01.jpg")
    assert dataset[0][0].shape == (3, 32, 32)


def test_missing_parts_are_named(photos: Path, edits: Path, bank: FractalBank, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="edits must be given with mix"):
        DiffuseMixDataset(photos, crop=EvalCrop(32), mix=MixSpec.paper())
    with pytest.raises(ConfigError, match="needs a fractal bank"):
        DiffuseMixDataset(photos, crop=EvalCrop(32), mix=MixSpec.paper(), edits=edits)
    with pytest.raises(StoreError, match="nowhere"):
        DiffuseMixDataset(photos, crop=EvalCrop(32), edits=tmp_path / "nowhere", mix=None)
    with pytest.raises(StoreError, match=r"nowhere\.npy"):
        DiffuseMixDataset(photos, crop=EvalCrop(32), fractals=tmp_path / "nowhere.npy")
    with pytest.raises(CatalogError, match="nowhere"):
        DiffuseMixDataset(tmp_path / "nowhere", crop=EvalCrop(32))
    with pytest.raises(ConfigError, match="seed must be at least 0"):
        DiffuseMixDataset(photos, crop=EvalCrop(32), seed=-1)
    plain = MixSpec(fractal_weight=0)
    assert DiffuseMixDataset(photos, crop=EvalCrop(32), mix=plain, edits=edits)[0][0].isfinite().all()


@pytest.mark.parametrize("damage", ["truncated", "gone"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    root = tmp_path / "train"
    (root / "a b").mkdir(parents=True)
    file = root / "a b" / 'it\'s "odd".jpg'
    write_photograph(file, 1, 200, 150)
    dataset = DiffuseMixDataset(root, crop=RandomCrop(32, padding=4), on_error="raise")
    assert dataset[0][0].shape == (3, 32, 32)
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:1500])
    assert len(dataset) == 1  # the catalog keeps the row
    said = "cannot be read \\(No such file" if damage == "gone" else "cannot be decoded .*; copy it again or remove it"
    with pytest.raises(DecodeError, match=f"odd.*{said}"):
        dataset[0]


def test_a_damaged_edit_has_the_remedy_of_its_store(photos: Path, edits: Path, tmp_path: Path) -> None:
    store = shutil.copytree(edits, tmp_path / "edits")
    dataset = DiffuseMixDataset(photos, edits=store, mix=MixSpec(probability=1, fractal_weight=0), crop=EvalCrop(32))
    assert dataset.store is not None
    row = dataset.store.index[dataset.planner.batch(0, [5]).edit[0]]
    with (store / "shards" / f"edits-{row['shard']:06}.tar").open("r+b") as file:
        file.seek(int(row["offset"]))
        file.write(bytes(int(row["length"])))
    with pytest.warns(QuarantineWarning):
        dataset[5]
    (found,) = dataset.quarantine.values()
    assert found.kind == "edit" and "is no image of a supported format" in found.reason
    assert "run `dali-diffusemix verify STORE --discard`" in found.reason
    assert "in memory" not in found.reason and "convert it" not in found.reason


def test_what_is_easily_given_by_mistake(photos: Path, tmp_path: Path) -> None:
    for crop, remedy in ((96, r"TrainCrop\(96\)"), (TrainCrop, r"TrainCrop\(224\)"), ("train", "TrainCrop")):
        with pytest.raises(ConfigError, match=rf"crop must be a TrainCrop, .*{remedy}"):
            DiffuseMixDataset(photos, crop=crop)  # type: ignore[arg-type]
    for mix in ("paper", MixSpec, MixSpec.paper):
        with pytest.raises(ConfigError, match=r"mix must be a MixSpec or None, found .*MixSpec\.paper\(\)"):
            DiffuseMixDataset(photos, crop=TrainCrop(32), mix=mix)  # type: ignore[arg-type]
    with pytest.raises(CatalogError, match="there is no such folder"):
        DiffuseMixDataset(tmp_path / "trian", crop=TrainCrop(32))
