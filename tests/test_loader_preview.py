"""loader.preview: the picture of the batch that was delivered last, and nothing else changes."""

import pickle
import random
import shutil
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import ConcatDataset, Subset

from dali_diffusemix import (
    ConfigError,
    DiffuseMixDataset,
    DiffuseMixLoader,
    EvalCrop,
    FractalBank,
    MixSpec,
    PackConfig,
    TrainCrop,
    pack,
)
from dali_diffusemix.generate import GenerateConfig, generate
from dali_diffusemix.inspect.preview import COLUMNS, batch_sheet, sheets
from dali_diffusemix.inspect.preview.canvas import Layout, Sheet
from dali_diffusemix.inspect.preview.samples import MOST_DETAILS, Sample

pytest.importorskip("nvidia.dali", reason="DALI is not installed on this machine")

SIZE = 32
SHOWN = 128  # pixels of a cell: a sample, enlarged
Plain = dict[str, Any]


@pytest.fixture
def settings(edits: Path, bank: FractalBank) -> Plain:
    """Of datasets whose samples can be read off a picture: values in [0, 1], some mixed, some not."""
    return {"crop": TrainCrop(SIZE), "mix": MixSpec(probability=0.7), "edits": edits, "fractals": bank, "seed": 5}


@pytest.fixture
def plain(photos: Path, settings: Plain) -> DiffuseMixDataset:
    return DiffuseMixDataset(photos, normalize=None, **settings)


def loader_of(dataset: Any, batch_size: int = 6, **options: Any) -> DiffuseMixLoader:
    return DiffuseMixLoader(dataset, batch_size, **{"device": "cpu", "num_workers": 2, **options})


def column(picture: Image.Image, rows: int, name: str, *, extra: int = 0) -> NDArray[np.uint8]:
    """The samples in a column of a sheet, (rows, height, width, 3)."""
    return cells(picture, rows, [title for title, _ in COLUMNS].index(name), extra)


def delivered(picture: Image.Image, rows: int) -> NDArray[np.uint8]:
    """The same of the column of a batch transform."""
    return cells(picture, rows, len(COLUMNS), 1)


