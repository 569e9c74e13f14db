"""Exceptions thrown at single lines of a loader's epoch, and a loader whose every batch is compared."""

import contextlib
import importlib
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from material import write_photograph

from dali_diffusemix import DiffuseMixDataset, DiffuseMixLoader, EvalCrop, MixSpec, TrainCrop
from dali_diffusemix.fractals import render_bank
from dali_diffusemix.generate import GenerateConfig, generate

MODULES = (
    *("dali_diffusemix.loading.loader", "dali_diffusemix.loading.batches", "dali_diffusemix.loading.cursor"),
    *("dali_diffusemix.loading.samplers", "dali_diffusemix.loading.pieces", "dali_diffusemix.loading.memory"),
    *("dali_diffusemix.loading.decoder", "dali_diffusemix.loading.dali"),
    *("dali_diffusemix.images.reading", "dali_diffusemix.mix.call", "dali_diffusemix.base.native"),
    *("dali_diffusemix.base.workers", "nvidia.dali.pipeline"),
)
EPOCHS = 5


class Thrown(BaseException):
    """What no handler expects, as KeyboardInterrupt."""


Line = tuple[str, int]
"""(file, number)."""


class Thrower:
    """Counts how often each line of `MODULES` runs, on all threads, and throws when one does for the n-th time."""

    def __init__(self, at: tuple[Line, int] | None) -> None:
        self.lines: Counter[Line] = Counter()
        self.thrown = False
        self._at = at
        self._files = {importlib.import_module(name).__file__ for name in MODULES}

    def __call__(self, frame: FrameType, event: str, _: object) -> Any:
        if event == "call":
            # What a task raises, in whatever thread, is its result; the loop that takes tasks gets no signals.
            ours = frame.f_code.co_filename in self._files and frame.f_code.co_name != "_work"
            return self if ours else None
        if event == "line":
            line = frame.f_code.co_filename, frame.f_lineno
            self.lines[line] += 1
            if self._at == (line, self.lines[line]):
                self._at, self.thrown = None, True
                raise Thrown(f"{Path(line[0]).name}:{line[1]}")
        return self

    def __enter__(self) -> "Thrower":
        threading.settrace(self)
        sys.settrace(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._at = None  # threads that were started meanwhile are still traced
        sys.settrace(None)
        threading.settrace(None)  # type: ignore[arg-type]


class Case:
    """A loader's samples by epoch and index, to compare with."""

    def __init__(self, make: Callable[[], DiffuseMixLoader]) -> None:
        self.make = make
        self.expected: list[dict[int, torch.Tensor]] = []
        with make() as loader:
            for _ in range(EPOCHS):
                self.expected.append({})
                for images, _, indices in loader:
                    self.expected[-1].update(zip(indices.tolist(), images.clone(), strict=True))

    def check(self, loader: DiffuseMixLoader, epochs: int) -> None:
        """Deliver whole epochs and compare them."""
        for _ in range(epochs):
            batches = iter(loader)
            epoch = loader.state_dict()["epoch"]
            found: list[int] = []
            for images, labels, indices in batches:
                found += indices.tolist()
                for image, label, index in zip(images, labels.tolist(), indices.tolist(), strict=True):
                    assert torch.equal(image, self.expected[epoch][index]), (epoch, index)
                    assert label == loader.dataset.targets[index]
            assert len(found) == len(set(found)) == len(loader) * 4

    def throw(self, at: tuple[Line, int] | None) -> Thrower:
        """Throw in an epoch, then check two more."""
        loader = self.make()
        with Thrower(at) as thrower, contextlib.suppress(Thrown):
            for _ in loader:
                pass
        with loader:
            self.check(loader, 2)
        return thrower

    def places(self, draw: np.random.Generator) -> list[tuple[Line, int]]:
        """Every line that an epoch runs: its first time, and some later one."""
        lines = sorted(self.throw(None).lines.items())
        later = [(line, int(draw.integers(2, times + 1))) for line, times in lines if times > 1]
        return [*((line, 1) for line, _ in lines), *later]


def make_case(folder: Path, pieces: str) -> Case:
    """12 originals whose pieces are all of one "equal" size, which no shape betrays; or "mixed", with edits."""
    for i in range(13):
        file = folder / "train" / f"{i % 3}" / f"{i}.jpg"
        size = (40, 40) if pieces == "equal" else (40 + 3 * i, 70 - 2 * i)
        write_photograph(file, i, *size)
    if pieces == "equal":
        dataset = DiffuseMixDataset(folder / "train", crop=EvalCrop(32), normalize=None)
    else:
        generate(folder / "train", folder / "edits", GenerateConfig(prompts=("autumn",), size=48))
        bank, mix = render_bank(folder / "fractals.npy", count=2, size=32), MixSpec(probability=0.7)
        dataset = DiffuseMixDataset(
            folder / "train", edits=folder / "edits", fractals=bank, mix=mix, crop=TrainCrop(32), seed=0
        )

    def loader() -> DiffuseMixLoader:
        return DiffuseMixLoader(
            dataset, 4, shuffle=True, drop_last=True, device="cpu", num_workers=2, return_index=True
        )

    return Case(loader)
