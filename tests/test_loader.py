"""The loader: the same samples as DataLoader over the same dataset, whatever the batches, threads, files and epochs."""

import gc
import os
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from material import MakeStore, encoded, photograph, write_photograph
from PIL import Image
from torch.utils.data import DataLoader, Subset

from dali_diffusemix import (
    ConfigError,
    DecodeError,
    DiffuseMixDataset,
    DiffuseMixLoader,
    EvalCrop,
    FractalBank,
    MissingDependencyError,
    MixSpec,
    RandomCrop,
    TrainCrop,
)
from dali_diffusemix.base import gpu
from dali_diffusemix.loading.dali import dali
from dali_diffusemix.plan import Crop

pytest.importorskip("nvidia.dali", reason="DALI is not installed on this machine")

TOLERANCE = 2 / 255  # DESIGN's bound; on the CPU both decoders give the same bytes and the difference is 0


def load(dataset: DiffuseMixDataset, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    with DiffuseMixLoader(dataset, **{"batch_size": 64, "num_workers": 2, "device": "cpu", **options}) as loader:  # type: ignore[arg-type]
        images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def load_by_pillow(dataset: DiffuseMixDataset, indices: range | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    subset = dataset if indices is None else Subset(dataset, indices)
    images, labels = zip(*DataLoader(subset, batch_size=64), strict=True)
    return torch.cat(images), torch.cat(labels)


def mixed(root: Path, edits: Path, bank: FractalBank, **options: object) -> DiffuseMixDataset:
    arguments = {"crop": TrainCrop(40), "mix": MixSpec.paper(), "edits": edits, "fractals": bank, **options}
    return DiffuseMixDataset(root, **arguments)  # type: ignore[arg-type]


# --- equality with DataLoader -------------------------------------------------------------------------------------

CROPS: list[Callable[[float], Crop]] = [
    lambda flip: TrainCrop(96, flip=flip),
    lambda flip: RandomCrop((80, 96), resize=120, padding=9, flip=flip),
    lambda flip: EvalCrop(96),
]


@pytest.mark.parametrize(
    ("preset", "order", "crop", "flip"),
    [
        pytest.param(preset, order, crop, flip, marks=() if preset == "paper" else pytest.mark.slow)
        for (preset, order, crop), flip in zip(
            product(("paper", "release"), ("mix_then_crop", "crop_then_mix"), range(3)), [0.0, 0.5] * 6, strict=True
        )
    ],
)
def test_equality_over_256_imagenet_photographs(
    imagenet_edits: tuple[Path, Path], bank: FractalBank, preset: str, order: str, crop: int, flip: float
) -> None:
    root, edits = imagenet_edits
    mix = replace(getattr(MixSpec, preset)(), order=order)
    dataset = mixed(root, edits, bank, mix=mix, crop=CROPS[crop](flip), normalize=None, seed=crop)
    assert len(dataset) == (256 if preset == "paper" else 512)
    images, labels = load(dataset)
    # Of the expanded epoch the second half, every edit once, then the same for its originals.
    which = range(len(dataset) - 256, len(dataset))
    expected, expected_labels = load_by_pillow(dataset, which)
    assert (images[-256:] - expected).abs().max() <= TOLERANCE
    assert torch.equal(labels[-256:], expected_labels)
    plan = dataset.planner.batch(0, which)
    assert plan.mixed.any()
    if flip == 0 or isinstance(dataset.crop, EvalCrop):
        assert not plan.flip.any()
    else:
        assert plan.flip.any()


@pytest.fixture(scope="module")
def odd_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of file that a folder may hold."""
    root = tmp_path_factory.mktemp("odd") / "train"
    files: dict[str, bytes] = {}
    picture = Image.fromarray(photograph(1, 83, 61))
    alpha = np.dstack([np.asarray(picture), np.linspace(0, 255, 83 * 61).reshape(83, 61).astype(np.uint8)])
    wide = np.random.default_rng(0).integers(0, 65536, (83, 61), dtype=np.uint16)
    for form in ("JPEG", "PNG", "BMP", "TIFF", "PPM", "WEBP"):
        files[f"plain.{form.lower()}"] = encoded(picture, form)
    files |= {
        "grey.jpg": encoded(picture.convert("L")),
        "grey.png": encoded(picture.convert("L"), "PNG"),
        "cmyk.jpg": encoded(picture.convert("CMYK")),
        "cmyk.tif": encoded(picture.convert("CMYK"), "TIFF"),
        "sixteen.png": encoded(Image.fromarray(wide), "PNG"),
        "palette.png": encoded(picture.quantize(32), "PNG"),
        "transparent palette.png": encoded(picture.quantize(32), "PNG", transparency=bytes(range(32))),
        "bilevel.png": encoded(picture.convert("1"), "PNG"),
        "rgba.png": encoded(Image.fromarray(alpha), "PNG"),
        "rgba.webp": encoded(Image.fromarray(alpha), "WEBP", quality=85),
        "lossless.webp": encoded(picture, "WEBP", lossless=True),
        "grey alpha.png": encoded(Image.fromarray(alpha).convert("LA"), "PNG"),
        "lzw.tif": encoded(picture, "TIFF", compression="tiff_lzw"),
        "progressive.jpg": encoded(picture, progressive=True),
        "subsampled.jpg": encoded(picture, subsampling=2),
        "not subsampled.jpg": encoded(picture, subsampling=0),
        "a lie.png": encoded(picture),
        "one.png": encoded(picture.resize((1, 1)), "PNG"),
        "one.jpg": encoded(picture.resize((1, 1))),
        "long.jpg": encoded(picture.resize((20_000, 10))),
        "tall.png": encoded(picture.resize((10, 20_000)), "PNG"),
        'it\'s "quoted".jpg': encoded(picture.resize((37, 41))),
    }
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        for form in ("JPEG", "PNG", "TIFF", "WEBP"):
            # DALI 2.4 cannot read this lossless WebP with EXIF at all: it goes the Pillow way.
            lossless = {"lossless": True} if form == "WEBP" else {}
            files[f"turned {turn}.{form.lower()}"] = encoded(picture, form, exif=exif, **lossless)
    (root / "odd").mkdir(parents=True)
    for name, content in files.items():
        (root / "odd" / name).write_bytes(content)
    with open(os.fsencode(root / "odd") + b"/not utf-8 \xff\xfe.jpg", "wb") as file:  # noqa: PTH123 - a path of bytes
        file.write(encoded(picture))
    return root


@pytest.mark.parametrize(
    "crop", [TrainCrop(48), RandomCrop(48, padding=5), EvalCrop(48)], ids=lambda c: type(c).__name__
)
def test_equality_over_every_kind_of_file(
    odd_files: Path, make_store: MakeStore, bank: FractalBank, crop: Crop, tmp_path_factory: pytest.TempPathFactory
) -> None:
    store = make_store(odd_files, prompts=("autumn",), size=40)
    dataset = mixed(odd_files, store, bank, crop=crop, mix=MixSpec(probability=0.5), normalize=None)
    assert len(dataset) == 6 + 22 + 4 * 8 + 1
    assert not dataset.catalog.rejected
    images, labels = load(dataset, batch_size=16)
    expected, expected_labels = load_by_pillow(dataset)
    for i in range(len(dataset)):
        assert (images[i] - expected[i]).abs().max() <= TOLERANCE, dataset.samples[i][0]
    assert torch.equal(labels, expected_labels)


# --- what must change nothing ---------------------------------------------------------------------------------------


def test_batches_threads_and_read_ahead_change_nothing(photos: Path, edits: Path, bank: FractalBank) -> None:
    dataset = mixed(photos, edits, bank)
    images, labels = load(dataset, batch_size=33)
    for batch_size, workers, ahead in ((1, 0, 1), (4, 1, 2), (7, 3, 5), (64, 2, 2)):
        again = load(dataset, batch_size=batch_size, num_workers=workers, prefetch_factor=ahead)
        assert torch.equal(again[0], images) and torch.equal(again[1], labels)


def test_a_restart_changes_nothing(photos: Path, edits: Path, bank: FractalBank) -> None:
    first = mixed(photos, edits, bank, seed=7)
    loader = DiffuseMixLoader(first, batch_size=8, shuffle=True, device="cpu")
    epochs = [[images for images, _ in loader] for _ in range(3)]
    restarted = DiffuseMixLoader(mixed(photos, edits, bank, seed=7), batch_size=8, shuffle=True, device="cpu")
    restarted.set_epoch(2)
    assert all(torch.equal(a, b) for (a, _), b in zip(restarted, epochs[2], strict=True))


def test_shuffling_reorders_and_changes_no_sample(photos: Path, edits: Path, bank: FractalBank) -> None:
    dataset = mixed(photos, edits, bank)
    plain, _ = load(dataset)
    loader = DiffuseMixLoader(dataset, batch_size=33, shuffle=True, device="cpu")
    ((images, labels),) = loader
    order = [next(i for i in range(33) if torch.equal(plain[i], image)) for image in images]
    assert sorted(order) == list(range(33)) and order != list(range(33))
    assert labels.tolist() == [i // 11 for i in order]


# --- epochs ---------------------------------------------------------------------------------------------------------


def test_each_iter_is_the_next_epoch(photos: Path, edits: Path, bank: FractalBank) -> None:
    dataset = mixed(photos, edits, bank)
    expected = []
    for epoch in range(8):
        dataset.set_epoch(epoch)
        expected.append(dataset[0][0])
    dataset.set_epoch(99)

    def first(batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        return next(batches)[0][0]

    loader = DiffuseMixLoader(dataset, batch_size=4, device="cpu")
    assert torch.equal(first(iter(loader)), expected[0])
    for images, _ in loader:  # left after the first batch
        assert torch.equal(images[0], expected[1])
        break
    loader.set_epoch(6)
    assert torch.equal(first(iter(loader)), expected[6])
    assert torch.equal(first(iter(loader)), expected[7])
    assert dataset.epoch == 7  # a DataLoader made from the loader's attributes gives the same samples
    assert not torch.equal(expected[0], expected[1])


def test_iterators_are_independent(photos: Path, edits: Path, bank: FractalBank) -> None:
    dataset = mixed(photos, edits, bank)
    loader = DiffuseMixLoader(dataset, batch_size=5, device="cpu")
    epochs = [[images for images, _ in loader] for _ in range(2)]
    loader.set_epoch(0)
    together = list(zip(iter(loader), iter(loader), strict=True))
    for i, ((a, _), (b, _)) in enumerate(together):
        assert torch.equal(a, epochs[0][i]) and torch.equal(b, epochs[1][i])


def test_len_and_drop_last(photos: Path) -> None:
    dataset = DiffuseMixDataset(photos, crop=EvalCrop(16))
    for batch_size, drop_last, sizes in (
        (10, False, [10, 10, 10, 3]),
        (10, True, [10] * 3),
        (40, False, [33]),
        (40, True, []),
    ):
        warns = pytest.warns(UserWarning, match="no batches: drop_last drops the only one, of 33")
        with nullcontext() if sizes else warns:
            loader = DiffuseMixLoader(dataset, batch_size=batch_size, drop_last=drop_last, device="cpu")
        assert len(loader) == len(sizes)
        assert [len(images) for images, _ in loader] == sizes


# --- tensors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_types_and_layouts(
    photos: Path, edits: Path, bank: FractalBank, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    normalize = None if dtype is torch.uint8 else ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    dataset = mixed(photos, edits, bank, normalize=normalize, crop=TrainCrop((31, 45)))
    images, labels = next(iter(DiffuseMixLoader(dataset, 9, device="cpu", dtype=dtype, memory_format=memory_format)))
    assert images.shape == (9, 3, 31, 45) and images.dtype == dtype
    assert images.is_contiguous(memory_format=memory_format)
    assert labels.dtype == torch.int64 and labels.tolist() == [0] * 9
    expected = torch.stack([dataset[i][0] for i in range(9)])
    if dtype is torch.uint8:
        assert (images.float() / 255 - expected).abs().max() <= 0.51 / 255
    else:
        torch.testing.assert_close(images, expected.to(dtype, memory_format=memory_format))


def test_batches_are_never_overwritten(photos: Path, edits: Path, bank: FractalBank) -> None:
    dataset = mixed(photos, edits, bank)
    loader = DiffuseMixLoader(dataset, batch_size=3, device="cpu", num_workers=2)
    kept, copies = [], []
    for images, _ in loader:
        kept.append(images)
        copies.append(images.clone())
    loader.close()
    gc.collect()
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_part_that_is_kept_is_never_overwritten(
    photos: Path, edits: Path, bank: FractalBank, memory_format: torch.memory_format
) -> None:
    """Batches' memory is used again, but not while a view, a NumPy array or a detached tensor of it is held."""
    loader = DiffuseMixLoader(mixed(photos, edits, bank), batch_size=3, device="cpu", memory_format=memory_format)
    keepers = (lambda i: i[1], lambda i: i.numpy()[:, 0], lambda i: i.detach()[..., 3:], lambda i: i.flatten(1)[0])
    for keep in keepers:
        kept, copies = [], []
        for images, _ in loader:
            kept.append(keep(images))
            copies.append(torch.as_tensor(kept[-1]).clone())
            del images
        for _ in loader:  # which would write over what was given back too early
            pass
        assert all(torch.equal(torch.as_tensor(a), b) for a, b in zip(kept, copies, strict=True))


def test_memory_is_used_again_once_nobody_holds_the_batch(photos: Path) -> None:
    loader = DiffuseMixLoader(DiffuseMixDataset(photos, crop=EvalCrop(64)), batch_size=11, device="cpu")
    places = set()
    for _ in range(4):
        for images, _ in loader:
            places.add(images.data_ptr())
            del images
    assert len(places) <= 2


def test_it_is_picklable_and_starts_nothing_in_the_constructor(photos: Path, edits: Path, bank: FractalBank) -> None:
    threads = set(threading.enumerate())
    loader = DiffuseMixLoader(mixed(photos, edits, bank), batch_size=11, device="cpu")
    assert set(threading.enumerate()) <= threads and not loader._maker._free
    again = pickle.loads(pickle.dumps(loader))
    for (a, _), (b, _) in zip(loader, again, strict=True):
        assert torch.equal(a, b)
    pickle.dumps(loader)  # after an epoch too


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, found 0"),
        ({"num_workers": -1}, "num_workers must be at least 0"),
        ({"prefetch_factor": 0}, "prefetch_factor must be at least 1"),
        ({"dtype": torch.int8}, "dtype must be one of"),
        ({"dtype": torch.uint8}, "uint8 holds plain pixels: give normalize=None"),
        ({"memory_format": torch.preserve_format}, "memory_format must be"),
        ({"device": "mps"}, "device must be 'cuda', 'cuda:N' or 'cpu', found 'mps'"),
    ],
)
def test_arguments_are_checked(photos: Path, options: dict[str, object], message: str) -> None:
    dataset = DiffuseMixDataset(photos, crop=EvalCrop(16))
    with pytest.raises(ConfigError, match=message):
        DiffuseMixLoader(dataset, **{"device": "cpu", **options})  # type: ignore[arg-type]


