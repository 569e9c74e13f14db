"""preview: the sheet has its geometry, and its cells are what the specification, and so training, gives."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from material import write_photograph
from numpy.typing import NDArray
from PIL import Image

from dali_diffusemix.errors import ConfigError
from dali_diffusemix.fractals import FractalBank
from dali_diffusemix.generate import GenerateConfig, generate
from dali_diffusemix.images.codec import decode
from dali_diffusemix.inspect.preview import (
    COLUMNS,
    animation,
    canvas,
    contact_sheet,
    decoded_shares,
    encoded,
    epochs_sheet,
    lettering,
    matching_indices,
    parts_sheet,
    presets_sheet,
    sheets,
    spread_indices,
)
from dali_diffusemix.inspect.preview.canvas import Frame, Layout, Sheet
from dali_diffusemix.inspect.preview.samples import Sample
from dali_diffusemix.loading.dataset import DiffuseMixDataset
from dali_diffusemix.mix import TensorFormat
from dali_diffusemix.mix.pixel import edit_weight, encode, mixed_image, resample
from dali_diffusemix.plan import (
    MASKS,
    Crop,
    EpochOrder,
    EvalCrop,
    MixSpec,
    RandomCrop,
    TrainCrop,
    visible_parts,
)
from dali_diffusemix.plan.augment import ColorJitter, GaussianBlur, RandAugment, described

PIXELS = TensorFormat(dtype="uint8", channels_last=True, normalize=None)
ODD_CLASS = b"caf\xc3\xa9 \xff \xe9\x9b\xaa, and a name that is far too long for the caption"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """root/, edits/ and a bank: four classes of five images, one of an odd name."""
    folder = tmp_path_factory.mktemp("preview")
    for name in (b"ants", b"bees", b"cats", ODD_CLASS):
        path = folder / "root" / name.decode("utf-8", "surrogateescape")
        for number in range(5):
            write_photograph(path / f"{number}.png", 10 * len(name) + number, 120, 160 + 9 * number)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DALI_DIFFUSEMIX_CACHE", str(folder / "cache"))
        generate(folder / "root", folder / "edits", GenerateConfig(prompts=("autumn", "a sketch with crayon"), size=64))
    np.save(folder / "bank.npy", np.random.default_rng(0).integers(0, 256, (3, 48, 48, 3), dtype=np.uint8))
    return folder


def dataset_of(folder: Path, mix: MixSpec | None, crop: Crop | None = None, seed: int = 0) -> DiffuseMixDataset:
    return DiffuseMixDataset(
        folder / "root",
        edits=folder / "edits",
        fractals=FractalBank.open(folder / "bank.npy"),
        mix=mix,
        crop=crop or TrainCrop(160),
        normalize=None,
        seed=seed,
    )


def cells(
    dataset: DiffuseMixDataset, sheet: Image.Image, indices: list[int]
) -> dict[tuple[int, str], NDArray[np.uint8]]:
    """The sheet's cells by (row, column name)."""
    layout = Layout.of(
        dataset.crop.output_size, rows=len(indices), columns=len(COLUMNS), groups=(3,), captions=206, enlarged=False
    )
    assert sheet.width == layout.size[0]
    return {
        (row, name): cell(sheet, layout, row, column)
        for row in range(len(indices))
        for column, (name, _) in enumerate(COLUMNS)
    }


def cell(sheet: Image.Image, layout: Layout, row: int, column: int) -> NDArray[np.uint8]:
    (left, top), (height, width) = layout.corner(row, column), layout.cell
    return np.asarray(sheet.crop((left, top, left + width, top + height)))


def expected(dataset: DiffuseMixDataset, indices: list[int], row: int) -> dict[str, NDArray[np.uint8]]:
    """Hybrid, fractal and augmented of a mixed sample by the specification."""
    plan = dataset.planner.batch(0, indices)
    assert dataset.store is not None and dataset.bank is not None
    original = decode(dataset.path_of(int(plan.original[row])))
    edit = decode(dataset.store.encoded(int(plan.edit[row])))
    fractal = dataset.bank.images[plan.fractal[row]]
    down, right = (-1 if flipped else 1 for flipped in plan.fractal_flip[row])
    alone = resample(fractal[::down, ::right], plan.span[row], plan.output_size)
    images = {
        "hybrid": mixed_image(plan, row, original, edit),
        "fractal": alone[:, :: -1 if plan.flip[row] else 1],
        "augmented": mixed_image(plan, row, original, edit, fractal),
    }
    return {name: encode(image, PIXELS).astype(np.uint8) for name, image in images.items()}


