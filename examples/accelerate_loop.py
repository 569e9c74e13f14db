"""Train a classifier with Hugging Face Accelerate and gradient accumulation, on one process or several.

    pip install '.[accelerate]'
    dali-diffusemix generate data/train cache/edits --editor procedural --prompts autumn,snowy
    dali-diffusemix fractals cache/fractals.npy --count 64
    accelerate launch examples/accelerate_loop.py data/train data/val cache/edits cache/fractals.npy

Run it again with the same --out to resume after the last saved batch.
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.nn import functional

from dali_diffusemix import DiffuseMixDataset, DiffuseMixLoader, EvalCrop, MixSpec, TrainCrop
from dali_diffusemix.integrations.accelerate import prepare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path, help="folder of originals")
    parser.add_argument("valid", type=Path, help="folder of photographs of the same classes")
    parser.add_argument("edits", type=Path, help="edit store of the originals")
    parser.add_argument("fractals", type=Path, help="fractal bank")
    parser.add_argument("--batch-size", type=int, default=64, help="per process")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--save-every", type=int, default=100, help="batches")
    parser.add_argument("--out", type=Path, default=Path("checkpoints"))
    options = parser.parse_args()

    accelerator = Accelerator(cpu=options.cpu, gradient_accumulation_steps=4)
    mixed = DiffuseMixDataset(
        options.train,
        edits=options.edits,
        fractals=options.fractals,
        mix=MixSpec.paper(),
        crop=TrainCrop(options.size),
    )
    plain = DiffuseMixDataset(options.valid, crop=EvalCrop(options.size))
    device = accelerator.device.type
    train = DiffuseMixLoader(mixed, options.batch_size, shuffle=True, num_workers=4, device=device)
    valid = DiffuseMixLoader(plain, options.batch_size, num_workers=4, device=device)

    network = torch.nn.Sequential(
        *(torch.nn.Conv2d(3, 32, 7, stride=4), torch.nn.ReLU(), torch.nn.Conv2d(32, 64, 3, stride=2)),
        *(torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(64, len(mixed.classes))),
    )
    model, optimizer = accelerator.prepare(network, torch.optim.AdamW(network.parameters(), lr=1e-3))
    training, validation = prepare(train, accelerator), prepare(valid, accelerator)
    if options.out.is_dir():
        accelerator.load_state(str(options.out))

    # The state has the current epoch; after its last batch, the next one.
    while (epoch := training.state_dict()["epoch"]) < options.epochs:
        model.train()
        for number, (images, labels) in enumerate(training, 1):
            with accelerator.accumulate(model):
                accelerator.backward(functional.cross_entropy(model(images), labels))
                optimizer.step()
                optimizer.zero_grad()
            if number % options.save_every == 0:
                accelerator.save_state(str(options.out))
        accelerator.save_state(str(options.out))

        model.eval()
        right = []
        with torch.no_grad():
            for images, labels in validation:
                right.append(accelerator.gather_for_metrics(model(images).argmax(1) == labels))
        found = torch.cat(right)
        accelerator.print(f"epoch {epoch}: {int(found.sum())} of {len(found)} right")
    accelerator.end_training()


if __name__ == "__main__":
    main()
