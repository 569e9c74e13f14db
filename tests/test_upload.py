"""The copy of decoded pieces to a GPU, with the CPU in the GPU's place: all but the page-locking and the streams."""

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from dali_diffusemix import DiffuseMixDataset, DiffuseMixLoader, FractalBank, MixSpec, RandomCrop, TrainCrop
from dali_diffusemix.loading.pieces import request
from dali_diffusemix.loading.upload import PieceUpload
from dali_diffusemix.mix import TensorFormat
from dali_diffusemix.mix.call import mix, piece_table
from dali_diffusemix.plan import Crop

CPU = torch.device("cpu")


def content(table: NDArray[np.void]) -> list[bytes]:
    return [ctypes.string_at(int(p["data"]), 3 * p["height"] * p["width"]) if p["data"] else b"" for p in table]


def described(images: list[NDArray[np.uint8] | None]) -> NDArray[np.void]:
    data = np.array([0 if image is None else image.ctypes.data for image in images], dtype=np.uint64)
    shapes = np.array([(0, 0) if image is None else image.shape[:2] for image in images], dtype=np.int32)
    return piece_table(data, shapes.reshape(-1, 2))


@given(
    shapes=st.lists(st.none() | st.tuples(st.integers(1, 40), st.integers(1, 40)), max_size=9),
    split=st.integers(0, 9),
    threads=st.integers(1, 4),
    native=st.booleans(),
)
def test_every_byte_arrives(shapes: list[tuple[int, int] | None], split: int, threads: int, native: bool) -> None:
    draw = np.random.default_rng(len(shapes))
    images = [None if shape is None else draw.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]
    table = described(images)
    on_host = np.arange(len(images)) >= split  # the others lie on the device already
    with pytest.MonkeyPatch.context() as patch:
        if not native:
            patch.setattr("dali_diffusemix.base.native.library", lambda: None)
        upload = PieceUpload(CPU, threads)
        for _ in range(2):
            moved, block = upload(table, on_host)
            assert content(moved) == content(table)
            assert not moved["data"][table["data"] == 0].any()
            for name in set(table.dtype.names or ()) - {"data"}:
                np.testing.assert_array_equal(moved[name], table[name])
            np.testing.assert_array_equal(moved["data"][:split], table["data"][:split])
            there = moved["data"][split:][table["data"][split:] != 0]
            if not len(there):
                assert block is None
                continue
            assert isinstance(block, torch.Tensor)
            # Where a kernel reads whole words.
            assert not (there % 16).any()
            assert ((there >= block.data_ptr()) & (there < block.data_ptr() + len(block))).all()


def test_blocks_grow_to_the_largest_batch_and_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that torch's allocators give the same memory again."""
    upload = PieceUpload(CPU, 1)
    sizes = []
    for side in (10, 2000, 20):
        image = np.zeros((side, side, 3), dtype=np.uint8)
        _, block = upload(described([image]), np.ones(1, dtype=np.bool_))
        assert isinstance(block, torch.Tensor)
        sizes.append(len(block))
    assert sizes[0] < 2000 * 2000 * 3 <= sizes[1] == sizes[2]


@pytest.mark.parametrize("crop", [TrainCrop(40), RandomCrop(48, resize=60, padding=5)], ids=repr)
@pytest.mark.parametrize("visible_parts", [True, False])
def test_pixels_before_the_kernel_are_those_of_the_cpu(
    photos: Path, edits: Path, bank: FractalBank, crop: Crop, visible_parts: bool
) -> None:
    """What decode="cpu" gives the kernel on a GPU: bit for bit what device="cpu" mixes, and mixed it is the same."""
    pytest.importorskip("nvidia.dali", reason="DALI is not installed on this machine")
    dataset = DiffuseMixDataset(photos, edits=edits, fractals=bank, mix=MixSpec.paper(), crop=crop, normalize=None)
    loader = DiffuseMixLoader(dataset, 9, device="cpu", num_workers=2, visible_parts=visible_parts)
    upload = PieceUpload(CPU, 2)
    format = TensorFormat(normalize=None)
    decoder = loader._maker.take_decoder(9, crop.output_size)
    for step, (images, _) in enumerate(loader):
        plan = loader.plan(0, step)
        decoder.submit(lambda plan=plan: request([(dataset, plan)], visible_only=visible_parts))
        pieces = decoder.fetch()
        moved, block = upload(pieces.table, pieces.on_host)
        assert pieces.on_host[pieces.table["data"] != 0].all()
        assert content(moved.ravel()) == content(pieces.table.ravel())
        del pieces
        out = np.empty(format.shape(len(plan), plan.output_size), dtype=format.storage)
        mix(plan, moved, bank.images, out=out, format=format, threads=2)
        del block
        np.testing.assert_array_equal(out, images.numpy())
    decoder.close()
