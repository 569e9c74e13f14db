"""doctor: every check is made, none that breaks takes another with it, and the report is fit for a bug report."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from test_cli import PROGRAM

import dali_diffusemix
from dali_diffusemix import cli, doctor
from dali_diffusemix.base import cpus
from dali_diffusemix.doctor import Answer, Examination, advice, attempts, lanes, machine, probes, run, storage
from dali_diffusemix.doctor.lanes import Lane
from dali_diffusemix.doctor.probes import EXTRAS, PROBES

pytestmark = pytest.mark.slow

PACKAGE = Path(dali_diffusemix.__file__).parent


def ask(*names: str, arguments: tuple[str, ...] = (), **environment: str) -> dict[str, Answer]:
    """The answers of probes, run as the command runs them."""
    answers: dict[str, Answer] = {}
    lanes.run([Lane(names, {**os.environ, **environment}, answers.__setitem__, arguments)])
    assert list(answers) == list(names)
    return answers


def error(name: str, **environment: str) -> str:
    found = ask(name, **environment)[name].error
    assert found is not None
    return found


def test_keys_are_in_no_report() -> None:
    found = ask("package", DALI_DIFFUSEMIX_API_KEY="very secret")["package"]
    assert found.found["environment"]["DALI_DIFFUSEMIX_API_KEY"] == "(set)" and "very secret" not in str(found)


def module(folder: Path, name: str, code: str) -> None:
    """A module or package that is found before the installed one."""
    *packages, _ = parts = name.split(".")
    for depth in range(len(packages)):
        package = folder.joinpath(*packages[: depth + 1])
        package.mkdir(parents=True, exist_ok=True)
        (package / "__init__.py").touch()
    place = folder.joinpath(*parts)
    place.mkdir(parents=True, exist_ok=True)
    (place / "__init__.py").write_text(code)


def shape(report: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a report."""
    return {
        "": sorted(report),
        **{name: sorted(report["found"][name]) for name in report["found"]},
        **{f"works {name}": sorted(report["works"][name]) for name in report["works"]},
    }


# The whole ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report(photos: Path) -> Examination:
    return doctor.examine(photos)


def test_all_probes_answer_and_what_is_installed_here_works(report: Examination) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    assert report.ok and report.seconds < 120
    assert set(report.answers) == set(PROBES) == {*(name for lane in probes.LANES for name in lane), "data"}
    for name in ("package", "machine", "versions", "torch", "pillow", "dali_cpu", "cache", "data", "edits", "dataset"):
        assert report.answers[name].error is None, report.answers[name]
    assert report.works["load_cpu"].detail == "4 samples by DALI: the dataset's, bit for bit"
    assert report.answers["dali_cpu"].found["formats"] == {"JPEG": None, "PNG": None}
    assert set(report.answers["pillow"].found["formats"].values()) == {None}
    for name, probe in PROBES.items():
        if report.answers[name].error is None and name != "data":
            assert None not in [report.answers[name].found[key] for key in probe.keys if key == "detail"]


def test_what_does_not_work_has_a_reason_and_a_remedy(report: Examination) -> None:
    for feature in report.works.values():
        assert feature.detail and (feature.remedy is None) == feature.works
    if report.answers["gpus"].error:
        gpu = report.works["load_cuda"]
        assert gpu.detail.startswith(report.answers["gpus"].error)
        assert gpu.remedy is not None and "pip install 'dali-diffusemix[cuda12]'" in gpu.remedy


def test_the_text_is_80_columns_of_plain_text(report: Examination) -> None:
    lines = list(report.lines())
    assert max(map(len, lines)) <= 80
    assert all(line.isprintable() and line == line.rstrip() for line in lines)
    text = "\n".join(lines)
    for feature in report.works.values():
        assert f"\n  {'yes' if feature.works else 'no ':5}{feature.title} " in text
    assert lines[-1].startswith("Loading works on ")


def test_the_command_prints_it_and_its_exit_code_says_whether_a_loader_works(
    report: Examination, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "examine", lambda *_, **__: report)
    result = CliRunner().invoke(cli.main, ["doctor"])
    assert (result.exit_code, result.stdout.splitlines()) == (0 if report.ok else 1, list(report.lines()))


