"""The verdicts of `quality`: scores of good and of bad edits of real photographs.

Method: photographs, chosen at random from a folder and squashed to `--size`. Good edits are procedural, of all nine
prompts; none is from a diffusion model. Bad edits are made:

    unchanged        the photograph itself: blurred by a pixel, JPEG of quality 75, brightness to the power of 1.02,
                     noise of two levels; similar to an autoencoder that edits nothing
    another          the edit of another photograph
    noise            random pixels
    black, white     with noise of three levels
    grey             flat, with noise of three levels

For each kind: the verdicts, and quantiles of the scores.
"""

import argparse
import io
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from record import write

from dali_diffusemix.catalog import index
from dali_diffusemix.generate.editors import PROMPTS, EditTask
from dali_diffusemix.generate.editors.procedural import ProceduralEditor
from dali_diffusemix.generate.quality import Thresholds, judge
from dali_diffusemix.images.codec import decode

Picture = NDArray[np.uint8]


def unchanged(picture: Picture, rng: np.random.Generator) -> Picture:
    stream = io.BytesIO()
    Image.fromarray(picture).filter(ImageFilter.GaussianBlur(1)).save(stream, "JPEG", quality=75)
    values = np.asarray(Image.open(stream), np.float64)
    values = 255 * (values / 255) ** 1.02 + rng.uniform(-2, 2, values.shape)
    return np.clip(values, 0, 255).astype(np.uint8)


def even(value: int, picture: Picture, rng: np.random.Generator) -> Picture:
    return np.clip(value + rng.uniform(-3, 3, picture.shape), 0, 255).astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="a folder of photographs, root/class/image")
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    catalog, editor = index(options.root), ProceduralEditor()
    verdicts: dict[str, Counter[str]] = {}
    scores: dict[str, list[float]] = {}

    def note(kind: str, original: Picture, edit: Picture) -> None:
        found = judge(original, edit)
        verdicts.setdefault(kind, Counter())[found.verdict or "accepted"] += 1
        scores.setdefault(kind, []).append(found.score)

    before: list[Picture] = []
    for row in rng.permutation(len(catalog))[: options.images].tolist():
        photograph = Image.fromarray(decode(options.root / catalog.path(row)))
        picture = np.asarray(photograph.resize((options.size, options.size), Image.Resampling.BICUBIC))
        edits = editor.edit([picture], [EditTask(image=0, prompt=prompt, seed=row) for prompt in PROMPTS])
        for number, (prompt, edit) in enumerate(zip(PROMPTS, edits, strict=True)):
            note(f"good: {prompt}", picture, edit)
            if before:
                note("bad: another", picture, before[number])
        before = edits
        note("bad: unchanged", picture, unchanged(picture, rng))
        note("bad: noise", picture, rng.integers(0, 256, picture.shape, np.uint8))
        for kind, value in (("black", 0), ("white", 255), ("grey", int(rng.integers(40, 216)))):
            note(f"bad: {kind}", picture, even(value, picture, rng))
    results: dict[str, Any] = {
        kind: {
            "edits": count.total(),
            "accepted": round(count["accepted"] / count.total(), 4),
            "verdicts": dict(count),
            "score_quantiles": {str(q): round(float(np.quantile(scores[kind], q)), 4) for q in (0, 0.01, 0.5, 0.99, 1)},
        }
        for kind, count in verdicts.items()
    }
    settings = {"images": options.images, "size": options.size, "thresholds": Thresholds().settings()}
    write(options.out, {"benchmark": "calibrate_quality", "settings": settings, "results": results})


if __name__ == "__main__":
    main()
