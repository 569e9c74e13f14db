"""`index`, `fractals` and `pack`: what training and generation read."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dali_diffusemix.cli.display import Display
from dali_diffusemix.cli.options import PATH, StyledCommand, completed, output_options
from dali_diffusemix.errors import ConfigError

if TYPE_CHECKING:
    from dali_diffusemix.images.codec import Stored


@click.command("index", cls=StyledCommand, short_help="List the images of a folder, and their classes.")
@click.argument("root", type=PATH)
@click.option("--refresh", is_flag=True, help="List the folder again, to add new files and drop deleted ones.")
@click.option("--workers", type=int, metavar="N", help="Number of threads that read files.  [default: 8]")
@output_options
def index_command(root: Path, refresh: bool, workers: int | None, as_json: bool) -> None:
    """List the images of the folder ROOT, and their classes.

    ROOT holds one folder for each class, as in ROOT/cat/1.jpg. The list is kept in a cache, so that later
    commands start at once. Every file that is left out is shown with the reason.

    \b
    Example:
      dali-diffusemix index data/train
    """
    import numpy as np

    from dali_diffusemix.catalog.listing import index
    from dali_diffusemix.catalog.table import default_location
    from dali_diffusemix.store import kind_at

    if (kind := kind_at(root)) is not None:
        raise ConfigError(
            f"root must be a folder of images, found {kind.a_name}, {str(root)!r}, which has a list already; index the "
            "folder that it was made from."
        )
    display = Display(as_json)
    location = default_location(root)
    with display.progress("Reading headers", "images") as progress:
        catalog = index(root, location=location, refresh=refresh, workers=workers, progress=progress)
    counts = np.bincount(catalog.labels, minlength=len(catalog.classes)).tolist()
    display.line(f"{len(catalog)} images in {len(catalog.classes)} classes")
    display.lines((f"{count:>8}  {name}" for name, count in zip(catalog.classes, counts, strict=True)), most=20)
    if catalog.rejected:
        display.line(f"{len(catalog.rejected)} left out")
        display.lines(f"  {one.path}: {one.reason}" for one in catalog.rejected)
    display.line(f"kept in {location}")
    display.result(
        {
            "root": str(root),
            "images": len(catalog),
            "classes": dict(zip(catalog.classes, counts, strict=True)),
            "rejected": [{"path": one.path, "reason": one.reason} for one in catalog.rejected],
            "fingerprint": catalog.fingerprint,
            "catalog": str(location),
        }
    )


@click.command("fractals", cls=StyledCommand, short_help="Render the fractals that are blended into training images.")
@click.argument("path", metavar="FILE", type=PATH)
@click.option("--count", default=64, show_default=True, metavar="N", help="Number of fractals to render.")
@click.option("--size", default=256, show_default=True, metavar="N", help="Side length of a fractal in pixels.")
@click.option("--seed", default=0, show_default=True, metavar="N", help="The same seed gives the same fractals.")
@click.option("--from-folder", type=PATH, metavar="DIR", help="Take the images of a folder instead of rendering.")
@click.option("--overwrite", is_flag=True, help="Replace FILE if it exists.")
@output_options
@click.pass_context
def fractals_command(
    ctx: click.Context,
    path: Path,
    count: int,
    size: int,
    seed: int,
    from_folder: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Render fractals into FILE, a fractal bank: training blends them into images.

    FILE is a NumPy array and ends in .npy. Other commands take it as --fractals FILE.

    \b
    Example:
      dali-diffusemix fractals cache/fractals.npy --count 64
    """
    from dali_diffusemix.fractals.bank import bank_from_folder, render_bank

    display = Display(as_json)
    left_out: list[tuple[Path, str]] = []
    if from_folder is None:
        with display.progress("Rendering fractals", "fractals") as progress:
            bank = render_bank(path, count=count, size=size, seed=seed, overwrite=overwrite, progress=progress)
    else:
        for name in ("count", "seed"):
            if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
                raise click.UsageError(f"--{name} is for rendering; leave it out beside --from-folder.")
        with display.progress("Reading images", "images") as progress:
            bank, left_out = bank_from_folder(path, from_folder, size=size, overwrite=overwrite, progress=progress)
    display.line(f"{len(bank)} fractals of {size} x {size} pixels in {path}")
    if left_out:
        display.line(f"{len(left_out)} files left out")
        display.lines(f"  {file}: {reason}" for file, reason in left_out)
    display.result(
        {
            "path": str(path),
            "shape": bank.shape,
            "left_out": [{"path": str(file), "reason": reason} for file, reason in left_out],
        }
    )


