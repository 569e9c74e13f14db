"""The loader's protocol: samplers, ranks, transforms, state, statistics and lifetime."""

import contextlib
import copy
import functools
import gc
import os
import pickle
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import warm
from torch.utils.data import DataLoader

from dali_diffusemix import (
    ConfigError,
    DiffuseMixDataset,
    DiffuseMixLoader,
    EvalCrop,
    FractalBank,
    MixSpec,
    TrainCrop,
    globally_seeded,
)

pytest.importorskip("nvidia.dali", reason="DALI is not installed on this machine")


def loader_of(dataset: DiffuseMixDataset, batch_size: int = 4, **options: Any) -> DiffuseMixLoader:
    return DiffuseMixLoader(dataset, batch_size, **{"device": "cpu", "num_workers": 2, **options})


def delivered(batches: Iterator[tuple[torch.Tensor, ...]]) -> list[tuple[list[int], bytes]]:
    """Indices and pixels of each batch."""
    return [(indices.tolist(), images.numpy().tobytes()) for images, _, indices in batches]


# --- arguments


def test_attributes_are_dataloaders(dataset: DiffuseMixDataset) -> None:
    loader = loader_of(dataset, 5, shuffle=True, drop_last=True, prefetch_factor=3, return_index=True)
    assert (loader.batch_size, loader.drop_last, loader.num_workers, loader.prefetch_factor) == (5, True, 2, 3)
    assert loader.dataset is dataset and len(loader.sampler) == 30 and len(loader.batch_sampler) == 6  # type: ignore[arg-type]
    ahead = list(loader.batch_sampler)
    assert list(loader.sampler) == [i for batch in ahead for i in batch]
    assert [indices.tolist() for _, _, indices in loader] == ahead
    assert list(loader.batch_sampler) != ahead  # of the next epoch
    loader.sampler.set_epoch(0)  # type: ignore[attr-defined]
    assert list(loader.batch_sampler) == ahead
    assert set(vars(DataLoader([1]))) - {k for k in vars(DataLoader([1])) if k.startswith("_")} <= set(dir(loader))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": [1], "shuffle": True}, "sampler decides the order"),
        ({"batch_sampler": [[1]], "batch_size": 2}, "batch_sampler decides the batches"),
        ({"batch_sampler": [[1]], "drop_last": True}, "batch_sampler decides the batches"),
        ({"sampler": [1], "rank": 0, "world_size": 1}, "rank and world_size divide the loader's own order"),
        ({"rank": 1}, "rank and world_size must be given together"),
        ({"rank": 2, "world_size": 2}, r"rank must lie in \[0, world_size 2\), found 2"),
        (
            {"batch_size": None},
            "batch_size must be a whole number, at least 1, found None; .* for single samples give 1",
        ),
        (
            {"collate_fn": list},
            r"(?s)collate_fn must be left out or be torch's default_collate, found .*batch_transform=",
        ),
        ({"timeout": -1}, "timeout must be seconds, at least 0 .*, found -1"),
        ({"timeout": "5"}, "timeout must be seconds, at least 0 .*, found '5'"),
    ],
)
def test_contradicting_and_impossible_arguments_are_refused(
    dataset: DiffuseMixDataset, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        DiffuseMixLoader(dataset, **{"device": "cpu", **options})


def test_what_is_satisfied_anyway_is_taken(dataset: DiffuseMixDataset) -> None:
    """And reported, as by DataLoader."""
    options: dict[str, Any] = {
        "persistent_workers": True,
        "multiprocessing_context": "spawn",
        "pin_memory_device": "cuda",
        "in_order": False,
        "timeout": 30,
        "snapshot_every_n_steps": 10,
        "prefetch_factor": None,
    }
    loader = DiffuseMixLoader(dataset, 4, num_workers=2, device="cpu", **options)
    options["prefetch_factor"] = 2
    for name in set(options) - {"snapshot_every_n_steps"}:
        assert getattr(loader, name) == options[name]
    with pytest.raises(ConfigError, match="timeout of a loader cannot be changed"):
        loader.timeout = 2
    plain = DiffuseMixLoader(dataset, 4, num_workers=2, device="cpu")
    assert all(torch.equal(a[0], b[0]) for a, b in zip(loader, plain, strict=True))


def test_what_has_no_effect_is_said(dataset: DiffuseMixDataset) -> None:
    with pytest.warns(UserWarning, match="worker_init_fn is not called: .* the dataset's seed decides all samples"):
        assert DiffuseMixLoader(dataset, device="cpu", worker_init_fn=print).worker_init_fn is print
    if not torch.cuda.is_available():
        loader = loader_of(dataset, 11, pin_memory=True)
        with pytest.warns(UserWarning, match="pin_memory=True: there is no GPU on this machine"):
            batches = list(loader)
        assert len(list(loader)) == len(batches) == 3 and loader.pin_memory  # said once


def test_the_device_is_what_works(dataset: DiffuseMixDataset) -> None:
    assert DiffuseMixLoader(dataset).device.type == ("cuda" if torch.cuda.is_available() else "cpu")


def kind_of_torchvision(name: str) -> Any:
    """As torchvision has it, which cannot be installed beside this torch; tests/clients has the real one."""
    return type(name, (), {"__module__": "torchvision.transforms.v2._auto_augment", "__call__": lambda self, x: x})()


def test_colour_operations_on_normalised_images_are_said(photos: Path) -> None:
    augment, mixing = kind_of_torchvision("RandAugment"), kind_of_torchvision("CutMix")
    compose = kind_of_torchvision("Compose")
    compose.transforms = [mixing, augment]

    def normalised(transform: Any, **options: Any) -> None:
        dataset = DiffuseMixDataset(photos, crop=EvalCrop(16), **options)
        iter(DiffuseMixLoader(dataset, device="cpu", batch_transform=transform))

    for transform in (
        globally_seeded(lambda images, labels, _: (augment(images), labels)),
        globally_seeded(lambda images, labels, _: (compose(images), labels)),
        functools.partial(lambda augment, images, labels, _: (augment(images), labels), augment),
    ):
        with pytest.warns(UserWarning, match="batch_transform has torchvision's RandAugment, which needs values in"):
            normalised(transform)
        normalised(transform, normalize=None)
    normalised(globally_seeded(lambda images, labels, _: mixing(images, labels)))
    normalised(globally_seeded(mixup))


STUCK = """
import sys, time
from dali_diffusemix import DiffuseMixDataset, DiffuseMixLoader, EvalCrop, LoaderTimeoutError

class Stuck(EvalCrop):  # in the reading thread, as storage that does not answer
    def boxes(self, sizes, draws):
        if after < time.monotonic():
            time.sleep(1000)
        return super().boxes(sizes, draws)

after = float("inf")
loader = DiffuseMixLoader(DiffuseMixDataset(sys.argv[1], crop=Stuck(16)), 4, device="cpu", timeout=0.5)
assert len(list(loader)) == 9
after, begin = 0.0, time.monotonic()
try:
    list(loader)
except LoaderTimeoutError as error:
    assert isinstance(error, RuntimeError) and 0.4 < time.monotonic() - begin < 20
    print(error)
loader.close()
"""


def test_a_storage_that_does_not_answer_is_an_error_in_time(photos: Path) -> None:
    """In a process of its own, which ends although its reading thread waits for ever."""
    output, errors = warm.Script("-c", STUCK, photos).communicate(timeout=60)
    assert output.startswith("timeout of 0.5 seconds is over, and a batch is still being read."), errors


def test_what_the_order_follows_from_cannot_be_changed(dataset: DiffuseMixDataset) -> None:
    loader = loader_of(dataset)
    for name in ("dataset", "batch_size", "shuffle", "drop_last"):
        with pytest.raises(ConfigError, match=f"{name} of a loader cannot be changed"):
            setattr(loader, name, getattr(loader, name))
    for name in ("sampler", "batch_sampler"):
        with pytest.raises(AttributeError):
            setattr(loader, name, None)
    assert len(pickle.loads(pickle.dumps(loader))) == 9


def test_unknown_arguments_and_indices_are_refused(dataset: DiffuseMixDataset) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'batchsize'"):
        DiffuseMixLoader(dataset, device="cpu", batchsize=3)
    neutral = {"pin_memory": False, "timeout": 0, "collate_fn": None, "persistent_workers": False, "shuffle": None}
    assert len(DiffuseMixLoader(dataset, device="cpu", **neutral)) == 33  # type: ignore[arg-type]
    with pytest.raises(IndexError, match="index 33 is out of range for a dataset of 33 samples"):
        next(iter(DiffuseMixLoader(dataset, device="cpu", sampler=[33])))


# --- transforms


def mixup(images: torch.Tensor, labels: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """With the generator given, and with every global one, as others' transforms do."""
    import random

    order = torch.randperm(len(images), generator=generator)
    weight = torch.rand(()) + float(np.random.rand()) + random.random()
    return weight * images + images[order], labels[order]


def test_a_transform_is_a_function_of_the_step(dataset: DiffuseMixDataset) -> None:
    options = {"shuffle": True, "batch_transform": globally_seeded(mixup), "return_index": True}
    torch.manual_seed(1)
    whole = delivered(iter(loader_of(dataset, **options)))
    first = loader_of(dataset, **options)
    batches = iter(first)
    part = [next(batches) for _ in range(3)]
    state = first.state_dict()
    torch.manual_seed(2)
    np.random.seed(2)
    before = torch.get_rng_state()
    second = loader_of(dataset, num_workers=1, **{k: v for k, v in options.items() if k != "num_workers"})
    second.load_state_dict(state)
    assert delivered(iter(part)) + delivered(iter(second)) == whole
    assert torch.equal(torch.get_rng_state(), before)  # the caller's own numbers go on as if nothing had been
    plain = delivered(iter(loader_of(dataset, shuffle=True, return_index=True)))
    assert [i for i, _ in plain] == [i for i, _ in whole] and plain[0][1] != whole[0][1]
    ranks = [delivered(iter(loader_of(dataset, 2, rank=r, world_size=2, **options)))[0][1] for r in range(2)]
    assert ranks[0] != ranks[1]


def test_what_a_transform_gives_is_checked(dataset: DiffuseMixDataset) -> None:
    with pytest.raises(ConfigError, match=r"batch_transform must return \(images, labels\), found Tensor"):
        next(iter(loader_of(dataset, batch_transform=lambda images, labels, generator: images)))  # type: ignore[arg-type,return-value]


def test_the_plan_of_a_batch(dataset: DiffuseMixDataset) -> None:
    loader = loader_of(dataset, shuffle=True, return_index=True)
    for step, (_, _, indices) in enumerate(loader):
        np.testing.assert_array_equal(loader.plan(0, step).index, indices.numpy())
    with pytest.raises(ConfigError, match="the batches are a sampler's"):
        loader_of(dataset, sampler=[1]).plan(0, 0)


# --- state


@pytest.mark.parametrize("epoch", ["fixed", "expanded"])
@pytest.mark.parametrize("shuffle", [False, True])
def test_resume_at_every_step(photos: Path, edits: Path, bank: FractalBank, epoch: str, shuffle: bool) -> None:
    mix = MixSpec(epoch=epoch)  # type: ignore[arg-type]
    dataset = DiffuseMixDataset(photos, crop=TrainCrop(8), mix=mix, edits=edits, fractals=bank)
    size = len(dataset) // 4
    loader = loader_of(dataset, size, shuffle=shuffle, return_index=True)
    steps, states = [], [loader.state_dict()]
    for _ in range(3):
        for batch in loader:
            steps.append(batch)
            states.append(loader.state_dict())
    whole = delivered(iter(steps))
    per_epoch = len(loader)
    assert states[per_epoch] == {**states[0], "epoch": 1, "places": 0}
    assert all(len(pickle.dumps(state)) < 500 for state in states)
    for step, state in enumerate(copy.deepcopy(states[:-1])):
        again = loader_of(dataset, size, shuffle=shuffle, return_index=True, num_workers=1, prefetch_factor=1)
        again.load_state_dict(state)
        assert again.state_dict() == state
        left = per_epoch - step % per_epoch
        assert delivered(iter(again)) == whole[step : step + left]
    ranks = []
    for rank in range(2):  # the same global batch on two
        again = loader_of(dataset, size // 2, shuffle=shuffle, return_index=True, rank=rank, world_size=2)
        if size % 2 == 0:
            again.load_state_dict(states[2])
            ranks.append([i.tolist() for _, _, i in again])
    if ranks:
        together, alone = [a + b for a, b in zip(*ranks, strict=True)], [i for i, _ in whole[2:per_epoch]]
        assert together[:-1] == alone[:-1] and together[-1][: len(alone[-1])] == alone[-1]  # filled up to two


def test_what_is_under_way_does_not_count(dataset: DiffuseMixDataset) -> None:
    loader = loader_of(dataset, prefetch_factor=4)
    batches = iter(loader)
    assert loader.state_dict()["places"] == 0
    next(batches)
    assert loader.state_dict()["places"] == 4
    older, newer = batches, iter(loader)
    next(older)
    assert (loader.state_dict()["epoch"], loader.state_dict()["places"]) == (1, 0)
    next(newer)
    del newer, older  # a loop that was left: the state stays where it was
    assert (loader.state_dict()["epoch"], loader.state_dict()["places"]) == (1, 4)
    loader.set_epoch(9)
    assert (loader.state_dict()["epoch"], loader.state_dict()["places"]) == (9, 0)


def test_setting_the_epoch_that_a_state_is_of_keeps_its_place(dataset: DiffuseMixDataset) -> None:
    loader = loader_of(dataset, return_index=True)
    loader.load_state_dict({**loader.state_dict(), "epoch": 5, "places": 8})
    loader.set_epoch(5)
    assert next(iter(loader))[2].tolist() == [8, 9, 10, 11]
    loader.load_state_dict({**loader.state_dict(), "epoch": 5, "places": 8})
    loader.set_epoch(6)
    assert next(iter(loader))[2].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 4}, "seed of the state is 4, here it is 3; give the dataset this seed"),
        ({"length": 34}, "length of the state is 34, here it is 33"),
        ({"shuffle": True}, "shuffle of the state is True"),
        ({"fingerprint": "0"}, "fingerprint of the state is '0'.*relative paths and labels"),
        ({"version": 2}, "state must be of version 1.*found 2"),
        ({"places": 6}, r"places of the state is 6 of 33.*multiple of the global batch.* = 4\)"),
        ({"places": 36}, "places of the state is 36"),
        ({"sampler": None}, "the state was taken with a sampler, this loader has none"),
    ],
)
def test_foreign_states_are_refused(dataset: DiffuseMixDataset, change: dict[str, Any], message: str) -> None:
    loader = loader_of(dataset)
    with pytest.raises(ConfigError, match=message):
        loader.load_state_dict({**loader.state_dict(), **change})
    with pytest.raises(ConfigError, match="found list"):
        loader.load_state_dict([])  # type: ignore[arg-type]