def test_a_pipe_gets_no_colours_and_nobody_s_home(photos: Path, tmp_path: Path) -> None:
    """Where little is installed, so that it takes little time."""
    for name in ("torch", "nvidia.dali", "diffusers", "ray", "s3fs", "kornia", "accelerate"):
        module(tmp_path, name, "raise ImportError('none')")
    home = PACKAGE.parent
    environment = {**os.environ, "HOME": str(home), "FORCE_COLOR": "1", "PYTHONPATH": f"{tmp_path}{os.pathsep}{home}"}
    done = subprocess.run([*PROGRAM, "doctor", photos], capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 1, done
    assert "\x1b" not in done.stdout and str(home) not in done.stdout
    assert f"{dali_diffusemix.__version__} in ~/dali_diffusemix" in done.stdout


def test_a_broken_installation_is_survived_and_told(tmp_path: Path, report: Examination) -> None:
    """DALI takes the process down, everything optional is broken: code 1, the same keys, and the rest answers."""
    module(tmp_path, "nvidia.dali", "import os; os.abort()")
    for name in ("diffusers", "ray", "s3fs", "kornia"):
        module(tmp_path, name, "raise RuntimeError('broken\\n' + 200 * 'and long ')")
    module(tmp_path, "accelerate", "import nothing_that_is_there")
    command = [*PROGRAM, "doctor", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    assert (done.returncode, done.stderr) == (1, "")
    found = json.loads(done.stdout)
    assert shape(found) == shape(report.json()) and not found["ok"]
    assert found["works"]["load_cpu"]["detail"] == "the process that tried it was ended by SIGABRT"
    wheels = [wheel for wheel in probes.DALI if found["found"]["versions"][wheel]]
    if len(wheels) == 1:
        assert found["works"]["load_cpu"]["remedy"] == f"pip install --force-reinstall {wheels[0]}"
    for name in ("dataset", "kernel", "edits"):
        assert found["works"][name]["works"] == report.works[name].works
    for name, extra in EXTRAS.items():
        if name != "s3" or found["found"]["versions"]["s3fs"]:
            assert not found["works"][name]["works"]
            assert found["works"][name]["remedy"].startswith("pip install ")
            assert (
                extra.packages[0] in found["works"][name]["remedy"] or extra.install in found["works"][name]["remedy"]
            )
    assert found["works"]["accelerate"]["detail"] == "ModuleNotFoundError: No module named 'nothing_that_is_there'"


def test_an_interrupt_is_code_130_and_leaves_no_process(tmp_path: Path) -> None:
    module(tmp_path, "ray", "import time; time.sleep(100)")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [*PROGRAM, "doctor"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as running:
        for _ in range(200):
            if any(processes(tmp_path) - {running.pid}):
                break
            time.sleep(0.05)
        running.send_signal(signal.SIGINT)
        stdout, stderr = running.communicate(timeout=30)
    assert (running.returncode, stdout) == (130, "") and "Traceback" not in stderr
    for _ in range(100):
        if not processes(tmp_path):
            break
        time.sleep(0.1)
    assert not processes(tmp_path)


def processes(folder: Path) -> set[int]:
    """Those with a folder in their environment."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.fsencode(folder) in (process / "environ").read_bytes():
                found.add(int(process.name))
        except OSError:
            continue
    return found


# Probes that break ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("raise RuntimeError('no luck')", "RuntimeError: no luck"),
        ("import os; os.abort()", "the process that tried it was ended by SIGABRT"),
        ("import ctypes; ctypes.string_at(0)", "the process that tried it was ended by SIGSEGV"),
        ("raise SystemExit(3)", "the process that tried it ended with exit code 3"),
        ("import os; os.write(2, b'disk on fire\\n'); os._exit(4)", "exit code 4, after: disk on fire"),
        ("print('noise', flush=True); raise ImportError('libcuda')", "is installed, but cannot be imported: libcuda"),
    ],
)
def test_a_probe_that_breaks_keeps_no_other_from_its_answer(
    code: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module(tmp_path, "nvidia.dali", code)
    monkeypatch.syspath_prepend(tmp_path)
    answers = ask("package", "dali_cpu", "pillow")
    assert expected in str(answers["dali_cpu"].error)
    assert answers["package"].error is answers["pillow"].error is None


def test_a_probe_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module(tmp_path, "ray", "import time; time.sleep(100)")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(PROBES, "ray", replace(PROBES["ray"], seconds=5.0))
    answers = ask("ray", "package")
    assert answers["ray"].error == "no answer within 5 s" and answers["package"].error is None


def test_without_a_python_every_probe_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    for answer in ask("package", "machine").values():
        assert answer.error == "FileNotFoundError: [Errno 2] No such file or directory: '/nowhere/python'"


def test_what_is_not_installed_is_told_from_what_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia").mkdir()
    (tmp_path / "nvidia" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert error("dali_cpu") == "NVIDIA DALI is not installed"
    assert attempts.probe_imports(("json", "math"))["detail"] == "json and math can be imported"
    with pytest.raises(ImportError, match=r"^nothing_that_is_there is not installed$"):
        attempts.probe_imports(("json", "nothing_that_is_there.within"))


def test_two_dali_wheels_are_a_trap(tmp_path: Path, report: Examination, monkeypatch: pytest.MonkeyPatch) -> None:
    for wheel in probes.DALI:
        folder = tmp_path / f"{wheel.replace('-', '_')}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {wheel}\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    answers = {**report.answers, **ask("versions")}
    (note,) = (note for note in advice.traps(answers) if "own the same folder" in note)
    assert f"pip uninstall -y {' '.join(probes.DALI)}; then pip install 'dali-diffusemix[" in note


# The CPU kernel -------------------------------------------------------------------------------------------------------


def test_no_compiler(tmp_path: Path) -> None:
    assert error("compiler", PATH=str(tmp_path), CXX="").startswith("no C++ compiler is found")
    if shutil.which("false"):
        assert error("compiler", CXX="false") == "false compiles no C++17: 1"


def test_the_compiler_is_tried() -> None:
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    found = ask("compiler", CXX="")["compiler"].found
    assert found["command"] == "g++" and "g++" in found["version"]


def test_a_kernel_that_was_not_built_or_is_old(
    tmp_path: Path, report: Examination, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "dali_diffusemix"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", "kernels"))
    (copy / "kernels").mkdir()
    (copy / "kernels" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    answers = {**report.answers, **ask("package", "kernel", "edits")}
    feature = advice.judge("kernel", answers)
    assert feature.detail.startswith("not built for this version; NumPy mixes, many times slower (")
    assert feature.remedy == "pip install --force-reinstall --no-deps dali-diffusemix" or answers["compiler"].error
    assert answers["edits"].error is None
    if compiler := shutil.which("cc"):
        library = copy / "kernels" / "libdali_diffusemix.so"
        subprocess.run([compiler, "-shared", "-xc", "/dev/null", "-o", library], check=True)
        assert "libdali_diffusemix.so was built from another version: it has interface 1" in error("kernel")
    answers |= ask("kernel", DALI_DIFFUSEMIX_NATIVE="0")
    monkeypatch.setenv("DALI_DIFFUSEMIX_NATIVE", "0")
    assert advice.judge("kernel", answers).remedy == "unset DALI_DIFFUSEMIX_NATIVE"


# The machine ----------------------------------------------------------------------------------------------------------


def test_a_container_s_limits(tmp_path: Path, report: Examination, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own").write_text("0::/\n")
    monkeypatch.setattr(cpus, "_GROUPS", tmp_path)
    monkeypatch.setattr(cpus, "_OWN", tmp_path / "own")
    affinity = len(os.sched_getaffinity(0))
    assert machine.probe_machine()["quota"] is None and machine.probe_machine()["cores"] == affinity
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.probe_machine()["quota"] is machine.probe_machine()["memory_limit"] is None
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "memory.max").write_text("1073741824\n")
    found = machine.probe_machine()
    assert (found["quota"], found["memory_limit"], found["cores"]) == (1.5, 1 << 30, min(2, affinity))
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    found = machine.probe_machine()
    assert found["cores"] == 1
    notes = advice.traps({**report.answers, "machine": Answer(found=found)})
    assert any(note.startswith("this container may use 0.5 of the ") and "num_workers=1" in note for note in notes)


_NVML = """
#include <string.h>
const char* nvmlErrorString(int code) { return code == 18 ? "Driver/library version mismatch" : "?"; }
int nvmlInit_v2() { return INIT; }
int nvmlSystemGetDriverVersion(char* text, unsigned length) { strncpy(text, "570.1", length); return 0; }
int nvmlSystemGetCudaDriverVersion_v2(int* version) { *version = 12080; return 0; }
int nvmlDeviceGetCount_v2(unsigned* count) { *count = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned place, void** device) { *device = (void*)(0x700000000000 + place);
  return 0; }
int nvmlDeviceGetName(void* device, char* text, unsigned length) { strncpy(text, "NVIDIA H100", length); return 0; }
int nvmlDeviceGetMemoryInfo(void* device, unsigned long long* memory) { memory[0] = 80ull << 30; return 0; }
int nvmlDeviceGetCudaComputeCapability(void* device, int* major, int* minor) {
  if (device < (void*)0x700000000000) return 1;
  *major = 9; *minor = 0; return 0;
}
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_the_driver_is_asked_for_its_gpus(tmp_path: Path) -> None:
    """By a library with the interface of the driver's: there is no GPU in most places where tests run."""
    for name, init in (("good", 0), ("bad", 18)):
        (tmp_path / name).mkdir()
        command = ["cc", "-shared", "-fPIC", "-xc", "-", f"-DINIT={init}", "-o", tmp_path / name / "libnvidia-ml.so.1"]
        subprocess.run(command, input=_NVML, text=True, check=True)
    found = ask("gpus", LD_LIBRARY_PATH=str(tmp_path / "good"))["gpus"].found
    gpu = {"name": "NVIDIA H100", "memory": 80 << 30, "capability": "9.0"}
    assert found == {"driver": "570.1", "cuda": "12.8", "devices": [gpu, gpu]}
    why = "the NVIDIA driver does not answer: Driver/library version mismatch"
    assert error("gpus", LD_LIBRARY_PATH=str(tmp_path / "bad")) == why


def test_remedies_for_a_gpu_go_by_what_is_missing(report: Examination) -> None:
    gpus = Answer(found={"driver": "570.1", "cuda": "12.8", "devices": [{"name": "NVIDIA H100"}]})
    torch = {**report.answers["torch"].found, "version": "2.13.0", "cuda": "13.0", "why_no_gpu": None}
    versions = dict.fromkeys(report.answers["versions"].found)
    failed = Answer(found={}, error="it failed")
    answers = {
        **report.answers,
        "gpus": gpus,
        "torch": Answer(found=torch),
        "versions": Answer(found=versions),
        "gpu_kernel": failed,
        "dali_gpu": failed,
        "load_cuda": failed,
    }
    feature = advice.judge("load_cuda", answers)
    assert (feature.detail, feature.remedy) == ("CuPy is not installed", "pip install 'dali-diffusemix[cuda13]'")
    answers["gpu_kernel"] = Answer(found={})
    assert advice.judge("load_cuda", answers).detail == "DALI: it failed"
    assert advice.judge("load_cuda", answers).remedy == "pip install 'dali-diffusemix[cuda13]'"
    answers["dali_gpu"] = Answer(found={"formats": {"JPEG": None}})
    assert advice.judge("load_cuda", answers).detail == "it failed"
    answers["torch"] = Answer(found={**torch, "why_no_gpu": "RuntimeError: The NVIDIA driver is too old"})
    feature = advice.judge("load_cuda", answers)
    assert "PyTorch sees no GPU (RuntimeError: The NVIDIA driver is too old)" in feature.detail
    assert feature.remedy is not None and "CUDA_VISIBLE_DEVICES" in feature.remedy
    answers["torch"] = Answer(found={**torch, "cuda": None})
    assert "PyTorch 2.13.0 is built without CUDA" in advice.judge("load_cuda", answers).detail


def test_a_cache_that_cannot_be_written(report: Examination, tmp_path: Path) -> None:
    answers = ask("cache", DALI_DIFFUSEMIX_CACHE="/proc/none")
    feature = advice.judge("cache", {**report.answers, **answers})
    assert feature.detail.startswith("/proc/none/catalogs cannot be written: ")
    assert feature.remedy == "set DALI_DIFFUSEMIX_CACHE to a folder that can be written"
    found = ask("cache", DALI_DIFFUSEMIX_CACHE=str(tmp_path / "to be made"))["cache"].found
    assert not found["exists"] and found["free"] > 0 and list(tmp_path.iterdir()) == []


# SOURCE ---------------------------------------------------------------------------------------------------------------


def test_files_of_a_folder_and_of_a_store_are_read(photos: Path, edits: Path, tmp_path: Path) -> None:
    found = ask("data", arguments=(str(photos),))["data"].found
    assert set(found) == set(PROBES["data"].keys)
    assert (found["kind"], found["files"], found["all_listed"]) == ("folder", 33, True)
    one, many = found["one_thread"], found["many_threads"]
    assert one["files"] + many["files"] == 33
    assert one["bytes"] + many["bytes"] == sum(file.stat().st_size for file in photos.rglob("*.jpg"))
    assert one["mb_per_second"] > 0 and one["files_per_second"] > 0
    stored = ask("data", arguments=(str(edits),))["data"].found
    assert (stored["kind"], stored["files"]) == ("store", 1) and stored["many_threads"] is None


def test_data_that_cannot_be_read_is_named_and_does_not_decide(tmp_path: Path, photos: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("none")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "gone.jpg").symlink_to(tmp_path / "gone.jpg")
    cases = {
        "missing": "found no folder '",
        "file": "found no folder '",
        "empty": "found no file in '",
        "links": "found no file in '",
    }
    for name, expected in cases.items():
        answer = ask("data", arguments=(str(tmp_path / name),))["data"]
        assert answer.known and expected in str(answer.error)
    assert "the URL" in str(ask("data", arguments=("s3://bucket/edits",))["data"].error)


def test_a_folder_that_may_not_be_read(tmp_path: Path) -> None:
    # Root may read anything, so it becomes nobody, once what is needed is imported.
    code = (
        "import os, sys; from dali_diffusemix.doctor.storage import probe_data; os.geteuid() or os.seteuid(65534);"
        "print(probe_data(sys.argv[1])['unreadable']); print(probe_data(sys.argv[1] + '/closed'))"
    )
    # Not below pytest's own folder, which only its user may enter.
    folder = Path("/tmp") / f"doctor-{os.getpid()}"
    try:
        (folder / "closed").mkdir(parents=True)
        (folder / "image.jpg").write_bytes(b"image")
        (folder / "closed").chmod(0)
        done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
    finally:
        (folder / "closed").chmod(0o755)
        shutil.rmtree(folder)
    assert done.stdout.startswith("PermissionError: ")
    assert "ConfigError: SOURCE must hold images, found no file in " in done.stderr
    assert done.stderr.strip().endswith(f"PermissionError: [Errno 13] Permission denied: '{folder}/closed'")


def test_a_large_folder_is_listed_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in range(20):
        (tmp_path / str(place)).mkdir()
        (tmp_path / str(place) / "image.jpg").write_bytes(b"image")
    monkeypatch.setattr(storage, "_MOST_LISTED", 5)
    files, unreadable, complete = storage.list_files(tmp_path, "")
    assert (len(files), unreadable, complete) == (5, None, False)


def test_the_home_folder_is_a_tilde_and_nothing_else_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    homes = run._homes()
    for text, expected in {
        "/home/ann": "~",
        "no '/home/ann/data': /home/anna, /mnt/home/ann": "no '~/data': /home/anna, /mnt/home/ann",
        "PATH=/usr/bin:/home/ann/bin": "PATH=/usr/bin:~/bin",
    }.items():
        assert homes.sub("~", text) == expected
    monkeypatch.setenv("HOME", "/")
    assert run._homes().sub("~", "/usr/lib") == "/usr/lib"
