"""Other people's training scripts, changed at run time as a user would change them, and run in processes."""

import ast
import hashlib
import importlib.metadata
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

CLIENTS = (
    *("torch", "torchvision", "timm", "transformers", "accelerate", "lightning", "mosaicml", "pytorch-ignite", "ray"),
    *("numpy", "pillow", "nvidia-dali-cuda120"),
)

Measured = Callable[..., None]
"""(**facts): what the running test found."""

LIMIT = 600  # seconds for a run


def version(name: str) -> str:
    """The version of a package; "missing" if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def folder_of(variable: str, what: str) -> Path:
    """The folder that a variable names; the test is skipped if there is none."""
    path = os.environ.get(variable)
    if not path or not Path(path).is_dir():
        pytest.skip(f"{variable} must name {what}, found {path!r}")
    return Path(path)


def replaced(source: str, name: str, function: str, lines: str) -> str:
    """Replace the assignment `name = function(...)` by other lines."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            call = node.value
            if isinstance(call, ast.Call) and ast.unparse(call.func) == function:
                indent = " " * node.col_offset
                rows = source.splitlines()
                rows[node.lineno - 1 : node.end_lineno] = [indent + line for line in lines.strip().splitlines()]
                return "\n".join(rows) + "\n"
    raise AssertionError(f"the script has no {name} = {function}(...)")


def inserted(source: str, before: str, lines: str) -> str:
    """Insert lines before the only line that begins so."""
    rows = source.splitlines()
    (place,) = (number for number, row in enumerate(rows) if row.strip().startswith(before))
    indent = " " * (len(rows[place]) - len(rows[place].lstrip()))
    rows[place:place] = [indent + line for line in lines.strip().splitlines()]
    return "\n".join(rows) + "\n"


def run(
    script: Path, *arguments: object, path: Sequence[Path] = (), kill_at: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a script to its end, or kill it once it has printed a text.

    Args:
        script: The file.
        arguments: Its arguments.
        path: Folders to import from.
        kill_at: The text.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-u", script, *map(str, arguments)]
    with subprocess.Popen(
        command, text=True, env=environment, cwd=script.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout is not None
        printed, end = [], time.monotonic() + LIMIT
        for line in process.stdout:
            printed.append(line)
            if (kill_at is not None and kill_at in line) or time.monotonic() > end:
                process.kill()
                break
        else:
            process.wait()
    output = "".join(printed)
    if kill_at is None:
        assert process.returncode == 0, output[-4000:]
    else:
        assert process.returncode == -signal.SIGKILL, output[-4000:]
    return subprocess.CompletedProcess(command, process.returncode, output, "")


def digest(value: Any) -> str:
    """What stands for tensors, numbers and texts, in containers of any depth."""
    found = hashlib.sha256()

    def add(one: Any) -> None:
        if isinstance(one, torch.Tensor):
            found.update(f"{one.dtype}{tuple(one.shape)}".encode() + one.detach().cpu().numpy().tobytes())
        elif isinstance(one, dict):
            for name in sorted(one, key=str):
                found.update(f"{name}:".encode())
                add(one[name])
        elif isinstance(one, list | tuple):
            for entry in one:
                add(entry)
        else:
            found.update(repr(one).encode())

    add(value)
    return found.hexdigest()
