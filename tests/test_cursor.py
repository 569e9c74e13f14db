"""cursor: the position of a loader, without a loader: epochs, resuming, `set_epoch`, samplers and their states."""

import json
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from torch.utils.data import BatchSampler, RandomSampler

from dali_diffusemix import ConfigError
from dali_diffusemix.loading.cursor import Cursor, Identity, Run
from dali_diffusemix.loading.samplers import OwnOrder, Ranks, SamplerOrder

LENGTH, BATCH = 23, 4
BATCHES = -(-LENGTH // BATCH)
IDENTITY = Identity(seed=3, length=LENGTH, shuffle=True, fingerprint="f")


def own(batch_size: int = BATCH, rank: int = 0, world_size: int = 1, *, drop_last: bool = False) -> OwnOrder:
    return OwnOrder(LENGTH, batch_size, True, drop_last, IDENTITY.seed, Ranks((rank, world_size)))


def cursor_of(order: Any = None, **identity: Any) -> Cursor:
    order = own() if order is None else order
    return Cursor(order, IDENTITY._replace(**identity), has_sampler=isinstance(order, SamplerOrder))


def advance(order: Any, run: Run, batches: int) -> list[list[int]]:
    """Deliver batches, as the loader does."""
    run.started = True
    found = []
    for batch, _ in zip(order.batches(run.epoch, run.delivered), range(batches), strict=False):
        found.append(batch.indices.tolist())
        run.delivered, run.checksum = batch.delivered, batch.checksum
    return found


def position(cursor: Cursor) -> tuple[int, int]:
    state = cursor.state()
    return state["epoch"], state["places"]


class Positions(RuleBasedStateMachine):
    """Any sequence of calls, against a model of a few lines."""

    runs = Bundle("runs")

    def __init__(self) -> None:
        super().__init__()
        self.order, self.cursor = own(), cursor_of()
        self.expected = (0, 0)  # the state
        self.coming = (0, 0)  # where the next run begins
        self.newest: Run | None = None

    @rule(target=runs)
    def begin(self) -> Run:
        run = self.cursor.begin()
        assert (run.epoch, run.delivered, run.started, run.running) == (*self.coming, False, True)
        self.newest, self.expected, self.coming = run, self.coming, (self.coming[0] + 1, 0)
        return run

    @rule(run=runs, batches=st.integers(1, 2))
    def deliver(self, run: Run, batches: int) -> None:
        if run.running:
            advance(self.order, run, batches)
            if run is self.newest:
                self.expected = run.epoch, run.delivered

    @rule(run=consumes(runs))
    def finish(self, run: Run) -> None:
        epoch, running = run.epoch, run.running
        if running:
            self.cursor.finish(run)
            assert not run.running
            if run is self.newest:
                self.expected = epoch + 1, 0

    @rule(run=consumes(runs))
    def give_up(self, run: Run) -> None:
        run.running = False

    @rule(epoch=st.integers(0, 5))
    def set_epoch(self, epoch: int) -> None:
        run = self.newest
        if run is not None and run.running and not run.started:  # the run moves along
            self.coming = (run.epoch, run.delivered) if run.epoch == epoch else (epoch, 0)
            self.expected = self.coming
        else:
            self.coming = self.coming if self.coming[0] == epoch else (epoch, 0)
            if run is None or not run.running:
                self.newest, self.expected = None, self.coming
        self.cursor.set_epoch(epoch)

    @rule()
    def resume(self) -> None:
        """A state, by way of JSON, into a new loader."""
        state = json.loads(json.dumps(self.cursor.state()))
        if state["places"] < LENGTH:
            self.cursor = cursor_of()
            self.cursor.load(state)
            assert self.cursor.state() == state
            self.newest, self.coming = None, self.expected

    @invariant()
    def the_state_is_the_position(self) -> None:
        assert position(self.cursor) == self.expected
        assert self.cursor.next_epoch == self.coming[0]


TestPositions = Positions.TestCase
TestPositions.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


@pytest.mark.parametrize("delivered", range(BATCHES))
def test_resuming_continues_the_order_on_any_number_of_ranks(delivered: int) -> None:
    order = own()
    cursor = cursor_of(order)
    first = advance(order, cursor.begin(), delivered)
    for world_size in (1, 2, 4):
        rest = []
        for rank in range(world_size):
            here = own(BATCH // world_size, rank, world_size)
            resumed = cursor_of(here)
            resumed.load(cursor.state())
            rest.append(advance(here, resumed.begin(), BATCHES))
        seen = sorted(i for batch in first for i in batch) + sorted(i for one in rest for batch in one for i in batch)
        assert set(seen) == set(range(LENGTH)) and len(seen) - LENGTH < world_size


def test_an_older_run_changes_nothing() -> None:
    order = own()
    cursor = cursor_of(order)
    older, newer = cursor.begin(), cursor.begin()
    advance(order, newer, 2)
    state = cursor.state()
    advance(order, older, 3)
    cursor.finish(older)
    assert cursor.state() == state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "state must be of version 1"),
        ({"seed": 4}, "seed of the state is 4, here it is 3; give the dataset this seed."),
        ({"length": 9}, "length of the state is 9"),
        ({"shuffle": False}, "shuffle of the state is False"),
        ({"fingerprint": "g"}, "fingerprint of the state is 'g'"),
        ({"sampler": None}, "taken with a sampler, this loader has none"),
        ({"places": 3}, r"must be a multiple of the global batch \(batch_size x world_size = 4\)"),
        ({"places": 24}, "must be a multiple of the global batch"),
        ({"places": "much"}, "state must hold whole numbers"),
        ({"epoch": -1}, "epoch must be at least 0"),
    ],
)
def test_a_state_of_something_else_is_refused(change: dict[str, Any], message: str) -> None:
    cursor = cursor_of()
    before = cursor.state()
    with pytest.raises(ConfigError, match=message):
        cursor.load({**before, **change})
    assert cursor.state() == before


def test_a_samplers_state_is_that_of_the_epochs_beginning() -> None:
    def order() -> SamplerOrder:
        generator = torch.Generator().manual_seed(5)
        sampler = RandomSampler(range(LENGTH), generator=generator)
        return SamplerOrder(BatchSampler(sampler, BATCH, False), sampler, generator, LENGTH, Ranks(None))

    whole = order()
    cursor = cursor_of(whole)
    epochs = []
    for _ in range(2):
        run = cursor.begin()
        epochs.append(advance(whole, run, BATCHES))
        cursor.finish(run)
    again = order()
    first = cursor_of(again)
    advance(again, run := first.begin(), BATCHES)
    first.finish(run)
    advance(again, first.begin(), 2)
    other = order()
    resumed = cursor_of(other)
    resumed.load(first.state())
    assert advance(other, resumed.begin(), BATCHES) == epochs[1][2:]


def test_threads_that_begin_at_once_get_runs_of_their_own() -> None:
    cursor, interval = cursor_of(), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as threads:
            runs = list(threads.map(lambda _: cursor.begin(), range(400)))
    finally:
        sys.setswitchinterval(interval)
    assert len({id(run) for run in runs}) == 400
    assert sorted(run.epoch for run in runs) == list(range(400))


def test_a_pickled_cursor_begins_the_next_epoch() -> None:
    cursor = cursor_of()
    advance(own(), cursor.begin(), 2)
    assert position(pickle.loads(pickle.dumps(cursor))) == (1, 0)


@pytest.mark.slow
def test_it_needs_no_dali() -> None:
    code = (
        "import sys; import dali_diffusemix.loading.cursor; assert not any(m.startswith('nvidia') for m in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
