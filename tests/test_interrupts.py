"""An exception anywhere under `next()`, a Ctrl-C for one: every batch that comes afterwards is right.

It is thrown at single lines of the loader, the decoder, reading and DALI's own Python, on all threads, by a trace
function; `make soak` takes every line twice, and 500 signals at random moments.
"""

import numpy as np
import pytest
from interrupting import Case, Thrown, make_case

pytest.importorskip("nvidia.dali", reason="DALI is not installed on this machine")

# What is thrown in a destructor goes no further.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="session", params=["equal", "mixed"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("case"), request.param)


@pytest.mark.slow
def test_after_an_exception_at_any_line_every_batch_is_right(case: Case) -> None:
    """At every 30th line, from another on each time."""
    draw = np.random.default_rng()
    for at in case.places(draw)[int(draw.integers(30)) :: 30]:
        case.throw(at)


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
