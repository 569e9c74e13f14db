"""Hugging Face Accelerate over the loader: metrics over exactly the samples, gradient accumulation, saved states."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler

from dali_diffusemix import ConfigError, DiffuseMixLoader

pytest.importorskip("nvidia.dali", reason="DALI is not installed on this machine")
accelerate = pytest.importorskip(
    "accelerate", reason="Accelerate is not installed: pip install 'dali-diffusemix[accelerate]'"
)

from accelerate.state import AcceleratorState, GradientState  # noqa: E402
from gathered import BATCH_SIZES, gathered, loader_of, report, synchronised  # noqa: E402
from samples import described, training_set  # noqa: E402

from dali_diffusemix.integrations.accelerate import prepare  # noqa: E402

SCRIPT = Path(__file__).with_name("gathered.py")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def accelerator() -> Any:
    return accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)


def whole(data: Path) -> str:
    """What stands for all samples of epoch 0, in the order of their indices."""
    ((images, labels, index),) = DiffuseMixLoader(training_set(data), 33, device="cpu", return_index=True)
    return described(torch.cat([images.flatten(1), labels[:, None]], dim=1), index)[1]


def check(found: dict[str, Any], data: Path) -> None:
    for name, (indices, pixels) in found["gathered"].items():
        assert sorted(indices) == list(range(33)), name
        assert pixels == whole(data), name
    assert len(found["gathered"]) == 2 * len(BATCH_SIZES)
    # Two batches at a time, and what is left of an epoch by itself.
    assert found["ours"] == found["theirs"]
    assert found["ours"].count(True) == 2 * -(-len(found["ours"]) // 4)
    before, after = found["resumed"]
    assert before == after and before


@pytest.mark.slow
def test_one_process(data: Path, tmp_path: Path) -> None:
    found = report(data, tmp_path)
    check(json.loads(json.dumps(found)), data)
    assert found["sizes"] == found["own sizes"] == [7, 7, 7, 7, 5]


@pytest.mark.slow
def test_two_processes(data: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", SCRIPT]
    done = subprocess.run([*command, data, tmp_path], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0]["processes"] == 2
    for found in ranks:
        check(found, data)
    # Of the last 5 samples the loader gives 2 and 3; for gathering it must be 3 and 3.
    assert [found["own sizes"] for found in ranks] == [[7, 7, 2], [7, 7, 3]]
    assert [found["sizes"] for found in ranks] == [[7, 7, 3], [7, 7, 3]]
    # The last batch was made anew, with the same seed for the transform.
    for found in ranks:
        assert len(set(found["seeds"])) == 3 and len(found["seeds"]) == 4 and found["seeds"][2] == found["seeds"][3]


def test_accelerators_own_prepare_leaves_both_alone(data: Path, accelerator: Any) -> None:
    """It must not make a DataLoader of them, which decodes on the CPU."""
    loader = loader_of(data, 4)
    prepared = prepare(loader, accelerator)
    assert accelerator.prepare(loader) is loader
    assert accelerator.prepare(prepared) is prepared
    assert prepared.dataset is loader.dataset
    assert (prepared.batch_size, prepared.total_batch_size, prepared.total_dataset_length) == (4, 4, 33)


def test_the_loader_itself_ends_an_accumulation(data: Path, accelerator: Any) -> None:
    """9 batches, 2 at a time: with Accelerate's own `prepare`, which leaves it alone, as with its own loaders."""
    theirs = accelerator.prepare(DataLoader(range(33), batch_size=4))  # type: ignore[arg-type]
    loader = accelerator.prepare(loader_of(data, 4))
    found = synchronised(accelerator, loader)
    assert found == synchronised(accelerator, theirs) and found.count(True) == 2 * 5
    assert not accelerator.gradient_state.in_dataloader
    for _ in loader:
        assert accelerator.gradient_state.in_dataloader
        break
    assert not accelerator.gradient_state.in_dataloader
    for _ in zip(theirs, loader, strict=True):  # nested, each end is its own
        pass
    assert not accelerator.gradient_state.in_dataloader


