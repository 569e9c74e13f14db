"""Substitution: a function of file and draw, whatever is remembered; and damaged files in a row cost what they are."""

import io
import shutil
import time
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from material import photograph
from PIL import Image
from torch.utils.data import DataLoader

from dali_diffusemix import (
    Catalog,
    DecodeError,
    DiffuseMixDataset,
    DiffuseMixLoader,
    EvalCrop,
    MixSpec,
    QuarantineWarning,
    TrainCrop,
)
from dali_diffusemix.loading.quarantine import Failure, Kind, Quarantine, Substitution
from dali_diffusemix.plan import BatchPlan, Planner

quiet = pytest.mark.filterwarnings("ignore::dali_diffusemix.QuarantineWarning")


class Edits:
    """One edit of each original."""

    def __init__(self, count: int) -> None:
        self.starts = np.arange(count + 1)

    def originals_of(self, edits: np.ndarray) -> np.ndarray:
        return edits


class Files:
    """Originals and edits, some of which fail; pieces are the place of what was decoded, and whether its edit was."""

    def __init__(self, count: int, originals: set[int], edits: set[int] = frozenset()) -> None:  # type: ignore[assignment]
        self.originals, self.edits = originals, edits
        crop, mix = TrainCrop(8), MixSpec(probability=1, fractal_weight=0)
        self.planner = Planner(seed=0, crop=crop, sizes=np.full((count, 2), 9, np.int32), mix=mix, edits=Edits(count))
        self.decoded = 0

    def decode(self, rows: BatchPlan) -> tuple[tuple[int, bool], Mapping[int, Failure]]:
        self.decoded += len(rows)
        failures = {}
        for place, (original, edit) in enumerate(zip(rows.original.tolist(), rows.edit.tolist(), strict=True)):
            if original in self.originals:
                failures[place] = Failure("original", DecodeError(f"original {original} is damaged"))
            elif edit in self.edits:
                failures[place] = Failure("edit", DecodeError(f"edit {edit} is damaged"))
        return (int(rows.original[0]), bool(rows.mixed[0])), failures

    def substitution(self) -> Substitution[tuple[int, bool]]:
        def name_of(row: BatchPlan, kind: Kind) -> str:
            return f"{kind} {row.original[0]}"

        return Substitution(self.planner, name_of, "substitute", size_of=lambda pieces: 2**20)

    def expected(self, index: int) -> tuple[int, bool]:
        """As the definition has it, a step at a time."""
        while index in self.originals:
            index = (index + 1) % len(self.planner)
        return index, index not in self.edits


@pytest.mark.slow
@quiet
@given(st.data())
def test_what_is_remembered_changes_nothing(data: st.DataObject) -> None:
    count = data.draw(st.integers(2, 60))
    places = st.sets(st.integers(0, count - 1))
    files = Files(count, data.draw(places.filter(lambda failing: len(failing) < count)), data.draw(places))
    order = data.draw(st.permutations(range(count)))
    batch = data.draw(st.integers(1, count))
    substitution, log = files.substitution(), Quarantine()
    for epoch in (0, 1, 0):
        for start in range(0, count, batch):
            plan = files.planner.batch(epoch, order[start : start + batch])
            _, failures = files.decode(plan)
            found = substitution(plan, failures, files.decode, log)
            assert set(found) == set(failures)
            for place, (row, pieces) in found.items():
                assert pieces == files.expected(int(plan.index[place])) == (int(row.original[0]), bool(row.mixed[0]))
                assert row.epoch == epoch and len(row) == 1
    # Both epochs, once each, whatever the number of passes and of chains.
    originals, edits = ({int(name.split()[1]) for name in log if name.startswith(kind)} for kind in ("orig", "edit"))
    assert originals == files.originals and edits == files.edits - files.originals
    assert all(entry.count == 2 for entry in log.values())


@quiet
def test_a_run_costs_its_length() -> None:
    """However the samples come: decodes grow with the run, not with its square."""
    for run in (100, 2000):
        files = Files(run + 500, set(range(100, 100 + run)))
        substitution, log = files.substitution(), Quarantine()
        order = np.random.default_rng(0).permutation(run + 500)
        for start in range(0, len(order), 50):
            plan = files.planner.batch(0, order[start : start + 50])
            failures = files.decode(plan)[1]
            if failures:
                substitution(plan, failures, files.decode, log)
        assert len(log) == run and files.decoded - len(order) < run + 200


@quiet
def test_storage_that_is_gone_ends_the_run() -> None:
    for count in (3, 5000):
        files = Files(count, set(range(count)))
        plan = files.planner.batch(0, [1])
        with pytest.raises(DecodeError, match=r"none of \d+ samples in a row could be made\. Check that the storage"):
            files.substitution()(plan, files.decode(plan)[1], files.decode, Quarantine())
        assert files.decoded < 1200
    files.originals.remove(17)  # one alone, far from here, that is not among those that are asked
    plan = files.planner.batch(0, [20])
    with pytest.raises(DecodeError, match="Check that the storage is there"):
        files.substitution()(plan, files.decode(plan)[1], files.decode, Quarantine())


def test_the_first_hundred_are_named() -> None:
    files = Files(300, set(range(150)))
    plan = files.planner.batch(0, np.arange(300))
    with pytest.warns(QuarantineWarning) as said:
        files.substitution()(plan, files.decode(plan)[1], files.decode, log := Quarantine())
    assert len(log) == 150 and len(said) == 101
    assert "more than 100 images could not be read" in str(said[-1].message)


# Real files -----------------------------------------------------------------------------------------------------------


