"""An exception anywhere under `next()`, a Ctrl-C for one: every batch that comes afterwards is right.

It is thrown at single lines of the loader, the decoder, reading and DALI's own Python, on all threads, by a trace
function; `make soak` takes every line, and 500 signals at random moments.
"""

import contextlib
import importlib
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from material import encoded, photograph

from dali_diffusemix import DiffuseMixDataset, DiffuseMixLoader, EvalCrop, FractalBank, MixSpec, TrainCrop

pytest.importorskip("nvidia.dali", reason="DALI is not installed on this machine")

FILES = {
    importlib.import_module(name).__file__
    for name in (
        *("dali_diffusemix.loader", "dali_diffusemix.pipeline", "dali_diffusemix.reading", "dali_diffusemix.mixing"),
        *("dali_diffusemix.native", "nvidia.dali.pipeline"),
    )
}
EPOCHS = 5


class Thrown(BaseException):
    """What no handler expects, as KeyboardInterrupt."""


class Thrower:
    """Counts the lines of `FILES` on all threads, and throws at one of them."""

    def __init__(self, at: int | None) -> None:
        self.at, self.lines = at, 0

    def __call__(self, frame: FrameType, event: str, _: object) -> Any:
        if event == "call":
            return self if frame.f_code.co_filename in FILES else None
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                raise Thrown(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
        return self

    def __enter__(self) -> "Thrower":
        threading.settrace(self)
        sys.settrace(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.at = None  # threads that were started meanwhile are still traced
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

    def throw(self, at: int | None) -> int:
        """Throw at a line of an epoch, then check two more; returns how many lines the epoch had."""
        loader = self.make()
        with Thrower(at) as thrower, contextlib.suppress(Thrown):
            for _ in loader:
                pass
        with loader:
            self.check(loader, 2)
        return thrower.lines


@pytest.fixture(scope="session", params=["equal", "mixed"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """12 originals whose pieces are all of one size, which no shape betrays; or of many, of originals and edits."""
    from dali_diffusemix.fractals import render_bank
    from dali_diffusemix.generate import GenerateConfig, generate

    folder = tmp_path_factory.mktemp("case")
    for i in range(13):
        file = folder / "train" / f"{i % 3}" / f"{i}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        size = (40, 40) if request.param == "equal" else (40 + 3 * i, 70 - 2 * i)
        file.write_bytes(encoded(photograph(i, *size)))
    options: dict[str, object] = {"batch_size": 4, "device": "cpu", "num_workers": 2, "return_index": True}
    if request.param == "equal":
        dataset = DiffuseMixDataset(folder / "train", crop=EvalCrop(32), normalize=None)
        return Case(lambda: DiffuseMixLoader(dataset, shuffle=True, drop_last=True, **options))  # type: ignore[arg-type]
    generate(folder / "train", folder / "edits", GenerateConfig(prompts=("autumn",), size=48))
    bank: FractalBank = render_bank(folder / "fractals.npy", count=2, size=32)
    spec = MixSpec(probability=0.7)
    dataset = DiffuseMixDataset(folder / "train", edits=folder / "edits", fractals=bank, mix=spec, crop=TrainCrop(32))
    return Case(lambda: DiffuseMixLoader(dataset, shuffle=True, drop_last=True, **options))  # type: ignore[arg-type]


def lines(case: Case, every: int, offset: int) -> Iterator[int]:
    yield from range(1 + offset, case.throw(None), every)


def test_after_an_exception_at_any_line_every_batch_is_right(case: Case) -> None:
    """Every 61st line; all of them in `make soak`."""
    for at in lines(case, 61, int(np.random.default_rng().integers(61))):
        case.throw(at)


def test_what_was_thrown_passes_through(case: Case) -> None:
    """And the decoder that it passed through is not used again."""
    loader = case.make()
    iterator = iter(loader)
    next(iterator)
    decoder = iterator._progress.decoder
    assert decoder is not None
    with pytest.raises(Thrown), Thrower(30):
        next(iterator)
    assert not decoder.intact and not loader._idle
    with pytest.raises(RuntimeError, match="can only be closed"):
        decoder.fetch()
    with pytest.raises(StopIteration):
        next(iterator)
    loader.close()
