"""Evaluates and trains under Accelerate and writes what each process saw; run by test_accelerate.py."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from samples import described, training_set
from torch.utils.data import DataLoader

from dali_diffusemix import DiffuseMixLoader
from dali_diffusemix.integrations.accelerate import AcceleratedLoader, prepare

# On 2 processes 33 samples leave 1, 3, 3, 5, 11 and 33 for the last batch.
BATCH_SIZES = (4, 3, 5, 7, 11, 17)


def loader_of(data: Path, batch_size: int, **options: Any) -> DiffuseMixLoader:
    return DiffuseMixLoader(training_set(data), batch_size, device="cpu", return_index=True, **options)


def gathered(accelerator: Accelerator, prepared: AcceleratedLoader) -> tuple[list[int], str]:
    """Indices of one epoch, as `gather_for_metrics` gives them, and what stands for their pixels and labels."""
    images, labels, indices = zip(*(accelerator.gather_for_metrics(batch) for batch in prepared), strict=True)
    index = torch.cat(indices)
    pixels = torch.cat([torch.cat(images).flatten(1), torch.cat(labels)[:, None]], dim=1)[index.argsort()]
    return described(pixels, index)


def synchronised(accelerator: Accelerator, loader: Any, epochs: int = 2) -> list[bool]:
    """After which batches an optimizer would step."""
    found = []
    for _ in range(epochs):
        for _ in loader:
            with accelerator.accumulate():
                found.append(accelerator.sync_gradients)
    return found


def resumed(data: Path, folder: Path, accelerator: Accelerator) -> tuple[list[Any], list[Any]]:
    """What came after batch 6 of two epochs, where the state was saved; and the same from that state."""
    first = prepare(loader_of(data, 4, shuffle=True), accelerator)
    batches = []
    for _ in range(2):
        for images, _, indices in first:
            batches.append(described(images, indices))
            if len(batches) == 6:
                accelerator.save_state(str(folder))
    first.set_epoch(0)
    accelerator.wait_for_everyone()  # the main process writes the state
    accelerator.load_state(str(folder))
    again: list[Any] = []
    while len(again) < len(batches) - 6:
        again.extend(described(images, indices) for images, _, indices in first)
    return batches[6:], again


def transform_seeds(data: Path, accelerator: Accelerator) -> list[int]:
    seeds = []

    def noted(images: torch.Tensor, labels: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        seeds.append(generator.initial_seed())
        return images, labels

    for _ in prepare(loader_of(data, 7, batch_transform=noted), accelerator):
        pass
    return seeds


def report(data: Path, folder: Path) -> dict[str, Any]:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    prepared = prepare(loader_of(data, 4), accelerator)
    samples = torch.arange(33)
    uneven = loader_of(data, 7)
    return {
        "resumed": resumed(data, folder, accelerator),
        "gathered": {
            f"{size} {shuffle}": gathered(accelerator, prepare(loader_of(data, size, shuffle=shuffle), accelerator))
            for size in BATCH_SIZES
            for shuffle in (False, True)
        },
        "ours": synchronised(accelerator, prepared),
        "theirs": synchronised(accelerator, accelerator.prepare(DataLoader(samples, batch_size=4))),  # type: ignore[arg-type]
        "seeds": transform_seeds(data, accelerator),
        "processes": accelerator.num_processes,
        "sizes": [len(indices) for *_, indices in prepare(uneven, accelerator)],
        "own sizes": [len(indices) for *_, indices in uneven],
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    out = Path(sys.argv[2])
    result = report(Path(sys.argv[1]), out / "state")
    (out / f"{torch.distributed.get_rank()}.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()
