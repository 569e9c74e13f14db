"""DiffuseMixLoader(device="cuda") in each way to decode: its pixels, and its promises about streams, memory, restarts.

`-k cpu`, `-k whole` and `-k regions` choose a way; a way that crashes on a GPU then costs its own process alone.
"""

import gc
import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from material import encoded, photograph, write_photograph
from PIL import Image

from dali_diffusemix import (
    DiffuseMixDataset,
    DiffuseMixLoader,
    EvalCrop,
    FractalBank,
    GpuDecoding,
    MixSpec,
    QuarantineWarning,
    TrainCrop,
    globally_seeded,
)
from dali_diffusemix.loading import auto

# nvJPEG's inverse transform and chroma upsampling are not libjpeg-turbo's. Stated for normalize=None, values in [0, 1]:
# on average over an epoch's pixels, over those of a sample, and for the largest of them.
MEAN_DIFFERENCE = 3 / 255
MEAN_OF_A_SAMPLE = 12 / 255
LARGEST_DIFFERENCE = 128 / 255
FANCY_DIFFERENCE = 6 / 255
# The kernels' sums differ in their order only.
SAME = 2e-5

WAYS: dict[str, auto.Decode] = {
    "cpu": "cpu",
    "whole": GpuDecoding(),
    "regions": GpuDecoding(regions=True),
    "no_engine": GpuDecoding(hardware_load=0),
    "edits_apart": GpuDecoding(regions=True, edits_on_cpu=True),
    "fancy": GpuDecoding(fancy_upsampling=True),
}


@pytest.fixture(params=["cpu", "whole", "regions", "edits_apart"])
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def mixed(root: Path, edits: Path, bank: FractalBank, **options: object) -> DiffuseMixDataset:
    arguments = {"crop": TrainCrop(64), "mix": MixSpec.paper(), "edits": edits, "fractals": bank, **options}
    return DiffuseMixDataset(root, **arguments)  # type: ignore[arg-type]


def on_gpu(dataset: DiffuseMixDataset, batch_size: int, way: str, **options: object) -> DiffuseMixLoader:
    arguments = {"num_workers": 4, "decode": WAYS[way], **options}
    return DiffuseMixLoader(dataset, batch_size, device="cuda", **arguments)  # type: ignore[arg-type]


def on_cpu(dataset: DiffuseMixDataset, batch_size: int, **options: object) -> DiffuseMixLoader:
    return DiffuseMixLoader(dataset, batch_size, device="cpu", num_workers=4, **options)  # type: ignore[arg-type]


def check(images: torch.Tensor, expected: torch.Tensor, way: str) -> None:
    """Images of an epoch are those of the CPU: exactly where it decodes them, else within what decoders differ."""
    difference = (images.cpu().float() - expected.float()).abs()
    if way == "cpu":
        assert difference.max() <= SAME
        return
    samples = difference.flatten(1).mean(dim=1)
    print(  # noqa: T201 - a finding
        f"{way}: mean difference {float(samples.mean()) * 255:.3f}/255, of a sample at most "
        f"{float(samples.max()) * 255:.2f}/255, of a pixel {float(difference.max()) * 255:.1f}/255"
    )
    # A decoder that answers success with black or stale pixels differs by far more in that sample.
    assert samples.max() <= MEAN_OF_A_SAMPLE
    assert samples.mean() <= MEAN_DIFFERENCE and difference.max() <= LARGEST_DIFFERENCE
    if way == "fancy":
        assert difference.max() <= FANCY_DIFFERENCE


@pytest.mark.parametrize("batch_size", [8, 33])
def test_the_same_samples_as_on_the_cpu(
    photos: Path, edits: Path, bank: FractalBank, way: str, batch_size: int
) -> None:
    dataset = mixed(photos, edits, bank, normalize=None)
    loader = on_gpu(dataset, batch_size, way, shuffle=True)
    batches = list(zip(loader, on_cpu(dataset, batch_size, shuffle=True), strict=True))
    for (images, labels), (_, expected) in batches:
        assert images.device.type == labels.device.type == "cuda"
        assert torch.equal(labels.cpu(), expected)
    images, expected = (torch.cat([side[0].cpu() for side in sides]) for sides in zip(*batches, strict=True))
    check(images, expected, way)
    assert loader.stats().decoded_on == ("cpu" if way == "cpu" else "gpu")
    assert not loader.quarantine