@pytest.mark.parametrize("mix", [MixSpec.paper(), MixSpec.release(), MixSpec(order="crop_then_mix", seam_width=0.3)])
def test_cells_are_what_the_specification_gives(folder: Path, mix: MixSpec) -> None:
    dataset = dataset_of(folder, mix)
    indices = spread_indices(dataset, rows=6)
    found = cells(dataset, contact_sheet(dataset, indices=indices), indices)
    for row in range(len(indices)):
        for name, pixels in expected(dataset, indices, row).items():
            # The sum of a fractal alone goes by way of the blend, so that it may round differently.
            assert np.abs(found[row, name].astype(int) - pixels).max() <= (1 if name == "fractal" else 0)


def test_the_last_column_is_what_training_sees(folder: Path) -> None:
    dataset = dataset_of(folder, MixSpec(probability=0.5))
    indices = list(range(12))
    found = cells(dataset, contact_sheet(dataset, indices=indices), indices)
    assert set(dataset.planner.batch(0, indices).mixed.tolist()) == {True, False}
    for row, index in enumerate(indices):
        sample = dataset[index][0].numpy().transpose(1, 2, 0) * 255
        assert np.abs(found[row, "augmented"] - sample).max() <= 1


def test_other_epochs_and_seeds_give_other_sheets_and_leave_the_dataset_alone(folder: Path) -> None:
    dataset = dataset_of(folder, MixSpec.paper())
    first = contact_sheet(dataset, rows=2)
    assert contact_sheet(dataset, rows=2) == first
    assert contact_sheet(dataset, rows=2, epoch=1) != first
    assert contact_sheet(dataset_of(folder, MixSpec.paper(), seed=1), rows=2) != first
    assert dataset.epoch == 0


def test_an_unmixed_row_says_so(folder: Path) -> None:
    for dataset in (dataset_of(folder, None), dataset_of(folder, MixSpec(probability=0))):
        indices = spread_indices(dataset, rows=2)
        found = cells(dataset, contact_sheet(dataset, indices=indices), indices)
        for name in ("edit", "mask", "hybrid", "fractal"):
            assert (found[0, name] == canvas.PANEL).all(axis=-1).mean() > 0.9
            assert np.array_equal(found[0, name], found[1, name])
        sample = dataset[indices[0]][0].numpy().transpose(1, 2, 0) * 255
        assert np.abs(found[0, "augmented"] - sample).max() <= 1


def test_without_a_fractal_the_cell_is_a_dash(folder: Path) -> None:
    dataset = dataset_of(folder, MixSpec(fractal_weight=0, probability=1))
    found = cells(dataset, contact_sheet(dataset, indices=[4]), [4])
    assert (found[0, "fractal"] == canvas.PANEL).all(axis=-1).mean() > 0.9
    assert np.array_equal(found[0, "hybrid"], found[0, "augmented"])


def test_small_samples_are_enlarged_and_large_ones_shrunk(folder: Path) -> None:
    small = dataset_of(folder, MixSpec(probability=1), RandomCrop(30, padding=4))
    found = cells(small, contact_sheet(small, indices=[3]), [3])[0, "augmented"]
    assert found.shape == (150, 150, 3)
    assert np.array_equal(found[2::5, 2::5], expected(small, [3], 0)["augmented"])
    large = dataset_of(folder, MixSpec(probability=1), EvalCrop((768, 384)))
    assert cells(large, contact_sheet(large, indices=[3]), [3])[0, "augmented"].shape == (384, 192, 3)


@pytest.mark.parametrize("order", ["mix_then_crop", "crop_then_mix"])
@pytest.mark.parametrize("mask", MASKS)
def test_the_mask_within_the_crop_is_the_one_applied(folder: Path, mask: str, order: str) -> None:
    mix = MixSpec(masks=(mask,), seam_width=0.4, order=order, probability=1)  # type: ignore[arg-type]
    dataset = dataset_of(folder, mix, TrainCrop((90, 70), flip=0))
    plan = dataset.planner.batch(0, [7])
    sample = Sample.of(dataset, plan, 0)
    top, left, height, width = (round(float(side)) for side in sample.box)
    # On the image's own pixels the crop is a whole rectangle of them.
    shown = sample.mask(sample.original.shape[:2])[top : top + height, left : left + width]
    applied = edit_weight(int(plan.mask[0]), plan.seam_width, plan.span[0], (height, width))
    assert np.abs(shown - 255 * applied).max() <= 0.51
    axis, place = sample.seam()
    at = np.zeros(2)
    at[axis] = place
    span, box = plan.span[0], plan.box[0]
    assert span[axis] + span[axis + 2] * (at[axis] - box[axis]) / box[axis + 2] == pytest.approx(0.5)


def test_chosen_samples_are_mixed_and_spread_over_classes(folder: Path) -> None:
    dataset = dataset_of(folder, MixSpec.paper())
    chosen = spread_indices(dataset, rows=8)
    plan = dataset.planner.batch(0, chosen)
    assert plan.mixed.all()
    assert np.bincount(dataset.labels_of(plan), minlength=4).tolist() == [2, 2, 2, 2]
    order = EpochOrder(length=len(dataset), batch_size=20, shuffle=True, seed=0).indices(0, np.arange(20)).tolist()
    places = [order.index(index) for index in chosen]
    assert places == sorted(places)
    assert spread_indices(dataset, rows=2) == chosen[:2]


def test_where_mixed_samples_are_few_others_fill_up(folder: Path) -> None:
    dataset = dataset_of(folder, MixSpec(probability=0.2))
    chosen = spread_indices(dataset, rows=20)
    assert sorted(chosen) == list(range(20))
    mixed = dataset.planner.batch(0, chosen).mixed
    assert not (mixed[1:] & ~mixed[:-1]).any()


@pytest.mark.parametrize("rows", [0, 65])
def test_rows_have_a_limit(folder: Path, rows: int) -> None:
    dataset = dataset_of(folder, MixSpec.paper())
    with pytest.raises(ConfigError, match=f"rows must lie in 1 to 64, found {rows}"):
        contact_sheet(dataset, rows=rows)
    with pytest.raises(ConfigError, match="indices must name 1 to 64 samples, found 0"):
        contact_sheet(dataset, indices=[])
    with pytest.raises(ConfigError, match=r"index must lie in \[0, 20\)"):
        contact_sheet(dataset, indices=[20])


def test_the_footer_says_what_the_edits_are(folder: Path, tmp_path: Path) -> None:
    dataset = dataset_of(folder, MixSpec.paper(), seed=5)
    setting, edits = sheets._footnotes(dataset, 3)
    assert "MixSpec.paper()" in setting and "seed 5" in setting and "epoch 3" in setting
    assert edits == "edits: procedural restyling, not diffusion"
    assert "MixSpec.release()" in sheets._footnotes(dataset_of(folder, MixSpec.release()), 0)[0]
    shutil.copytree(folder / "edits", tmp_path / "edits")
    file = tmp_path / "edits" / "store.json"
    content = json.loads(file.read_bytes())
    content["settings"] |= {"editor": "diffusers", "model": "timbrooks/instruct-pix2pix"}
    file.write_text(json.dumps(content))
    other = DiffuseMixDataset(folder / "root", edits=tmp_path / "edits", crop=TrainCrop(32), mix=None)
    setting, edits = sheets._footnotes(other, 0)
    assert setting.startswith("mix none")
    assert edits == "edits: timbrooks/instruct-pix2pix"