def test_another_dataset_is_refused_with_what_to_write() -> None:
    with pytest.raises(ConfigError, match=r"found list\..*\n    dataset = DiffuseMixDataset\("):
        DiffuseMixLoader([1, 2, 3], device="cpu")  # type: ignore[arg-type]


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "gone", "folder"])
def test_a_damaged_original_is_named_and_the_loader_lives_on(tmp_path: Path, damage: str) -> None:
    (tmp_path / "train" / "a").mkdir(parents=True)
    for i in range(12):
        write_photograph(tmp_path / "train" / "a" / f"{i:02}.jpg", i, 90, 80)
    dataset = DiffuseMixDataset(tmp_path / "train", crop=EvalCrop(32), on_error="raise")
    file = tmp_path / "train" / "a" / "07.jpg"
    content = file.read_bytes()
    file.unlink()
    if damage == "folder":
        file.mkdir()
    elif damage != "gone":
        file.write_bytes({"cut": content[:300], "empty": b"", "garbage": b"\xff\xd8\xff" + bytes(5000)}[damage])
    loader = DiffuseMixLoader(dataset, batch_size=3, device="cpu")
    batches = iter(loader)
    good = [next(batches)[0], next(batches)[0]]
    with pytest.raises(DecodeError, match=r"07\.jpg") as caught:
        next(batches)
    assert any("sample 7 of epoch 0" in note for note in caught.value.__notes__)
    if damage == "folder":
        file.rmdir()
    file.write_bytes(content)
    loader.set_epoch(0)
    images = [images for images, _ in loader]
    assert len(images) == 4
    assert torch.equal(images[0], good[0]) and torch.equal(images[1], good[1])