@pytest.mark.parametrize("mix", [True, False])
@pytest.mark.parametrize("way", [*WAYS])
def test_the_same_photographs_as_on_the_cpu(
    imagenet_edits: tuple[Path, Path], bank: FractalBank, way: str, mix: bool
) -> None:
    root, edits = imagenet_edits
    options = {"crop": TrainCrop(224), "normalize": None}
    if mix:
        dataset = mixed(root, edits, bank, mix=MixSpec(probability=1), **options)
    else:
        dataset = DiffuseMixDataset(root, mix=None, **options)  # type: ignore[arg-type]
    images = torch.cat([images.cpu() for images, _ in on_gpu(dataset, 64, way)])
    check(images, torch.cat([images for images, _ in on_cpu(dataset, 64)]), way)


def test_every_kind_of_file(tmp_path: Path, way: str) -> None:
    """EXIF's orientations, CMYK, grey, 16 bits, palettes, alpha, progressive: as on the CPU."""
    picture = Image.fromarray(photograph(1, 83, 61))
    deep = np.asarray(picture.convert("L")).astype(np.uint16) * 257
    files = {
        "grey.jpg": encoded(picture.convert("L")),
        "grey.png": encoded(picture.convert("L"), "PNG"),
        "cmyk.jpg": encoded(picture.convert("CMYK")),
        "deep.png": encoded(Image.fromarray(deep), "PNG"),
        "palette.png": encoded(picture.quantize(32), "PNG"),
        "alpha.png": encoded(picture.convert("RGBA"), "PNG"),
        "progressive.jpg": encoded(picture, progressive=True),
        "full colour.jpg": encoded(picture, subsampling=0),
        "half colour.jpg": encoded(picture, subsampling=1),
        "bitmap.bmp": encoded(picture, "BMP"),
        "webp.webp": encoded(picture, "WEBP", lossless=True),
        "one.jpg": encoded(picture.resize((1, 1))),
        "thin.jpg": encoded(picture.resize((300, 3))),
        "large.jpg": encoded(picture.resize((3000, 2000))),
    }
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        files[f"turned {turn}.jpg"] = encoded(picture, exif=exif)
    (tmp_path / "train" / "a").mkdir(parents=True)
    for name, content in files.items():
        (tmp_path / "train" / "a" / name).write_bytes(content)
    dataset = DiffuseMixDataset(tmp_path / "train", crop=EvalCrop(48), normalize=None)
    images = torch.cat([images.cpu() for images, _ in on_gpu(dataset, 11, way)])
    expected = torch.cat([images for images, _ in on_cpu(dataset, 11)])
    wrong = {}
    for row, path in enumerate(dataset.catalog.paths):
        difference = float((images[row] - expected[row]).abs().mean())
        if difference > (SAME if way == "cpu" else MEAN_OF_A_SAMPLE):
            wrong[path] = round(difference * 255, 2)
    assert not wrong


@pytest.mark.parametrize("damage", ["short", "holes", "stray markers", "empty"])
def test_a_damaged_original_is_substituted_as_on_the_cpu(tmp_path: Path, way: str, damage: str) -> None:
    root = tmp_path / "train" / "a"
    root.mkdir(parents=True)
    for i in range(9):
        write_photograph(root / f"{i}.jpg", i, 190, 180)
    dataset = DiffuseMixDataset(tmp_path / "train", crop=EvalCrop(48), normalize=None)
    content = bytearray((root / "4.jpg").read_bytes())
    middle = len(content) * 2 // 3
    if damage == "short":
        del content[middle:]
    elif damage == "holes":
        content[middle : middle + 40] = bytes(40)
    elif damage == "stray markers":
        content[middle : middle + 4] = b"\xff\xd3\xff\xd8"
    else:
        content.clear()
    (root / "4.jpg").write_bytes(content)

    def loaded(loader: DiffuseMixLoader) -> tuple[torch.Tensor, list[int]]:
        batches = [(images.cpu(), indices) for images, _, indices in loader]
        return torch.cat([images for images, _ in batches]), torch.cat([i for _, i in batches]).tolist()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QuarantineWarning)
        expected, rows = loaded(on_cpu(dataset, 9, return_index=True))
        images, found = loaded(on_gpu(dataset, 9, way, return_index=True))
    sound = [row for row in range(9) if row != 4]
    check(images[sound], expected[sound], way)
    if damage == "holes":  # codes that are wrong but can be read: decoders may refuse them or show something
        assert [found[row] for row in sound] == sound and found[4] in (4, 5)
    else:
        assert found == rows and rows[4] == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_types_and_layouts(
    photos: Path, edits: Path, bank: FractalBank, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    normalize = None if dtype is torch.uint8 else ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    dataset = mixed(photos, edits, bank, normalize=normalize)
    options = {"dtype": dtype, "memory_format": memory_format}
    images, _ = next(iter(on_gpu(dataset, 9, "cpu", **options)))
    expected, _ = next(iter(on_cpu(dataset, 9, **options)))
    assert images.dtype is dtype and images.is_contiguous(memory_format=memory_format)
    tolerance = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 4e-2, torch.uint8: 1}[dtype]
    assert (images.cpu().float() - expected.float()).abs().max() <= tolerance