def folder(root: Path, count: int) -> bytes:
    """So many copies of a photograph, 400 x 300; gives its file."""
    stream = io.BytesIO()
    Image.fromarray(photograph(0, 300, 400)).save(stream, "JPEG", quality=85)
    (root / "x").mkdir(parents=True)
    for place in range(count):
        (root / f"x/{place:05}.jpg").write_bytes(stream.getvalue())
    return stream.getvalue()


def dataset_of(root: Path, count: int) -> DiffuseMixDataset:
    paths = [f"x/{place:05}.jpg" for place in range(count)]
    catalog = Catalog.from_arrays(paths, np.zeros(count, np.int32), ["x"], np.tile([300, 400], (count, 1)))
    return DiffuseMixDataset(root, catalog=catalog, crop=EvalCrop(64))


def seconds(loader: DiffuseMixLoader) -> float:
    """Of the processors: what else runs on the machine does not count."""
    begin = time.process_time()
    for _ in loader:
        pass
    return time.process_time() - begin


@pytest.mark.slow
@quiet
def test_damaged_files_in_a_row_take_no_longer_than_spread_ones(tmp_path: Path) -> None:
    """80 of 400 in a row and 8 spread ones, in turn; the best of several epochs."""
    pytest.importorskip("nvidia.dali", reason="DALI is not installed on this machine")
    loaders = {}
    for name, damaged in (("spread", range(7, 400, 50)), ("in a row", range(100, 180))):
        content = folder(tmp_path / name, 400)
        for place in damaged:
            (tmp_path / name / f"x/{place:05}.jpg").write_bytes(content[: len(content) * 2 // 3])
        dataset = dataset_of(tmp_path / name, 400)
        loaders[name] = DiffuseMixLoader(dataset, 50, num_workers=2, device="cpu", shuffle=True)
    best = dict.fromkeys(loaders, 1e9)
    for _ in range(4):
        for name, loader in loaders.items():
            best[name] = min(best[name], seconds(loader))
    assert best["in a row"] <= 1.5 * best["spread"], best
    assert {name: len(loader.quarantine) for name, loader in loaders.items()} == {"spread": 8, "in a row": 80}


@quiet
@pytest.mark.parametrize("way", ["loader", "DataLoader", "two workers"])
def test_a_deleted_stretch_ends_nothing_and_takes_seconds(tmp_path: Path, way: str) -> None:
    folder(tmp_path / "train", 1400)
    dataset = dataset_of(tmp_path / "train", 1400)
    for place in range(50, 1350):
        (tmp_path / f"train/x/{place:05}.jpg").unlink()
    begin = time.perf_counter()
    if way == "loader":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed on this machine")
        loader = DiffuseMixLoader(dataset, 50, num_workers=2, device="cpu", shuffle=True, return_index=True)
        shown = [index for _, _, indices in loader for index in indices.tolist()]
        assert len(loader.quarantine) == 1300
        assert sorted(shown) == sorted([*range(50), *[1350] * 1301, *range(1351, 1400)])
    else:
        workers = 2 if way == "two workers" else 0
        batches = list(DataLoader(dataset, batch_size=50, num_workers=workers, shuffle=True))
        assert sum(len(labels) for _, labels in batches) == 1400
    assert time.perf_counter() - begin < 30


@quiet
def test_the_dataset_and_the_loader_substitute_alike_in_a_long_run(
    photos: Path, edits: Path, bank: object, tmp_path: Path
) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed on this machine")
    root = tmp_path / "train"
    shutil.copytree(photos, root)
    options = {"edits": edits, "fractals": bank, "crop": TrainCrop(40), "mix": MixSpec(probability=1)}
    dataset = DiffuseMixDataset(root, **options)  # type: ignore[arg-type]
    for place in (*range(8), 30, 31, 32):
        (root / dataset.catalog.path(place)).write_bytes(b"")
    loader = DiffuseMixLoader(
        dataset, 5, num_workers=2, device="cpu", shuffle=True, return_index=True, visible_parts=False
    )
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        order = DiffuseMixLoader(dataset, 5, device="cpu", shuffle=True)
        indices = [index for step in range(len(order)) for index in order.plan(epoch, step).index.tolist()]
        images, labels, shown = (torch.cat(part) for part in zip(*loader, strict=True))
        for image, label, at, index in zip(images, labels.tolist(), shown.tolist(), indices, strict=True):
            expected, expected_label = dataset[index]
            assert torch.equal(image, expected) and label == expected_label
            assert at == {**dict.fromkeys(range(8), 8), **dict.fromkeys((30, 31, 32), 8)}.get(index, index)


def test_a_mended_file_is_seen(tmp_path: Path) -> None:
    """In the loader's next epoch, and under DataLoader once it is drawn again."""
    pytest.importorskip("nvidia.dali", reason="DALI is not installed on this machine")
    content = folder(tmp_path / "train", 6)
    dataset = dataset_of(tmp_path / "train", 6)
    for place in (2, 3):
        (tmp_path / f"train/x/{place:05}.jpg").write_bytes(content[:500])
    loader = DiffuseMixLoader(dataset, 6, device="cpu", return_index=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QuarantineWarning)
        assert next(iter(loader))[2].tolist() == [0, 1, 4, 4, 4, 5]
        dataset[2], dataset[3]
        assert dataset._is_known_to_fail(2) and dataset._is_known_to_fail(3)
        for place in (2, 3):
            (tmp_path / f"train/x/{place:05}.jpg").write_bytes(content)
        loader.set_epoch(0)
        assert next(iter(loader))[2].tolist() == [0, 1, 2, 3, 4, 5]
        assert torch.equal(dataset[3][0], dataset[0][0]) and not dataset._is_known_to_fail(3)
