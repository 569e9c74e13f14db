"""Several processes of torch.distributed: together they deliver what one process does, and go on as any other number.

The processes run this file as a script. The long versions of the last two tests are in tests/soak, which has torchrun
start them, as tests/integrations has.
"""

import argparse
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any, Final

import pytest
import warm

from dali_diffusemix import ConfigError, DiffuseMixDataset, DiffuseMixLoader, FractalBank, MixSpec, TrainCrop

pytest.importorskip("nvidia.dali", reason="DALI is not installed on this machine")

GLOBAL: Final = 8  # samples of all ranks in a step
EPOCHS: Final = 2
STEPS: Final = 2  # after which the state is taken
# 33 samples in a fixed epoch, 99 in an expanded one: the last step has 1 sample, or 3, for 4 ranks.
CASES: Final[dict[str, dict[str, Any]]] = {
    f"{epoch}, {'shuffled' if shuffle else 'in order'}{', full batches' if drop_last else ''}": {
        "epoch": epoch,
        "shuffle": shuffle,
        "drop_last": drop_last,
    }
    for epoch, shuffle, drop_last in (
        ("fixed", False, False),
        ("fixed", True, False),
        ("fixed", True, True),
        ("expanded", False, True),
        ("expanded", True, False),
    )
}
RESUMED: Final = "fixed, shuffled"

Batches = list[dict[str, list[Any]]]


def load(
    folders: tuple[Path, ...], case: str, batch_size: int, **options: Any
) -> tuple[DiffuseMixDataset, DiffuseMixLoader]:
    root, edits, fractals = folders
    settings = CASES[case]
    mix = MixSpec(epoch=settings["epoch"])
    dataset = DiffuseMixDataset(root, edits=edits, fractals=fractals, mix=mix, crop=TrainCrop(24), seed=5)
    return dataset, DiffuseMixLoader(
        dataset,
        batch_size,
        shuffle=settings["shuffle"],
        drop_last=settings["drop_last"],
        device="cpu",
        return_index=True,
        **options,
    )


def written(batches: Iterable[Any]) -> Batches:
    """What is compared of batches."""
    return [
        {
            "indices": indices.tolist(),
            "labels": labels.tolist(),
            "pixels": [hashlib.blake2b(image.numpy().tobytes(), digest_size=8).hexdigest() for image in images],
        }
        for images, labels, indices in batches
    ]


