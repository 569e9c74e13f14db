"""resident="device": the CPU's samples from raw images in the GPU's memory, by torch and CuPy alone."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import ConcatDataset, Subset

from dali_diffusemix import (
    ConfigError,
    DiffuseMixDataset,
    DiffuseMixLoader,
    EvalCrop,
    FractalBank,
    MixSpec,
    RandomCrop,
    TrainCrop,
)
from dali_diffusemix.plan.crops import Crop
from dali_diffusemix.store.pack import PackConfig, pack

SAME = 2e-5  # the kernels' sums differ in their order only


@pytest.fixture(scope="module")
def stores(photos: Path, edits: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("raw")
    pack(photos, folder / "originals", PackConfig(format="raw", originals_per_shard=7))
    pack(edits, folder / "edits", PackConfig(format="raw"))
    return folder / "originals", folder / "edits"


def mixed(stores: tuple[Path, Path], bank: FractalBank, crop: Crop, **options: Any) -> DiffuseMixDataset:
    arguments = {"mix": MixSpec.paper(), "normalize": None, "seed": 4, **options}
    return DiffuseMixDataset(stores[0], edits=stores[1], fractals=bank, crop=crop, **arguments)


def epoch(dataset: Any, batch_size: int = 8, **options: Any) -> list[torch.Tensor]:
    with DiffuseMixLoader(dataset, batch_size, shuffle=True, num_workers=2, **options) as loader:
        return [images.float().cpu() for images, _ in loader]


def assert_close(found: list[torch.Tensor], expected: list[torch.Tensor], most: float = SAME) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= most


@pytest.mark.parametrize("resident", ["device", "host", None])
@pytest.mark.parametrize(
    "crop", [TrainCrop(64), RandomCrop(48, padding=9), EvalCrop(32)], ids=lambda crop: type(crop).__name__
)
def test_the_samples_of_the_cpu(stores: tuple[Path, Path], bank: FractalBank, crop: Crop, resident: str | None) -> None:
    dataset = mixed(stores, bank, crop)
    expected = epoch(dataset, device="cpu")
    assert_close(epoch(dataset, device="cuda", resident=resident), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_types_and_layouts(
    stores: tuple[Path, Path], bank: FractalBank, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    dataset = mixed(stores, bank, TrainCrop(40))
    options: dict[str, Any] = {"dtype": dtype, "memory_format": memory_format}
    most = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.uint8: 1}[dtype]
    assert_close(
        epoch(dataset, device="cuda", resident="device", **options), epoch(dataset, device="cpu", **options), most
    )


def test_several_datasets_and_a_damaged_shard(
    stores: tuple[Path, Path], bank: FractalBank, photos: Path, tmp_path: Path
) -> None:
    both = ConcatDataset([Subset(mixed(stores, bank, TrainCrop(32), seed=s), range(1, 33, 2)) for s in (1, 2)])
    assert_close(epoch(both, device="cuda", resident="device"), epoch(both, device="cpu"))
    pack(photos, tmp_path / "raw", PackConfig(format="raw", originals_per_shard=9))
    dataset = DiffuseMixDataset(tmp_path / "raw", mix=None, crop=EvalCrop(24), normalize=None)
    tar = tmp_path / "raw" / "shards" / "originals-000001.tar"
    content = bytearray(tar.read_bytes())
    content[3000] ^= 1
    tar.write_bytes(content)
    loader = DiffuseMixLoader(dataset, 33, device="cuda", resident="device")
    with pytest.warns(UserWarning, match="SHA-256"):
        ((images, _),) = loader
    assert len(loader.quarantine) == 9 and torch.equal(images[9], images[18]) and torch.equal(images[17], images[18])


def test_no_dali_no_decoder_and_no_thread(stores: tuple[Path, Path], bank: FractalBank) -> None:
    script = """
import sys, threading
sys.modules["nvidia.dali"] = None
from dali_diffusemix import DiffuseMixDataset, DiffuseMixLoader, TrainCrop
originals, edits, bank = sys.argv[1:]
dataset = DiffuseMixDataset(originals, edits=edits, fractals=bank, crop=TrainCrop(24), seed=0)
loader = DiffuseMixLoader(dataset, batch_size=8, device="cuda", resident="device")
batches = iter(loader)
next(batches)
assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("dali-diffusemix")]
print(1 + len(list(batches)))
"""
    arguments = [str(one) for one in (*stores, bank.path)]
    found = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    assert found.stdout == "5\n", found.stderr


def test_too_large_for_the_gpu(stores: tuple[Path, Path], bank: FractalBank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 80 * 2**30))
    loader = DiffuseMixLoader(mixed(stores, bank, TrainCrop(24), seed=9), 8, device="cuda", resident="device")
    with pytest.raises(ConfigError, match=r"needs \d+ bytes .* of the memory of cuda:0, of whose 1000 free bytes"):
        iter(loader)


def test_memory_stays_flat_over_fifty_epochs(stores: tuple[Path, Path], bank: FractalBank) -> None:
    loader = DiffuseMixLoader(mixed(stores, bank, TrainCrop(64)), 8, device="cuda", resident="device")
    used = []
    for _ in range(50):
        for _ in loader:
            pass
        torch.cuda.synchronize()
        used.append(torch.cuda.memory_reserved())
    assert used[-1] <= used[4] + 2**20
    loader.close()