def test_text_is_written_whatever_it_holds() -> None:
    assert lettering.runs("a λ b") == ["a ", "λ", " b"]
    assert lettering.runs("caf\u00e9 \udcff \u96ea\n") == ["cafe ? ??"]
    name = ODD_CLASS.decode("utf-8", "surrogateescape")
    short, size = lettering.fitted(name, 20, 150)
    assert size == 16 and short.endswith("…") and name.startswith(short[:-1])
    assert lettering.width(short, size) <= 150 < lettering.width(name, size)
    assert lettering.fitted("ants", 20, 150) == ("ants", 20)
    assert lettering.fitted("a sketch with crayon", 20, lettering.width("a sketch with crayon", 17)) == (
        "a sketch with crayon",
        17,
    )
    note = "mix a, of several words  ·  seed 0  ·  epoch 3"
    assert lettering.wrapped(note, 13, 1000) == [note]
    assert lettering.wrapped(note, 13, 160) == ["mix a, of several words", "seed 0  ·  epoch 3"]
    assert lettering.wrapped(note, 13, 60) == ["mix a, of", "several", "words", "seed 0", "epoch 3"]
    for character in lettering._STROKES:
        assert np.asarray(lettering._drawn(character, 13)).max() > 100


def test_a_changed_plan_changes_only_what_it_should(folder: Path) -> None:
    dataset = dataset_of(folder, MixSpec(probability=1))
    sample = Sample.of(dataset, dataset.planner.batch(0, [2]), 0)
    heavier = replace(sample, plan=replace(sample.plan, fractal_weight=np.array([0.9], dtype=np.float32)))
    assert np.array_equal(sample.hybrid(), heavier.hybrid())
    assert np.array_equal(sample.fractal_alone(), heavier.fractal_alone())
    assert not np.array_equal(sample.augmented(), heavier.augmented())