def test_nothing_waits_for_the_device_in_the_steady_state(
    photos: Path, edits: Path, bank: FractalBank, way: str
) -> None:
    loader = on_gpu(mixed(photos, edits, bank), 8, way)
    for _ in range(2):  # compiles, allocates
        list(loader)
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


def test_decoding_goes_on_beside_training(photos: Path, edits: Path, bank: FractalBank, way: str) -> None:
    """`next()` returns while the device is busy with what training gave it, step after step."""
    loader = on_gpu(mixed(photos, edits, bank), 4, way)
    list(loader)  # compiles, allocates
    batches = iter(loader)
    next(batches)
    torch.cuda.synchronize()
    for _ in range(6):
        torch.cuda._sleep(600_000_000)  # about 0.3 s of the device's time
        next(batches)
        assert not torch.cuda.current_stream().query(), "next() came back only when the device was done"
        torch.cuda.synchronize()


def test_batches_under_a_side_stream_are_whole(photos: Path, edits: Path, bank: FractalBank, way: str) -> None:
    loader = on_gpu(mixed(photos, edits, bank), 8, way)
    expected = [images.cpu() for images, _ in loader]
    loader.set_epoch(0)
    stream = torch.cuda.Stream()
    kept = []
    with torch.cuda.stream(stream):
        for images, _ in loader:
            torch.cuda._sleep(20_000_000)  # the consumer is late
            kept.append(images.clone())
    torch.cuda.current_stream().wait_stream(stream)
    for images, one in zip(kept, expected, strict=True):
        assert torch.equal(images.cpu(), one)


def test_two_loaders_at_once_and_broken_off_epochs(photos: Path, edits: Path, bank: FractalBank, way: str) -> None:
    dataset = mixed(photos, edits, bank)
    reference = [images.cpu() for images, _ in on_gpu(dataset, 8, way)]
    a, b = on_gpu(dataset, 8, way), on_gpu(dataset, 8, way, num_workers=1)
    for (x, _), (y, _), expected in zip(a, b, reference, strict=True):
        assert torch.equal(x.cpu(), expected) and torch.equal(y.cpu(), expected)
    for _ in range(3):
        a.set_epoch(0)
        for images, _ in a:
            assert torch.equal(images.cpu(), reference[0])
            break


def test_samples_do_not_depend_on_the_batch(photos: Path, edits: Path, bank: FractalBank, way: str) -> None:
    """Exactly, where the CPU decodes. A GPU's JPEG engine and its other decoders share a batch, and differ a little."""
    dataset = mixed(photos, edits, bank, normalize=None)
    one, nine = (torch.cat([images.cpu() for images, _ in on_gpu(dataset, size, way)]) for size in (1, 9))
    if way == "cpu":
        assert torch.equal(one, nine)
    else:
        check(one, nine, way)


def test_memory_stays_flat_and_is_given_back(photos: Path, edits: Path, bank: FractalBank, way: str) -> None:
    dataset = mixed(photos, edits, bank)
    used = []
    with on_gpu(dataset, 8, way, shuffle=True) as loader:
        for epoch in range(200):
            for _ in loader:  # 5 batches each: 1000 in all; DALI's pools grow in the first hundreds
                pass
            if epoch in (99, 199):
                torch.cuda.synchronize()
                gc.collect()
                free, total = torch.cuda.mem_get_info()
                used.append(total - free)
    assert used[1] - used[0] <= 64 << 20


def test_a_file_that_the_gpu_cannot_decode_goes_another_way(tmp_path: Path, way: str) -> None:
    root = tmp_path / "train"
    (root / "a").mkdir(parents=True)
    for i in range(6):
        write_photograph(root / "a" / f"{i}.jpg", i, 90, 80)
    # DALI 2.4 cannot read a lossless WebP with EXIF on the CPU either; Pillow can.
    exif = Image.Exif()
    exif[0x0112] = 6
    (root / "a" / "3.webp").write_bytes(encoded(photograph(9, 70, 60), "WEBP", lossless=True, exif=exif))
    dataset = DiffuseMixDataset(root, crop=EvalCrop(48), normalize=None)
    (images, _), (expected, _) = (next(iter(loader)) for loader in (on_gpu(dataset, 7, way), on_cpu(dataset, 7)))
    check(images, expected, way)


