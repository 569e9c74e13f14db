"""The host memory of a training process must not grow from epoch to epoch.

Each way of loading runs in a fresh process of its own (this file as a script), which prints what it occupied after each
epoch. DALI_DIFFUSEMIX_SOAK_EPOCHS (50) is how many epochs that is.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from dali_diffusemix import PackConfig, pack

EPOCHS = int(os.environ.get("DALI_DIFFUSEMIX_SOAK_EPOCHS", "50"))
SETTLED = 5  # epochs
LIMIT = 20.0  # MiB that the last epoch may lie above the one after which everything is in place
IMAGES = 500


# --- the process that is measured -----------------------------------------------------------------------------------


def occupied() -> float:
    """Resident memory of this process, MiB."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def epochs_of(way: str, root: str, edits: str, fractals: str) -> Iterator[None]:
    """Go through epochs one by one."""
    import torch
    from torch.utils.data import DataLoader

    from dali_diffusemix import DiffuseMixDataset, DiffuseMixLoader, MixSpec, TrainCrop

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of damaged images
    dataset = DiffuseMixDataset(root, edits=edits, fractals=fractals, mix=MixSpec.paper(), crop=TrainCrop(160), seed=0)
    if way == "dataset":
        samples = DataLoader(dataset, batch_size=64, shuffle=True)
        for epoch in range(EPOCHS):
            dataset.set_epoch(epoch)
            for _ in samples:
                pass
            yield
        return
    resident = "host" if way == "resident" else None
    loader = DiffuseMixLoader(dataset, batch_size=64, shuffle=True, num_workers=2, device="cpu", resident=resident)
    for _ in range(EPOCHS):
        for step, (images, _) in enumerate(loader):
            assert len(images)
            if way == "breaks" and step == 3:
                break
        yield


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("arguments", nargs=4)
    found = [occupied() for _ in epochs_of(*parser.parse_args().arguments)]
    sys.stdout.write(json.dumps(found) + "\n")


# --- the test -------------------------------------------------------------------------------------------------------


def photographs(root: Path) -> None:
    """IMAGES photographs of sizes as mixed as photographs have."""
    from material import write_photograph

    draw = np.random.default_rng(0)
    for i in range(IMAGES):
        file = root / f"class{i % 5}" / f"{i:03}.jpg"
        height, width = draw.integers(60, 420, 2)
        write_photograph(file, i, int(height), int(width), quality=90)


@pytest.mark.parametrize("way", ["loader", "breaks", "damaged", "dataset", "raw", "resident"])
def test_memory_stays_flat(
    tmp_path: Path, way: str, make_store: Callable[..., Path], bank: object, measured: Callable[..., None]
) -> None:
    """`breaks` gives each epoch up in its midst; `damaged` has files in it that end DALI's pipeline in every epoch."""
    root = tmp_path / "train"
    photographs(root)
    edits = make_store(root, prompts=("autumn",), size=128)
    if way == "damaged":
        for file in sorted(root.rglob("*.jpg"))[::50]:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    if way in ("raw", "resident"):
        pack(root, tmp_path / "raw", PackConfig(format="raw"))
        pack(edits, tmp_path / "raw-edits")
        root, edits = tmp_path / "raw", tmp_path / "raw-edits"
    output = subprocess.check_output([sys.executable, __file__, way, root, edits, bank.path], text=True)
    found = json.loads(output.splitlines()[-1])
    growth = found[-1] - found[SETTLED - 1]
    measured(
        mib_after_epoch={str(epoch): round(found[epoch - 1], 1) for epoch in (1, SETTLED, len(found) // 2, len(found))},
        growth_mib=round(growth, 1),
    )
    assert len(found) == EPOCHS
    assert growth <= LIMIT


if __name__ == "__main__":
    main()
