"""A scorer of edits of your own: a small network that tells whether an edit shows its original.

    cd examples
    python flower_scorer.py data/train cache/edits      # trains on the store's pairs; writes flower_scorer.pt here
    dali-diffusemix score cache/edits --with flower_scorer:Agreement --name agreement

The network learns two things at once from pairs of an original and its edit: which class both are of, and which of a
batch's edits belongs to which original (InfoNCE, van den Oord et al., 2018). It compares features of a grid of 8 x 8
places, so an edit that moves the objects scores low, and whatever recolours or repaints them costs little. Agreement is
the cosine of the angle between both images' features, -1 to 1. Train it on edits that you trust, for instance those of
the procedural editor; benchmarks/calibrate_score.py measures how well it finds edits of other photographs.
"""

import argparse
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from models import ResNet, build
from numpy.typing import NDArray
from PIL import Image
from torch import nn
from torch.nn import functional

from dali_diffusemix import EditStore
from dali_diffusemix.errors import ConfigError
from dali_diffusemix.images.codec import decode

SIDE = 64  # pixels of the network's input
FEATURES = 16  # of each place of the grid
WEIGHTS = Path(os.environ.get("FLOWER_SCORER", Path(__file__).with_name("flower_scorer.pt")))
_TEMPERATURE = 0.07


class PairNetwork(nn.Module):
    """From (batch, 3, 64, 64) images to features (batch, 64 x FEATURES) of length 1, and to logits (batch, classes)."""

    def __init__(self, classes: int, width: int = 24) -> None:
        super().__init__()
        trunk = build("resnet18", classes, width=width)
        assert isinstance(trunk, ResNet)
        self.trunk = trunk
        self.places = nn.Conv2d(2 * width, FEATURES, 1)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        trunk = self.trunk
        # Brightness and contrast of each channel say little: most edits change them.
        mean, deviation = images.mean((2, 3), keepdim=True), images.std((2, 3), keepdim=True)
        x = functional.relu(trunk.bn1(trunk.conv1((images - mean) / (deviation + 0.02))))
        x = trunk.layer2(trunk.layer1(trunk.maxpool(x)))
        features = functional.normalize(self.places(x).flatten(1))
        return features, trunk.fc(trunk.layer4(trunk.layer3(x)).mean((2, 3)))


def resized(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The image at the network's size, (SIDE, SIDE, 3) uint8."""
    return np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC, reducing_gap=2.0))


def tensor(images: NDArray[np.uint8]) -> torch.Tensor:
    """(n, SIDE, SIDE, 3) uint8 as (n, 3, SIDE, SIDE) float32 from 0 to 1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


# Training -------------------------------------------------------------------------------------------------------------


def recoloured(images: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """The images with mixed channels, another gamma, some blurred, some negative, some noisy: styles nobody foresaw."""
    n = len(images)
    mixing = torch.eye(3) + 0.35 * torch.randn(n, 3, 3, generator=draw)
    images = torch.einsum("nij,njhw->nihw", mixing / mixing.sum(2, keepdim=True).clamp(min=0.4), images).clamp(0, 1)
    gamma = torch.exp(0.5 * torch.randn(n, 1, 1, 1, generator=draw))
    images = images.clamp(min=1e-3) ** gamma
    chance = torch.rand(3, n, 1, 1, 1, generator=draw)
    images = torch.where(chance[0] < 0.1, 1 - images, images)
    images = torch.where(chance[1] < 0.3, functional.avg_pool2d(images, 3, 1, 1), images)
    noise = 0.08 * torch.randn(images.shape, generator=draw)
    return torch.where(chance[2] < 0.3, images + noise, images)


def framed(
    originals: torch.Tensor, edits: torch.Tensor, draw: torch.Generator, least: float = 0.6
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same random crop and reflection of an original and its edit, for each pair."""
    n = len(originals)
    scale = least + (1 - least) * torch.rand(n, generator=draw)
    offsets = (1 - scale[:, None]) * (2 * torch.rand(n, 2, generator=draw) - 1)
    flips = (torch.rand(n, generator=draw) < 0.5).float() * 2 - 1
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = scale * flips, scale, offsets
    grid = functional.affine_grid(theta, list(originals.shape), align_corners=False)
    a, b = (
        functional.grid_sample(one, grid, padding_mode="reflection", align_corners=False) for one in (originals, edits)
    )
    return a, b


