"""Shared by all benchmarks: alternating rounds, medians, and a JSON record with machine, command and commit."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dali_diffusemix import bench
from dali_diffusemix.base.files import write as write_file

ROOT = Path(__file__).parents[1]


def machine() -> dict[str, Any]:
    """Return `bench.machine` with the command and the commit."""
    found = {**bench.machine(), "command": sys.argv}
    git = ["git", "-C", str(ROOT)]
    if carried := os.environ.get("COMMIT"):  # on a host that has a copy of the repository
        return {**found, "commit": carried}
    try:
        found["commit"] = subprocess.check_output(
            [*git, "rev-parse", "HEAD"], text=True, stderr=subprocess.DEVNULL
        ).strip()
        found["changed"] = bool(subprocess.check_output([*git, "status", "--porcelain", "-uno"], text=True).strip())
    except (OSError, subprocess.CalledProcessError):
        found["commit"] = "unknown"
    return found


def interleaved(contenders: Mapping[str, Callable[[], int]], rounds: int) -> dict[str, dict[str, Any]]:
    """Run contenders in this process alternately, A B C A B C ..., after an uncounted round; see `bench.interleaved`.

    Args:
        contenders: Name to a function that does the work once and returns the number of images.
        rounds: Counted runs of each contender.

    Returns:
        `bench.Measurement.json` for each. The peak memory is that of the process, so it is None for several contenders.
    """
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    cpu: dict[str, list[float]] = {name: [] for name in contenders}
    with bench.MemoryWatch() if len(contenders) == 1 else contextlib.nullcontext() as watch:
        for work in contenders.values():
            work()
    for _ in range(rounds):
        for name, work in contenders.items():
            begin, begin_cpu = time.perf_counter(), bench.cpu_seconds()
            images = work()
            rates[name].append(images / (time.perf_counter() - begin))
            cpu[name].append((bench.cpu_seconds() - begin_cpu) / images)
    return {
        name: bench.Measurement(
            images_per_second=tuple(rates[name]),
            cpu_seconds_per_image=tuple(cpu[name]),
            peak_memory_mib=None if watch is None else watch.peak,
        ).json()
        for name in contenders
    }


def write(path: Path | None, content: Mapping[str, Any], *, quiet: bool = False) -> None:
    """Write a record, which is complete at any time, and print its results."""
    record = {"machine": machine(), **content}
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, (json.dumps(record, indent=1) + "\n").encode())
    if not quiet:
        print(json.dumps(content, indent=1))
