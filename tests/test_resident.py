"""Resident stores: one copy for all processes of a machine, whole or not at all, gone with the last of them."""

import gc
import os
import pickle
import re
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import warm
from material import photograph

from dali_diffusemix import (
    ConfigError,
    DiffuseMixDataset,
    DiffuseMixLoader,
    EvalCrop,
    FractalBank,
    MixSpec,
    QuarantineWarning,
    RandomCrop,
    TrainCrop,
    pack,
)
from dali_diffusemix.base import memory
from dali_diffusemix.loading import resident
from dali_diffusemix.loading.resident import Residents
from dali_diffusemix.mix.call import mix
from dali_diffusemix.mix.tensor import TensorFormat
from dali_diffusemix.store import OriginalStore
from dali_diffusemix.store.pack import PackConfig

IMAGES, SIDE = 120, 128


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """6 MB of photographs of this test alone, so that no memory of others has them, in 4 shards."""
    seed = int(time.time_ns() % 2**31)
    images = np.stack([np.roll(photograph(seed, SIDE, SIDE), i, axis=1) for i in range(IMAGES)])
    pack((images, np.arange(IMAGES) % 7), tmp_path / "raw", PackConfig(originals_per_shard=30))
    return tmp_path / "raw"


def plain(store: Path | str, **options: Any) -> DiffuseMixDataset:
    return DiffuseMixDataset(store, mix=None, crop=EvalCrop(32), **options)


def batches(dataset: Any, **options: Any) -> torch.Tensor:
    with DiffuseMixLoader(dataset, 16, num_workers=2, device="cpu", **options) as loader:
        return torch.cat([images for images, _ in loader])