def _kinds() -> Iterable[str]:
    from dali_diffusemix.catalog.layouts import LAYOUTS

    return ("folder", "webdataset", "parquet", *LAYOUTS)


@click.command("pack", cls=StyledCommand, short_help="Pack images into a store that loads faster than files.")
@click.argument("source", type=PATH)
@click.argument("store", type=PATH)
@click.option(
    "--layout",
    "kind",
    metavar="NAME",
    shell_complete=completed(_kinds),
    help="Layout of SOURCE: folder, webdataset, parquet or a published dataset such as cub.  [default: detected]",
)
@click.option("--split", default="train", show_default=True, metavar="NAME", help="Split of a published dataset.")
@click.option("--image", metavar="NAME", help="Column or ending of the images.  [default: detected]")
@click.option("--label", metavar="NAME", help="Column or ending of the labels, or none.  [default: detected]")
@click.option("--format", metavar="NAME", help="Format: raw, png or jpeg.  [default: as it is; edits raw]")
@click.option("--max-side", type=int, metavar="N", help="Shrink images whose longest side is above N pixels.")
@click.option("--quality", type=int, metavar="N", help="JPEG quality, from 1 to 100.  [default: 90]")
@click.option("--no-tiles", is_flag=True, help="Copy files byte for byte, which loads more slowly.")
@output_options
def pack_command(
    source: Path,
    store: Path,
    kind: str | None,
    image: str | None,
    label: str | None,
    split: str,
    format: "Stored | None",
    max_side: int | None,
    quality: int | None,
    no_tiles: bool,
    as_json: bool,
) -> None:
    """Pack the images of SOURCE into the folder STORE, which is used in its place and loads faster. SOURCE is a
    folder, WebDataset tars, Parquet files, a published dataset or an edit store. Pixels change only with
    --max-side, --quality or --format jpeg. Small images load fastest with --format raw.

    \b
    Example:
      dali-diffusemix pack cifar cache/cifar --layout cifar100 --format raw
    """
    from dali_diffusemix.sources.tars import WebDatasetSource
    from dali_diffusemix.store import EditStore, check_order
    from dali_diffusemix.store.pack import PackConfig, pack, packed_bytes, source_to_pack

    display = Display(as_json)
    check_order(source, store)
    config = PackConfig(format=format, max_side=max_side, quality=quality, tiled=not no_tiles)
    found = source_to_pack(source, kind=kind, image=image, label=False if label == "none" else label, split=split)
    if not isinstance(found, EditStore):
        with display.progress("Listing", "bytes" if isinstance(found, WebDatasetSource) else "images") as progress:
            found.catalog(progress)
    if (needed := packed_bytes(found, config)) is not None:
        display.line(f"the whole store will take {needed / 1e6:.1f} MB")
    with display.progress("Packing", "images") as progress:
        summary = pack(found, store, config, progress=progress)
    display.line(f"{summary.images} images, {summary.bytes / 1e6:.1f} MB")
    if summary.left_out:
        display.line(f"{len(summary.left_out)} left out")
        display.lines(f"  {one.path}: {one.reason}" for one in summary.left_out)
    display.line(f"{summary.made} done now, in {summary.seconds:.1f} s" if summary.made else "all were there already")
    display.line(f"kept in {store}")
    display.result(
        {
            "store": str(store),
            "images": summary.images,
            "bytes": summary.bytes,
            "left_out": [{"path": one.path, "reason": one.reason} for one in summary.left_out],
            "made": summary.made,
            "seconds": summary.seconds,
        }
    )
