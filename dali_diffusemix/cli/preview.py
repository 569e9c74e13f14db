"""`preview`: pictures of samples."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from dali_diffusemix.cli.display import Display, write_file
from dali_diffusemix.cli.options import (
    PATH,
    PRESETS,
    STORE,
    completed,
    json_option,
    to_epochs,
    to_numbers,
    to_presets,
)
from dali_diffusemix.errors import ConfigError


@click.command("preview")
@click.argument("root", type=STORE)
@click.option("--edits", type=STORE, required=True, metavar="STORE", help="The edit store.")
@click.option("--fractals", type=PATH, required=True, metavar="FILE", help="The fractal bank.")
@click.option("--out", type=PATH, default="sheet.png", show_default=True, metavar="FILE", help="A .png or .jpg.")
@click.option("--rows", default=8, show_default=True, metavar="N", help="Number of samples, at most 64.")
@click.option("--indices", callback=to_numbers, metavar="1,5", help="The samples.  [default: mixed, of all classes]")
@click.option("--epoch", default=0, show_default=True, metavar="N", help="The epoch of the samples.")
@click.option("--epochs", callback=to_epochs, metavar="0-5", help="Several epochs; --out x.webp or x.gif animates.")
@click.option("--parts", is_flag=True, help="Outline the decoded part of each image.")
@click.option("--seed", default=0, show_default=True, metavar="N", help="The seed of your training run.")
@click.option(
    "--preset",
    "presets",
    callback=to_presets,
    default="paper",
    show_default=True,
    metavar="NAME",
    help="paper, release or paper,release.",
    shell_complete=completed(lambda: PRESETS, many=True),
)
@click.option("--crop-size", default=224, show_default=True, metavar="N", help="Side length of a sample in pixels.")
@json_option
@click.pass_context
def preview_command(
    ctx: click.Context,
    root: Path,
    edits: Path,
    fractals: Path,
    out: Path,
    rows: int,
    indices: list[int] | None,
    epoch: int,
    epochs: list[int] | None,
    parts: bool,
    seed: int,
    presets: list[str],
    crop_size: int,
    as_json: bool,
) -> None:
    """Draw samples as training sees them.

    A row shows one sample: original, edit, mask, hybrid, fractal, augmented.

    \b
    Example:
      dali-diffusemix preview data/train --edits edits --fractals fractals.npy
    """
    from dali_diffusemix.inspect import preview
    from dali_diffusemix.loading.dataset import DiffuseMixDataset
    from dali_diffusemix.plan.crops import TrainCrop
    from dali_diffusemix.plan.spec import MixSpec

    given = {name for name in ctx.params if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE}
    ending = out.suffix.lower()
    animated = ending in preview.ANIMATION_ENDINGS
    _check_ending(out, preview.SHEET_ENDINGS, preview.ANIMATION_ENDINGS)
    if epochs is not None and "epoch" in given:
        raise click.UsageError("--epoch is for one epoch; leave it out beside --epochs.")
    _check_one_kind({"--epochs": epochs, "--parts": parts, "--preset with several names": presets[1:]})
    if animated:
        if epochs is None:
            raise click.UsageError(f"{ending} is an animation over epochs; name them, as in --epochs 0-11.")
        if len(indices or [0]) > 1 or (indices is None and "rows" in given and rows != 1):
            found = f"--rows {rows}" if indices is None else f"--indices {','.join(map(str, indices))}"
            raise click.UsageError(
                f"{ending} is an animation of one sample, found {found}; name one, as in --indices 5."
            )
        rows = 1

    display = Display(as_json)
    mixes = {name: MixSpec.paper() if name == "paper" else MixSpec.release() for name in presets}
    dataset = DiffuseMixDataset(
        root,
        edits=edits,
        fractals=fractals,
        mix=mixes[presets[0]],
        crop=TrainCrop(crop_size),
        seed=seed,
    )
    shown = [epoch] if epochs is None else epochs
    more: dict[str, Any] = {}
    if len(presets) > 1:
        try:
            samples = preview.matching_indices(dataset, mixes, epoch=epoch, originals=indices, rows=rows)
        except ConfigError as error:
            error.add_note("With several presets, --indices names originals.")
            raise
        chosen = samples["paper"]  # of a fixed epoch: an index is an original
        pictures = [preview.presets_sheet(dataset, mixes, epoch=epoch, indices=samples)]
        more["samples"] = samples
        what = f"{len(chosen)} originals under {' and '.join(presets)}"
    else:
        chosen = indices if indices is not None else preview.spread_indices(dataset, epoch=shown[0], rows=rows)
        what = f"{len(chosen)} samples" if epochs is None else f"{len(chosen)} samples in {len(epochs)} epochs"
        if animated:
            pictures = preview.animation(dataset, index=chosen[0], epochs=shown)
            what = f"sample {chosen[0]} in {len(shown)} epochs"
        elif epochs is not None:
            pictures = [preview.epochs_sheet(dataset, epochs=epochs, indices=chosen)]
        elif parts:
            pictures = [preview.parts_sheet(dataset, epoch=epoch, indices=chosen)]
            shares = preview.decoded_shares(dataset, epoch=epoch, indices=chosen).tolist()
            more["decoded"] = [
                # NaN is not JSON.
                {"original": original, "edit": None if edit != edit else edit, "both": both}
                for original, edit, both in shares
            ]
        else:
            pictures = [preview.contact_sheet(dataset, epoch=epoch, indices=chosen)]
    write_file(out, preview.encoded(pictures, ending))
    width, height = pictures[0].size
    display.line(f"{what} in {out}, {width} x {height} pixels")
    display.result(
        {
            "sheet": str(out),
            "width": width,
            "height": height,
            "indices": chosen,
            "epochs": shown,
            "presets": presets,
            "frames": len(pictures),
            **more,
        }
    )


def _check_ending(out: Path, sheets: Sequence[str], animations: Sequence[str]) -> None:
    if out.suffix.lower() not in (*sheets, *animations):
        raise click.BadParameter(
            f"{str(out)!r} must end in {' or '.join(sheets)}, or for an animation in {' or '.join(animations)}, "
            f"found {out.suffix or 'no ending'!r}.",
            param_hint="--out",
        )


def _check_one_kind(asked: Mapping[str, object]) -> None:
    """Each of these options draws a sheet of its own kind."""
    kinds = [option for option, value in asked.items() if value]
    if len(kinds) > 1:
        raise click.UsageError(f"{kinds[0]} and {kinds[1]} draw different sheets; leave one of them out.")
