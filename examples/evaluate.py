"""Evaluate a checkpoint: top-1 and top-5 with 95 % intervals, per class too, under FGSM, and on corrupted images.

    python examples/evaluate.py runs/cub/best.pt --data data/CUB_200_2011
    torchrun --nproc-per-node 8 examples/evaluate.py runs/imagenet/best.pt --data data/imagenet --fgsm 1,2,4,8
    python examples/evaluate.py runs/cub/best.pt --data data/CUB_200_2011 --corruptions 1,3,5

The checkpoint contains its recipe, which decides the test images. FGSM: x' = x + ε sign(dL/dx), clipped to the image's
range, with ε in steps of 1/255 (Goodfellow et al., "Explaining and Harnessing Adversarial Examples", ICLR 2015); the
attacker knows the weights. Corruptions are noise, blur, contrast and JPEG of examples/corruptions.py, in the strengths
given. Intervals are Wilson's, for a proportion of n independent images. The output also says which images were right, a
bit each, in the order of the dataset: tests that compare two checkpoints need it.
"""

import argparse
import csv
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import models
import numpy as np
import torch
from corruptions import LEVELS, corrupt
from data import parts, plain_set
from recipe import Evaluate, Recipe
from significance import to_text
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn import functional
from world import World

from dali_diffusemix import DiffuseMixLoader
from dali_diffusemix.errors import ConfigError, DiffuseMixError
from dali_diffusemix.mix import IMAGENET_MEAN, IMAGENET_STD


@dataclass(frozen=True)
class Scores:
    """A model's scores for every image of a dataset."""

    rank: np.ndarray  # (n,) of the correct class in the model's ranking; 0 is its first choice
    loss: np.ndarray  # (n,)
    labels: np.ndarray  # (n,)

    @property
    def top1(self) -> float:
        return float(np.mean(self.rank < 1))

    @property
    def top5(self) -> float:
        return float(np.mean(self.rank < 5))

    def tables(self) -> dict[str, object]:
        top1, top5, n = self.top1, self.top5, len(self.rank)
        return {
            "images": n,
            "loss": round(float(self.loss.mean()), 6),
            "top1": round(top1, 6),
            "top1_interval": wilson(top1, n),
            "top5": round(top5, 6),
            "top5_interval": wilson(top5, n),
            "right": to_text(self.rank < 1),
        }


def wilson(share: float, n: int, z: float = 1.959964) -> list[float]:
    """Return Wilson's 95 % interval of a proportion of n."""
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return [round(max(middle - half, 0.0), 6), round(min(middle + half, 1.0), 6)]


Change = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]
"""From a model, a batch of normalised images and their labels to the images that are scored in their place."""


def corrupted(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, *, name: str, strength: int
) -> torch.Tensor:
    """Return normalised images, corrupted."""
    mean, std = (np.array(one, np.float32) for one in (IMAGENET_MEAN, IMAGENET_STD))
    values = images.permute(0, 2, 3, 1).cpu().numpy() * std + mean
    pixels = np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8)
    changed = np.stack([corrupt(one, name, strength) for one in pixels])
    normalised = (changed.astype(np.float32) / 255 - mean) / std
    return torch.from_numpy(normalised).permute(0, 3, 1, 2).to(images.device)


def fgsm(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, *, strength: float) -> torch.Tensor:
    """Return normalised images, moved by `strength` steps of 1/255 in the direction that raises the loss most."""
    mean = torch.tensor(IMAGENET_MEAN, device=images.device).view(1, 3, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=images.device).view(1, 3, 1, 1)
    images = images.detach().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(functional.cross_entropy(model(images), labels), images)
    moved = images.detach() + strength / 255 * gradient.sign() / std
    return torch.minimum(torch.maximum(moved, (0 - mean) / std), (1 - mean) / std)


@torch.no_grad()
def evaluate(model: nn.Module, loader: DiffuseMixLoader, world: World, change: Change | None = None) -> Scores:
    """Score a dataset. Processes share it, and each image counts once. The loader must deliver indices."""
    model.eval()
    n = len(loader.dataset)
    table = torch.full((2, n), -1.0, dtype=torch.float64, device=loader.device)
    loader.set_epoch(0)
    for images, labels, indices in loader:
        labels = labels.to(images.device)
        if change is not None:
            images = change(model, images, labels)
        logits = model(images).float()
        right = logits.gather(1, labels[:, None])
        at = indices.to(table.device)
        # Equal logits and non-finite logits count as wrong.
        table[0, at] = (~(logits < right)).sum(1).double() - 1
        table[1, at] = functional.cross_entropy(logits, labels, reduction="none").double()
    world.largest(table)
    return Scores(*table.cpu().numpy(), labels=np.array(loader.dataset.targets))


