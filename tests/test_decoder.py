"""decoder: batches come in order, errors in their turn; and a decoder belongs to one iterator of one process."""

import gc
import os
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from test_protocol import loader_of

from dali_diffusemix import DiffuseMixDataset, EvalCrop
from dali_diffusemix.loading.decoder import PieceDecoder
from dali_diffusemix.loading.pieces import Pieces, request

pytest.importorskip("nvidia.dali", reason="DALI is not installed on this machine")


def test_an_error_comes_in_its_turn(photos: Path) -> None:
    """What cannot be begun while later batches are asked for takes none of those before with it."""
    dataset = DiffuseMixDataset(photos, crop=EvalCrop(24))

    def pieces() -> Pieces:
        return request([(dataset, dataset.planner.batch(0, np.arange(4)))], visible_only=True)

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


def test_a_forked_process_leaves_the_decoder_alone(dataset: DiffuseMixDataset) -> None:
    loader = loader_of(dataset)
    batches = iter(loader)
    next(batches)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            del batches, loader
            gc.collect()
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert len(list(batches)) == 8


@pytest.mark.slow
def test_iterators_in_several_threads_never_share_a_decoder(dataset: DiffuseMixDataset) -> None:
    loader, interval = loader_of(dataset), sys.getswitchinterval()
    wrong: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(12):
                for _ in zip(range(2), loader, strict=False):
                    pass
        except BaseException as error:
            wrong.append(error)

    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong
