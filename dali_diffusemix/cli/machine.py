"""`bench`, `doctor` and `demo`: what this package can do on this machine."""

import os
import shutil
from pathlib import Path
from typing import Any

import click

from dali_diffusemix.cli.display import Display
from dali_diffusemix.cli.options import PATH, STORE, StyledCommand, Whole, output_options


@click.command("bench", cls=StyledCommand, short_help="Compare this loader with others, and advise what to change.")
@click.argument("root", type=PATH)
@click.option("--edits", type=PATH, metavar="STORE", help="Edit store; without it nothing is mixed.")
@click.option("--fractals", type=PATH, metavar="FILE", help="Fractal bank, needed with --edits.")
@click.option("--batch-size", default=64, show_default=True, metavar="N", help="Number of samples in a batch.")
@click.option("--workers", type=Whole(), metavar="N", help="Number of workers of a loader.  [default: one per core]")
@click.option("--device", default="cpu", show_default=True, metavar="NAME", help="Device: cpu, cuda or cuda:N.")
@click.option("--size", default=224, show_default=True, metavar="N", help="Side length of a sample in pixels.")
@click.option("--limit", type=Whole(), default=2048, show_default=True, metavar="N", help="Maximum number of images.")
@click.option("--rounds", default=5, show_default=True, metavar="N", help="Number of turns of each loader.")
@click.option("--seconds", default=1.0, show_default=True, metavar="X", help="Length of a turn in seconds.")
@output_options
def bench_command(root: Path, workers: int | None, limit: int, as_json: bool, **settings: Any) -> None:
    """Measure how fast this loader and others load the images of ROOT, a folder or a packed store, and advise
    what to change. The loaders take turns on a random sample of the images, for a minute or two. Changes that
    make loading faster are shown with the commands to run.

    \b
    Example:
      dali-diffusemix bench data/train --edits edits --fractals fractals.npy
    """
    from dali_diffusemix.bench import bench

    display = Display(as_json)
    with display.progress("Measuring", "") as progress:
        result = bench(root, num_workers=workers, images=limit, progress=progress, **settings)
    for line in result.lines(shutil.get_terminal_size().columns):
        display.line(line)
    display.result(result.json())


@click.command("doctor", cls=StyledCommand, short_help="Show what works on this machine, and what is missing.")
@click.argument("data", metavar="[SOURCE]", type=STORE, required=False)
@output_options
@click.pass_context
def doctor_command(ctx: click.Context, data: Path | str | None, as_json: bool) -> None:
    """Try everything that this package needs, and show what works on this machine.

    What does not work is shown with the reason and a remedy. The check takes some seconds and leaves nothing
    behind. Please add its output to bug reports. SOURCE is a folder of images or a store: if it is given, the
    speed of reading it is measured too.

    The exit code is 0 if the loader works on a CPU or a GPU, and 1 otherwise.

    \b
    Example:
      dali-diffusemix doctor data/train
    """
    from dali_diffusemix.doctor import examine

    display = Display(as_json)
    with display.progress("Trying", "") as progress:
        found = examine(data, progress=progress)
    for line in found.lines():
        display.line(line)
    display.result(found.json())
    ctx.exit(0 if found.ok else 1)


@click.command("demo", cls=StyledCommand, short_help="Run every step, from photographs to mixed batches.")
@click.argument("folder", metavar="[ROOT]", type=PATH, required=False)
@click.option("--out", type=PATH, default="demo", show_default=True, metavar="DIR", help="Folder to write.")
@click.option("--keep", is_flag=True, help="Keep what an earlier demo wrote there, and make only the rest.")
@output_options
def demo_command(folder: Path | None, out: Path, keep: bool, as_json: bool) -> None:
    """Run every step, from photographs to mixed batches.

    ROOT holds one folder of photographs for each class; up to 64 photographs are used. Without ROOT, those of
    scikit-image and scikit-learn are used, if both are installed. The edits are made without a diffusion
    model. What an earlier demo wrote to the same folder is replaced, unless --keep is given.

    \b
    Example:
      dali-diffusemix demo data/train
    """
    from dataclasses import asdict

    from dali_diffusemix.demo import run_demo

    display = Display(as_json)
    result = run_demo(display, folder=folder, out=out, keep=keep)
    display.line(f"Done in {result.seconds:.0f} s. Look at {os.path.relpath(result.sheet)}")
    display.result(asdict(result))
