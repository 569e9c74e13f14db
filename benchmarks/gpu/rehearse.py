"""The calls of a GPU host, rehearsed on this machine: on the CPU, without a network, each step killed once.

    prepare.sh FOLDER PHOTOGRAPHS BUNDLE
    rehearse.py FOLDER --python PYTHON --out RECORD

A new folder stands for the host: it gets the repository's tracked files as they are committed, and what call N carries
when N is made. The calls run under `unshare -n` with PYTHON, an environment that holds what the host has (Python 3.12;
no DALI). First both calls are made as on the host. Then each step is taken again, and the suite killed with SIGKILL
after a third of the time the step took: the archive must be whole and still have all other steps, and `--resume` must
take the step and end what the killed one left. Needs root, for `unshare -n`.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))


class Host:
    """A folder that represents the host."""

    def __init__(self, folder: Path, carried: Path, python: Path) -> None:
        self._folder, self._carried = folder, carried
        self.repository, self.out = folder / "repository", folder / "out"
        self.repository.mkdir()
        files = subprocess.run(["git", "-C", str(ROOT), "archive", "HEAD"], stdout=subprocess.PIPE, check=True).stdout
        subprocess.run(["tar", "-x", "-C", str(self.repository)], input=files, check=True)
        (folder / "tmp").mkdir()
        self._environment = {
            "PATH": f"{python.parent}:/usr/bin:/bin",
            "HOME": str(folder),
            "TMPDIR": str(folder / "tmp"),
            "HOST_FOLDER": str(folder / "host"),
            "OUT": str(self.out),
            "PYTHON": str(python),
            "DEVICE": "cpu",
            "SCALE": "3",
        }

    def call(self, number: int, *arguments: str, carry: bool = True) -> subprocess.Popen[str]:
        """Start a call with its carried folder and an empty OUT."""
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir()
        for other in (1, 2):
            shutil.rmtree(self.repository / f"carried-{other}", ignore_errors=True)
        what = f"carried-{number}" if carry else "-"
        if carry:
            shutil.copytree(self._carried / str(number), self.repository / what)
        return subprocess.Popen(
            ["unshare", "-n", "bash", f"benchmarks/gpu/call-{number}.sh", what, *arguments],
            cwd=self.repository,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def archive(self) -> tuple[list[str], dict[str, Any]]:
        """Read the whole archive that came back; returns its names and the results of the steps."""
        with tarfile.open(self.out / "suite.tar.gz") as tar:
            content = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        return sorted(content), json.loads(content["suite/steps.json"])


def killed(host: Host, name: str, seconds: float) -> dict[str, Any]:
    """Take a step, kill everything `seconds` after its start, and resume."""
    before = host.archive()[1] if (host.out / "suite.tar.gz").exists() else {}
    process = host.call(2, "900", name, carry=False)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(f"== {name} (about"):
            break
    time.sleep(seconds)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    names, steps = host.archive()
    others = {other: row["state"] for other, row in steps.items() if other != name}
    expected = {other: row["state"] for other, row in before.items() if other != name}
    if steps[name]["state"] != "running" and seconds > 0.2:
        return killed(host, name, seconds / 3)  # the step had ended already, on a faster machine
    assert steps[name]["state"] == "running" and others == expected, (name, steps[name]["state"], others, expected)
    again = host.call(2, "900", name, "--resume", carry=False)
    output = again.communicate()[0]
    steps_after = host.archive()[1]
    return {
        "killed_after": round(seconds, 1),
        "files_in_archive": len(names),
        "other_steps_kept": len(others),
        "after_resume": steps_after[name]["state"],
        "leftover_processes": leftovers(name),
        "said": output.strip().splitlines()[-1],
    }


def leftovers(name: str) -> int:
    """Return the number of processes of a step that still run."""
    count = 0
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                count += f"DALI_DIFFUSEMIX_SUITE={name}-".encode() in (folder / "environ").read_bytes()
            except OSError:
                continue
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("carried", type=Path, help="the folder that prepare.sh made")
    parser.add_argument("--python", type=Path, default=Path(sys.executable))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    from record import write

    with tempfile.TemporaryDirectory(prefix="gpu-host-") as folder:
        host = Host(Path(folder), options.carried, options.python.absolute())
        calls = {}
        for number, arguments in ((1, []), (2, ["1500"])):
            begin = time.monotonic()
            output = host.call(number, *arguments).communicate()[0]
            print(output, flush=True)
            calls[f"call-{number}"] = {"seconds": round(time.monotonic() - begin, 1), "characters": len(output)}
        names, steps = host.archive()
        kept = {name: {key: row[key] for key in ("group", "state", "exit", "seconds")} for name, row in steps.items()}
        print("\n".join(names))
        for name, row in kept.items():
            row["killed"] = killed(host, name, row["seconds"] / 3)
            print(name, row["killed"], flush=True)
        size = (host.out / "suite.tar.gz").stat().st_size
    versions = "import sys, torch, numpy; print(sys.version.split()[0], torch.__version__, numpy.__version__)"
    used = subprocess.check_output([options.python, "-c", versions], text=True).split()
    content = {
        "benchmark": "rehearsal of the GPU calls, device cpu",
        "host": dict(zip(("python", "torch", "numpy"), used, strict=True)),
        "calls": calls,
        "archive": {"bytes": size, "files": names},
        "steps": kept,
    }
    write(options.out, content, quiet=True)


if __name__ == "__main__":
    main()