def test_batches_are_skipped_without_a_dataloader(data: Path, accelerator: Any) -> None:
    prepared = prepare(loader_of(data, 4, shuffle=True), accelerator)
    epochs = [[described(images, index) for images, _, index in prepared] for _ in range(3)]
    with pytest.raises(AttributeError, match=r"prepared\.skip_first_batches\(n\)"):
        accelerate.skip_first_batches(prepared, 5)
    prepared.set_epoch(1)
    assert [described(images, index) for images, _, index in prepared.skip_first_batches(5)] == epochs[1][5:]
    assert [described(images, index) for images, _, index in prepared] == epochs[2]
    with pytest.raises(ConfigError, match=r"count must lie in \[0, 9\), the batches of an epoch, found 9"):
        prepared.skip_first_batches(9)


def test_a_break_leaves_the_accelerator_outside(data: Path, accelerator: Any) -> None:
    prepared = prepare(loader_of(data, 4), accelerator)
    for _ in prepared:
        assert accelerator.gradient_state.in_dataloader
        break
    assert not accelerator.gradient_state.in_dataloader


def test_evaluation_within_an_epoch(data: Path, accelerator: Any) -> None:
    train, valid = (prepare(loader_of(data, size), accelerator) for size in (4, 7))
    ends = []
    for step, _ in enumerate(train):
        if step == 3:
            assert sorted(gathered(accelerator, valid)[0]) == list(range(33))
        ends.append(accelerator.gradient_state.end_of_dataloader)
    assert ends == [False] * 8 + [True]


def test_with_a_sampler_nothing_is_dropped(data: Path, accelerator: Any) -> None:
    chosen = [3, 1, 4, 1, 5, 9, 2, 6]
    prepared = prepare(loader_of(data, 4, sampler=chosen), accelerator)
    assert gathered(accelerator, prepared)[0] == chosen
    sampler = RandomSampler(range(33), generator=torch.Generator().manual_seed(0))
    prepared = prepare(loader_of(data, 4, sampler=sampler), accelerator)
    epoch = [described(images, index) for images, _, index in prepared]
    prepared.loader.sampler.generator.manual_seed(0)
    prepared.set_epoch(0)
    assert [described(images, index) for images, _, index in prepared.skip_first_batches(5)] == epoch[5:]
    batches = prepare(loader_of(data, 1, batch_sampler=[[1, 2], [3]]), accelerator)
    assert gathered(accelerator, batches)[0] == [1, 2, 3]
    with pytest.raises(ConfigError, match="must not have a batch sampler"):
        batches.skip_first_batches(1)


def test_what_does_not_fit_is_refused(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = loader_of(data, 4)
    for name in ("split_batches", "dispatch_batches"):
        config = accelerate.DataLoaderConfiguration(**{name: True})
        with pytest.raises(ConfigError, match=f"{name} of the accelerator must be False"):
            prepare(loader, accelerate.Accelerator(cpu=True, dataloader_config=config))
        AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True)
    monkeypatch.setattr(DiffuseMixLoader, "device", torch.device("cuda", 1))  # as on a machine that has one
    with pytest.raises(ConfigError, match=r"must be the accelerator's, 'cpu', found 'cuda:1'; give"):
        prepare(loader, accelerator)


def test_a_dataloader_made_of_the_loaders_attributes_gives_its_batches_or_raises(data: Path) -> None:
    """As `accelerate.skip_first_batches` makes one, and Ray Train's `prepare_data_loader`."""
    loader = DiffuseMixLoader(training_set(data), 4, shuffle=True, device="cpu")
    for _ in range(2):
        whole = [(images.clone(), labels) for images, labels in loader]
    loader.set_epoch(1)
    rest = list(accelerate.skip_first_batches(loader, 3))
    assert len(rest) == len(whole) - 3
    assert all(
        torch.equal(a, b)
        for ours, theirs in zip(whole[3:], rest, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    )
    next(iter(loader))  # epoch 1, so the next is 2
    ahead = list(accelerate.skip_first_batches(loader, 5))
    loader.set_epoch(2)
    expected = list(loader)[5:]
    assert all(torch.equal(a[0], b[0]) for a, b in zip(ahead, expected, strict=True))
    for options in (
        {"batch_transform": lambda images, labels, _: (images, labels)},
        {"return_index": True},
        {"dtype": torch.float16},
        {"rank": 0, "world_size": 2},
    ):
        other = DiffuseMixLoader(training_set(data), 4, shuffle=True, device="cpu", **options)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="a DataLoader made from the attributes of a DiffuseMixLoader would lack"):
            list(accelerate.skip_first_batches(other, 1))
