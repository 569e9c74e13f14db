"""CPUs: how many this process may use, and the control groups that say so."""

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_GROUPS = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")


def cpus() -> int:
    """The CPUs that this process may use, at least 1: its affinity mask, limited by the quota, which is rounded up."""
    limit = quota()
    return affinity() if limit is None else min(affinity(), max(1, math.ceil(limit)))


def affinity() -> int:
    """The CPUs in this process's affinity mask; those of the machine if the system has no such masks."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def quota() -> float | None:
    """The lowest limit of CPU time in this process's control groups, in CPUs; None if there is none."""
    limits = []
    for group in control_groups("cpu"):
        for files in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):
            with suppress(OSError, ValueError, ZeroDivisionError):
                time, period = " ".join((group / file).read_text() for file in files).split()
                limits.append(int(time) / int(period))
    return min((limit for limit in limits if limit > 0), default=None)  # -1: no limit


def control_groups(controller: str) -> Iterator[Path]:
    """The folders that may have a controller's files: of this process's group and those above it, in versions 1 and 2.

    Version 2 has one tree, version 1 one per controller. In a container a group's path may be the machine's, while its
    files are in the root of the tree.
    """
    with suppress(OSError, UnicodeDecodeError):
        for line in _OWN.read_text().splitlines():
            number, _, rest = line.partition(":")
            controllers, _, path = rest.partition(":")
            if number == "0" and not controllers:
                root = _GROUPS
            elif controller in controllers.split(","):
                root = _GROUPS / controller
            else:
                continue
            group = root / path.lstrip("/")
            yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(root))