# --- statistics


class Clock:
    """Shows 1 ms more each time it is looked at, and what a training loop adds: no machine is too busy for it."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 0.001
        return self.now


def test_statistics_say_who_waits(
    photos: Path, edits: Path, bank: FractalBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr("dali_diffusemix.loading.batches.time", clock)
    dataset = DiffuseMixDataset(photos, crop=TrainCrop(64), mix=MixSpec(probability=1), edits=edits, fractals=bank)
    loader = loader_of(dataset)
    assert loader.stats().batches == 0 and loader.stats().bottleneck == "training"
    for _ in loader:
        pass
    stats = loader.stats()
    assert (stats.batches, stats.images) == (9, 33) and stats.bottleneck == "loader"
    assert 0 < stats.idle + stats.mix <= stats.wait <= stats.total and stats.read > 0 and stats.decode > 0
    for _ in loader:
        clock.now += 0.1
    stats = loader.stats()
    assert stats.batches == 9 and stats.bottleneck == "training" and stats.total > 0.8 > 8 * stats.wait


def test_the_rate_that_training_gets(dataset: DiffuseMixDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("dali_diffusemix.loading.batches.time", clock)
    loader = loader_of(dataset, batch_size=4)
    assert loader.images_per_second == 0.0
    batches = iter(loader)
    assert loader.images_per_second == loader.stats().images_per_second == 0.0
    for _ in batches:
        clock.now += 1.0  # training
        stats = loader.stats()
        assert loader.images_per_second == stats.images_per_second == pytest.approx(stats.images / stats.total)
    assert loader.images_per_second == pytest.approx(33 / 8, rel=0.05)  # 9 batches, 8 steps between them
    assert pickle.loads(pickle.dumps(loader)).images_per_second == 0.0
    loader.close()
    assert loader.images_per_second > 0  # of the epoch that ended
    iter(loader)
    assert loader.images_per_second == 0.0


def test_the_rate_is_that_of_the_recent_past(dataset: DiffuseMixDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("dali_diffusemix.loading.batches.time", clock)
    loader = loader_of(dataset, batch_size=2, sampler=list(range(33)) * 10)
    for step, _ in enumerate(loader, 1):
        clock.now += 10.0 if step < 50 else 0.1  # it warms up
        if step == 160:
            break
    # The window of 100 batches has left the slow steps behind.
    assert loader.images_per_second == pytest.approx(2 / 0.1, rel=0.1)
    assert loader.stats().images / loader.stats().total < 1


# --- lifetime


def dali_threads() -> set[str]:
    names = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            names.add(f"{task.name} {(task / 'comm').read_text().strip()}")
    return {name for name in names if "DALI" in name or "dali" in name}


def test_nothing_is_left_behind(dataset: DiffuseMixDataset) -> None:
    gc.collect()
    before, threads = dali_threads(), set(threading.enumerate())

    def train() -> None:
        with loader_of(dataset) as loader:
            for step, _ in enumerate(loader):
                if step == 2:
                    raise ValueError("in the training loop")

    with pytest.raises(ValueError, match="in the training loop"):
        train()
    loader = loader_of(dataset)
    batches = [iter(loader), iter(loader)]
    next(batches[0]), next(batches[1])
    del batches
    loader.close()
    assert len(list(loader)) == 9  # it can be used again
    loader.close()
    del loader
    gc.collect()
    for _ in range(50):
        if dali_threads() <= before and set(threading.enumerate()) <= threads:
            break
        time.sleep(0.1)
    assert dali_threads() <= before and set(threading.enumerate()) <= threads


def run(script: str, *arguments: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_ctrl_c_ends_it_within_two_seconds(photos: Path) -> None:
    """The best of eight: the machine may be busy."""
    seconds = []
    while not seconds or (min(seconds) >= 2 and len(seconds) < 8):
        process = run(
            """
            import sys
            from dali_diffusemix import DiffuseMixDataset, DiffuseMixLoader, EvalCrop
            loader = DiffuseMixLoader(DiffuseMixDataset(sys.argv[1], crop=EvalCrop(64)), 4, device="cpu")
            while True:
                for _ in loader:
                    print("batch", flush=True)
            """,
            photos,
        )
        assert process.stdout is not None and process.stdout.readline() == "batch\n"
        begin = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        seconds.append(time.monotonic() - begin)
        assert "KeyboardInterrupt" in errors and process.returncode != 0
    assert min(seconds) < 2


def test_a_loader_that_is_dropped_goes_at_once(dataset: DiffuseMixDataset) -> None:
    """Without cycles: a collection in a forked process would destroy DALI's pipeline, which ends that process."""
    gc.collect()
    before = dali_threads()
    gc.disable()
    try:
        loader = loader_of(dataset)
        next(iter(loader))
        assert not dali_threads() <= before
        del loader
        assert dali_threads() <= before
    finally:
        gc.enable()