def train(
    originals: NDArray[np.uint8],
    labels: NDArray[np.int64],
    edits: NDArray[np.uint8],
    of: NDArray[np.int64],
    *,
    epochs: int = 10,
    batch: int = 64,
    pairs: bool = True,
    seed: int = 0,
    said: Callable[[str], None] = print,
) -> PairNetwork:
    """Train a network on pairs.

    Args:
        originals: (n, SIDE, SIDE, 3).
        labels: (n,) classes, from 0.
        edits: (m, SIDE, SIDE, 3).
        of: (m,) the original of each edit. An epoch shows each original once, with one of its edits.
        epochs: Number of epochs.
        batch: Pairs in a batch.
        pairs: False trains a plain classifier: no edit is shown, no pair told apart, and nothing is recoloured.
        seed: Of weights and draws.
        said: Called with a line after each epoch.
    """
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed)
    network = PairNetwork(int(labels.max()) + 1).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.05)
    order = np.argsort(of, kind="stable")
    starts = np.searchsorted(of[order], np.arange(len(originals) + 1))
    with_edits = np.flatnonzero(starts[1:] > starts[:-1])
    steps = len(with_edits) // batch
    if not steps:
        raise ConfigError(f"originals with edits must be at least {batch}, found {len(with_edits)}; make it smaller.")
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, epochs * steps, pct_start=0.2)
    rng = np.random.default_rng(seed)
    for epoch in range(epochs):
        total = right = 0.0
        drawn = rng.permutation(with_edits)
        for step in range(steps):
            rows = drawn[step * batch : (step + 1) * batch]
            chosen = order[rng.integers(starts[rows], starts[rows + 1])]
            a, b = framed(tensor(originals[rows]), tensor(edits[chosen]), draw)
            images = torch.cat([recoloured(a, draw), recoloured(b, draw)]) if pairs else a
            features, logits = network(images.contiguous(memory_format=torch.channels_last))
            target = torch.from_numpy(labels[rows]).repeat(2 if pairs else 1)
            loss = functional.cross_entropy(logits, target, label_smoothing=0.1)
            if pairs:
                alike = features[:batch] @ features[batch:].T / _TEMPERATURE
                which = torch.arange(batch)
                loss = loss + (functional.cross_entropy(alike, which) + functional.cross_entropy(alike.T, which)) / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
            right += float((logits.argmax(1) == target).float().mean())
        said(f"epoch {epoch + 1}/{epochs}: loss {total / steps:.3f}, class {right / steps:.3f}")
    return network.eval()


# Scoring --------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def embed(network: PairNetwork, images: NDArray[np.uint8], batch: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and logits of (n, SIDE, SIDE, 3) images."""
    found = [network(tensor(images[start : start + batch])) for start in range(0, len(images), batch)]
    features, logits = zip(*found, strict=True)
    return torch.cat(features), torch.cat(logits)


class Agreement:
    """The scorer: `score --with flower_scorer:Agreement`. It is made once, and called with batches."""

    def __init__(self) -> None:
        if not WEIGHTS.is_file():
            raise ConfigError(f"{str(WEIGHTS)!r}: is missing; run `python flower_scorer.py ROOT STORE` to train.")
        stored = torch.load(WEIGHTS, map_location="cpu", weights_only=True)
        self.network = PairNetwork(stored["classes"])
        self.network.load_state_dict(stored["weights"])
        self.network.eval()
        # Identifies the weights: scores of another training are not mixed with these.
        self.revision = f"sha256:{hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()}"

    def __call__(
        self, originals: Sequence[NDArray[np.uint8]], edits: Sequence[NDArray[np.uint8]], labels: Sequence[str]
    ) -> list[float]:
        """The agreement of each edit with its original, -1 to 1; images of any size."""
        ours, theirs = (
            embed(self.network, np.stack([resized(image) for image in images]))[0] for images in (originals, edits)
        )
        return (ours * theirs).sum(1).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="the folder of the originals")
    parser.add_argument("store", type=Path, help="the edit store")
    parser.add_argument("--images", type=int, default=20_000, help="at most so many originals")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    options = parser.parse_args()
    store = EditStore.open(options.store)
    catalog, rng = store.catalog, np.random.default_rng(0)
    with_edits = np.flatnonzero(store.starts[1:] > store.starts[:-1])
    rows = np.sort(rng.permutation(with_edits)[: options.images])
    edits = np.concatenate([np.arange(store.starts[row], store.starts[row + 1]) for row in rows])
    network = train(
        np.stack([resized(decode(options.root / catalog.path(int(row)))) for row in rows]),
        catalog.labels[rows].astype(np.int64),
        np.stack([resized(decode(store.encoded(int(edit)))) for edit in edits]),
        np.searchsorted(rows, store.originals_of(edits)),
        epochs=options.epochs,
        batch=options.batch_size,
    )
    torch.save({"classes": network.trunk.fc.out_features, "weights": network.state_dict()}, options.out)
    print(f"{options.out}: trained on {len(rows)} originals and {len(edits)} edits")


if __name__ == "__main__":
    main()
