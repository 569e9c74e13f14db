"""The loader of two checkouts, in one run: is a change of the code slower?

    python benchmarks/bench_commits.py /path/to/other/checkout data/train --out benchmarks/results/DATE-commits.json

Each checkout loads the same photographs in processes of its own, in turns (before, after, plain DALI, before, ...),
with every sample mixed, then plain. `before` is the other checkout (its C library must be built), `after` is this one.
Reported are medians of images per second, of wall time and of processor time (which a busy machine disturbs less), and,
per round, after over before and each over plain DALI.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Self

from record import ROOT, write

from dali_diffusemix.fractals import render_bank
from dali_diffusemix.generate import GenerateConfig, generate

# Answers "seconds" lines with images per second, in steady state.
SERVER = """
import itertools, sys, time
from pathlib import Path
from dali_diffusemix import bench
root, edits, fractals, threads, which = sys.argv[1:]
material = bench.Material(root=Path(root), files=Path(root), edits=Path(edits), fractals=Path(fractals),
                          epochs=64, num_workers=int(threads))
contender = bench.plain_dali(material) if which == "plain_dali" else bench.diffusemix(material, mixed=which == "mixed")
batches = itertools.chain.from_iterable(contender.epoch() for _ in itertools.count())
for line in sys.stdin:
    for _ in range(contender.ahead + 4):
        next(batches)
    images, begin, cpu = 0, time.perf_counter(), bench.cpu_seconds()
    while time.perf_counter() - begin < float(line):
        images += next(batches)
    print(images / (time.perf_counter() - begin), images / (bench.cpu_seconds() - cpu), flush=True)
"""


class Server:
    """A contender in a process of its own, stopped between its turns."""

    def __init__(self, checkout: Path, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(checkout)},
            cwd=checkout,
        )

    def turn(self, seconds: float) -> list[float]:
        """Return images per second, and images per second of processor time of all threads."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()
        return list(map(float, self._process.stdout.readline().split()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()


def ratios(over: list[float], under: list[float]) -> dict[str, Any]:
    values = [a / b for a, b in zip(over, under, strict=True)]
    return {"median": round(statistics.median(values), 4), "rounds": [round(value, 4) for value in values]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="another checkout")
    parser.add_argument("root", type=Path, help="a folder of photographs, root/class/image")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=2.0, help="per turn")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    before = options.before.resolve()
    with tempfile.TemporaryDirectory() as folder:
        edits, bank = Path(folder) / "edits", Path(folder) / "fractals.npy"
        generate(options.root, edits, GenerateConfig(prompts=("sunset",), size=256))
        render_bank(bank, count=64, size=256)
        inputs = [str(path.resolve()) for path in (options.root, edits, bank)]
        found: dict[str, list[list[float]]] = {}
        for which in ("mixed", "plain"):
            arguments = (*inputs, str(options.threads))
            with (
                Server(before, *arguments, which) as old,
                Server(ROOT, *arguments, which) as new,
                Server(ROOT, *arguments, "plain_dali") as dali,
            ):
                servers = {f"before, {which}": old, f"after, {which}": new, f"plain DALI beside {which}": dali}
                for server in servers.values():
                    server.turn(options.seconds)
                for number in range(options.rounds):
                    # In both directions, and each alone: what one has prefetched is done before the next begins.
                    for name in list(servers)[:: -1 if number % 2 else 1]:
                        time.sleep(0.5)
                        found.setdefault(name, []).append(servers[name].turn(options.seconds))
    commit = subprocess.check_output(["git", "-C", str(before), "rev-parse", "HEAD"], text=True).strip()
    kinds = {"": 0, " (of processor time)": 1}
    rates = {f"{name}{kind}": [turn[i] for turn in turns] for name, turns in found.items() for kind, i in kinds.items()}
    pairs = [("after", "before", which) for which in ("mixed", "plain")]
    content = {
        "benchmark": "bench_commits",
        "settings": {"before": commit, "threads": options.threads, "seconds": options.seconds, "batch_size": 64},
        "results": {
            name: {
                "images_per_second": round(statistics.median(taken), 1),
                "rounds": [round(rate, 1) for rate in taken],
            }
            for name, taken in rates.items()
        },
        "ratios": {
            f"{new} over {old}, {which}{kind}": ratios(rates[f"{new}, {which}{kind}"], rates[f"{old}, {which}{kind}"])
            for new, old, which in pairs
            for kind in kinds
        }
        | {
            f"{when} over plain DALI, {which}": ratios(rates[f"{when}, {which}"], rates[f"plain DALI beside {which}"])
            for which in ("mixed", "plain")
            for when in ("before", "after")
        },
    }
    write(options.out, content)


if __name__ == "__main__":
    main()