def test_resume_and_transforms_on_the_device(photos: Path, edits: Path, bank: FractalBank, way: str) -> None:
    def noisy(
        images: torch.Tensor, labels: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert images.is_cuda and labels.is_cuda and generator.device.type == "cuda"
        drawn = torch.rand(len(images), 1, 1, 1, device=images.device, generator=generator)
        return images + drawn + torch.rand((), device=images.device), labels

    def loader() -> DiffuseMixLoader:
        return on_gpu(mixed(photos, edits, bank), 8, way, shuffle=True, batch_transform=globally_seeded(noisy))

    first = loader()
    batches, states = [], []
    for images, _ in first:
        batches.append(images.cpu())
        states.append(first.state_dict())
    second = loader()
    second.load_state_dict(states[1])
    assert all(torch.equal(a.cpu(), b) for (a, _), b in zip(second, batches[2:], strict=True))


def test_a_missing_original_is_substituted_on_the_device(tmp_path: Path, way: str) -> None:
    root = tmp_path / "train"
    (root / "a").mkdir(parents=True)
    for i in range(9):
        write_photograph(root / "a" / f"{i}.jpg", i, 90, 80)
    dataset = DiffuseMixDataset(root, crop=EvalCrop(48), normalize=None)
    (root / "a" / "4.jpg").unlink()
    with pytest.warns(QuarantineWarning):
        images, _, indices = next(iter(on_gpu(dataset, 9, way, return_index=True)))
    assert indices.tolist() == [0, 1, 2, 3, 5, 5, 6, 7, 8]
    # The same file, decoded once in the batch and once by itself.
    assert (images[4] - images[5]).abs().mean() <= (SAME if way == "cpu" else MEAN_DIFFERENCE)


def test_a_captured_step_runs_beside_the_loader(photos: Path, edits: Path, bank: FractalBank, way: str) -> None:
    """Captured with capture_error_mode="thread_local": DALI's threads call CUDA meanwhile."""
    loader = on_gpu(mixed(photos, edits, bank), 8, way, drop_last=True)
    static = torch.empty((8, 3, 64, 64), device="cuda")
    graph, epoch = torch.cuda.CUDAGraph(), iter(loader)
    static.copy_(next(epoch)[0])
    (static * 2).sum()  # allocates
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        total = (static * 2).sum()
    for images, _ in epoch:
        static.copy_(images)
        graph.replay()
        torch.testing.assert_close(total, (images * 2).sum())


def test_auto_tries_once_and_remembers(
    photos: Path, edits: Path, bank: FractalBank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DALI_DIFFUSEMIX_CACHE", str(tmp_path))
    choice = auto.choose(0, 8)
    print(choice)  # noqa: T201 - a finding
    assert choice.images_per_second.keys() | choice.errors.keys() == auto.WAYS.keys()
    assert "cpu" in choice.images_per_second
    monkeypatch.setattr(auto, "_trial", lambda *_: pytest.fail("it was tried before"))
    assert auto.choose(0, 8) == choice
    loader = DiffuseMixLoader(mixed(photos, edits, bank), 8, device="cuda", num_workers=8)
    assert len(list(loader)) == len(loader)
    assert loader.stats().decoded_on == ("cpu" if choice.way == "cpu" else "gpu")


def test_it_says_how_it_decodes_and_shows_what_a_transform_made(
    photos: Path, edits: Path, bank: FractalBank, way: str, tmp_path: Path
) -> None:
    loader = on_gpu(mixed(photos, edits, bank), 4, way, batch_transform=lambda images, labels, _: (-images, labels))
    images, labels = next(iter(loader))
    told = dict(line.strip().split("  ", 1) for line in repr(loader).splitlines()[1:])
    assert (
        told["device"].strip().startswith("cuda:")
        and told["decoding"].strip() == f"on the {loader._maker.decoded_on.upper()}"
    )
    loader.preview(tmp_path / "held.png")
    held_by_us = weakref.ref(images)
    del images, labels
    assert held_by_us() is None  # the loader holds no batch
    loader.preview(tmp_path / "gone.png")
    with Image.open(tmp_path / "held.png") as held, Image.open(tmp_path / "gone.png") as gone:
        assert held.width > gone.width  # a column less
