"""The host: versions, driver, cores, memory, libraries for video and JPEG, and the speed of memory copies.

The device copy counts bytes read plus bytes written, 1 GiB; the copies from the host are of 256 MiB, pinned and not.
"""

import argparse
import contextlib
import ctypes
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PACKAGES = (
    *("torch", "numpy", "pillow", "cupy-cuda13x", "cupy-cuda12x", "nvidia-dali-cuda130", "nvidia-dali-cuda120"),
    *("pytest", "pytest-xdist", "pytest-timeout", "hypothesis", "timm", "transformers", "accelerate", "diffusers"),
    *("click", "rich", "nvidia-cuda-nvrtc", "kornia"),
)
LIBRARIES = ("libcuda.so.1", "libnvcuvid.so.1", "libnvidia-ml.so.1", "libnvjpeg.so.13", "libnvjpeg.so.12")


def output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=15).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}: {error}"


def loads(library: str) -> str:
    try:
        ctypes.CDLL(library)
    except OSError as error:
        return str(error)
    return "loads"


def fastest(work: Callable[[], None], wait: Callable[[], None], times: int = 8) -> float:
    """Return the seconds of the fastest of some runs."""
    work()
    wait()
    taken = []
    for _ in range(times):
        begin = time.perf_counter()
        work()
        wait()
        taken.append(time.perf_counter() - begin)
    return min(taken)


def copies(device: str) -> dict[str, float]:
    """Return gigabytes per second."""
    import torch

    cuda = device != "cpu"
    wait = torch.cuda.synchronize if cuda else lambda: None
    size = (1 << 30) if cuda else (1 << 26)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found = {"device": 2 * size / fastest(lambda: target.copy_(source), wait) / 1e9}
    if cuda:
        part, there = 1 << 28, target[: 1 << 28]
        pageable = torch.zeros(part, dtype=torch.uint8)
        pinned = pageable.pin_memory()
        found["pinned host to device"] = part / fastest(lambda: there.copy_(pinned, non_blocking=True), wait) / 1e9
        found["pageable host to device"] = part / fastest(lambda: there.copy_(pageable), wait, 3) / 1e9
    return {name: round(rate, 1) for name, rate in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    found: dict[str, Any] = {}

    def note(name: str, value: Any) -> None:
        found[name] = value
        options.out.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{name}: {value}", flush=True)

    def tried(name: str, work: Callable[[], Any]) -> None:
        try:
            note(name, work())
        except Exception as error:
            note(name, f"failed: {type(error).__name__}: {error}")
            failed.append(name)

    failed: list[str] = []
    memory = Path("/proc/meminfo").read_text().splitlines()[0].split()
    note("python", sys.version)
    note("system", f"{platform.platform()}, {' '.join(platform.libc_ver())}")
    note("cores", len(os.sched_getaffinity(0)))
    note("memory", f"{int(memory[1]) / 2**20:.0f} GiB")
    note("shared memory", f"{(s := os.statvfs('/dev/shm')).f_frsize * s.f_blocks / 2**30:.1f} GiB")
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    note("packages", versions)
    note("libraries", {name: loads(name) for name in LIBRARIES})
    query = "name,driver_version,memory.total,memory.used,clocks.sm,clocks.max.sm,pcie.link.gen.max,pcie.link.width.max"
    note("nvidia-smi", output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"))
    (options.out.parent / "nvidia-smi.txt").write_text(output("nvidia-smi", "-q") + "\n")
    if options.device != "cpu":

        def torch_sees() -> dict[str, Any]:
            import torch

            one = torch.cuda.get_device_properties(0)
            return {"name": one.name, "multiprocessors": one.multi_processor_count, "cuda": torch.version.cuda}

        def cupy_sees() -> dict[str, Any]:
            import cupy

            runtime = cupy.cuda.runtime
            versions = {"cupy": cupy.__version__, "runtime": runtime.runtimeGetVersion()}
            return {**versions, "driver": runtime.driverGetVersion(), "nvrtc": cupy.cuda.nvrtc.getVersion()}

        tried("torch sees", torch_sees)
        tried("cupy sees", cupy_sees)
    tried("copies, GB/s", lambda: copies(options.device))

    def native() -> str:
        from dali_diffusemix.base.native import load

        load()
        return "loads"

    tried("library for the CPU", native)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
