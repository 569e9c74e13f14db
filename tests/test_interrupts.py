"""An exception anywhere under `next()`, a Ctrl-C for one: every batch that comes afterwards is right.

It is thrown at single lines of the loader, the decoder, reading and DALI's own Python, on all threads, by a trace
function; `make soak` takes every line twice, and 500 signals at random moments.
"""

from pathlib import Path

import numpy as np
import pytest
from interrupting import Case, Thrown, make_case

from dali_diffusemix import DiffuseMixDataset, EvalCrop
from dali_diffusemix.loading.decoder import PieceDecoder
from dali_diffusemix.loading.pieces import Pieces, request

pytest.importorskip("nvidia.dali", reason="DALI is not installed on this machine")

# What is thrown in a destructor goes no further.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="session", params=["equal", "mixed"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("case"), request.param)


def test_after_an_exception_at_any_line_every_batch_is_right(case: Case) -> None:
    """At every 30th line, from another on each time."""
    draw = np.random.default_rng()
    for at in case.places(draw)[int(draw.integers(30)) :: 30]:
        case.throw(at)


def test_an_error_comes_in_its_turn(photos: Path) -> None:
    """What cannot be begun while later batches are asked for takes none of those before with it."""
    dataset = DiffuseMixDataset(photos, crop=EvalCrop(24))

    def pieces() -> Pieces:
        return request(dataset, dataset.planner.batch(0, np.arange(4)), visible_only=True)

    def gone() -> Pieces:
        raise OSError("the storage does not answer")

    decoder = PieceDecoder(4, threads=1)
    for make in (pieces, gone, pieces):
        decoder.submit(make)
    decoded = decoder.fetch()
    assert decoded.table["data"][0].all() and not decoded.errors
    with pytest.raises(OSError, match="does not answer"):
        decoder.fetch()
    decoder.close()


def test_what_was_thrown_passes_through(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the decoder that it passed through is not used again."""
    loader = case.make()
    iterator = iter(loader)
    next(iterator)
    decoder = iterator._batches._decoder
    assert decoder is not None

    def thrown(*_: object) -> None:
        raise Thrown

    with monkeypatch.context() as patch, pytest.raises(Thrown):
        patch.setattr("dali_diffusemix.loading.dali.Pipeline.outputs", thrown)
        next(iterator)
    assert not decoder.intact and not loader._maker._free
    with pytest.raises(RuntimeError, match="can only be closed"):
        decoder.fetch()
    with pytest.raises(StopIteration):
        next(iterator)
    loader.close()