def load(checkpoint: Path) -> tuple[Recipe, nn.Module, dict]:
    """Return a checkpoint's recipe, its model with the weights, and the rest. Only plain data is unpickled."""
    if not checkpoint.is_file():
        raise ConfigError(f"there is no checkpoint {str(checkpoint)!r}; a run's folder has best.pt and last.pt.")
    found = torch.load(checkpoint, map_location="cpu", weights_only=True)
    recipe = Recipe.from_tables(found["recipe"])
    settings = recipe.model
    model = models.build(settings.name, len(found["classes"]), small=settings.small, width=settings.width)
    model.load_state_dict(found["model"])
    return recipe, model, found


def _numbers(name: str, text: str, kind: type[int] | type[float]) -> tuple:
    try:
        return tuple(kind(one) for one in text.split(",") if one)
    except ValueError:
        raise ConfigError(f"{name} must be numbers, separated by commas, found {text!r}.") from None


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="the dataset's folder")
    parser.add_argument("--out", type=Path, help="output file; default: the checkpoint's name with .evaluation.json")
    parser.add_argument("--fgsm", help="strengths in steps of 1/255, such as 1,2,4,8; default: the recipe's")
    parser.add_argument("--corruptions", help="strengths from 1 to 5, such as 1,3,5; default: the recipe's")
    parser.add_argument("--batch-size", type=int, default=128, help="per device")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--channels-last", action="store_true", help="memory format; faster on most processors")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


@record
def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    with World(options.device) as world:
        recipe, model, found = load(options.checkpoint)
        divided = parts(recipe, options.data)
        dataset = plain_set(recipe, divided.test)
        if list(found["classes"]) != dataset.classes:
            raise ConfigError(
                f"{options.checkpoint}: was trained on {len(found['classes'])} classes, {str(options.data)!r} has "
                f"{len(dataset.classes)}, or others; give the dataset that it was trained on."
            )
        memory_format = torch.channels_last if options.channels_last else torch.contiguous_format
        model = model.to(world.device, memory_format=memory_format)
        loader = DiffuseMixLoader(
            dataset,
            options.batch_size,
            num_workers=options.workers,
            device=world.device,
            memory_format=memory_format,
            return_index=True,
        )
        clean = evaluate(model, loader, world)
        asked = Evaluate(
            fgsm=recipe.evaluate.fgsm if options.fgsm is None else _numbers("--fgsm", options.fgsm, float),
            corruptions=recipe.evaluate.corruptions
            if options.corruptions is None
            else _numbers("--corruptions", options.corruptions, int),
        )
        attacked = {one: evaluate(model, loader, world, partial(fgsm, strength=one)) for one in asked.fgsm}
        spoilt = {
            name: {
                strength: evaluate(model, loader, world, partial(corrupted, name=name, strength=strength))
                for strength in asked.corruptions
            }
            for name in (LEVELS if asked.corruptions else ())
        }
        if not world.is_first:
            return
        result = {
            "checkpoint": str(options.checkpoint),
            "step": found["step"],
            "split": recipe.data.test
            if not recipe.data.test_share
            else f"{recipe.data.test_share:g} of {recipe.data.train}",
            **clean.tables(),
            "fgsm": {f"{strength:g}": scores.tables() for strength, scores in attacked.items()},
            "corruptions": {
                name: {str(strength): scores.tables() for strength, scores in of.items()} for name, of in spoilt.items()
            },
            "classes": [
                {
                    "class": name,
                    "images": int(np.sum(clean.labels == label)),
                    "top1": round(float(np.mean(clean.rank[clean.labels == label] < 1)), 6),
                    "top1_interval": wilson(
                        float(np.mean(clean.rank[clean.labels == label] < 1)), int(np.sum(clean.labels == label))
                    ),
                }
                for label, name in enumerate(dataset.classes)
                if np.any(clean.labels == label)
            ],
        }
        out = options.out or options.checkpoint.with_name(options.checkpoint.name + ".evaluation.json")
        out.write_text(json.dumps(result, indent=1) + "\n")
        with out.with_suffix(".csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["class", "images", "top1", "low", "high"])
            table.writerows([r["class"], r["images"], r["top1"], *r["top1_interval"]] for r in result["classes"])
        show(result)
        print(f"written to {out}")


def show(result: dict) -> None:
    def line(name: str, scores: dict) -> str:
        (a, b), (c, d) = scores["top1_interval"], scores["top5_interval"]
        one, five = scores["top1"], scores["top5"]
        return f"{name:18s} top-1 {one:6.2%} [{a:.2%}, {b:.2%}]   top-5 {five:6.2%} [{c:.2%}, {d:.2%}]"

    print(f"{result['images']:,} images of {result['split']}, weights of step {result['step']:,}")
    print(line("clean", result))
    for strength, scores in result["fgsm"].items():
        print(line(f"FGSM {strength}/255", scores))
    for name, of in result["corruptions"].items():
        for strength, scores in of.items():
            print(line(f"{name}, {strength} of 5", scores))
    worst = sorted(result["classes"], key=lambda one: one["top1"])[:5]
    print("worst classes: " + ", ".join(f"{one['class']} {one['top1']:.1%} of {one['images']}" for one in worst))


if __name__ == "__main__":
    try:
        main()
    except DiffuseMixError as error:
        sys.exit(f"evaluate.py: {error}")
