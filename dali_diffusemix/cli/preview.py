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
    StyledCommand,
    Whole,
    completed,
    output_options,
    to_epochs,
    to_numbers,
    to_presets,
)
from dali_diffusemix.errors import ConfigError


@click.command("preview", cls=StyledCommand, short_help="Draw training samples into a picture.")
@click.argument("root", type=STORE)
@click.option("--edits", type=STORE, required=True, metavar="STORE", help="Edit store, made by `generate`.")
@click.option("--fractals", type=PATH, required=True, metavar="FILE", help="Fractal bank, made by `fractals`.")
@click.option(
    "--out",
    type=PATH,
    default="sheet.png",
    show_default=True,
    metavar="FILE",
    help="Picture (.png or .jpg) or animation (.webp or .gif) to write.",
)
@click.option(
    "--limit", type=Whole(1, 64), default=8, show_default=True, metavar="N", help="Maximum number of samples, 1 to 64."
)
@click.option("--indices", callback=to_numbers, metavar="1,5", help="Samples to draw.  [default: some of each class]")
@click.option(
    "--epochs",
    callback=to_epochs,
    default="0",
    show_default=True,
    metavar="0-5",
    help="Epochs of the samples, one or several.",
)
@click.option("--decoded", is_flag=True, help="Outline the part of each image that is decoded.")
@click.option("--seed", default=0, show_default=True, metavar="N", help="Seed of your training run.")
@click.option(
    "--preset",
    "presets",
    callback=to_presets,
    default="paper",
    show_default=True,
    metavar="NAME",
    help="Mix: paper, release or paper,release.",
    shell_complete=completed(lambda: PRESETS, many=True),
)
@click.option("--size", default=224, show_default=True, metavar="N", help="Side length of a sample in pixels.")
@output_options
@click.pass_context
def preview_command(
    ctx: click.Context,
    root: Path,
    edits: Path,
    fractals: Path,
    out: Path,
    limit: int,
    indices: list[int] | None,
    epochs: list[int],
    decoded: bool,
    seed: int,
    presets: list[str],
    size: int,
    as_json: bool,
) -> None:
    """Draw samples of ROOT, a folder or a packed store, as the network sees them.

    A row shows one sample: original, edit, mask, hybrid, fractal, augmented.

    \b
    Example:
      dali-diffusemix preview data/train --edits edits --fractals fractals.npy
    """
    ending, several = out.suffix.lower(), len(epochs) > 1
    _check_one_kind({"--epochs": several, "--decoded": decoded, "--preset with several names": presets[1:]})
    display = Display(as_json)
    with display.progress("Drawing samples", "samples") as progress:
        # Inside, since PyTorch takes its time.
        from dali_diffusemix.inspect import preview
        from dali_diffusemix.loading.dataset import DiffuseMixDataset
        from dali_diffusemix.plan.crops import TrainCrop
        from dali_diffusemix.plan.spec import MixSpec

        _check_ending(out, preview.SHEET_ENDINGS, preview.ANIMATION_ENDINGS)
        if animated := ending in preview.ANIMATION_ENDINGS:
            given = ctx.get_parameter_source("limit") is click.core.ParameterSource.COMMANDLINE
            _check_animation(ending, epochs, indices, limit if given else 1)
            limit = 1
        mixes = {name: MixSpec.paper() if name == "paper" else MixSpec.release() for name in presets}
        dataset = DiffuseMixDataset(
            root,
            edits=edits,
            fractals=fractals,
            mix=mixes[presets[0]],
            crop=TrainCrop(size),
            seed=seed,
        )
        more: dict[str, Any] = {}
        if len(presets) > 1:
            try:
                samples = preview.matching_indices(dataset, mixes, epoch=epochs[0], originals=indices, rows=limit)
            except ConfigError as error:
                error.add_note("With several presets, --indices names originals.")
                raise
            chosen = samples["paper"]  # of a fixed epoch: an index is an original
            pictures = [preview.presets_sheet(dataset, mixes, epoch=epochs[0], indices=samples, progress=progress)]
            more["samples"] = samples
            what = f"{len(chosen)} originals under {' and '.join(presets)}"
        else:
            chosen = indices if indices is not None else preview.spread_indices(dataset, epoch=epochs[0], rows=limit)
            what = f"{len(chosen)} samples" + (f" in {len(epochs)} epochs" if several else "")
            if animated:
                pictures = preview.animation(dataset, index=chosen[0], epochs=epochs, progress=progress)
                what = f"sample {chosen[0]} in {len(epochs)} epochs"
            elif several:
                pictures = [preview.epochs_sheet(dataset, epochs=epochs, indices=chosen, progress=progress)]
            elif decoded:
                pictures = [preview.parts_sheet(dataset, epoch=epochs[0], indices=chosen, progress=progress)]
                shares = preview.decoded_shares(dataset, epoch=epochs[0], indices=chosen).tolist()
                more["decoded"] = [
                    # NaN is not JSON.
                    {"original": original, "edit": None if edit != edit else edit, "both": both}
                    for original, edit, both in shares
                ]
            else:
                pictures = [preview.contact_sheet(dataset, epoch=epochs[0], indices=chosen, progress=progress)]
        write_file(out, preview.encoded(pictures, ending))
    width, height = pictures[0].size
    display.line(f"{what} in {out}, {width} x {height} pixels")
    display.result(
        {
            "sheet": str(out),
            "width": width,
            "height": height,
            "indices": chosen,
            "epochs": epochs,
            "presets": presets,
            "frames": len(pictures),
            **more,
        }
    )


def _check_animation(ending: str, epochs: list[int], indices: list[int] | None, limit: int) -> None:
    """An animation shows one sample in several epochs."""
    if len(epochs) == 1:
        raise click.UsageError(f"{ending} is an animation over epochs; name them, as in --epochs 0-11.")
    if len(indices or [0]) > 1 or (indices is None and limit != 1):
        found = f"--limit {limit}" if indices is None else f"--indices {','.join(map(str, indices))}"
        raise click.UsageError(f"{ending} is an animation of one sample, found {found}; name one, as in --indices 5.")


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
