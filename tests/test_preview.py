"""preview: the sheet has its geometry, and its cells are what the specification, and so training, gives."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from dali_diffusemix import preview
from dali_diffusemix.dataset import DiffuseMixDataset
from dali_diffusemix.errors import ConfigError
from dali_diffusemix.fractals import FractalBank
from dali_diffusemix.generate import GenerateConfig, generate
from dali_diffusemix.mixing import TensorFormat, edit_weight, encode, mixed_image, resample
from dali_diffusemix.pixels import decode
from dali_diffusemix.plan import MASKS, Crop, EvalCrop, MixSpec, RandomCrop, Schedule, TrainCrop
from dali_diffusemix.preview import COLUMNS, contact_sheet, spread_indices

PIXELS = TensorFormat(dtype="uint8", channels_last=True, normalize=None)
ODD_CLASS = b"caf\xc3\xa9 \xff \xe9\x9b\xaa, and a name that is far too long for the caption"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """root/, edits/ and a bank: four classes of five images, one of an odd name."""
    folder = tmp_path_factory.mktemp("preview")
    rng = np.random.default_rng(0)
    for name in (b"ants", b"bees", b"cats", ODD_CLASS):
        path = folder / "root" / name.decode("utf-8", "surrogateescape")
        path.mkdir(parents=True)
        for number in range(5):
            small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
            small.resize((160 + 9 * number, 120), Image.Resampling.BICUBIC).save(path / f"{number}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DALI_DIFFUSEMIX_CACHE", str(folder / "cache"))
        generate(folder / "root", folder / "edits", GenerateConfig(prompts=("autumn", "a sketch with crayon"), size=64))
    np.save(folder / "bank.npy", rng.integers(0, 256, (3, 48, 48, 3), dtype=np.uint8))
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
    layout = preview._Layout.of(dataset.planner.batch(0, indices))
    assert sheet.size == layout.size
    height, width = layout.cell
    found = {}
    for row in range(len(indices)):
        for column, (name, _) in enumerate(COLUMNS):
            left, top = layout.place(row, column)
            found[row, name] = np.asarray(sheet.crop((left, top, left + width, top + height)))
    return found


def expected(dataset: DiffuseMixDataset, indices: list[int], row: int) -> dict[str, NDArray[np.uint8]]:
    """Hybrid, fractal and augmented of a mixed sample by the specification."""
    plan = dataset.planner.batch(0, indices)
    assert dataset.store is not None and dataset.bank is not None
    original = decode(dataset.path_of(int(plan.original[row])))
    edit = decode(dataset.store.encoded(int(plan.edit[row])))
    fractal = dataset.bank.images[plan.fractal[row]]
    down, right = (-1 if flipped else 1 for flipped in plan.fractal_flip[row])
    alone = resample(fractal[::down, ::right], plan.span[row] * np.tile(fractal.shape[:2], 2), plan.output_size)
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
            assert (found[0, name] == preview._PANEL).all(axis=-1).mean() > 0.9
            assert np.array_equal(found[0, name], found[1, name])
        sample = dataset[indices[0]][0].numpy().transpose(1, 2, 0) * 255
        assert np.abs(found[0, "augmented"] - sample).max() <= 1


def test_without_a_fractal_the_cell_is_a_dash(folder: Path) -> None:
    dataset = dataset_of(folder, MixSpec(fractal_weight=0, probability=1))
    found = cells(dataset, contact_sheet(dataset, indices=[4]), [4])
    assert (found[0, "fractal"] == preview._PANEL).all(axis=-1).mean() > 0.9
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
    sample = preview._Sample.of(dataset, plan, 0)
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
    order = Schedule(length=len(dataset), batch_size=20, shuffle=True, seed=0).indices(0, np.arange(20)).tolist()
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
    setting, edits = preview._footnotes(dataset, 3)
    assert "MixSpec.paper()" in setting and "seed 5" in setting and "epoch 3" in setting
    assert edits == "edits: procedural restyling, not diffusion"
    assert "MixSpec.release()" in preview._footnotes(dataset_of(folder, MixSpec.release()), 0)[0]
    shutil.copytree(folder / "edits", tmp_path / "edits")
    file = tmp_path / "edits" / "store.json"
    content = json.loads(file.read_bytes())
    content["settings"] |= {"editor": "diffusers", "model": "timbrooks/instruct-pix2pix"}
    file.write_text(json.dumps(content))
    other = DiffuseMixDataset(folder / "root", edits=tmp_path / "edits", crop=TrainCrop(32))
    setting, edits = preview._footnotes(other, 0)
    assert setting.startswith("mix none")
    assert edits == "edits: timbrooks/instruct-pix2pix"


def test_text_is_written_whatever_it_holds() -> None:
    assert preview._runs("a λ b") == ["a ", "λ", " b"]
    assert preview._runs("caf\u00e9 \udcff \u96ea\n") == ["cafe ? ??"]
    name = ODD_CLASS.decode("utf-8", "surrogateescape")
    short = preview._fitted(name, 20, 150)
    assert short.endswith("…") and name.startswith(short[:-1])
    assert preview._width(short, 20) <= 150 < preview._width(name, 20)
    assert preview._fitted("ants", 20, 150) == "ants"
    for character in preview._STROKES:
        assert np.asarray(preview._drawn(character, 13)).max() > 100


def test_a_changed_plan_changes_only_what_it_should(folder: Path) -> None:
    dataset = dataset_of(folder, MixSpec(probability=1))
    sample = preview._Sample.of(dataset, dataset.planner.batch(0, [2]), 0)
    heavier = replace(sample, plan=replace(sample.plan, fractal_weight=np.array([0.9], dtype=np.float32)))
    assert np.array_equal(sample.hybrid(), heavier.hybrid())
    assert np.array_equal(sample.fractal_alone(), heavier.fractal_alone())
    assert not np.array_equal(sample.augmented(), heavier.augmented())
