"""Ray Train with two workers: the loader as it is shares the epoch. `prepare_data_loader` would replace it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from samples import described, training_set
from scripts import Measured, version

from dali_diffusemix import DiffuseMixLoader

ray = pytest.importorskip("ray", reason="Ray is not installed: make clients")
pytest.importorskip("ray.train.torch", reason="Ray Train is not installed: make clients")

# Its own use of what it deprecates.
pytestmark = pytest.mark.filterwarnings("ignore")

HERE = Path(__file__).parent
BATCH = 4  # on each of two workers


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    paths = [str(HERE), str(HERE.parent / "integrations"), str(HERE.parent)]
    environment = {"env_vars": {"PYTHONPATH": ":".join(paths), "OMP_NUM_THREADS": "1"}}
    ray.init(num_cpus=3, include_dashboard=False, runtime_env=environment, log_to_driver=False)
    yield
    ray.shutdown()


def trained(config: dict[str, Any]) -> None:
    """Two epochs on each worker, which notes its batches; with "resume" after batch 6."""
    import random
    import warnings

    import numpy as np
    from ray.train import get_context
    from ray.train.torch import prepare_data_loader

    random.seed(0)
    np.random.seed(0)
    rank = get_context().get_world_rank()
    loader: Any = DiffuseMixLoader(training_set(Path(config["data"])), BATCH, shuffle=True, device="cpu")
    if "state" in config:
        loader.load_state_dict(config["state"])
    batches, states, said = [], [], ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            given = prepare_data_loader(loader) if config["prepare"] else loader
            while len(batches) < 10:
                for images, labels in given:
                    batches.append(described(images, labels))
                    states.append(loader.state_dict())
                if "state" in config and loader.state_dict()["epoch"] == 2:
                    break
            said = type(getattr(given, "_dataloader", given)).__name__
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
    out = Path(config["out"]) / f"{rank}.json"
    out.write_text(json.dumps([batches, states, said, sorted({one.category.__name__ for one in caught})]))


def fit(data: Path, out: Path, **config: Any) -> list[Any]:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    out.mkdir()
    TorchTrainer(
        trained,
        train_loop_config={"data": str(data), "out": str(out), "prepare": False, **config},
        scaling_config=ScalingConfig(num_workers=2, use_gpu=False),
        torch_config=TorchConfig(backend="gloo"),
        run_config=RunConfig(storage_path=str(out / "ray")),
    ).fit()
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]


def alone(data: Path, rank: int) -> list[Any]:
    loader = DiffuseMixLoader(training_set(data), BATCH, shuffle=True, device="cpu", rank=rank, world_size=2)
    return [list(described(images, labels)) for _ in range(2) for images, labels in loader]


@pytest.mark.usefixtures("cluster")
def test_the_loader_as_it_is(data: Path, tmp_path: Path, measured: Measured) -> None:
    whole = fit(data, tmp_path / "whole")
    for rank, (batches, _, said, _) in enumerate(whole):
        assert (batches, said) == (alone(data, rank), "DiffuseMixLoader")
    again = fit(data, tmp_path / "again", state=whole[0][1][6])
    for rank in range(2):
        assert again[rank][0] == whole[rank][0][7:]
    measured(ray=version("ray"))


def test_one_worker_is_left_alone(data: Path, measured: Measured) -> None:
    """With one worker it only moves batches to the device."""
    from ray.train.torch.train_loop_utils import _WrappedDataLoader

    loader = DiffuseMixLoader(training_set(data), BATCH, shuffle=True, device="cpu")
    epochs = [[described(*batch) for batch in loader] for _ in range(2)]
    loader.set_epoch(0)
    wrapped = _WrappedDataLoader(loader, torch.device("cpu"), False)
    assert [[described(*batch) for batch in wrapped] for _ in range(2)] == epochs
    measured(ray=version("ray"))