def in_a_new_process(loader: DiffuseMixLoader, batches: Any) -> None:
    batches.put([images.numpy().copy() for images, _ in loader])


def test_a_spawned_process_gets_the_same(dataset: DiffuseMixDataset) -> None:
    loader = loader_of(dataset, 17)
    queue = warm.CONTEXT.Queue()
    process = warm.CONTEXT.Process(target=in_a_new_process, args=(loader, queue))
    process.start()
    there = queue.get(timeout=60)
    process.join()
    here: Sequence[torch.Tensor] = [images for images, _ in loader]
    assert all(np.array_equal(a, b.numpy()) for a, b in zip(there, here, strict=True))
    assert os.getpid() != process.pid


def test_validation_goes_the_same_way(photos: Path) -> None:
    dataset = DiffuseMixDataset(photos, crop=EvalCrop(24))
    loader = loader_of(dataset, 10)
    epochs = [torch.cat([images for images, _ in loader]) for _ in range(2)]
    assert torch.equal(*epochs)  # nothing is random
    assert torch.equal(epochs[0], torch.stack([dataset[i][0] for i in range(33)]))


# --- threads, forks and ends ----------------------------------------------------------------------------------------

SCRIPT = """
import atexit, os, signal, sys, threading, time
from dali_diffusemix import DiffuseMixDataset, DiffuseMixLoader, EvalCrop
import dali_diffusemix.loading.loader, nvidia.dali.fn, nvidia.dali.pipeline


def begun():
    batches = iter(loader)
    next(batches)
    return batches


def in_a_fork(work):
    batches = begun()
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # a child that hangs is ended
        work()
        sys.exit(7)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == 7, code
    assert len(list(batches)) == 8  # nothing was lost here


def forever():
    while True:
        for _ in loader:
            pass


# Each is what a process does up to its end: one that is forked here, where all is imported and nothing is begun.
for work in sys.argv[2:]:
    child = os.fork()
    if child == 0:
        loader = DiffuseMixLoader(DiffuseMixDataset(sys.argv[1], crop=EvalCrop(24)), 4, device="cpu", num_workers=2)
        exec(work)
        break
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == 0, (work, code)
"""
WORKS = (
    "batches = begun()",
    # Forks that do nothing, have a new iterator, and have one that is not finished.
    "for work in (lambda: None, lambda: list(loader), lambda: list(zip(range(3), loader))): in_a_fork(work)",
    "threading.Thread(target=forever, daemon=True).start(); time.sleep(0.3)",
    "batches = begun(); atexit.register(loader.close)",
)