def test_all_operations_are_listed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However narrow the samples are, with room for each line."""
    drawn: list[str] = []
    plain = Sheet.cell

    def noted(sheet: Sheet, row: int, column: int, content: Any, notes: Any = ()) -> None:
        drawn[:] = [text for text, _, _ in notes]
        assert len(notes) <= sheet.layout.notes
        plain(sheet, row, column, content, notes)

    monkeypatch.setattr(Sheet, "cell", noted)
    augment = [GaussianBlur(3), RandAugment(5), ColorJitter(0.4, 0.4, 0.4, 0.1)]
    dataset = DiffuseMixDataset(folder / "root", crop=TrainCrop(31), augment=augment, seed=0)
    contact_sheet(dataset, indices=[3])
    (operations,) = dataset.planner.batch(0, [3]).operations
    wanted = [text for one in operations if (text := described(one))]
    assert len(wanted) > 7 and [word for line in drawn for word in line.split() if word != "·"] == [
        word for text in wanted for word in text.split()
    ]


# Over the epochs ------------------------------------------------------------------------------------------------------


def seen(dataset: DiffuseMixDataset, epoch: int, index: int) -> NDArray[np.uint8]:
    """What training sees, (height, width, 3)."""
    dataset.set_epoch(epoch)
    tensor = dataset[index][0].numpy()
    dataset.set_epoch(0)
    return np.rint(tensor.transpose(1, 2, 0) * 255).astype(np.uint8)


def differ(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> int:
    return int(np.abs(first.astype(int) - second).max())


@pytest.mark.parametrize("mix", [MixSpec.paper(), MixSpec.release(), MixSpec(probability=0.5), None])
@pytest.mark.parametrize("epochs", [[0], [3, 7, 2], range(8)])
def test_a_row_is_an_original_and_its_samples_epoch_by_epoch(
    folder: Path, mix: MixSpec | None, epochs: list[int]
) -> None:
    dataset = dataset_of(folder, mix)
    indices = [4, len(dataset) - 1]
    sheet = epochs_sheet(dataset, epochs=epochs, indices=indices)
    lines = -(-len(epochs) // 6)
    across = -(-len(epochs) // lines)
    layout = Layout.of((160, 160), rows=2 * lines, columns=1 + across, groups=(1,), notes=3)
    for place, index in enumerate(indices):
        for number, epoch in enumerate(epochs):
            found = cell(sheet, layout, place * lines + number // across, 1 + number % across)
            assert differ(found, seen(dataset, epoch, index)) <= 1
        original = dataset.decode_original(int(dataset.planner.batch(0, [index]).original[0]))
        height, width = original.shape[:2]
        small = Image.fromarray(original).resize((160, round(height * 160 / width)), Image.Resampling.LANCZOS)
        shown = cell(sheet, layout, place * lines, 0)
        top = (160 - small.height) // 2
        assert differ(shown[top : top + small.height], np.asarray(small)) == 0
        assert (shown[: top - 1] == canvas.PANEL).all()
    assert epochs_sheet(dataset, epochs=epochs, indices=indices) == sheet
    assert dataset.epoch == 0


@pytest.mark.slow
def test_frames_of_the_animation_are_the_samples_of_the_epochs(folder: Path) -> None:
    dataset = dataset_of(folder, MixSpec(probability=0.5))
    epochs = [0, 1, 2, 3, 9]
    frames = animation(dataset, index=6, epochs=epochs)
    assert {bool(dataset.planner.batch(epoch, [6]).mixed[0]) for epoch in epochs} == {True, False}
    assert {frame.size for frame in frames} == {(320, 320 + 54)}  # twice 160, and the caption
    for frame, epoch in zip(frames, epochs, strict=True):
        assert differ(np.asarray(frame)[1:320:2, ::2], seen(dataset, epoch, 6)) <= 1
    for ending, close in ((".webp", 4), (".gif", 24)):
        content = encoded(frames, ending)
        assert content == encoded(animation(dataset, index=6, epochs=epochs), ending)
        assert len(content) < 100_000 * len(frames)
        with Image.open(io.BytesIO(content)) as file:
            assert (file.n_frames, file.info["loop"]) == (len(frames), 0)
            for place in range(len(frames)):
                file.seek(place)
                file.load()
                assert file.info["duration"] == 1000
                lossy = np.asarray(file.convert("RGB")).astype(int)
                distances = [np.abs(lossy - np.asarray(other)).mean() for other in frames]
                assert distances[place] < close and np.argmin(distances) == place


def test_small_frames_are_enlarged_and_large_ones_shrunk(folder: Path) -> None:
    assert animation(dataset_of(folder, None, TrainCrop(32)), index=0, epochs=[0])[0].size == (224, 224 + 54)
    assert animation(dataset_of(folder, None, TrainCrop((64, 1024))), index=0, epochs=[0])[0].size == (512, 32 + 54)


def test_a_file_is_what_its_ending_says(folder: Path) -> None:
    frames = animation(dataset_of(folder, MixSpec.paper()), index=0, epochs=[0, 1])
    for ending, format in ((".png", "PNG"), (".jpg", "JPEG"), (".webp", "WEBP"), (".gif", "GIF")):
        with Image.open(io.BytesIO(encoded(frames[:1], ending))) as file:
            assert file.format == format and file.size == frames[0].size
            if ending == ".png":
                assert np.array_equal(np.asarray(file), np.asarray(frames[0]))
    with pytest.raises(ConfigError, match=r"ending must be one of .*, found '.tiff'"):
        encoded(frames, ".tiff")
    with pytest.raises(
        ConfigError, match=r"\.png must have one picture, found 2; an animation ends in \('.webp', '.gif'\)"
    ):
        encoded(frames, ".png")


def test_epochs_have_a_limit(folder: Path) -> None:
    dataset = dataset_of(folder, MixSpec.paper())
    for draw in (lambda epochs: animation(dataset, index=0, epochs=epochs), lambda e: epochs_sheet(dataset, epochs=e)):
        for count in (0, 101):
            with pytest.raises(ConfigError, match=f"epochs must name 1 to 100 epochs, found {count}"):
                draw(range(count))
    with pytest.raises(ConfigError, match="at most 512 samples on a sheet, found 20 times 26"):
        epochs_sheet(dataset, epochs=range(26), indices=range(20))
    with pytest.raises(ConfigError, match=r"index must lie in \[0, 20\)"):
        animation(dataset, index=20, epochs=[0])


# Mixes side by side ---------------------------------------------------------------------------------------------------

BOTH = {"release": MixSpec.release(), "paper": MixSpec.paper()}


def test_each_mix_shows_its_sample_of_the_same_original(folder: Path) -> None:
    dataset = dataset_of(folder, None)
    indices = matching_indices(dataset, BOTH, originals=range(20))
    plans = {name: replace(dataset.planner, mix=mix).batch(0, indices[name]) for name, mix in BOTH.items()}
    assert indices["paper"] == list(range(20))
    for plan in plans.values():
        assert plan.original.tolist() == list(range(20))
    # An expanded epoch has the very edit that the fixed one draws.
    assert np.array_equal(plans["paper"].edit, plans["release"].edit)
    assert set(plans["paper"].mixed.tolist()) == {True, False}

    shown = {name: [lists[place] for place in (2, 7, 11)] for name, lists in indices.items()}
    sheet = presets_sheet(dataset, BOTH, indices=shown)
    layout = Layout.of((160, 160), rows=3, columns=5, groups=(1, 3), notes=2)
    for group, (name, mix) in zip((1, 3), BOTH.items(), strict=True):
        for row, index in enumerate(shown[name]):
            found = cell(sheet, layout, row, group + 1)
            assert differ(found, seen(dataset_of(folder, mix), 0, index)) <= 1
            mixed = plans[name].mixed[indices[name].index(index)]
            assert ((cell(sheet, layout, row, group) == canvas.PANEL).all(axis=-1).mean() > 0.9) == (not mixed)
    assert presets_sheet(dataset, BOTH, indices=shown) == sheet


def test_originals_are_chosen_by_the_first_fixed_mix(folder: Path) -> None:
    dataset = dataset_of(folder, MixSpec.release())
    found = matching_indices(dataset, BOTH, rows=6)
    assert found["paper"] == spread_indices(dataset_of(folder, MixSpec.paper()), rows=6)
    assert presets_sheet(dataset, BOTH, rows=6) == presets_sheet(dataset, BOTH, indices=found)
    # Where there is none, an edit all the same.
    alone = matching_indices(dataset, {"release": MixSpec.release()}, originals=range(20))["release"]
    plan = dataset.planner.batch(0, alone)
    assert plan.mixed.all() and plan.original.tolist() == list(range(20))


def test_mixes_that_do_not_match_are_refused(folder: Path) -> None:
    dataset = dataset_of(folder, None)
    with pytest.raises(ConfigError, match=r"originals must lie in \[0, 20\), found 3 to 25; give rows of"):
        matching_indices(dataset, BOTH, originals=[3, 25])
    with pytest.raises(ConfigError, match="mixes must name at least 1 mix, found none"):
        matching_indices(dataset, {})
    with pytest.raises(ConfigError, match=r"of the same originals .* found originals \[4\] and, under 'paper', \[5\]"):
        presets_sheet(dataset, BOTH, indices={"release": [4], "paper": [5]})
    with pytest.raises(ConfigError, match=r"index must lie in \[0, 20\), found 25 to 25"):
        presets_sheet(dataset, BOTH, indices={"release": [25], "paper": [25]})
    with pytest.raises(ConfigError, match="use `matching_indices`"):
        presets_sheet(dataset, BOTH, indices={"paper": [5]})
    bare = DiffuseMixDataset(folder / "root", crop=TrainCrop(32))
    with pytest.raises(ConfigError, match="edits must be given with mix"):
        presets_sheet(bare, BOTH)


# Visible parts --------------------------------------------------------------------------------------------------------


def windows(dataset: DiffuseMixDataset, indices: list[int]) -> tuple[NDArray[np.int32], ...]:
    """(n, 2) sizes and (n, 4) windows of originals, the same of edits."""
    plan = dataset.planner.batch(0, indices)
    assert dataset.store is not None
    sizes = dataset.catalog.sizes[plan.original]
    edit_sizes = np.where(plan.mixed[:, None], dataset.store.sizes(np.maximum(plan.edit, 0)), 0).astype(np.int32)
    originals, edits = visible_parts(plan, np.stack([sizes, edit_sizes]))
    return sizes, originals, edit_sizes, edits


def area(windows: NDArray[np.int32]) -> NDArray[np.int64]:
    return np.prod(windows[:, 2:].astype(np.int64) - windows[:, :2], axis=1)


CROPS = [TrainCrop(160), RandomCrop(150, padding=30), EvalCrop(128)]


@pytest.mark.parametrize("crop", CROPS, ids=lambda crop: type(crop).__name__)
@pytest.mark.parametrize("mix", [MixSpec(probability=0.7), MixSpec.release()], ids=["fixed", "expanded"])
def test_shares_are_those_of_the_visible_parts(folder: Path, mix: MixSpec, crop: Crop) -> None:
    dataset = dataset_of(folder, mix, crop)
    indices = list(range(len(dataset)))
    sizes, originals, edit_sizes, edits = windows(dataset, indices)
    found = decoded_shares(dataset, indices=indices)
    whole, whole_edit = sizes.astype(np.int64).prod(axis=1), edit_sizes.astype(np.int64).prod(axis=1)
    mixed = dataset.planner.batch(0, indices).mixed
    assert np.array_equal(found[:, 0], area(originals) / whole)
    assert np.array_equal(found[mixed, 1], (area(edits) / np.maximum(whole_edit, 1))[mixed])
    assert np.isnan(found[~mixed, 1]).all() and set(mixed.tolist()) == {True, False}
    assert np.array_equal(found[:, 2], (area(originals) + area(edits)) / (whole + whole_edit))
    assert decoded_shares(dataset, indices=[]).shape == (0, 3)


@pytest.mark.parametrize("crop", CROPS, ids=lambda crop: type(crop).__name__)
def test_what_is_outlined_is_what_is_decoded(folder: Path, crop: Crop) -> None:
    dataset = dataset_of(folder, MixSpec(probability=0.8, seam_width=0.1), crop)
    indices = list(range(12))
    sheet = parts_sheet(dataset, indices=indices)
    assert parts_sheet(dataset, indices=indices[:2]) == parts_sheet(dataset, indices=indices[:2])
    layout = Layout.of(crop.output_size, rows=12, columns=3, groups=(2,), captions=206, notes=2)
    plan = dataset.planner.batch(0, indices)
    sizes, originals, edit_sizes, edits = windows(dataset, indices)
    outlined = 0
    for row in indices:
        sample = Sample.of(dataset, plan, row)
        frame = Frame.of(sample, layout.cell)
        sources = (sample.original, sizes[row], originals[row]), (sample.edit, edit_sizes[row], edits[row])
        for column, (image, size, window) in enumerate(sources):
            shown = cell(sheet, layout, row, column)
            down, right = np.nonzero((shown == canvas.ACCENT).all(axis=-1))
            if image is None:
                assert (shown == canvas.PANEL).all(axis=-1).mean() > 0.9
            if not window.any():
                assert not len(down)
                continue
            outlined += 1
            # The outline, in pixels of the image, to a pixel of the cell.
            outline = np.array([down.min(), right.min(), down.max() + 1, right.max() + 1])
            scale = np.tile(size / [frame.height, frame.width], 2)
            found = (outline - [frame.top, frame.left, frame.top, frame.left]) * scale
            assert (np.abs(found - window) <= scale + 1e-9).all()
            # Within it and the crop's line, the image is as it is.
            inner = tuple(slice(outline[axis] + 8, outline[axis + 2] - 8) for axis in (0, 1))
            bright = Image.new("RGB", layout.cell[::-1])
            assert image is not None
            whole = Image.fromarray(image).resize((frame.width, frame.height), Image.Resampling.LANCZOS)
            bright.paste(whole, frame.corner)
            assert np.array_equal(shown[inner], np.asarray(bright)[inner])
        assert differ(cell(sheet, layout, row, 2), seen(dataset, 0, row)) <= 1
    assert outlined > 12


def test_the_footer_of_the_parts_counts_the_pixels(folder: Path) -> None:
    dataset = dataset_of(folder, MixSpec.paper())
    plan = dataset.planner.batch(0, [3, 8])
    _, line = sheets._about_shares(dataset, 0, plan)
    sizes, originals, edit_sizes, edits = windows(dataset, list(range(20)))
    pixels = area(originals) + area(edits)
    whole = sizes.astype(np.int64).prod(axis=1) + edit_sizes.astype(np.int64).prod(axis=1)
    here, all_of_them = 100 * pixels[[3, 8]].sum() / whole[[3, 8]].sum(), 100 * pixels.sum() / whole.sum()
    assert f"Decoded pixels: {here:.0f} % in the images shown" in line
    assert line.endswith(f", {all_of_them:.0f} % in all 20 samples of the epoch.")