def test_a_damaged_edit_is_named(photos: Path, make_store: MakeStore, bank: FractalBank) -> None:
    store = make_store(photos)
    dataset = mixed(photos, store, bank, mix=MixSpec(probability=1), on_error="raise")
    assert dataset.store is not None
    row = dataset.store.index[dataset.planner.batch(0, [5]).edit[0]]
    (tar,) = (store / "shards").glob("*.tar")
    with tar.open("r+b") as file:
        file.seek(int(row["offset"]))
        file.write(bytes(int(row["length"])))
    with pytest.raises(DecodeError) as caught:
        list(DiffuseMixLoader(dataset, batch_size=11, device="cpu"))
    assert any("edit of sample 5 of epoch 0" in note for note in caught.value.__notes__)
    assert "verify STORE --discard" in str(caught.value) and "convert it" not in str(caught.value)
    assert "in memory" not in str(caught.value)
    with pytest.raises(DecodeError, match="edit"):
        dataset[5]


def test_a_dali_that_is_damaged_is_not_called_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is after both of its wheels were installed and one removed: a folder without its modules."""
    monkeypatch.setitem(sys.modules, "nvidia.dali", ModuleType("nvidia.dali"))
    with pytest.raises(MissingDependencyError, match=r"or is damaged \(cannot import name .*dali-diffusemix doctor"):
        dali()


def test_a_driver_that_is_too_old_is_thought_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "check_installed", lambda: None)
    monkeypatch.setattr(torch.version, "cuda", "12.4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        MissingDependencyError, match=r"or the driver is older than PyTorch's CUDA 12\.4\. On a machine"
    ):
        gpu.check_available()


@pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch is built for CUDA")
def test_a_gpu_that_cannot_be_used_is_one_clear_error(photos: Path) -> None:
    dataset = DiffuseMixDataset(photos, crop=EvalCrop(16))
    for device in ("cuda", "cuda:1", torch.device("cuda")):
        with pytest.raises(MissingDependencyError) as caught:
            DiffuseMixLoader(dataset, device=device)
        message = str(caught.value)
        assert "is built without CUDA" in message and "dali-diffusemix[cuda12]" in message
        assert ("CuPy is not installed" in message) == (find_spec("cupy") is None)
        assert "device='cpu'" in message
    if "is built without CUDA" in message:
        assert DiffuseMixLoader(dataset).device == torch.device("cpu")  # the default takes what works


def test_the_cuda_source_is_one_text_without_includes_of_ours() -> None:
    """CuPy's cache of compiled kernels goes by the text, so the header must be part of it."""
    from dali_diffusemix.base import gpu

    text = gpu.source()
    assert '#include "' not in text
    assert "struct Piece {" in text and "__global__" in text
