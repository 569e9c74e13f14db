"""Edits per second: `generate` with a diffusers editor, compared with the released way of calling the same pipeline.

Method: contenders alternate (A B C A B C ...), the first round is not counted, and the figure is the median of
`--rounds`. Loading is not counted: the released way is timed over its loop alone, `generate` from its first report of
edits to its last one. So the first batch, in which kernels are chosen, is not counted either. All write JPEG files.

    released          one image and one prompt per call; each call encodes text and image again
    generate          batches, everything encoded once, decoding and JPEG in parallel; one process
    generate, all     the same in one process per device: every GPU, or every core
    generate, N steps `--few`, with the scheduler dpm-solver++

The pipeline is InstructPix2Pix with the released steps and scheduler (`--steps 100`: Euler ancestral) and random
weights, which do not affect the time. `--full-size` builds the published architecture (Stable Diffusion 1.5, float16,
edits of 256 px), for measurements on a GPU; the targets there are 6x the released way, and 30x with few steps. Without
it the pipeline is small (64 px, float32, `--steps 10`), for measurements on a CPU; the target is 2x.
"""

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from material import encoded, photograph
from record import write
from tiny_model import build_full_size, build_instruct_pix2pix

from dali_diffusemix.catalog import index
from dali_diffusemix.generate import GenerateConfig, generate
from dali_diffusemix.generate.editors import PROMPTS, TEMPLATE
from dali_diffusemix.generate.editors.diffusers import DiffusersConfig
from dali_diffusemix.generate.engines.local import LocalEngine, default_devices


class Released:
    """The released code's loop: decode, resize, one call for each image and prompt, save."""

    def __init__(self, model: Path, root: Path, out: Path, size: int, steps: int, dtype: str, device: str) -> None:
        import diffusers
        import torch

        self._pipeline = diffusers.DiffusionPipeline.from_pretrained(
            model, dtype=getattr(torch, dtype), use_safetensors=True
        ).to(device)
        self._pipeline.set_progress_bar_config(disable=True)
        self._files = sorted(root.rglob("*.jpg"))
        self._out, self._size, self._steps = out, size, steps
        out.mkdir(parents=True, exist_ok=True)

    def __call__(self, prompts: tuple[str, ...], most: int) -> float:
        """Return edits per second."""
        begin, made = time.perf_counter(), 0
        for file in self._files:
            image = Image.open(file).convert("RGB").resize((self._size, self._size))
            for prompt in prompts:
                (edit,) = self._pipeline(
                    TEMPLATE.format(prompt=prompt), image=image, num_inference_steps=self._steps, guidance_scale=4.0
                ).images
                edit.save(self._out / f"{file.stem}.{prompt}.jpg")
                made += 1
                if made == most:
                    return made / (time.perf_counter() - begin)
        return made / (time.perf_counter() - begin)


def ours(root: Path, config: GenerateConfig, devices: tuple[str, ...], originals: int) -> float:
    """Return edits per second between the first report and the last."""
    reports: list[tuple[float, int]] = []

    def progress(done: int, total: int) -> None:
        reports.append((time.perf_counter(), done))

    with tempfile.TemporaryDirectory() as folder:
        generate(root, Path(folder) / "edits", config, engine=LocalEngine(devices), progress=progress)
    made = [(moment, done) for moment, done in reports if done]
    (first, before), (last, done) = made[0], made[-1]
    return (done - before) / (last - first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full-size", action="store_true")
    parser.add_argument("--steps", type=int, help="10 for the small pipeline, 100 for the full one")
    parser.add_argument("--few", type=int, default=None, help="steps of the few-step contender: 3, and 20")
    parser.add_argument("--size", type=int, help="pixels: 64, and 256")
    parser.add_argument("--originals", type=int, help="64, and 96")
    parser.add_argument("--released", type=int, help="edits of the released way a round: 48, and 8")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--compile", action="store_true", help="one more contender: torch.compile")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-warm-up", action="store_true", help="count the first round, for a first look")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    full = options.full_size
    steps, few = options.steps or (100 if full else 10), options.few or (20 if full else 3)
    size, originals = options.size or (256 if full else 64), options.originals or (96 if full else 64)
    released_edits = options.released or (8 if full else 48)
    warnings.simplefilter("ignore")
    devices = default_devices(accelerated=True)
    dtype = "float16" if devices[0].startswith("cuda") else "float32"
    prompts = PROMPTS[: options.prompts]
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for number in range(originals):
            file = folder / "train" / f"class{number % 4}" / f"{number:04}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(encoded(photograph(number, 375, int(rng.integers(375, 520))), quality=90))
        index(folder / "train")
        model = build_full_size(folder / "model") if full else build_instruct_pix2pix(folder / "model")

        def config(steps: int, scheduler: str = "euler-ancestral", *, compile: bool = False) -> GenerateConfig:
            editor = DiffusersConfig(model=str(model), steps=steps, scheduler=scheduler, dtype=dtype, compile=compile)
            return GenerateConfig(
                editor=editor,
                prompts=prompts,
                size=size,
                batch_size=options.batch_size,
                # Several shards per process, so that all are busy until the end.
                originals_per_shard=max(1, originals // (2 * len(devices))),
            )

        root = folder / "train"
        released = Released(model, root, folder / "released", size, steps, dtype, devices[0])
        contenders: dict[str, Callable[[], float]] = {
            "released": lambda: released(prompts, released_edits),
            "generate": lambda: ours(root, config(steps), devices[:1], originals),
            f"generate, {few} steps": lambda: ours(root, config(few, "dpm-solver++"), devices[:1], originals),
        }
        if len(devices) > 1:
            contenders["generate, all"] = lambda: ours(root, config(steps), devices, originals)
        if options.compile:
            contenders["generate, compiled"] = lambda: ours(root, config(steps, compile=True), devices[:1], originals)
        rates: dict[str, list[float]] = {name: [] for name in contenders}
        if options.no_warm_up:
            released(prompts, 1)
        for turn in range(0 if options.no_warm_up else -1, options.rounds):
            for name, work in contenders.items():
                rate = work()
                print(f"{name}: {rate:.3f} edits/s{' (uncounted)' if turn < 0 else ''}", flush=True)
                if turn >= 0:
                    rates[name].append(rate)
    baseline = statistics.median(rates["released"])
    results: dict[str, Any] = {
        name: {
            "images_per_second": round(statistics.median(found), 3),
            "over_released": round(statistics.median(found) / baseline, 2),
            "rounds": [round(rate, 3) for rate in found],
        }
        for name, found in rates.items()
    }
    settings = {
        "pipeline": "Stable Diffusion 1.5 InstructPix2Pix, random weights" if full else "a small InstructPix2Pix",
        "steps": steps,
        "few_steps": few,
        "size": size,
        "dtype": dtype,
        "batch_size": options.batch_size,
        "originals": originals,
        "prompts": len(prompts),
        "devices": list(devices),
        "warm_up": not options.no_warm_up,
    }
    write(options.out, {"benchmark": "bench_generate", "settings": settings, "results": results})


if __name__ == "__main__":
    main()
