"""Memory that this process may still take: the machine's, limited by its control groups."""

import re
from contextlib import suppress
from pathlib import Path

from dali_diffusemix.base.cpus import control_groups

_MACHINE = Path("/proc/meminfo")


def free_memory() -> int:
    """Bytes that are free, or can be freed at once, on the machine and within this process's control groups."""
    found = re.search(r"^MemAvailable: +(\d+) kB", _MACHINE.read_text(), re.MULTILINE)
    free = [int(found[1]) * 1024] if found else []
    for group in control_groups("memory"):
        for limit, usage, cached in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            with suppress(OSError, ValueError):  # without a limit it says "max"
                most, used = int((group / limit).read_text()), int((group / usage).read_text())
                files = re.search(rf"^{cached} (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
                free.append(max(0, most - used + (int(files[1]) if files else 0)))
    return min(free, default=0)