def cells(picture: Image.Image, rows: int, number: int, extra: int) -> NDArray[np.uint8]:
    layout = Layout.of(
        (SIZE, SIZE),
        rows=rows,
        columns=len(COLUMNS) + extra,
        groups=(3,),
        captions=206,
        notes=2 * extra,
        enlarged=False,
    )
    assert picture.width == layout.size[0] and picture.height >= layout.size[1]
    found = []
    for row in range(rows):
        left, top = layout.corner(row, number)
        cell = np.asarray(picture.crop((left, top, left + SHOWN, top + SHOWN)))
        found.append(cell[:: SHOWN // SIZE, :: SHOWN // SIZE])
    return np.stack(found)


def bytes_of(images: torch.Tensor) -> NDArray[np.float32]:
    """A batch of values in [0, 1], as pixels in an image's layout."""
    return 255 * images.permute(0, 2, 3, 1).numpy()


def shows(file: Path, images: torch.Tensor) -> bool:
    """True if the last column of a picture is these samples, in this order."""
    with Image.open(file) as picture:
        drawn = column(picture, len(images), "augmented")
    return bool(np.abs(drawn - bytes_of(images)).max() <= 1)


def captions(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[str]]:
    """By row, the lines of the captions that are written from now on."""
    written: dict[int, list[str]] = {}
    before = Sheet.caption

    def caption(sheet: Sheet, row: int, lines: Any) -> None:
        written[row] = [text for _, (text, _, _) in lines]
        before(sheet, row, lines)

    monkeypatch.setattr(Sheet, "caption", caption)
    return written


def notes_of_cells(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[str]]:
    """By row, the notes below cells that are drawn from now on."""
    written: dict[int, list[str]] = {}
    before = Sheet.cell

    def cell(sheet: Sheet, row: int, column: int, content: Any, notes: Any = ()) -> None:
        if notes:
            written[row] = [text for text, _, _ in notes]
        before(sheet, row, column, content, notes)

    monkeypatch.setattr(Sheet, "cell", cell)
    return written


def footers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The footnotes of the sheets that are drawn from now on."""
    found: list[str] = []
    before = Sheet.__init__
    monkeypatch.setattr(
        Sheet, "__init__", lambda self, layout, footer: (found.extend(footer), before(self, layout, footer))[1]
    )
    return found


def test_every_batch_is_drawn_as_it_was_delivered(plain: DiffuseMixDataset, tmp_path: Path) -> None:
    loader = loader_of(plain, shuffle=True)
    mixed = set()
    for epoch in range(2):
        for step, (images, _) in enumerate(loader):
            loader.preview(tmp_path / "now.png")
            assert shows(tmp_path / "now.png", images), (epoch, step)
            mixed |= set(loader.plan(epoch, step).mixed.tolist())
    assert mixed == {True, False}
    assert not shows(tmp_path / "now.png", images.flip(0))
    loader.close()
    loader.preview(tmp_path / "now.png")  # after the loop, and without decoders
    assert shows(tmp_path / "now.png", images)


def test_the_cells_before_the_sample_are_its_images(
    plain: DiffuseMixDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Sample] = []
    before = sheets._draw_steps

    def draw(sheet: Sheet, row: int, one: Sample, **options: Any) -> None:
        found.append(one)
        before(sheet, row, one, **options)

    monkeypatch.setattr(sheets, "_draw_steps", draw)
    written = captions(monkeypatch)
    loader = loader_of(plain, shuffle=True, return_index=True)
    loader.set_epoch(4)
    batches = iter(loader)
    next(batches)
    _, labels, indices = next(batches)
    loader.preview(tmp_path / "now.png")
    plan = plain.planner.batch(4, indices.numpy())
    assert len(found) == 6
    for row, sample in enumerate(found):
        assert np.array_equal(sample.original, plain.decode_original(int(indices[row])))
        assert sample.plan.epoch == 4
        assert (sample.edit is None) == (plan.edit[row] < 0)
        assert written[row][0] == plain.classes[int(labels[row])]
        assert f"index {indices[row]}" in written[row]
        if sample.edit is not None:
            assert any(f"λ = {plan.fractal_weight[row]:.2f}" in line for line in written[row])


def test_training_is_not_disturbed(plain: DiffuseMixDataset, tmp_path: Path) -> None:
    """Batches, states and random numbers are those of a loader that nobody looks at."""

    def run(look: bool) -> list[Any]:
        torch.manual_seed(7), np.random.seed(7), random.seed(7)
        plain.set_epoch(0)
        loader = loader_of(plain, shuffle=True, batch_transform=noisy)
        found: list[Any] = []
        for _ in range(2):
            for images, labels in loader:
                if look:
                    loader.preview(tmp_path / "now.png", rows=3)
                found.append((images.numpy().tobytes(), labels.tolist(), loader.state_dict(), plain.epoch))
        found.append((torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()))
        found.append((dict(loader.quarantine), dict(plain.quarantine), plain._cells.tolist(), loader.stats().batches))
        return found

    def noisy(images: torch.Tensor, labels: torch.Tensor, generator: torch.Generator) -> Any:
        return images + torch.rand(images.shape, generator=generator), labels

    assert run(look=True) == run(look=False)


def test_resuming_after_a_look(plain: DiffuseMixDataset, tmp_path: Path) -> None:
    loader = loader_of(plain, shuffle=True)
    batches = iter(loader)
    next(batches)
    loader.preview(tmp_path / "now.png")
    other = loader_of(plain, shuffle=True)
    other.load_state_dict(loader.state_dict())
    for images, (resumed, _) in zip([images for images, _ in batches], other, strict=True):
        assert torch.equal(images, resumed)
        other.preview(tmp_path / "now.png")
        assert shows(tmp_path / "now.png", resumed)


@pytest.mark.filterwarnings("ignore::dali_diffusemix.QuarantineWarning")
def test_substitutes_are_drawn_in_the_place_of_what_failed(photos: Path, settings: Plain, tmp_path: Path) -> None:
    root = shutil.copytree(photos, tmp_path / "photos")
    store = shutil.copytree(settings["edits"], tmp_path / "edits")
    dataset = DiffuseMixDataset(root, normalize=None, **{**settings, "edits": store, "mix": MixSpec(probability=1)})
    assert dataset.store is not None
    planned = dataset.planner.batch(0, range(6))
    Path(dataset.path_of(2)).write_bytes(b"no picture")
    shard = next(store.rglob("*.tar"))
    row = dataset.store.index[int(planned.edit[4])]
    content = bytearray(shard.read_bytes())
    content[row["offset"] : row["offset"] + row["length"]] = bytes(row["length"])
    shard.write_bytes(content)
    dataset = DiffuseMixDataset(root, normalize=None, **{**settings, "edits": store, "mix": MixSpec(probability=1)})
    loader = loader_of(dataset)
    images, _ = next(iter(loader))
    assert len(loader.quarantine) == 2
    before = dict(loader.quarantine)
    loader.preview(tmp_path / "now.png")
    assert shows(tmp_path / "now.png", images)
    assert loader.quarantine == before and not dataset.quarantine
    assert loader._newest is not None and loader._newest.batch is not None
    delivered = [plan for _, plan in loader._newest.batch.samples([dataset])]
    assert [int(plan.index[0]) for plan in delivered] == [0, 1, 3, 3, 4, 5]
    assert [bool(plan.mixed[0]) for plan in delivered] == [True, True, True, True, False, True]


@pytest.mark.slow
def test_parts_of_several_datasets(photos: Path, plain: DiffuseMixDataset, tmp_path: Path) -> None:
    other = DiffuseMixDataset(photos, crop=EvalCrop(SIZE), normalize=None, seed=1)
    for part in (
        ConcatDataset([Subset(other, range(0, 30, 2)), plain.subset([3, 3, 9])]),
        ConcatDataset([plain, other]),
        plain.split(0.5, 0.5)[1],
    ):
        loader = loader_of(part, shuffle=True)
        drawn = 0
        for images, _ in loader:
            loader.preview(tmp_path / "now.png")
            assert shows(tmp_path / "now.png", images)
            assert loader._newest is not None and loader._newest.batch is not None
            drawn = max(drawn, len(loader._newest.batch.shares))
        assert drawn == (2 if isinstance(part, ConcatDataset) else 1)


def test_views_of_a_sampler(plain: DiffuseMixDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = captions(monkeypatch)
    loader = loader_of(plain, 4, sampler=[8, 8, 1, 8, 8, 1, 2, 8])
    for images, _ in loader:
        loader.preview(tmp_path / "now.png")
        assert shows(tmp_path / "now.png", images)
        assert not shows(tmp_path / "now.png", images[[1, 0, 2, 3]])
    assert [lines[-1] for lines in written.values()] == [
        "index 8  ·  view 3",
        "index 1  ·  view 1",
        "index 2",
        "index 8  ·  view 4",
    ]


def test_small_raw_images_that_are_planned_together(photos: Path, bank: FractalBank, tmp_path: Path) -> None:
    pack(photos, tmp_path / "raw", PackConfig(format="raw", max_side=48))
    generate(tmp_path / "raw", tmp_path / "edits", GenerateConfig(prompts=("autumn",), size=48))
    dataset = DiffuseMixDataset(
        tmp_path / "raw", edits=tmp_path / "edits", fractals=bank, crop=TrainCrop(SIZE), normalize=None, seed=2
    )
    loader = loader_of(dataset, shuffle=True, resident="host")
    assert loader._maker.planned_together > 6
    for images, _ in loader:
        loader.preview(tmp_path / "now.png")
        assert shows(tmp_path / "now.png", images)


def test_an_image_that_is_gone_has_a_row_that_says_so(
    photos: Path, settings: Plain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = captions(monkeypatch)
    root = shutil.copytree(photos, tmp_path / "photos")
    dataset = DiffuseMixDataset(root, normalize=None, **settings)
    loader = loader_of(dataset, 3)
    batches = iter(loader)
    images, _ = next(batches)
    Path(dataset.path_of(1)).unlink()
    loader.preview(tmp_path / "now.png")
    assert written[1] == ["ants", "cannot be decoded as a whole", "index 1"]
    with Image.open(tmp_path / "now.png") as picture:
        drawn = column(picture, 3, "augmented")
    assert np.abs(drawn[[0, 2]] - bytes_of(images)[[0, 2]]).max() <= 1
    assert not loader.quarantine and not dataset.quarantine
    assert len([*batches]) == 10


def test_given_targets_are_in_the_caption(
    photos: Path, settings: Plain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = captions(monkeypatch)
    for targets, expected in (
        (np.arange(33), {0: None, 1: "target 1"}),  # class 0 is class 0
        (np.tile(np.float32([0.25, 0, 1]), (33, 1)), {0: "target 0.25 0 1", 1: "target 0.25 0 1"}),
        (None, {0: None, 1: None}),
    ):
        dataset = DiffuseMixDataset(photos, normalize=None, targets=targets, **settings)
        loader = loader_of(dataset, 2)
        next(iter(loader))
        loader.preview(tmp_path / "now.png")
        for row, text in expected.items():
            found = [line for line in written[row] if line.startswith("target")]
            assert found == ([] if text is None else [text])
            assert len(written[row]) <= 2 + MOST_DETAILS


def test_before_the_first_batch(plain: DiffuseMixDataset, tmp_path: Path) -> None:
    loader = loader_of(plain)
    with pytest.raises(ConfigError, match="inside the loop"):
        loader.preview(tmp_path / "now.png")
    batches = iter(loader)
    with pytest.raises(ConfigError, match="inside the loop"):
        loader.preview(tmp_path / "now.png")
    next(batches)
    loader.preview(tmp_path / "now.png")
    newer = iter(loader)
    with pytest.raises(ConfigError, match="newest iterator"):
        loader.preview(tmp_path / "later.png")
    images, _ = next(newer)
    next(batches)  # of the older one
    loader.preview(tmp_path / "now.png")
    assert shows(tmp_path / "now.png", images)
    with pytest.raises(ConfigError, match="inside the loop"):
        pickle.loads(pickle.dumps(loader)).preview(tmp_path / "later.png")
    assert [file.name for file in tmp_path.iterdir()] == ["now.png"]


def test_rows_and_endings(plain: DiffuseMixDataset, tmp_path: Path) -> None:
    loader = loader_of(plain, 12)
    images, _ = next(iter(loader))
    loader.preview(str(tmp_path / "new" / "folder" / "now.PNG"))
    assert shows(tmp_path / "new" / "folder" / "now.PNG", images[:8])
    for rows, drawn in ((1, 1), (3, 3), (64, 12)):
        loader.preview(tmp_path / "now.png", rows=rows)
        assert shows(tmp_path / "now.png", images[:drawn])
    loader.preview(tmp_path / "now.jpg")
    with Image.open(tmp_path / "now.jpg") as picture:
        assert picture.format == "JPEG"
    for rows in (0, 65):
        with pytest.raises(ConfigError, match="rows must lie in 1 to 64"):
            loader.preview(tmp_path / "now.png", rows=rows)
    for name in ("now.webp", "now"):
        with pytest.raises(ConfigError, match=r"must end in .png or .jpg"):
            loader.preview(tmp_path / name)
    with pytest.raises(ConfigError, match="name another"):
        loader.preview(tmp_path / "now.jpg" / "below.png")


def test_what_a_batch_transform_made_is_drawn(
    photos: Path, settings: Plain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tensors themselves, with normalize undone, and the two largest shares of each label."""
    notes = notes_of_cells(monkeypatch)

    def mixup(images: torch.Tensor, labels: torch.Tensor, _: torch.Generator) -> Any:
        soft = torch.nn.functional.one_hot(labels, 3).float()
        return 0.7 * images + 0.3 * images.flip(0), (0.7 * soft + 0.3 * soft.flip(0)).to(torch.bfloat16)

    for dtype in (torch.float32, torch.bfloat16):
        loader = loader_of(DiffuseMixDataset(photos, **settings), shuffle=True, batch_transform=mixup, dtype=dtype)
        plain = DiffuseMixDataset(photos, normalize=None, **settings)
        for (images, labels), (pixels, classes) in zip(loader, loader_of(plain, shuffle=True), strict=True):
            loader.preview(tmp_path / "now.png")
            with Image.open(tmp_path / "now.png") as picture:
                drawn, before = delivered(picture, len(images)), column(picture, len(images), "augmented", extra=1)
            mixed = 0.7 * pixels + 0.3 * pixels.flip(0)
            assert np.abs(drawn - bytes_of(mixed)).max() <= (1 if dtype is torch.float32 else 3)
            assert np.abs(before - bytes_of(pixels)).max() <= 1  # the steps before are those of the plan
            for row, (one, other) in enumerate(zip(classes.tolist(), classes.flip(0).tolist(), strict=True)):
                names = plain.classes
                both = [f"70 % {names[one]}", f"30 % {names[other]}"]
                assert notes[row] == ([f"100 % {names[one]}"] if one == other else both)
            assert labels.dtype == torch.bfloat16


def test_a_batch_that_nobody_holds_any_more(
    plain: DiffuseMixDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loader itself keeps no tensor: the sheet then is that of the plan, and says so."""
    written = footers(monkeypatch)
    loader = loader_of(plain, batch_transform=lambda images, labels, _: (1 - images, labels))
    images, labels = next(iter(loader))
    loader.preview(tmp_path / "held.png")
    assert any(line.startswith("Last column: the tensors after batch_transform") for line in written)
    images.zero_()
    loader.preview(tmp_path / "changed.png")
    with Image.open(tmp_path / "changed.png") as picture:
        assert not delivered(picture, 6).any()  # as it is now
    gone = weakref.ref(images)
    del images
    assert gone() is None
    written.clear()
    loader.preview(tmp_path / "gone.png")
    assert any("nothing holds that batch's tensors any more" in line for line in written)
    with Image.open(tmp_path / "gone.png") as picture:
        expected = torch.stack([plain[index][0] for index in range(6)])
        assert np.abs(column(picture, 6, "augmented") - bytes_of(expected)).max() <= 1
    del labels


def test_only_batches_on_their_way_through_a_transform_are_remembered(plain: DiffuseMixDataset) -> None:
    loader = loader_of(plain)
    next(iter(loader))
    assert loader._newest is not None and loader._newest.batch is not None and loader._newest.batch.made is None


@pytest.mark.parametrize(
    ("transform", "shown", "text"),
    [
        (lambda images, labels: (images[:, :, ::2], labels), True, "ants"),  # another size
        (lambda images, labels: ((255 * images).to(torch.uint8), labels), True, "ants"),
        (lambda images, labels: (3 * images - 1, labels), True, "ants"),  # beyond black and white
        (lambda images, labels: (images, labels / 7), True, "0"),
        (
            lambda images, labels: (images, torch.tile(labels[:, None] + 2.5, (1, 9))),
            True,
            "2.5 2.5 2.5 2.5 2.5 2.5 … (9 values)",
        ),
        (lambda images, labels: (images, (labels, labels)), True, None),
        (lambda images, labels: (torch.cat([images, images]), torch.cat([labels, labels])), False, None),
        (lambda images, labels: (images.flatten(1), labels), False, None),
        (lambda images, labels: (images.mean(1, keepdim=True), labels), False, None),
    ],
)
def test_whatever_a_transform_makes_it_is_drawn_or_said_why_not(
    transform: Any,
    shown: bool,
    text: str | None,
    plain: DiffuseMixDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written, notes = footers(monkeypatch), notes_of_cells(monkeypatch)
    loader = loader_of(plain, 3, batch_transform=lambda images, labels, _: transform(images, labels))
    batch = next(iter(loader))
    loader.preview(tmp_path / "now.png")
    assert any(line.startswith("Last column") for line in written) == shown
    assert any("one image is drawn for each sample" in line for line in written) != shown
    assert notes.get(0) == (None if text is None else [text])
    clipped = any("are clipped" in line for line in written)
    assert clipped == (shown and batch[0].is_floating_point() and float(batch[0].min()) < -0.5)


def test_whole_numbers_as_targets_are_no_classes(
    photos: Path, settings: Plain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = notes_of_cells(monkeypatch)
    dataset = DiffuseMixDataset(photos, normalize=None, targets=np.arange(33) + 1, **settings)
    loader = loader_of(dataset, 2, batch_transform=lambda images, labels, _: (images, labels))
    batch = next(iter(loader))
    loader.preview(tmp_path / "now.png")
    assert notes == {0: ["1"], 1: ["2"]} and batch[1].tolist() == [1, 2]


def test_only_the_plan_is_held(plain: DiffuseMixDataset) -> None:
    loader = loader_of(plain, 30)
    next(iter(loader))
    assert loader._newest is not None
    assert len(pickle.dumps(loader._newest)) < 30 * 300 + 4096


def test_the_footer_names_each_dataset(photos: Path, plain: DiffuseMixDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    found = footers(monkeypatch)
    other = DiffuseMixDataset(photos, crop=EvalCrop(SIZE), normalize=None, seed=1)
    samples = [(one, one.planner.batch(3, [0])) for one in (plain, other, plain)]
    batch_sheet(samples, step=2, rows=2)
    assert found[0].startswith("The first 2 of 3 samples")
    assert [line for line in found if "seed 5" in line] and [line for line in found if "seed 1" in line]
    assert len(found) == len(set(found)) == 4
    assert all("epoch 3" in line for line in found if "seed" in line)