# --- one of the processes -------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("folders", type=Path, nargs=3)
    options = parser.parse_args()
    folders = tuple(options.folders)
    from torch import distributed

    rank, world_size = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
    meeting = f"file://{options.out}/meeting-{world_size}"
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world_size)
    found: dict[str, Any] = {"rank": rank, "cases": {}}
    for case in CASES:
        _, loader = load(folders, case, GLOBAL // world_size)
        assert (loader.rank, loader.world_size) == (rank, world_size)
        epochs = [written(loader) for _ in range(EPOCHS)]
        found["cases"][case] = {"length": len(loader), "count": len(loader.sampler), "epochs": epochs}

    _, loader = load(folders, RESUMED, GLOBAL // world_size)
    iterator = iter(loader)
    written(islice(iterator, STEPS))
    found["state"] = loader.state_dict()
    # A run of another number of processes may have been here.
    if (state := options.out / "state.json").exists():
        _, loader = load(folders, RESUMED, GLOBAL // world_size)
        loader.load_state_dict(json.loads(state.read_text()))
        found["resumed"] = written(loader)
        _, loader = load(folders, RESUMED, 3)
        try:
            loader.load_state_dict(json.loads(state.read_text()))
        except ConfigError as error:
            found["refused"] = str(error)
    (options.out / f"{world_size}-{rank}.json").write_text(json.dumps(found))
    distributed.barrier()
    if rank == 0:
        state.write_text(json.dumps(found["state"]))
    distributed.destroy_process_group()


# --- the tests ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(photos: Path, edits: Path, bank: FractalBank) -> tuple[Path, ...]:
    assert bank.path is not None
    return photos, edits, bank.path


@pytest.fixture(scope="module")
def ranks(folders: tuple[Path, ...], tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What each rank found, by the number of ranks: 4, and then 2, who find the state of the 4."""
    out = tmp_path_factory.mktemp("ranks")
    found = {}
    for world_size in (4, 2):
        environment = {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world_size)}
        started = [
            warm.Script(__file__, out, *folders, env={**environment, "RANK": str(rank)}) for rank in range(world_size)
        ]
        for process in started:
            with process:
                _, errors = process.communicate(120)
                assert process.returncode == 0, errors[-4000:]
        found[world_size] = [json.loads((out / f"{world_size}-{rank}.json").read_text()) for rank in range(world_size)]
    return found


@pytest.fixture(scope="module")
def alone(folders: tuple[Path, ...]) -> dict[str, list[Batches]]:
    """What one process delivers, epoch by epoch."""
    epochs = {}
    for case in CASES:
        with load(folders, case, GLOBAL)[1] as loader:
            epochs[case] = [written(loader) for _ in range(EPOCHS)]
    return epochs


def together(batches: list[Batches]) -> Batches:
    """The ranks' batches, one after the other, step by step. They have equally many."""
    return [
        {name: [value for batch in step for value in batch[name]] for name in step[0]}
        for step in zip(*batches, strict=True)
    ]


def filled(batches: Batches, world_size: int) -> Batches:
    """A last step with fewer samples than ranks is filled up from the epoch's start."""
    first, *_, last = batches
    missing = max(0, world_size - len(last["indices"]))
    return [*batches[:-1], {name: last[name] + first[name][:missing] for name in last}]


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_ranks_share_the_global_batches(
    ranks: dict[int, list[dict[str, Any]]], alone: dict[str, list[Batches]], world_size: int, case: str
) -> None:
    found = [rank["cases"][case] for rank in ranks[world_size]]
    for epoch in range(EPOCHS):
        assert together([rank["epochs"][epoch] for rank in found]) == filled(alone[case][epoch], world_size)
    samples = {"fixed": 33, "expanded": 99}[CASES[case]["epoch"]]
    steps = samples // GLOBAL + (not CASES[case]["drop_last"])
    for rank in found:
        assert rank["length"] == steps
        for batches in rank["epochs"]:
            assert len(batches) == steps
            assert sum(len(batch["indices"]) for batch in batches) == rank["count"]
            assert all(len(batch["indices"]) == GLOBAL // world_size for batch in batches[:-1])
            assert len(batches[-1]["indices"]) >= 1


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_that_are_given_are_the_same(
    folders: tuple[Path, ...], ranks: dict[int, list[dict[str, Any]]], world_size: int
) -> None:
    for case, rank in zip(CASES, range(world_size), strict=False):
        with load(folders, case, GLOBAL // world_size, rank=rank, world_size=world_size)[1] as loader:
            assert written(loader) == ranks[world_size][rank]["cases"][case]["epochs"][0]
            assert len(loader) == ranks[world_size][rank]["cases"][case]["length"]


def test_another_number_of_ranks_goes_on(
    folders: tuple[Path, ...], ranks: dict[int, list[dict[str, Any]]], alone: dict[str, list[Batches]]
) -> None:
    states = [rank["state"] for world_size in (4, 2) for rank in ranks[world_size]]
    assert all(state == states[0] for state in states)
    rest = alone[RESUMED][0][STEPS:]  # of which the last has one sample
    of_two = filled(alone[RESUMED][0], 2)[STEPS:]
    assert together([rank["resumed"] for rank in ranks[2]]) == of_two
    with load(folders, RESUMED, GLOBAL)[1] as loader:
        loader.load_state_dict(states[0])
        assert written(loader) == rest
        assert written(loader) == alone[RESUMED][1]


def test_another_global_batch_is_refused(ranks: dict[int, list[dict[str, Any]]]) -> None:
    for rank in ranks[2]:
        assert "places of the state is 16 of 33, which must be a multiple of the global batch" in rank["refused"]
        assert "batch_size x world_size = 6" in rank["refused"]


@pytest.mark.slow
def test_a_killed_training_goes_on(folders: tuple[Path, ...], tmp_path: Path) -> None:
    """At a random step and time; `make soak` kills it twenty times, and trains on with fewer processes."""
    import numpy as np
    from training import Training, check_all_lines, delivered, kill_somewhere, runs

    def training(out: str, *more: object) -> Training:
        return Training([*folders, tmp_path / out, "--epochs", 2, "--batch-size", 4, "--shuffle", *more], warm=True)

    training("whole").finish()
    expected = delivered(tmp_path / "whole")
    draw = np.random.default_rng()
    killed = training("killed", "--pause", 0.05)
    kill_somewhere(killed, tmp_path / "killed", draw, steps=(2, 8))
    training("killed").finish()

    assert delivered(tmp_path / "killed") == expected
    assert [len(batch) for batch in expected.values()] == 2 * (8 * [4] + [1])
    check_all_lines(tmp_path / "killed", expected)
    (whole,) = runs(tmp_path / "whole")
    for run in runs(tmp_path / "killed"):
        assert all(run.losses(step) == whole.losses(step) for step in run.steps)


DAMAGE: Final[dict[int, Callable[[Path], object]]] = {
    4: lambda file: file.write_bytes(b""),
    13: lambda file: file.write_bytes(file.read_bytes()[:200]),
    14: lambda file: file.unlink(),
    15: lambda file: (file.unlink(), file.mkdir()),
    32: lambda file: file.write_text("no image"),
}


@pytest.mark.filterwarnings("ignore::dali_diffusemix.StaleCatalogWarning")
@pytest.mark.parametrize("visible_parts", [True, False])
def test_every_rank_puts_the_same_in_place_of_damaged_images(
    photos: Path, tmp_path: Path, edits: Path, bank: FractalBank, alone: dict[str, list[Batches]], visible_parts: bool
) -> None:
    import shutil

    root, case = tmp_path / "train", "fixed, in order"
    shutil.copytree(photos, root)
    assert bank.path is not None
    dataset, _ = load((root, edits, bank.path), case, 1)
    for index, damage in DAMAGE.items():
        damage(Path(dataset.path_of(index)))
    found = []
    for rank in range(4):
        with (
            warnings.catch_warnings(),
            load((root, edits, bank.path), case, GLOBAL // 4, rank=rank, world_size=4, visible_parts=visible_parts)[
                1
            ] as loader,
        ):
            warnings.simplefilter("ignore")
            found.append(written(loader))
    (delivered,) = together([[step] for step in together(found)])
    (undamaged,) = together([[step] for step in filled(alone[case][0], 4)])
    substitutes = {4: 5, 13: 16, 14: 16, 15: 16, 32: 0}
    for place, index in enumerate([*range(33), 0, 1, 2]):
        # Of parts an image may not be seen at all in its sample; then nothing is missing.
        expected = index if visible_parts and delivered["indices"][place] == index else substitutes.get(index, index)
        assert delivered["indices"][place] == expected or (visible_parts and index in (13, 14))
        source = delivered["indices"][place]
        assert [delivered[name][place] for name in delivered] == [undamaged[name][source] for name in undamaged]


if __name__ == "__main__":
    main()
