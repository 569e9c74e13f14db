"""`bench`, `doctor` and `demo`: what this package can do on this machine."""

import os
import shutil
from pathlib import Path
from typing import Any

import click

from dali_diffusemix.cli.display import Display
from dali_diffusemix.cli.options import PATH, STORE, json_option


@click.command("bench", short_help="Compare this loader with others, and advise what to change.")
@click.argument("root", metavar="DATA", type=PATH)
@click.option("--edits", type=PATH, metavar="STORE", help="The edit store; without it nothing is mixed.")
@click.option("--fractals", type=PATH, metavar="FILE", help="The fractal bank.")
@click.option("--batch-size", default=64, show_default=True, metavar="N", help="Samples per batch.")
@click.option("--threads", type=int, metavar="N", help="num_workers of all loaders.  [default: one per core]")
@click.option("--device", default="cpu", show_default=True, metavar="NAME", help="cpu, cuda or cuda:N.")
@click.option("--size", default=224, show_default=True, metavar="N", help="Side length of a sample in pixels.")
@click.option("--rounds", default=5, show_default=True, metavar="N", help="Turns of each loader.")
@click.option("--seconds", default=1.0, show_default=True, metavar="S", help="Length of a turn.")
@click.option("--images", default=2048, show_default=True, metavar="N", help="Maximum number of originals.")
@json_option
def bench_command(root: Path, threads: int | None, as_json: bool, **settings: Any) -> None:
    """Compare this loader with others on DATA, and advise what to change.

    DATA is a folder or a packed store. If it holds many images, a random sample is used. A run takes a
    minute or two. Changes that pay are shown with the commands to run. Raw stores (pack --format raw) are
    also measured in memory, if they fit, and need no DALI.

    \b
    Example:
      dali-diffusemix bench data/train --edits edits --fractals fractals.npy
    """
    from dali_diffusemix.bench import bench

    display = Display(as_json)
    with display.progress("Measuring", "turns") as progress:
        result = bench(root, num_workers=threads, progress=progress, **settings)
    for line in result.lines(shutil.get_terminal_size().columns):
        display.line(line)
    display.result(result.json())


@click.command("doctor", short_help="Show what works on this machine.")
@click.argument("data", metavar="[DATA]", type=STORE, required=False)
@json_option
@click.pass_context
def doctor_command(ctx: click.Context, data: Path | str | None, as_json: bool) -> None:
    """Try what this package needs, and show what works on this machine.

    What does not work is shown with its reason and a remedy. The check takes some seconds and leaves nothing
    behind. Put its output into bug reports. If DATA, a folder of images or a store, is given, some of its
    files are read to measure the speed of reading.

    The exit code is 0 if the loader works on some device, the CPU or a GPU, and 1 otherwise.

    \b
    Example:
      dali-diffusemix doctor data/train
    """
    from dali_diffusemix.doctor import examine

    display = Display(as_json)
    with display.progress("Trying", "checks") as progress:
        found = examine(data, progress=progress)
    for line in found.lines():
        display.line(line)
    display.result(found.json())
    ctx.exit(0 if found.ok else 1)


@click.command("demo", short_help="Run every step, from photographs to mixed batches.")
@click.argument("folder", type=PATH, required=False)
@click.option("--out", type=PATH, default="demo", show_default=True, metavar="DIR", help="Where to write.")
@click.option("--keep", is_flag=True, help="Reuse what an earlier demo wrote there.")
@json_option
def demo_command(folder: Path | None, out: Path, keep: bool, as_json: bool) -> None:
    """Run every step, from photographs to mixed batches.

    FOLDER holds class folders of photographs; up to 64 are used. Without it, photographs that ship with
    scikit-image and scikit-learn are used. The edits are procedural, not diffusion. The output of an earlier
    demo in the same place is replaced, unless --keep is given.

    \b
    Example:
      dali-diffusemix demo
    """
    from dataclasses import asdict

    from dali_diffusemix.demo import run_demo

    display = Display(as_json)
    result = run_demo(display, folder=folder, out=out, keep=keep)
    display.line(f"Done in {result.seconds:.0f} s. Look at {os.path.relpath(result.sheet)}")
    display.result(asdict(result))
