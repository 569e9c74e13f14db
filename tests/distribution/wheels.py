"""Builds the wheels for x86-64 and AArch64 and checks them: python tests/distribution/wheels.py wheelhouse

Both are built from the source distribution, by g++ for the processor, and run wherever torch's wheels do: with glibc
2.28 or newer, which auditwheel checks. The wheel of this machine is checked as check.py does it. The library in the
other one must give the same bits as this machine's in tests of the kernels, under QEMU. In Debian the compiler and QEMU
are in g++-aarch64-linux-gnu and qemu-user; what is not there is left out, and said.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

from check import ROOT, check_contents, check_installed

_HERE = platform.machine()
_OTHER = "aarch64"
_NEWEST_GLIBC = 2, 28  # of torch's wheels
_TESTS = (  # they call every function of the library, and start no processes that do
    "tests/test_augment.py::test_the_kernel_gives_the_specifications_bits",
    "tests/test_fractals.py::test_every_variation_is_the_same_in_both",
    "tests/test_geometry.py::test_specification_kernel_and_windows_agree",
    "tests/test_mixing.py::test_the_kernel_gives_the_same_bits_on_any_number_of_threads",
    "tests/test_mixing.py::test_the_kernel_is_the_specification",
    "tests/test_philox.py::test_a_permutation_holds_each_index_once",
    "tests/test_philox.py::test_the_library_draws_the_same",
    "tests/test_raw.py::test_stretches_of_files",
    "tests/test_reading.py::test_a_window_has_the_pixels_of_the_whole",
    "tests/test_reading.py::test_files_and_parts_of_files",
    "tests/test_reading.py::test_what_is_sound",
    "tests/test_small_images.py::test_small_samples_are_the_specification",
    "tests/test_tile.py::test_damaged_files_never_make_it_crash",
    "tests/test_tile.py::test_no_pixel_changes",
    "tests/test_upload.py::test_every_byte_arrives",
)


def run(*command: str | Path, **more: str) -> str:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **more}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said = done.stdout.decode()
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{said}")
    return said


def build(sdist: Path, machine: str, scratch: Path) -> Path:
    """The wheel for the processor, with the tag that auditwheel finds."""
    with tarfile.open(sdist) as archive:
        archive.extractall(scratch / machine, filter="data")
    (tree,) = (scratch / machine).iterdir()
    environment = {"CXXFLAGS": f"-include {ROOT / 'tests' / 'distribution' / 'old_glibc.h'}"}
    if machine != _HERE:
        tools = {"CC": f"{machine}-linux-gnu-gcc", "CXX": f"{machine}-linux-gnu-g++"}
        environment |= tools | {"_PYTHON_HOST_PLATFORM": f"linux-{machine}"}
    run(sys.executable, "-m", "build", "--wheel", "--outdir", tree / "dist", tree, **environment)
    (wheel,) = (tree / "dist").iterdir()
    run(sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", tree / "repaired", wheel)
    (wheel,) = (tree / "repaired").iterdir()
    tag = re.search(r"-py3-none-manylinux_(\d+)_(\d+)_", wheel.name)
    if tag is None or (int(tag[1]), int(tag[2])) > _NEWEST_GLIBC:
        sys.exit(f"{wheel.name}: wants a newer glibc than {_NEWEST_GLIBC}; `auditwheel -v show` names the functions")
    return wheel


def check_other(wheel: Path, scratch: Path) -> None:
    """Run tests of the kernels with the library for the other processor beside this machine's."""
    call = scratch / "call"
    run(f"{_OTHER}-linux-gnu-g++", "-std=c++17", "-O1", "-o", call, "tests/distribution/call.cpp", "-ldl")
    with zipfile.ZipFile(wheel) as unzipped:
        library = unzipped.extract("dali_diffusemix/kernels/libdali_diffusemix.so", scratch)
    command = f"qemu-{_OTHER} -L /usr/{_OTHER}-linux-gnu {call} {library}"
    options = ("-q", "-p", "no:cacheprovider", "-p", "other_processor")
    path = f"{ROOT / 'tests' / 'distribution'}:{os.environ.get('PYTHONPATH', '')}"
    said = run(sys.executable, "-m", "pytest", *options, *_TESTS, OTHER_PROCESSOR=command, PYTHONPATH=path)
    print(*(line for line in said.splitlines() if "the same bits" in line))


def main() -> None:
    into = Path(sys.argv[1])
    shutil.rmtree(into, ignore_errors=True)
    into.mkdir(parents=True)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="dali-diffusemix-wheels-") as name:
        scratch = Path(name)
        run(sys.executable, "-m", "build", "--sdist", "--outdir", scratch / "dist")
        (sdist,) = (scratch / "dist").iterdir()

        wheel = build(sdist, _HERE, scratch)
        check_contents(sdist, wheel)
        check_installed(sdist, wheel)
        shutil.copy(wheel, into)
        print(f"{wheel.name}: installed without a compiler, and used")

        if _HERE == _OTHER or shutil.which(f"{_OTHER}-linux-gnu-g++") is None:
            print(f"No wheel for {_OTHER}: there is no {_OTHER}-linux-gnu-g++")
        else:
            wheel = build(sdist, _OTHER, scratch)
            check_contents(sdist, wheel)
            shutil.copy(wheel, into)
            if shutil.which(f"qemu-{_OTHER}") is None:
                print(f"{wheel.name}: built, and never run: there is no qemu-{_OTHER}")
            else:
                check_other(wheel, scratch)
                print(f"{wheel.name}: built, and its library used under QEMU")
    print(f"{into}/ has {sum(1 for _ in into.iterdir())} wheels ({time.monotonic() - begin:.0f} s)")


if __name__ == "__main__":
    main()