RUN = """
import sys, warnings
import torch
from dali_diffusemix import DiffuseMixDataset, DiffuseMixLoader, EvalCrop
torch.set_num_threads(1)
warnings.simplefilter("ignore")
dataset = DiffuseMixDataset(sys.argv[1], mix=None, crop=EvalCrop(32))
loader = DiffuseMixLoader(dataset, 16, device="cpu", resident="host")
while True:
    total = sum(float(images.double().sum()) for images, _ in loader)
    print(total, len(loader.quarantine), flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def processes() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


class Process(warm.Script):
    """A training process with the store in memory; it goes through an epoch when it is asked to."""

    def __init__(self, store: Path) -> None:
        super().__init__("-c", RUN, store)

    def epoch(self, *, first: bool = False) -> str:
        if not first:
            self.stdin.write("\n")
            self.stdin.flush()
        line = str(self.stdout.readline())
        assert line, self.stderr.read()
        return line


def mapped(process: int) -> dict[str, int]:
    """Inode to the proportional bytes of our memory that a process has mapped."""
    found: dict[str, int] = {}
    inode = None
    for line in Path(f"/proc/{process}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inode = line.split()[4] if "memfd:dali_diffusemix" in line else None
        elif inode is not None and line.startswith("Pss:"):
            found[inode] = found.get(inode, 0) + 1024 * int(line.split()[1])
    return found


@pytest.mark.slow
def test_four_processes_share_one_copy(store: Path, processes: ExitStack) -> None:
    """The proportional set sizes of four ranks add up to the store once; it outlives whoever made it."""
    total = sum(file.stat().st_size for file in (store / "shards").glob("*.tar"))
    first = processes.enter_context(Process(store))
    sums = {first.epoch(first=True)}
    others = [processes.enter_context(Process(store)) for _ in range(3)]
    sums |= {one.epoch(first=True) for one in others}
    assert len(sums) == 1
    shares = [mapped(one.pid) for one in (first, *others)]
    assert len({inode for share in shares for inode in share}) == 1
    together = sum(sum(share.values()) for share in shares)
    assert 0.97 * total < together < 1.03 * total
    first.kill()  # SIGKILL, and it made the memory
    first.wait()
    late = processes.enter_context(Process(store))
    assert {late.epoch(first=True), *(one.epoch() for one in others)} == sums
    assert mapped(late.pid).keys() == shares[0].keys()
    (inode,) = shares[0]
    for one in (late, *others):
        one.kill()
        one.wait()
    for folder in Path("/proc").glob("[0-9]*"):  # nobody has it any more
        try:
            maps = (folder / "maps").read_text()
        except OSError:
            continue
        assert not any("memfd:dali_diffusemix" in line and inode in line for line in maps.splitlines())


@pytest.mark.slow
def test_a_process_killed_while_it_fills_leaves_nothing(store: Path, processes: ExitStack) -> None:
    script = RUN.replace(
        "import torch\n",
        "import torch, time\nfrom dali_diffusemix.loading import resident\n"
        "def stuck(*_):\n    print('filling', flush=True)\n    time.sleep(1000)\nresident._copied = stuck\n",
    )
    filling = processes.enter_context(warm.Script("-c", script, store))
    assert filling.stdout.readline() == "filling\n"
    waiting = processes.enter_context(Process(store))  # for the lock
    time.sleep(0.5)
    filling.kill()
    filling.wait()
    other = processes.enter_context(Process(store))
    assert waiting.epoch(first=True) == other.epoch(first=True)
    assert mapped(waiting.pid).keys() == mapped(other.pid).keys()
    for one in (waiting, other):
        one.kill()
        one.wait()


def test_one_copy_in_a_process(store: Path, bank: FractalBank) -> None:
    one, two = plain(store), plain(store)
    expected = batches(one)
    loaders = [DiffuseMixLoader(of, 16, device="cpu", resident="host") for of in (one, two, one.subset(range(9, 50)))]
    found = [torch.cat([images for images, _ in loader]) for loader in loaders]
    assert torch.equal(found[0], expected) and torch.equal(found[1], expected) and torch.equal(found[2], expected[9:50])
    assert len(mapped(os.getpid())) == 1
    again = pickle.loads(pickle.dumps(loaders[0]))
    assert torch.equal(torch.cat([images for images, _ in again]), expected)
    loaders[0].close()
    assert torch.equal(torch.cat([images for images, _ in loaders[0]]), expected)
    for loader in (*loaders, again):
        loader.close()
    del loaders, loader, again
    gc.collect()
    assert not mapped(os.getpid())


def test_what_is_damaged_is_known_to_all(store: Path) -> None:
    dataset, other = plain(store), plain(store)
    tar = store / "shards" / "originals-000003.tar"
    content = bytearray(tar.read_bytes())
    content[-20_000] ^= 255
    tar.write_bytes(content)
    first = DiffuseMixLoader(dataset, 16, device="cpu", resident="host")
    with pytest.warns(QuarantineWarning, match=r"originals-000003\.tar: was damaged when it was read into memory"):
        expected = torch.cat([images for images, _ in first])
    resident._in_this_process.clear()  # as in another process
    second = DiffuseMixLoader(other, 16, device="cpu", resident="host")
    with pytest.warns(QuarantineWarning, match=r"originals-000003\.tar: was damaged when it was read into memory"):
        assert torch.equal(torch.cat([images for images, _ in second]), expected)
    assert len(first.quarantine) == len(second.quarantine) == 30


def test_too_little_memory(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = OriginalStore.open(store).raw_shards.bytes
    monkeypatch.setattr(resident, "free_memory", lambda: needed)
    loader = DiffuseMixLoader(plain(store), 16, device="cpu", resident="host")
    with pytest.raises(ConfigError, match=rf"needs {needed} bytes .* of whose {needed} free bytes .* at most 90%"):
        iter(loader)
    assert not mapped(os.getpid())
    monkeypatch.setattr(resident, "free_memory", lambda: 2 * needed)
    assert len([0 for _ in loader]) == len(loader)


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 4_000_000 * 1024),
        ({"memory.max": "max", "memory.current": "5"}, 4_000_000 * 1024),
        (
            {"memory.max": "1000000", "memory.current": "900000", "memory.stat": "anon 3\ninactive_file 50000\n"},
            150_000,
        ),
        ({"memory.max": "10", "memory.current": "90", "memory.stat": ""}, 0),
    ],
)
def test_free_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], free: int) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 8000000 kB\nMemFree: 10 kB\nMemAvailable:    4000000 kB\n")
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(memory, "_MACHINE", tmp_path / "meminfo")

    def groups(controller: str) -> Iterator[Path]:
        assert controller == "memory"
        yield tmp_path

    monkeypatch.setattr(memory, "control_groups", groups)
    assert memory.free_memory() == free


@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize("on_device", [False, True])
def test_the_pieces_are_those_of_the_samples(
    photos: Path, edits: Path, bank: FractalBank, tmp_path: Path, on_device: bool, windows: bool
) -> None:
    """As they go to a GPU, with the CPU in its place: whole images, or the rows that are shown."""
    pack(photos, tmp_path / "originals", PackConfig(format="raw", originals_per_shard=8))
    pack(edits, tmp_path / "edits", PackConfig(format="raw"))
    arguments: dict[str, Any] = {"fractals": bank, "mix": MixSpec(probability=0.7), "crop": TrainCrop(40), "seed": 8}
    dataset = DiffuseMixDataset(tmp_path / "originals", edits=tmp_path / "edits", **arguments)
    loose = DiffuseMixDataset(photos, edits=edits, **arguments)
    plan = dataset.planner.batch(3, range(33))
    residents = Residents([dataset], torch.device("cpu") if on_device else None, windows=windows)
    pieces = residents.request([(dataset, plan)])
    assert pieces.on_host.all() != on_device and not pieces.errors
    if windows:
        assert (pieces.table["height"] < pieces.table["image_height"]).any()
    loose.set_epoch(3)
    out = np.empty((33, 3, 40, 40), np.float32)
    mix(plan, pieces.table, bank.images, out=out, format=TensorFormat())
    assert torch.equal(
        torch.from_numpy(out),
        torch.stack([image for image, _ in loose.samples_at(np.arange(33), np.zeros(33, np.int64))]),
    )


def test_a_store_behind_a_url(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fsspec")
    monkeypatch.setenv("DALI_DIFFUSEMIX_MIRROR", str(tmp_path / "mirror"))
    expected = batches(plain(store))
    remote = plain(f"file://{store}")
    assert remote.is_raw and torch.equal(batches(remote), expected)
    assert torch.equal(batches(plain(f"file://{store}"), resident="host"), expected)


@pytest.mark.parametrize("batch_size", [pytest.param(1, marks=pytest.mark.slow), 7, 64, 5000])
def test_batches_of_small_images_are_planned_together(tmp_path: Path, batch_size: int) -> None:
    """Batches of any size, shuffled, resumed anywhere, from a sampler: those of one at a time."""
    images = np.random.default_rng(0).integers(0, 256, (311, 12, 12, 3), dtype=np.uint8)
    pack((images, np.arange(311) % 3), tmp_path / "raw")
    dataset = DiffuseMixDataset(tmp_path / "raw", mix=None, crop=RandomCrop(12, padding=2), seed=1)
    loader = DiffuseMixLoader(dataset, batch_size, shuffle=True, device="cpu", return_index=True)
    for epoch in range(2):
        dataset.set_epoch(epoch)
        count = 0
        for images_, labels, indices in loader:
            assert len(images_) == min(batch_size, 311 - count)
            count += len(images_)
            expected = dataset.samples_at(indices.numpy(), np.zeros(len(indices), np.int64))
            assert torch.equal(images_, torch.stack([image for image, _ in expected]))
            assert labels.tolist() == [label for _, label in expected]
        assert count == 311
    whole = list(DiffuseMixLoader(dataset, 16, shuffle=True, device="cpu"))
    for stop in (1, 9, 19):
        first = DiffuseMixLoader(dataset, 16, shuffle=True, device="cpu", resident="host")
        for _, _ in zip(range(stop), first, strict=False):
            pass
        second = DiffuseMixLoader(dataset, 16, shuffle=True, device="cpu")
        second.load_state_dict(first.state_dict())
        rest = list(second)
        assert len(rest) == 20 - stop and all(torch.equal(a[0], b[0]) for a, b in zip(rest, whole[stop:], strict=True))
    given = [5, 5, 5, 310, 0, 7, 7]
    sampled = DiffuseMixLoader(dataset, 2, sampler=given, device="cpu", return_index=True)
    assert [index for *_, indices in sampled for index in indices.tolist()] == given


def test_ctrl_c_between_batches(store: Path) -> None:
    """What was read for batches that are not delivered is dropped, and the next epoch is right."""
    loader = DiffuseMixLoader(plain(store), 16, device="cpu", resident="host")
    expected = [images.clone() for images, _ in loader]
    batches = iter(loader)
    next(batches)
    old = signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.002)
        with pytest.raises(KeyboardInterrupt):
            for _ in range(10_000):
                for _ in iter(loader):
                    pass
    finally:
        signal.signal(signal.SIGALRM, old)
    assert all(torch.equal(images, other) for (images, _), other in zip(loader, expected, strict=True))
