"""What every benchmark shares: interleaved rounds, medians, and a JSON record that says where it came from."""

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "numpy", "pillow", "nvidia-dali-cuda120", "nvidia-dali-cuda130", "cupy-cuda12x", "cupy-cuda13x")


def machine() -> dict[str, Any]:
    """The processor, the GPU where there is one, the versions and the commit."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    processor = next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), platform.processor())
    found: dict[str, Any] = {
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": {},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
    }
    for package in PACKAGES:
        try:
            found["versions"][package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = {"name": properties.name, "memory": properties.total_memory, "cuda": torch.version.cuda}
    git = ["git", "-C", str(ROOT)]
    try:
        found["commit"] = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()
        found["changed"] = bool(subprocess.check_output([*git, "status", "--porcelain", "-uno"], text=True).strip())
    except (OSError, subprocess.CalledProcessError):
        found["commit"] = os.environ.get("COMMIT", "unknown")
    return found


def interleaved(
    contenders: Mapping[str, Callable[[], int]], rounds: int, warmups: int = 1
) -> dict[str, dict[str, Any]]:
    """Run the contenders in turn, A B C A B C ..., so that a machine whose speed drifts treats them alike.

    Args:
        contenders: Name to a function that does the work once and returns how many images it made.
        rounds: Counted runs of each.
        warmups: Runs of each that are not counted.

    Returns:
        For each: images_per_second (the median), lowest, highest, and all rounds.
    """
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(warmups + rounds):
        for name, work in contenders.items():
            begin = time.perf_counter()
            images = work()
            rate = images / (time.perf_counter() - begin)
            if turn >= warmups:
                rates[name].append(rate)
    return {
        name: {
            "images_per_second": round(statistics.median(values), 1),
            "lowest": round(min(values), 1),
            "highest": round(max(values), 1),
            "rounds": [round(value, 1) for value in values],
        }
        for name, values in rates.items()
    }


def write(path: Path | None, content: Mapping[str, Any]) -> None:
    """Write a record, and print its results."""
    record = {"machine": machine(), **content}
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(content, indent=1))
