"""Edits per second of editors that need no GPU: the procedural one, the example's network, or one's own.

    python benchmarks/bench_editors.py ../shared/data/flowers128 --out editors.json

Method: `generate` with each editor, size of editing and number of processes, alternately (A B C A B C ...); the first
round is not counted, and the figure is the median of `--rounds`. Each is timed from its first report of edits to its
last, so that starting and loading do not count. The processor's time is that of all its processes in between; it says
more than edits per second where others use the machine. Originals are the first of each class; edits become JPEGs.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from record import ROOT, write

from dali_diffusemix import bench
from dali_diffusemix.catalog import index
from dali_diffusemix.generate import GenerateConfig, generate
from dali_diffusemix.generate.engines.local import LocalEngine

EDITORS = ("procedural", "examples.neural_editor:StyleTransfer")
PROMPTS = "watercolor art,mosaic,ukiyo-e,a sketch with crayon"  # that both know


def measured(root: Path, config: GenerateConfig, processes: int) -> tuple[float, float]:
    """Return edits per second and the processor's seconds per edit, between the first report and the last."""
    reports: list[tuple[int, float, float]] = []

    def progress(done: int, total: int) -> None:
        if done:
            reports.append((done, time.perf_counter(), bench.cpu_seconds()))

    with tempfile.TemporaryDirectory() as folder:
        generate(root, Path(folder) / "edits", config, engine=LocalEngine(("cpu",) * processes), progress=progress)
    (before, begin, begin_cpu), (done, end, end_cpu) = reports[0], reports[-1]
    return (done - before) / (end - begin), (end_cpu - begin_cpu) / (done - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("--editor", action="append", help="may be repeated; by default the two")
    parser.add_argument("--prompts", default=PROMPTS)
    parser.add_argument("--size", type=int, default=128, help="of stored edits, in pixels")
    parser.add_argument("--edit-sizes", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--originals", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    out = options.out and options.out.absolute()
    root, editors, prompts = options.root.resolve(), options.editor or EDITORS, tuple(options.prompts.split(","))
    os.chdir(ROOT)  # where the example is found
    with tempfile.TemporaryDirectory() as folder:
        by_class: dict[Path, list[Path]] = {}
        catalog = index(root)
        for path in catalog.paths:
            by_class.setdefault(Path(path).parent, []).append(root / path)
        for files in by_class.values():
            for file in files[: max(1, options.originals // len(by_class))]:
                link = Path(folder) / "train" / file.relative_to(root)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(file)
        count = len(index(Path(folder) / "train"))

        def contender(
            editor: str, edit_size: int, processes: int
        ) -> tuple[GenerateConfig, Callable[[], tuple[float, float]]]:
            config = GenerateConfig(
                editor=editor,
                prompts=prompts,
                size=options.size,
                edit_size=edit_size,
                format="jpeg",
                # Several shards per process, so that all are busy until the end.
                originals_per_shard=max(1, count // (4 * processes)),
            )
            return config, lambda: measured(Path(folder) / "train", config, processes)

        contenders = {
            f"{editor}, edited at {edit_size}, {processes} processes": contender(editor, edit_size, processes)
            for editor in editors
            for edit_size in options.edit_sizes
            for processes in options.processes
        }
        rates: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
        for turn in range(-1, options.rounds):
            for name, (_, work) in contenders.items():
                rate, cpu = work()
                print(f"{name}: {rate:.2f} edits/s, {cpu:.4f} s{' (uncounted)' if turn < 0 else ''}", flush=True)
                if turn >= 0:
                    rates[name].append((rate, cpu))
    settings = {
        "originals": count,
        "prompts": list(prompts),
        "size": options.size,
        "editors": {
            str(found["editor"]): found
            for config, _ in contenders.values()
            if (found := dict(config.editor_config.settings()))
        },
    }
    results = {
        name: {
            "images_per_second": round(statistics.median(rate for rate, _ in found), 2),
            "lowest": round(min(rate for rate, _ in found), 2),
            "highest": round(max(rate for rate, _ in found), 2),
            "rounds": [round(rate, 2) for rate, _ in found],
            "cpu_seconds_per_image": round(statistics.median(cpu for _, cpu in found), 5),
        }
        for name, found in rates.items()
    }
    write(out, {"benchmark": "bench_editors", "settings": settings, "results": results})


if __name__ == "__main__":
    main()
