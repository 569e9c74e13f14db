"""`index`, `fractals` and `pack`: what training and generation read."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from dali_diffusemix.cli.display import Display
from dali_diffusemix.cli.options import PATH, json_option
from dali_diffusemix.errors import ConfigError

if TYPE_CHECKING:
    from dali_diffusemix.images.codec import Stored


@click.command("index")
@click.argument("root", type=PATH)
@click.option("--refresh", is_flag=True, help="List again: add new files, drop deleted ones.")
@click.option("--workers", type=int, metavar="N", help="Threads that read headers.  [default: 8]")
@json_option
def index_command(root: Path, refresh: bool, workers: int | None, as_json: bool) -> None:
    """List the images of ROOT, a folder of class folders.

    The list is kept, so that later commands start at once. Every skipped file is shown with the reason.

    \b
    Example:
      dali-diffusemix index data/train
    """
    import numpy as np

    from dali_diffusemix.catalog.listing import index
    from dali_diffusemix.catalog.table import default_location
    from dali_diffusemix.store import OriginalStore

    if OriginalStore.find(root) is not None:
        raise ConfigError(
            f"root must be a folder of images, found a packed store, {str(root)!r}, which is listed already; index the "
            "folder that it was packed from."
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


@click.command("fractals")
@click.argument("path", type=PATH)
@click.option("--count", default=64, show_default=True, metavar="N", help="Number of fractals.")
@click.option("--size", default=256, show_default=True, metavar="N", help="Side length in pixels.")
@click.option("--seed", default=0, show_default=True, metavar="N", help="The same seed gives the same fractals.")
@click.option("--from-folder", type=PATH, metavar="DIR", help="Use the images of a folder instead.")
@click.option("--overwrite", is_flag=True, help="Replace PATH if it exists.")
@json_option
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
    """Render fractal flames into a bank, the file PATH.

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


@click.command("pack", short_help="Pack images, from anywhere, into a store that is faster to read.")
@click.argument("source", type=PATH)
@click.argument("store", type=PATH)
@click.option(
    "--from", "kind", metavar="KIND", help="folder, webdataset, parquet or a dataset, as cub.  [default: found]"
)
@click.option("--image", metavar="NAME", help="Column or ending of the images.  [default: found]")
@click.option("--label", metavar="NAME", help="The same of the labels; none: no labels.  [default: found]")
@click.option("--split", default="train", show_default=True, metavar="NAME", help="Of a published dataset.")
@click.option("--format", metavar="NAME", help="raw, png or jpeg.  [default: as files are; of edits raw]")
@click.option("--max-side", type=int, metavar="N", help="Shrink images whose longest side is over N pixels.")
@click.option("--quality", type=int, metavar="N", help="JPEG quality, 1 to 100.  [default: 90]")
@click.option("--no-tiles", is_flag=True, help="Copy files byte for byte; loading takes longer.")
@json_option
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
    """Pack a folder, a published dataset, WebDataset tars, Parquet files or an edit store into STORE,
    which replaces it and is faster to read. Pixels change only with --max-side, --quality or jpeg. As raw
    images, nothing has to be decoded, which small ones need most. Running it again resumes.

    \b
    Example:
      dali-diffusemix pack cifar cache/cifar --from cifar100 --format raw
    """
    from dali_diffusemix.sources.tars import WebDatasetSource
    from dali_diffusemix.store import EditStore
    from dali_diffusemix.store.pack import PackConfig, pack, packed_bytes, source_to_pack

    display = Display(as_json)
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
