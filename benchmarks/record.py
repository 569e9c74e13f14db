"""What every benchmark shares: interleaved rounds, medians, and a JSON record that says where it came from."""

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
    """`bench.machine`, the command and the commit."""
    found = {**bench.machine(), "command": sys.argv}
    git = ["git", "-C", str(ROOT)]
    if carried := os.environ.get("COMMIT"):  # on a host that has a copy
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
    """Run contenders of this process in turn, A B C A B C ..., the first round uncounted; see `bench.interleaved`.

    Args:
        contenders: Name to a function that does the work once and returns how many images it made.
        rounds: Counted runs of each.

    Returns:
        For each what `bench.Measurement.json` gives. A process has one memory: the peak is there for one contender.
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
    """Write a record, whole at any moment, and print its results."""
    record = {"machine": machine(), **content}
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, (json.dumps(record, indent=1) + "\n").encode())
    if not quiet:
        print(json.dumps(content, indent=1))
