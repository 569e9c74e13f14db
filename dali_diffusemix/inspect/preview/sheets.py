"""The sheets, and the content of their cells."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dali_diffusemix.base.files import write
from dali_diffusemix.errors import ConfigError
from dali_diffusemix.inspect.preview.animation import SHEET_ENDINGS, encoded
from dali_diffusemix.inspect.preview.canvas import ACCENT, INK, MUTED, Frame, Layout, Line, Sheet, zoomed
from dali_diffusemix.inspect.preview.lettering import wrapped
from dali_diffusemix.inspect.preview.made import MadeSamples
from dali_diffusemix.inspect.preview.samples import (
    MOST_ROWS,
    DecodedParts,
    Progress,
    Sample,
    check_epochs,
    check_rows,
    class_name_of,
    counted,
    matching_indices,
    spread_indices,
)
from dali_diffusemix.loading.batches import Made, PlannedSample
from dali_diffusemix.loading.dataset import DiffuseMixDataset
from dali_diffusemix.plan.augment import described
from dali_diffusemix.plan.batch import BatchPlan
from dali_diffusemix.plan.schedule import setting_at
from dali_diffusemix.plan.spec import MASKS, MixSpec
from dali_diffusemix.plan.written import written

COLUMNS: Final = (
    ("original", "I"),
    ("edit", "Î"),
    ("mask", "M"),
    ("hybrid", "H = M⊙Î + (1−M)⊙I"),
    ("fractal", "F"),
    ("augmented", "A = (1−λ)H + λF"),
)
"""Names of the columns, and the paper's symbols."""

_MIXED: Final = ("mixed", COLUMNS[-1][1])  # the last column's name where samples are changed after the mix
_AFTER: Final = ("augmented", "after the mix")
_DELIVERED: Final = ("delivered", "after batch_transform")
_LABEL_LINES: Final = 2

_CAPTIONS: Final = 206
_MOST_SAMPLES: Final = 512  # on one sheet
_EPOCHS_A_LINE: Final = 6
_MOST_COUNTED: Final = 4096  # samples from which the share of a whole epoch is computed


def contact_sheet(
    dataset: DiffuseMixDataset,
    *,
    epoch: int = 0,
    indices: Sequence[int] | None = None,
    rows: int = 8,
    progress: Progress | None = None,
) -> Image.Image:
    """Draw samples of a dataset, one per row: original, edit, mask, hybrid, fractal, augmented.

    Args:
        dataset: The dataset; its seed, mix and crop decide the samples.
        epoch: The epoch of the samples; `dataset.epoch` does not change.
        indices: The samples; None takes `spread_indices`.
        rows: Number of samples if `indices` is None; 1 to 64.
        progress: Called with the number of samples drawn, and of all samples.

    Returns:
        The sheet, RGB. Cells of the last three columns are the output grid pixel for pixel, enlarged by a whole
        number below 128 pixels and shrunk above 384.

    Raises:
        ConfigError: A sample is not in the dataset, or there are none or too many samples.
        DecodeError: An original or an edit cannot be decoded, and the dataset has on_error="raise".
    """
    plan = dataset.planner.batch(epoch, _chosen(dataset, epoch, indices, rows))
    augmented = plan.operations.shape[1] > 0
    about = _footnotes(dataset, epoch)
    sheet = _steps_sheet(plan.output_size, plan.operations, "samples of the plan", about)
    for row in counted(len(plan), progress):
        _draw_steps(sheet, row, Sample.of(dataset, plan, row), augmented=augmented)
    return sheet.image


def batch_sheet(samples: Sequence[PlannedSample], *, step: int, rows: int = 8, made: Made | None = None) -> Image.Image:
    """Draw the first samples of a delivered batch, as `contact_sheet` does; nothing is substituted or logged.

    Args:
        samples: The batch in its order: each sample's dataset, and its plan after substitution.
        step: Number of the batch in its epoch.
        rows: Number of samples at most, 1 to 64.
        made: What a batch transform made of them, for one more column.

    Returns:
        The sheet, RGB. A row whose images cannot be decoded now says so.

    Raises:
        ConfigError: `rows` breaks the rule.
    """
    check_rows(rows)
    shown = samples[:rows]
    epoch, output_size = samples[0][1].epoch, samples[0][1].output_size
    count = f"The first {len(shown)} of {len(samples)}" if len(shown) < len(samples) else f"All {len(samples)}"
    about = [f"{count} samples of the batch, in its order."]
    tensors = None if made is None else MadeSamples.of(made, samples, len(shown))
    if isinstance(tensors, MadeSamples):
        about.append(tensors.about)
    elif tensors is not None:
        about.append(tensors)
        tensors = None
    for dataset in dict.fromkeys(dataset for dataset, _ in shown):
        about += [line for line in _footnotes(dataset, epoch) if line not in about]
    augmented = any(plan.operations.shape[1] for _, plan in shown)
    title = f"epoch {epoch}, batch {step}"
    operations = [row for _, plan in shown for row in plan.operations]
    sheet = _steps_sheet(output_size, operations, title, about, transformed=tensors is not None)
    for row, (dataset, plan) in enumerate(shown):
        sample = Sample.delivered(dataset, plan)
        if sample is None:
            _draw_lost(sheet, row, dataset, plan)
        else:
            _draw_steps(sheet, row, sample, augmented=augmented)
        if tensors is not None:
            notes: list[Line] = [(line, 13, INK) for line in tensors.labels[row]]
            sheet.cell(row, sheet.layout.columns - 1, tensors.picture(row, sheet.layout.cell), notes)
    return sheet.image


def write_batch(
    file: str | os.PathLike[str],
    samples: Sequence[PlannedSample],
    *,
    step: int,
    rows: int = 8,
    made: Made | None = None,
) -> None:
    """Write `batch_sheet` to a file that ends in one of `SHEET_ENDINGS`; whole, or not at all. Makes its folder.

    Raises:
        ConfigError: the ending is another, the file cannot be written, or `rows` breaks its rule.
    """
    path = Path(file)
    ending = path.suffix.lower()
    if ending not in SHEET_ENDINGS:
        raise ConfigError(f"file must end in {' or '.join(SHEET_ENDINGS)}, found {str(path)!r}.")
    content = encoded([batch_sheet(samples, step=step, rows=rows, made=made)], ending)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, content, durable=False)
    except OSError as error:
        raise ConfigError(
            f"{str(path)!r}: must be a file that can be written, found: {error}; name another."
        ) from error


def epochs_sheet(
    dataset: DiffuseMixDataset,
    *,
    epochs: Sequence[int],
    indices: Sequence[int] | None = None,
    rows: int = 8,
    progress: Progress | None = None,
) -> Image.Image:
    """Draw samples of a dataset over several epochs: the original, then the augmented sample in each epoch.

    Args:
        dataset: The dataset; its seed, mix and crop decide the samples.
        epochs: 1 to 100 epochs, six per line; `dataset.epoch` does not change.
        indices: The samples; None takes `spread_indices` of the first epoch.
        rows: Number of samples if `indices` is None; 1 to 64.
        progress: Called with the number of samples drawn, and of all samples.

    Returns:
        The sheet, RGB, its samples as in `contact_sheet`.

    Raises:
        ConfigError: A sample is not in the dataset, or there are none or too many samples or epochs.
        DecodeError: An original or an edit cannot be decoded, and the dataset has on_error="raise".
    """
    check_epochs(epochs)
    chosen = _chosen(dataset, epochs[0], indices, rows)
    if len(chosen) * len(epochs) > _MOST_SAMPLES:
        raise ConfigError(
            f"indices times epochs must be at most {_MOST_SAMPLES} samples on a sheet, found {len(chosen)} times "
            f"{len(epochs)}; draw fewer at once."
        )
    plans = [dataset.planner.batch(epoch, chosen) for epoch in epochs]
    lines = -(-len(epochs) // _EPOCHS_A_LINE)
    across = -(-len(epochs) // lines)
    heights, widths = zip(*(plan.output_size for plan in plans), strict=True)
    layout = Layout.of((max(heights), max(widths)), rows=len(chosen) * lines, columns=1 + across, groups=(1,), notes=3)
    about = _about_epoch(dataset, setting_at(dataset.mix, epochs[0]))
    sheet = Sheet(layout, [*_footnotes(dataset, *epochs), *about])
    sheet.head(0, *COLUMNS[0])
    name, symbols = COLUMNS[-1]
    sheet.head(1, f"{name}, epoch by epoch", symbols, across)
    for row_of_plan in counted(len(chosen), progress):
        top = row_of_plan * lines
        if top:
            sheet.divide(top)
        for number, plan in enumerate(plans):
            sample = Sample.of(dataset, plan, row_of_plan)
            if not number:
                sheet.cell(top, 0, _whole(sample, layout), _named(sample))
            row, column = top + number // across, 1 + number % across
            under: list[Line] = [(f"epoch {plan.epoch}", 14, INK), *_drawn(sample)]
            sheet.cell(row, column, zoomed(sample.augmented(), layout.zoom), under)
    return sheet.image


def presets_sheet(
    dataset: DiffuseMixDataset,
    mixes: Mapping[str, MixSpec],
    *,
    epoch: int = 0,
    indices: Mapping[str, Sequence[int]] | None = None,
    rows: int = 8,
    progress: Progress | None = None,
) -> Image.Image:
    """Draw the same originals under several mixes: the original, then mask and augmented sample for each mix.

    Args:
        dataset: The dataset; its seed and crop decide the samples, its own mix does not matter.
        mixes: Mixes by name; the names are column titles.
        epoch: The epoch of the samples.
        indices: Samples of each mix, by name, of the same originals in the same order; None takes `matching_indices`.
        rows: Number of samples if `indices` is None; 1 to 64.
        progress: Called with the number of samples drawn, and of all samples.

    Returns:
        The sheet, RGB, its samples as in `contact_sheet`.

    Raises:
        ConfigError: Samples in a row have different originals, a sample is not in its mix's epoch, there are none or
            too many of them, or there is nothing to mix with.
        DecodeError: An original or an edit cannot be decoded, and the dataset has on_error="raise".
    """
    indices = matching_indices(dataset, mixes, epoch=epoch, rows=rows) if indices is None else indices
    if not mixes or set(indices) != set(mixes):
        raise ConfigError(
            f"indices must be given for each of at least 1 mix, found them for {sorted(indices)} and mixes "
            f"{sorted(mixes)}; use `matching_indices`."
        )
    planners = {name: replace(dataset.planner, mix=mix) for name, mix in mixes.items()}
    plans = {name: planner.batch(epoch, indices[name]) for name, planner in planners.items()}
    first = next(iter(plans.values()))
    _check_count(len(first))
    for name, plan in plans.items():
        if not np.array_equal(plan.original, first.original):
            raise ConfigError(
                f"indices must name samples of the same originals under each mix, found originals "
                f"{first.original.tolist()} and, under {name!r}, {plan.original.tolist()}; use `matching_indices`."
            )
    groups = tuple(1 + 2 * number for number in range(len(plans)))
    layout = Layout.of(first.output_size, rows=len(first), columns=1 + 2 * len(plans), groups=groups, notes=2)
    about = [*dict.fromkeys(line for mix in mixes.values() for line in _about_epoch(dataset, mix))]
    if about:
        about.insert(0, "A row shows one original. If its index differs between mixes, so do crop, mask and fractal.")
    sheet = Sheet(layout, [*about, *_footnotes(dataset, epoch, mixed=False)])
    sheet.head(0, *COLUMNS[0])
    for column, (name, mix) in zip(groups, mixes.items(), strict=True):
        sheet.head(column, name, _about_mix(mix), 2)
    for row in counted(len(first), progress):
        if row:
            sheet.divide(row)
        for column, (name, plan) in zip(groups, plans.items(), strict=True):
            sample = Sample.of(dataset, plan, row, planners[name])
            if column == 1:
                sheet.cell(row, 0, _whole(sample, layout), _named(sample))
            index = f"index {sample.plan.index[0]} of {len(planners[name])}"
            sheet.cell(row, column, *_masked(sample, layout))
            under = [*_drawn(sample)[:1], (index, 13, MUTED)]
            sheet.cell(row, column + 1, zoomed(sample.augmented(), layout.zoom), under)
    return sheet.image


def parts_sheet(
    dataset: DiffuseMixDataset,
    *,
    epoch: int = 0,
    indices: Sequence[int] | None = None,
    rows: int = 8,
    progress: Progress | None = None,
) -> Image.Image:
    """Draw the parts that the loader decodes: original and edit with the part outlined, and the sample made from them.

    Args:
        dataset: The dataset; its seed, mix and crop decide the samples.
        epoch: The epoch of the samples; `dataset.epoch` does not change.
        indices: The samples; None takes `spread_indices`.
        rows: Number of samples if `indices` is None; 1 to 64.
        progress: Called with the number of samples drawn, and of all samples.

    Returns:
        The sheet, RGB, its samples as in `contact_sheet`. The windows of `plan.visible_parts` and the crop are
        outlined; parts that are not decoded are faded.

    Raises:
        ConfigError: A sample is not in the dataset, or there are none or too many samples.
        DecodeError: An original or an edit cannot be decoded, and the dataset has on_error="raise".
    """
    plan = dataset.planner.batch(epoch, _chosen(dataset, epoch, indices, rows))
    layout = Layout.of(plan.output_size, rows=len(plan), columns=3, groups=(2,), captions=_CAPTIONS, notes=2)
    sheet = Sheet(layout, [*_about_shares(dataset, epoch, plan), *_footnotes(dataset, epoch)])
    sheet.title("Visible parts", "all that is decoded")
    for column, (name, symbols) in enumerate((*COLUMNS[:2], COLUMNS[-1])):
        sheet.head(column, name, symbols)
    for row in counted(len(plan), progress):
        if row:
            sheet.divide(row)
        sample = Sample.of(dataset, plan, row)
        _draw_parts(sheet, row, sample, *DecodedParts.of(dataset, sample.plan))
    return sheet.image


def _chosen(dataset: DiffuseMixDataset, epoch: int, indices: Sequence[int] | None, rows: int) -> Sequence[int]:
    if indices is None:
        return spread_indices(dataset, epoch=epoch, rows=rows)
    _check_count(len(indices))
    return indices


def _check_count(samples: int) -> None:
    if not 1 <= samples <= MOST_ROWS:
        raise ConfigError(f"indices must name 1 to {MOST_ROWS} samples, found {samples}.")


def _steps_sheet(
    output_size: tuple[int, int],
    operations: Iterable[NDArray[np.void]],
    below: str,
    footer: Sequence[str],
    *,
    transformed: bool = False,
) -> Sheet:
    """A sheet for `_draw_steps`, with its titles; with a column more for each way that samples are changed further.

    `operations` are those of each row, by which there is room for the longest list.
    """
    rows = list(operations)
    augmented = any(row.size for row in rows)
    columns = (*COLUMNS[:-1], _MIXED, _AFTER) if augmented else COLUMNS
    columns = (*columns, _DELIVERED) if transformed else columns
    layout = Layout.of(
        output_size,
        rows=len(rows),
        columns=len(columns),
        groups=(3,),
        captions=_CAPTIONS,
        notes=_LABEL_LINES if transformed else 0,
        enlarged=False,
    )
    if augmented:
        most = max(len(_operations(row, layout.cell[1])) for row in rows)
        layout = replace(layout, notes=max(most, layout.notes))
    sheet = Sheet(layout, footer)
    sheet.title("DiffuseMix", below)
    for column, (name, symbols) in enumerate(columns):
        sheet.head(column, name, symbols)
    return sheet


# Cells ----------------------------------------------------------------------------------------------------------------


def _draw_steps(sheet: Sheet, row: int, sample: Sample, *, augmented: bool) -> None:
    if row:
        sheet.divide(row)
    _draw_caption(sheet, row, sample)
    layout = sheet.layout
    frame = Frame.of(sample, layout.cell)
    cells: list[Image.Image | tuple[str, str]] = [frame.show(Image.fromarray(sample.original))]
    if sample.edit is None:
        cells += [("not mixed:", "shown as it is")] * 4
    else:
        mask = sample.mask((frame.height, frame.width))
        fractal = ("no fractal:", "λ is 0") if sample.fractal is None else zoomed(sample.fractal_alone(), layout.zoom)
        cells += [
            frame.show(Image.fromarray(sample.edit)),
            frame.show(Image.fromarray(mask), seam=sample.seam()),
            zoomed(sample.hybrid(), layout.zoom),
            fractal,
        ]
    cells.append(zoomed(sample.mixed(), layout.zoom))
    for column, cell in enumerate(cells):
        sheet.cell(row, column, cell)
    if augmented:
        notes: list[Line] = [(line, 13, MUTED) for line in _operations(sample.operations, layout.cell[1])]
        sheet.cell(row, len(COLUMNS), zoomed(sample.augmented(), layout.zoom), notes)


def _operations(operations: NDArray[np.void], most: int) -> list[str]:
    """The (slots,) operations after the mix and their magnitudes, in lines that `most` pixels hold."""
    lines = wrapped(" · ".join(filter(None, map(described, operations))), 13, most, " · ")
    return lines if any(lines) else ["unchanged"]


def _draw_lost(sheet: Sheet, row: int, dataset: DiffuseMixDataset, plan: BatchPlan) -> None:
    """Draw a row whose images cannot be decoded now."""
    if row:
        sheet.divide(row)
    lines: list[Line] = [(class_name_of(dataset, plan), 20, INK), ("cannot be decoded as a whole", 13, MUTED)]
    sheet.caption(row, [(17, lines[0]), (41, lines[1]), (66, (f"index {plan.index[0]}", 13, MUTED))])
    for column in range(sheet.layout.columns):
        sheet.cell(row, column, ("no picture:", "damaged or gone"))


def _draw_caption(sheet: Sheet, row: int, sample: Sample) -> None:
    prompt = ("not mixed: shown as it is", 15, MUTED) if sample.prompt is None else (f"“{sample.prompt}”", 15, ACCENT)
    lines = [(17, (sample.class_name, 20, INK)), (41, prompt)]
    lines += [(66 + 17 * line, (text, 13, MUTED)) for line, text in enumerate(sample.details())]
    sheet.caption(row, lines)


def _draw_parts(sheet: Sheet, row: int, sample: Sample, decoded: DecodedParts) -> None:
    _draw_caption(sheet, row, sample)
    layout = sheet.layout
    frame, line = Frame.of(sample, layout.cell), layout.scaled(2.5)
    sources = (
        (sample.original, decoded.original, decoded.original_size),
        (sample.edit, decoded.edit, decoded.edit_size),
    )
    for column, (image, window, size) in enumerate(sources):
        if image is None:
            sheet.cell(row, column, ("not mixed:", "no edit is read"))
            continue
        pixels, whole = decoded.pixels[column], decoded.whole[column]
        picture = frame.show_part(Image.fromarray(image), frame.rectangle(window, size), line)
        top, left, bottom, right = window
        part = f"{right - left} × {bottom - top} of {size[1]} × {size[0]}" if pixels else "the file is not read"
        sheet.cell(row, column, picture, [(_share(pixels, whole), 15, INK), (part, 13, MUTED)])
    pixels, whole = sum(decoded.pixels), sum(decoded.whole)
    both = "the original" if sample.edit is None else "both"
    notes = [(f"{_share(pixels, whole)} of {both}", 15, ACCENT), (f"{pixels:,} of {whole:,} pixels", 13, MUTED)]
    sheet.cell(row, 2, zoomed(sample.augmented(), layout.zoom), notes)


def _share(pixels: int, whole: int) -> str:
    if not pixels:
        return "nothing decoded"
    share = 100 * pixels / whole
    return f"decoded {share:.0f} %" if share >= 1 else "decoded under 1 %"


def _whole(sample: Sample, layout: Layout) -> Image.Image:
    size = sample.original.shape[:2]
    return Frame.around(size, np.array([0, 0, *size]), layout.cell).show_whole(Image.fromarray(sample.original))


def _masked(sample: Sample, layout: Layout) -> tuple[Image.Image | tuple[str, str], list[Line]]:
    """Return the cell of a mask and its notes."""
    if sample.edit is None:
        return ("not mixed:", "shown as it is"), []
    frame = Frame.of(sample, layout.cell)
    picture = frame.show(Image.fromarray(sample.mask((frame.height, frame.width))), seam=sample.seam())
    weight = f"λ = {sample.plan.fractal_weight[sample.row]:.2f}"
    return picture, [(_mask(sample), 13, INK), (weight, 13, MUTED)]


def _named(sample: Sample) -> list[Line]:
    height, width = sample.original.shape[:2]
    return [(sample.class_name, 14, INK), (f"{width} × {height}", 13, MUTED)]


def _drawn(sample: Sample) -> list[Line]:
    """Return prompt and mask, or that the sample is not mixed."""
    if sample.prompt is None:
        return [("not mixed", 13, MUTED)]
    return [(f"“{sample.prompt}”", 13, ACCENT), (_mask(sample), 13, MUTED)]


def _mask(sample: Sample) -> str:
    return f"mask {MASKS[int(sample.plan.mask[sample.row])]}"


# Footers --------------------------------------------------------------------------------------------------------------


def _footnotes(dataset: DiffuseMixDataset, *epochs: int, mixed: bool = True) -> list[str]:
    """Return the settings of the samples on a sheet, with the mix unless the sheet names it elsewhere."""
    mixes = [setting_at(dataset.mix, epoch) for epoch in epochs]
    mix = _in_epochs(["none" if one is None else written(one) for one in mixes])
    crop = _in_epochs([written(setting_at(dataset.crop, epoch)) for epoch in epochs])
    augment = _in_epochs([", ".join(map(written, setting_at(dataset.augment, epoch))) or "none" for epoch in epochs])
    setting = [f"mix {mix}"] if mixed else []
    setting += [
        f"crop {crop}",
        *([] if augment == "none" else [f"augment {augment}"]),
        f"seed {dataset.seed}",
        f"epoch{'s' * (len(epochs) > 1)} {_listed(epochs)}",
    ]
    notes = ["  ·  ".join(setting)]
    if dataset.store is not None:
        settings = dataset.store.settings
        procedural = settings.get("editor") == "procedural"
        edits = (
            "procedural restyling, not diffusion" if procedural else f"{settings.get('model', settings.get('editor'))}"
        )
        notes.append(f"edits: {edits}")
    return notes


def _in_epochs(values: Sequence[str]) -> str:
    """A setting in several epochs, which may change with them."""
    return ", then ".join(dict.fromkeys(values))


def _listed(numbers: Sequence[int]) -> str:
    """Return numbers as text; consecutive ones as a range."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][-1] + 1:
            ranges[-1].append(number)
        else:
            ranges.append([number])
    return ", ".join(str(one[0]) if len(one) == 1 else f"{one[0]} to {one[-1]}" for one in ranges)


def _about_mix(mix: MixSpec) -> str:
    seam = f"seam {100 * mix.seam_width:.0f} % wide" if mix.seam_width else "hard seam"
    return f"{len(mix.masks)} masks, {seam}, {mix.epoch} epoch"


def _about_epoch(dataset: DiffuseMixDataset, mix: MixSpec | None) -> list[str]:
    """Return the meaning of an index, if it is not an original."""
    if mix is None or mix.epoch == "fixed":
        return []
    count, samples = len(dataset.catalog), len(replace(dataset.planner, mix=mix))
    return [
        f"An expanded epoch has {samples} samples: first {count} unmixed originals, then {samples - count} edits, each "
        "mixed with its original."
    ]


def _about_shares(dataset: DiffuseMixDataset, epoch: int, plan: BatchPlan) -> list[str]:
    count = len(dataset)
    spread = np.unique(np.linspace(0, count - 1, min(count, _MOST_COUNTED)).astype(np.int64))
    of = f"all {count} samples" if len(spread) == count else f"{len(spread)} of {count} samples"
    here, everywhere = (
        100 * sum(sum(one.pixels) for one in decoded) / sum(sum(one.whole) for one in decoded)
        for decoded in (DecodedParts.of(dataset, plan), DecodedParts.of(dataset, dataset.planner.batch(epoch, spread)))
    )
    return [
        "Bold outline: the decoded part. Thin outline: the crop.",
        f"Decoded pixels: {here:.0f} % in the images shown, {everywhere:.0f} % in {of} of the epoch.",
    ]
