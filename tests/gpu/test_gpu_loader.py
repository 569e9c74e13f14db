"""DiffuseMixLoader(device="cuda") against the same on the CPU, and its promises about streams, memory and restarts."""

import gc
from pathlib import Path

import numpy as np
import pytest
import torch
from material import MakeStore, encoded, photograph, shared

from dali_diffusemix import (
    DiffuseMixDataset,
    DiffuseMixLoader,
    EvalCrop,
    FractalBank,
    MixSpec,
    QuarantineWarning,
    TrainCrop,
)

# nvJPEG's inverse transform and chroma upsampling differ from libjpeg-turbo's. Stated for normalize=None, values in
# [0, 1]: on average over a batch's pixels, and for the largest of them.
MEAN_DIFFERENCE = 2 / 255
LARGEST_DIFFERENCE = 80 / 255


def mixed(root: Path, edits: Path, bank: FractalBank, **options: object) -> DiffuseMixDataset:
    arguments = {"crop": TrainCrop(64), "mix": MixSpec.paper(), "edits": edits, "fractals": bank, **options}
    return DiffuseMixDataset(root, **arguments)  # type: ignore[arg-type]


def test_the_same_samples_as_on_the_cpu(photos: Path, edits: Path, bank: FractalBank) -> None:
    dataset = mixed(photos, edits, bank, normalize=None)
    for (a, labels), (b, expected) in zip(
        DiffuseMixLoader(dataset, 8, shuffle=True, device="cuda"),
        DiffuseMixLoader(dataset, 8, shuffle=True, device="cpu"),
        strict=True,
    ):
        assert a.device.type == labels.device.type == "cuda"
        assert torch.equal(labels.cpu(), expected)
        difference = (a.cpu() - b).abs()
        assert difference.mean() <= MEAN_DIFFERENCE and difference.max() <= LARGEST_DIFFERENCE


