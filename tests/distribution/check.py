"""Checks what `make dist` built, outside the checkout: python tests/distribution/check.py dist

The source distribution holds what git has, but for what `_LEFT_OUT` names; the wheel the package and nothing else.
Then the wheel goes into a new, empty virtual environment, where installed.py uses it and mypy finds its types, and
after it the source distribution. Both are installed as on a machine without a compiler.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

_LEFT_OUT = (".ci/", ".github/", ".gitignore")  # about this repository, not about the package
_MADE = ("PKG-INFO", "setup.cfg", "dali_diffusemix.egg-info/")
_MOST_BYTES = 5_000_000  # docs/ has pictures


def check_contents(sdist: Path, wheel: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}
    names = {name for name in names if not name.startswith(_MADE)}
    inside = "git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"
    if (ROOT / ".git").exists():
        tracked = set(subprocess.run(inside, capture_output=True, text=True, check=True).stdout.split("\0")) - {""}
        tracked = {name for name in tracked if (ROOT / name).exists() and not name.startswith(_LEFT_OUT)}
        if names != tracked:
            sys.exit(
                f"{sdist.name}: lacks {sorted(tracked - names)}, and has {sorted(names - tracked)}; change MANIFEST.in"
            )
    for file in (sdist, wheel):
        if file.stat().st_size > _MOST_BYTES:
            sys.exit(f"{file.name}: has {file.stat().st_size} bytes, more than {_MOST_BYTES}")

    ours = {name for name in names if name.startswith("dali_diffusemix/")}
    ours |= {f"dali_diffusemix/{name}" for name in names if name.startswith("kernels/")}
    ours.add("dali_diffusemix/kernels/libdali_diffusemix.so")
    with zipfile.ZipFile(wheel) as unzipped:
        packed = {name for name in unzipped.namelist() if ".dist-info/" not in name and not name.endswith("/")}
    if packed != ours:
        sys.exit(f"{wheel.name}: lacks {sorted(ours - packed)}, and has {sorted(packed - ours)}; change setup.py")


def check_installed(sdist: Path, wheel: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="dali-diffusemix-dist-") as scratch:
        home, empty = Path(scratch, "venv"), Path(scratch, "empty")
        empty.mkdir()
        for name in ("distribution/installed.py", "material.py", "typed_user.py"):
            shutil.copy(ROOT / "tests" / name, empty)
        venv.create(home, with_pip=False)
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_"))}
        environment["DALI_DIFFUSEMIX_CACHE"] = str(Path(scratch, "cache"))

        python = str(home / "bin" / "python")

        def run(*command: str | Path, **more: str) -> None:
            done = subprocess.run(command, cwd=empty, env={**environment, **more}, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")

        # This environment's pip: the new one is empty. Nothing is compiled that will be run once.
        pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
        install = (*pip, "install", "-q", "--no-compile")
        # On a PATH with nothing of the system's no compiler is found.
        bare = {"PATH": str(home / "bin"), "CC": "", "CXX": ""}
        # Torch's CPU build by itself, as in the Makefile.
        links = ("--find-links", os.environ["TORCH_LINKS"]) if os.environ.get("TORCH_LINKS") else ()
        run(*install, "--retries", "1", "--no-deps", "-c", ROOT / "constraints.txt", "torch", *links)
        run(*install, wheel, **bare)
        run(*pip, "check")
        run(python, "installed.py", "library")
        run(sys.executable, "-m", "mypy", "--strict", "--python-executable", python, "typed_user.py")
        run(*install, "--no-deps", "--force-reinstall", "--no-cache-dir", sdist, **bare)
        run(python, "installed.py", "numpy")


def main() -> None:
    folder = Path(sys.argv[1])
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    begin = time.monotonic()
    check_contents(sdist, wheel)
    check_installed(sdist.absolute(), wheel.absolute())
    print(f"{sdist.name} and {wheel.name} are as they should be ({time.monotonic() - begin:.0f} s)")


if __name__ == "__main__":
    main()