@pytest.mark.slow
def test_processes_end(photos: Path) -> None:
    """With nothing to say, and without waiting for threads that are not there."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, photos, *WORKS], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_iterator_of_another_process_says_so(dataset: DiffuseMixDataset) -> None:
    batches = iter(loader_of(dataset))
    next(batches)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            next(batches)
        except ConfigError as error:
            code = 0 if "call iter(loader) in the process that is to have the batches" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert len(list(batches)) == 8


def test_several_threads_share_an_iterator(dataset: DiffuseMixDataset) -> None:
    loader = DiffuseMixLoader(dataset, 2, device="cpu", num_workers=2, return_index=True)
    expected = {i: image for images, _, indices in loader for image, i in zip(images, indices.tolist(), strict=True)}
    loader.set_epoch(0)
    batches, found, lock = iter(loader), [], threading.Lock()

    def take() -> None:
        for images, _, indices in batches:
            with lock:
                found.extend(zip(indices.tolist(), images, strict=True))

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(i for i, _ in found) == sorted(expected)
    assert all(torch.equal(image, expected[i]) for i, image in found)


def test_an_iterator_is_not_copied(dataset: DiffuseMixDataset) -> None:
    """A copy that goes would end the epoch of the first."""
    batches = iter(loader_of(dataset))
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"cannot be copied or pickled; save loader\.state_dict\(\) instead"):
            copied(batches)
    assert len(list(batches)) == len(loader_of(dataset))


@pytest.mark.slow
def test_a_ctrl_c_while_dali_is_imported_does_no_harm(photos: Path) -> None:
    script = """