def test_the_same_photographs_as_on_the_cpu(make_store: MakeStore, bank: FractalBank) -> None:
    root = shared("imagenet_sample")
    dataset = mixed(root, make_store(root, prompts=("sunset",), size=128), bank, crop=TrainCrop(224), normalize=None)
    means, largest = [], 0.0
    for (a, _), (b, _) in zip(
        DiffuseMixLoader(dataset, 64, device="cuda", num_workers=8),
        DiffuseMixLoader(dataset, 64, device="cpu", num_workers=8),
        strict=True,
    ):
        difference = (a.cpu() - b).abs()
        means.append(float(difference.mean()))
        largest = max(largest, float(difference.max()))
    print(f"mean difference {np.mean(means) * 255:.3f}/255, largest {largest * 255:.1f}/255")  # noqa: T201 - a finding
    assert np.mean(means) <= MEAN_DIFFERENCE and largest <= LARGEST_DIFFERENCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_types_and_layouts(
    photos: Path, edits: Path, bank: FractalBank, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    normalize = None if dtype is torch.uint8 else ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    dataset = mixed(photos, edits, bank, normalize=normalize)
    images, _ = next(iter(DiffuseMixLoader(dataset, 9, device="cuda", dtype=dtype, memory_format=memory_format)))
    assert images.dtype is dtype and images.is_contiguous(memory_format=memory_format)
    assert images.float().isfinite().all() and images.float().std() > 0


def test_nothing_waits_for_the_device_in_the_steady_state(photos: Path, edits: Path, bank: FractalBank) -> None:
    loader = DiffuseMixLoader(mixed(photos, edits, bank), 8, device="cuda", num_workers=2)
    list(loader)  # compiles, allocates
    stream = torch.cuda.Stream()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for where in (torch.cuda.current_stream(), stream):
            with torch.cuda.stream(where):
                total = sum((images.sum() for images, _ in loader), torch.zeros((), device="cuda"))
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert bool(total.isfinite())


def test_batches_under_a_side_stream_are_whole(photos: Path, edits: Path, bank: FractalBank) -> None:
    loader = DiffuseMixLoader(mixed(photos, edits, bank), 8, device="cuda")
    expected = [images.clone() for images, _ in loader]
    loader.set_epoch(0)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        sums = []
        for images, _ in loader:
            torch.cuda._sleep(20_000_000)  # the consumer is late
            sums.append(images.double().sum())
    torch.cuda.current_stream().wait_stream(stream)
    for total, images in zip(sums, expected, strict=True):
        torch.testing.assert_close(total, images.double().sum())


def test_two_loaders_at_once_and_broken_off_epochs(photos: Path, edits: Path, bank: FractalBank) -> None:
    dataset = mixed(photos, edits, bank)
    reference = [images.cpu() for images, _ in DiffuseMixLoader(dataset, 8, device="cuda")]
    a, b = DiffuseMixLoader(dataset, 8, device="cuda"), DiffuseMixLoader(dataset, 8, device="cuda")
    for (x, _), (y, _), expected in zip(a, b, reference, strict=True):
        assert torch.equal(x.cpu(), expected) and torch.equal(y.cpu(), expected)
    for _ in range(3):
        a.set_epoch(0)
        for images, _ in a:
            assert torch.equal(images.cpu(), reference[0])
            break


def test_memory_stays_flat_and_is_given_back(photos: Path, edits: Path, bank: FractalBank) -> None:
    dataset = mixed(photos, edits, bank)
    used = []
    with DiffuseMixLoader(dataset, 8, shuffle=True, device="cuda", num_workers=2) as loader:
        for batch in range(40):
            for _ in loader:  # 5 batches each: 200 in all
                pass
            if batch in (4, 39):
                torch.cuda.synchronize()
                gc.collect()
                free, total = torch.cuda.mem_get_info()
                used.append(total - free)
    assert used[1] - used[0] <= 20 << 20


def test_a_file_that_the_gpu_cannot_decode_goes_another_way(tmp_path: Path) -> None:
    root = tmp_path / "train"
    (root / "a").mkdir(parents=True)
    for i in range(6):
        (root / "a" / f"{i}.jpg").write_bytes(encoded(photograph(i, 90, 80)))
    # DALI 2.4 cannot read a lossless WebP with EXIF on the CPU either; Pillow can.
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6
    (root / "a" / "3.webp").write_bytes(encoded(photograph(9, 70, 60), "WEBP", lossless=True, exif=exif))
    dataset = DiffuseMixDataset(root, crop=EvalCrop(48), normalize=None)
    (images, _), (expected, _) = (next(iter(DiffuseMixLoader(dataset, 7, device=d))) for d in ("cuda", "cpu"))
    assert (images.cpu() - expected).abs().mean() <= MEAN_DIFFERENCE


def test_resume_and_transforms_on_the_device(photos: Path, edits: Path, bank: FractalBank) -> None:
    def noisy(
        images: torch.Tensor, labels: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert images.is_cuda and labels.is_cuda and generator.device.type == "cuda"
        drawn = torch.rand(len(images), 1, 1, 1, device=images.device, generator=generator)
        return images + drawn + torch.rand((), device=images.device), labels

    def loader() -> DiffuseMixLoader:
        return DiffuseMixLoader(mixed(photos, edits, bank), 8, shuffle=True, device="cuda", batch_transform=noisy)

    first = loader()
    batches, states = [], []
    for images, _ in first:
        batches.append(images.cpu())
        states.append(first.state_dict())
    second = loader()
    second.load_state_dict(states[1])
    assert all(torch.equal(a.cpu(), b) for (a, _), b in zip(second, batches[2:], strict=True))


def test_a_damaged_original_is_substituted_on_the_device(tmp_path: Path) -> None:
    root = tmp_path / "train"
    (root / "a").mkdir(parents=True)
    for i in range(9):
        (root / "a" / f"{i}.jpg").write_bytes(encoded(photograph(i, 90, 80)))
    dataset = DiffuseMixDataset(root, crop=EvalCrop(48), normalize=None)
    (root / "a" / "4.jpg").write_bytes(b"")
    with pytest.warns(QuarantineWarning):
        images, _, indices = next(iter(DiffuseMixLoader(dataset, 9, device="cuda", return_index=True)))
    assert indices.tolist() == [0, 1, 2, 3, 5, 5, 6, 7, 8] and torch.equal(images[4], images[5])