import os, signal, sys, threading, time
from dali_diffusemix import DiffuseMixDataset, DiffuseMixLoader, EvalCrop
signal.signal(signal.SIGINT, signal.default_int_handler)
loader = DiffuseMixLoader(DiffuseMixDataset(sys.argv[1], crop=EvalCrop(24)), 4, device="cpu")
def interrupt():
    while "nvidia.dali" not in sys.modules:
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=interrupt, daemon=True).start()
try:
    for _ in loader:
        pass
except KeyboardInterrupt:
    print("interrupted")
print(len(list(loader)))
"""
    done = subprocess.run([sys.executable, "-c", script, str(photos)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["interrupted", "9"], "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 2.5}, "batch_size must be a whole number, at least 1, found 2.5"),
        ({"batch_size": "8"}, "batch_size must be a whole number, at least 1, found '8'"),
        ({"batch_size": 10**12}, "batch_size must be a whole number"),
        ({"num_workers": 1.5}, "num_workers must be a whole number, at least 0, found 1.5"),
        ({"prefetch_factor": "2"}, "prefetch_factor must be a whole number, at least 1, found '2'"),
        ({"device": "cuda:-1"}, "device must be 'cuda', 'cuda:N', 'cpu' or None, found 'cuda:-1'"),
        ({"device": "gpu"}, "device must be 'cuda', 'cuda:N', 'cpu' or None, found 'gpu'"),
        ({"batch_transform": 3}, "batch_transform must be a function of"),
    ],
)
def test_arguments_of_the_wrong_kind_are_named(
    dataset: DiffuseMixDataset, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        DiffuseMixLoader(dataset, **{"device": "cpu", **options})  # type: ignore[arg-type]


def test_states_and_epochs_of_the_wrong_kind_are_named(dataset: DiffuseMixDataset) -> None:
    loader = loader_of(dataset)
    for epoch in (1.5, "3", None):
        with pytest.raises(ConfigError, match="epoch must be a whole number"):
            loader.set_epoch(epoch)  # type: ignore[arg-type]
    for broken in ({"places": None}, {"epoch": "x"}):
        with pytest.raises(ConfigError, match="state must hold whole numbers as epoch and places"):
            loader.load_state_dict({**loader.state_dict(), **broken})


def test_dropout_resumes_too_if_torchs_state_is_saved(dataset: DiffuseMixDataset) -> None:
    """The loop of docs/dropin.md: loading draws nothing from torch's generator."""

    def losses(steps: int, state: dict[str, Any] | None = None) -> tuple[list[float], dict[str, Any]]:
        torch.manual_seed(3)
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.5), torch.nn.LazyLinear(4))
        model(torch.zeros(1, 3, 24, 24))
        loader = loader_of(dataset, shuffle=True)
        parts = {"model": model, "loader": loader}
        if state is not None:
            for name, part in parts.items():
                part.load_state_dict(state[name])
            torch.set_rng_state(state["random"])
        found: list[float] = []
        while True:
            for images, labels in loader:
                loss = torch.nn.functional.cross_entropy(model(images), labels)
                loss.backward()
                with torch.no_grad():
                    for one in model.parameters():
                        one -= 0.01 * one.grad
                        one.grad = None
                found.append(loss.item())
                if len(found) == steps:
                    state = {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}
                    return found, {**state, "random": torch.get_rng_state()}

    whole, _ = losses(9)
    first, state = losses(4)
    rest, _ = losses(5, state)
    assert first + rest == whole and len(set(whole)) == 9
