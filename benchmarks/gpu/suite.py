#!/usr/bin/env python3
"""Everything that needs a GPU, in short steps, for a host that is available for minutes and may be lost at any time.

    suite.py STEP... --out FOLDER     steps or groups of them: a b c d e f g; without any, all

Each step is a process with its own log and time limit. After the limit, the process and all that it started are killed.
A step that fails, crashes or hangs never stops the next one. After each step, all results are packed into one small
archive, which is written under another name and renamed, so that the last archive is always complete. With --resume,
steps that passed are skipped. With --deadline, a step is skipped if its limit exceeds the time left.

It needs only Python. `--device cpu` is the rehearsal: the same steps, smaller, as far as possible without a GPU.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MARK = "DALI_DIFFUSEMIX_SUITE"  # in the environment of a step and of its child processes
GRACE = 4.0  # seconds that a step has to end after its limit
TAIL = 1300  # characters of a step's log that are shown
LARGEST = 1 << 20  # bytes of a log in the archive; of a longer log, both ends are kept
REPORTS = (".json", ".log", ".xml", ".jsonl", ".txt")


@dataclass(frozen=True, kw_only=True)
class Step:
    """One process of the suite."""

    name: str
    group: str
    command: tuple[str, ...]
    limit: float  # seconds
    expected: float  # seconds on the host, estimated
    environment: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The end of a step."""

    state: str  # "passed", "failed", "timed out", "left out"
    exit: int | None  # exit status; negative: the signal
    seconds: float
    reason: str = ""


# Processes ------------------------------------------------------------------------------------------------------------


def marked(token: str) -> Iterator[int]:
    """Yield the processes of a step: those with its mark in their environment, in any group or session."""
    wanted = f"{MARK}={token}".encode()
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            with contextlib.suppress(OSError):
                if wanted in (folder / "environ").read_bytes().split(b"\0"):
                    yield int(folder.name)


def kill(token: str) -> None:
    """Kill the processes of a step, and those that they start meanwhile."""
    for _ in range(50):
        found = list(marked(token))
        if not found:
            return
        for process in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.02)


def perform(command: Sequence[str], log: Path, limit: float, token: str, environment: dict[str, str]) -> Outcome:
    """Run a command with a time limit and output to `log`; leaves none of its processes."""
    begin = time.monotonic()
    with log.open("wb") as file:
        try:
            process = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=ROOT,
                env={**environment, MARK: token},
                start_new_session=True,
            )
        except OSError as error:
            return Outcome(state="failed", exit=None, seconds=0.0, reason=str(error))
        try:
            try:
                status = process.wait(limit)
                state = "failed" if status else "passed"
            except subprocess.TimeoutExpired:
                state = "timed out"
                process.send_signal(signal.SIGINT)  # pytest then writes its report
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE)
        finally:
            kill(token)
            try:
                status = process.wait(GRACE)
            except subprocess.TimeoutExpired:  # leave it: a driver holds it
                status = -signal.SIGKILL
    reason = f"limit {limit:g} s" if state == "timed out" else ended(status)
    return Outcome(state=state, exit=status, seconds=time.monotonic() - begin, reason=reason)


def ended(status: int) -> str:
    """Return an exit status in words; empty for 0."""
    if status >= 0:
        return f"exit status {status}" if status else ""
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"


# Results --------------------------------------------------------------------------------------------------------------


def replace(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.tmp")
    with unfinished.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def archive(out: Path, target: Path) -> None:
    """Pack the reports in `out` into `target`, with both ends of long logs."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz", compresslevel=6) as tar:
        for file in sorted(out.rglob("*")):
            inside = file.relative_to(out).parts[0].startswith("cache")
            if inside or file.suffix not in REPORTS or not file.is_file():
                continue
            content = file.read_bytes()
            if len(content) > LARGEST:
                content = content[: LARGEST // 2] + b"\n... left out ...\n" + content[-LARGEST // 2 :]
            entry = tarfile.TarInfo(f"suite/{file.relative_to(out)}")
            entry.size, entry.mtime, entry.mode = len(content), int(file.stat().st_mtime), 0o644
            tar.addfile(entry, io.BytesIO(content))
    replace(target, stream.getvalue())


class Suite:
    """Takes steps, and keeps the results in `out`/steps.json and in the archive."""

    def __init__(self, out: Path, target: Path, *, deadline: float | None = None) -> None:
        """`deadline` is the time, of time.monotonic(), at which everything must have ended."""
        self._out, self._target, self._deadline = out, target, deadline
        self._state = out / "steps.json"
        out.mkdir(parents=True, exist_ok=True)
        self.known: dict[str, dict[str, Any]] = {}
        if self._state.exists():
            self.known = json.loads(self._state.read_text())
        for row in self.known.values():  # left by a killed suite
            if row["state"] == "running":
                kill(row["token"])
                row.update(state="failed", reason="the suite itself was killed")

    def take(self, step: Step, *, resume: bool) -> None:
        """Take a step, if it is needed and there is time."""
        if resume and self.known.get(step.name, {}).get("state") == "passed":
            print(f"== {step.name}: passed before", flush=True)
            return
        left = None if self._deadline is None else self._deadline - time.monotonic()
        if left is not None and left < step.limit + GRACE:
            reason = f"{left:.0f} s are left, its limit is {step.limit:g} s"
            self._note(step, Outcome(state="left out", exit=None, seconds=0.0, reason=reason))
            print(f"== {step.name}: left out, {reason}", flush=True)
            return
        token = f"{step.name}-{os.getpid()}-{time.monotonic_ns()}"
        self.known[step.name] = {"state": "running", "token": token, "group": step.group, "began": time.time()}
        self._save()
        print(f"== {step.name} (about {step.expected:g} s, at most {step.limit:g})", flush=True)
        log = self._out / f"{step.name}.log"
        environment = {**os.environ, **dict(step.environment)}
        try:
            outcome = perform(step.command, log, step.limit, token, environment)
        except BaseException:
            self._note(step, Outcome(state="failed", exit=None, seconds=0.0, reason="the suite itself was ended"))
            raise
        self._note(step, outcome)
        print(tail(log, TAIL if outcome.state == "passed" else 2 * TAIL), flush=True)
        print(f"== {step.name}: {outcome.state} {outcome.reason} after {outcome.seconds:.1f} s", flush=True)

    def _note(self, step: Step, outcome: Outcome) -> None:
        self.known[step.name] = {
            "state": outcome.state,
            "exit": outcome.exit,
            "seconds": round(outcome.seconds, 1),
            "reason": outcome.reason,
            "group": step.group,
            "limit": step.limit,
            "command": list(step.command),
        }
        self._save()

    def _save(self) -> None:
        replace(self._state, json.dumps(self.known, indent=1).encode())
        archive(self._out, self._target)

    def table(self) -> Iterator[str]:
        """Yield the results, one line per step."""
        for name, row in self.known.items():
            seconds, reason = row.get("seconds", 0.0), row.get("reason", "")
            yield f"{row['group']} {name:14} {row['state']:10} {seconds:6.1f} s  {reason}".rstrip()


def tail(log: Path, characters: int = TAIL) -> str:
    """Return the end of a log, in whole lines."""
    with contextlib.suppress(OSError):
        text = log.read_bytes()[-4 * characters :].decode(errors="replace")[-characters:]
        return text.partition("\n")[2].strip() if len(text) == characters else text.strip()
    return ""


# Steps ----------------------------------------------------------------------------------------------------------------


def has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


def pytest_command(out: Path, name: str, processes: int, seconds: int, *arguments: str) -> tuple[str, ...]:
    """Return the command of a step of tests: in parallel, with a time limit per test, and a JUnit report."""
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "--tb=short", "-p", "no:cacheprovider", "-W", "default"]
    command += ["--show-capture=all", f"--junit-xml={out / name}.xml"]
    if has("xdist"):
        # A crashed process counts as one failed test; a new process takes the next test.
        command += ["-n", str(processes), "--maxprocesses", str(processes), "--max-worker-restart", "12"]
    if has("pytest_timeout"):
        command += ["--timeout", str(seconds), "--timeout-method", "thread"]
    return (*command, *arguments)


def read(file: Path) -> dict[str, Any]:
    """Return the record of an earlier step; {} if there is none."""
    with contextlib.suppress(OSError, ValueError):
        found: dict[str, Any] = json.loads(file.read_text())
        return found
    return {}


def choice(out: Path) -> dict[str, str | None]:
    """Return the fastest way to decode of this package and of plain DALI, by the loader benchmark or the probe."""
    probed = read(out / "choice.json")
    rates = {name: row["images_per_second"] for name, row in read(out / "loader.json").get("results", {}).items()}

    def fastest(names: dict[str, str], otherwise: str | None) -> str | None:
        found = {choice: rates[name] for name, choice in names.items() if name in rates}
        return max(found, key=lambda choice: found[choice]) if found else otherwise

    ways = {name: name.removeprefix("diffusemix_") for name in rates if name.startswith("diffusemix_")}
    return {
        "loader": fastest({name: way for name, way in ways.items() if "packed" not in way}, probed.get("loader")),
        "plain_dali": fastest(
            {"plain_dali": "region", "plain_dali_whole": "whole", "plain_dali_cpu": "cpu"}, probed.get("plain_dali")
        ),
    }


def steps(options: argparse.Namespace) -> list[Callable[[], Step]]:
    """Return all steps in order, cheapest and most valuable first. Each is made just before it is taken."""
    out, photographs, python = options.out.resolve(), str(options.photographs), sys.executable
    cuda, cores = options.device != "cpu", len(os.sched_getaffinity(0))
    here, cache = ROOT / "benchmarks", str(out / "cache")
    threads = str(min(16, cores))
    rounds = str(options.rounds or (3 if cuda else 1))
    few = (("OMP_NUM_THREADS", "2"), ("OPENBLAS_NUM_THREADS", "2"), ("MKL_NUM_THREADS", "2"))
    if cuda:
        few += (("DALI_DIFFUSEMIX_NEED_GPU", "1"),)  # skipped tests would show nothing

    def script(name: str, *arguments: str) -> tuple[str, ...]:
        return (python, str(here / name), *arguments)

    def tests(name: str, processes: int, limit: float, expected: float, *arguments: str, group: str) -> Step:
        command = pytest_command(out, name, min(processes, cores), 45, *arguments)
        return Step(name=name, group=group, command=command, limit=limit, expected=expected, environment=few)

    def kernel_benchmark() -> Step:
        more = () if cuda else ("--repeat", "3", "--sets", "1", "--threads", threads)
        command = script("bench_kernel.py", "--device", options.device, *more, "--out", str(out / "kernel.json"))
        return Step(name="kernel-bench", group="a", command=command, limit=40, expected=8)

    def augment_benchmark() -> Step:
        more = () if cuda else ("--batch-size", "8", "--rounds", "2", "--plans", "1")
        command = script(
            *("bench_augment.py", "operations", "--device", options.device, *more, "--out", str(out / "augment.json"))
        )
        return Step(name="augment-bench", group="a", command=command, limit=60, expected=25)

    def small_benchmark() -> Step:
        images = ("--images", "10000", "--distinct", "1000") if cuda else ("--images", "600", "--distinct", "60")
        few_rounds = ("--rounds", str(options.rounds or 3), "--seconds", "0.4" if cuda else "0.1")
        command = script(
            *("bench_small.py", "32", photographs, "--device", options.device, "--threads", threads, *images),
            *(*few_rounds, "--cache", cache + "-small", "--out", str(out / "small.json")),
        )
        return Step(name="small-bench", group="a", command=command, limit=90, expected=30)

    def decoding() -> Step:
        seconds = "1.5" if cuda else "0.4"
        arguments = ("--device", options.device, "--out", str(out), "--seconds", seconds, "--limit", "70")
        command = script("gpu/decode_probe.py", photographs, *arguments)
        return Step(name="decode-probe", group="b", command=command, limit=80, expected=50)

    def loader_benchmark() -> Step:
        if options.only:
            only = options.only
        elif cuda:
            ours = ("cpu", "gpu", "gpu_0", "gpu_90", "regions", "shared_regions_90")
            names = [f"diffusemix_{way}" for way in ours] + [
                f"diffusemix_packed_{way}" for way in ours if way[-1] != "0"
            ]
            names += ["diffusemix_packed_shared_regions_90", "plain_cpu", "plain_gpu", "plain_regions"]
            only = ",".join([*names, "plain_dali", "plain_dali_whole", "plain_dali_cpu", "pillow_mixed"])
        else:
            only = "diffusemix,diffusemix_packed,plain,plain_dali,plain_dali_whole,pillow_mixed"
        batch, seconds = ("256", "0.8") if cuda else ("32", "0.3")
        command = script(
            *("bench_loader.py", photographs, "--device", options.device, "--batch-size", batch, "--threads", threads),
            *("--repeat", "1", "--rounds", rounds, "--seconds", seconds, "--begin-together", "--patience", "15"),
            *("--only", only, "--cache", cache, "--out", str(out / "loader.json")),
        )
        return Step(name="loader-bench", group="d", command=command, limit=110, expected=90)

    def raw_benchmark() -> Step:
        size = ("--repeat", "8", "--batch-size", "256") if cuda else ("--repeat", "1", "--batch-size", "16")
        command = script(
            *("bench_small.py", "photographs", photographs, "--device", options.device, "--threads", threads, *size),
            *("--rounds", str(options.rounds or 3), "--seconds", "0.6" if cuda else "0.1", "--cold-rounds", "1"),
            *("--cache", cache + "-raw", "--out", str(out / "raw.json")),
        )
        return Step(name="raw-bench", group="d", command=command, limit=90, expected=50)

    def waits() -> Step:
        some = ("--ways", "cpu,gpu,regions", "--steps", "40") if cuda else ("--ways", "cpu", "--steps", "12")
        size = () if cuda else ("--batch-size", "16", "--busy", "5")
        command = script(
            *("bench_wait.py", photographs, "--device", options.device, "--threads", threads, *some, *size),
            *("--cache", cache, "--out", str(out / "wait.json")),
        )
        return Step(name="wait", group="e", command=command, limit=70, expected=35)

    def overhead() -> Step:
        found = choice(out)
        size = ("--sizes", "224", "--model", "resnet50", "--amp", "--batch-size", "128", "--skip", "5", "--steps", "20")
        if not cuda:
            size = ("--sizes", "32", "--batch-size", "16", "--skip", "1", "--steps", "2")
        decode = ("--decode", found["loader"]) if cuda and found.get("loader") else ()
        form = ("--dali-form", found["plain_dali"]) if found.get("plain_dali") else ()
        command = script(
            *(
                "bench_overhead.py",
                photographs,
                "--device",
                options.device,
                *size,
                *decode,
                *form,
                "--workers",
                threads,
            ),
            *("--sources", "plain,all_mixed,plain_dali", "--rounds", rounds),
            *("--cache", cache + "-training", "--out", str(out / "overhead.json")),
        )
        return Step(name="overhead", group="e", command=command, limit=60, expected=40)

    def generation() -> Step:
        size = ("--full-size", "--originals", "16", "--released", "3", "--steps", "20", "--few", "5")
        if not cuda:
            size = ("--originals", "8", "--released", "2", "--steps", "4", "--few", "2", "--batch-size", "4")
        few_rounds = str(options.rounds or 1)
        command = script(
            "bench_generate.py", *size, "--rounds", few_rounds, "--no-warm-up", "--out", str(out / "generate.json")
        )
        return Step(name="generate", group="f", command=command, limit=70, expected=50)

    gpu = "tests/gpu"
    host = script("gpu/host.py", "--device", options.device, "--out", str(out / "host.json"))
    alone = "memory_stays or auto"  # they measure, or check the memory of the whole device: nothing else may run

    def regions() -> Step:
        """Return the tests of a way that may crash in each of them: few, unless it worked in the probe."""
        works = read(out / "choice.json").get("ways", {}).get("gpu_region", {}).get("works", not cuda)
        which = "regions" if works else "regions and same_samples and 8"
        arguments = (f"{gpu}/test_gpu_loader.py", "-k", which)
        return tests("region-tests", 4 if works else 1, 60, 20, *arguments, group="g")

    return [
        lambda: Step(name="host", group="a", command=host, limit=40, expected=12),
        lambda: tests("resident-tests", 8, 60, 20, f"{gpu}/test_gpu_resident.py", group="a"),
        small_benchmark,
        lambda: tests("kernel-tests", 10, 75, 25, f"{gpu}/test_gpu_kernel.py", group="a"),
        kernel_benchmark,
        lambda: tests("augment-tests", 8, 90, 40, f"{gpu}/test_gpu_augment.py", group="a"),
        augment_benchmark,
        decoding,
        lambda: tests(
            "loader-tests",
            8,
            90,
            45,
            f"{gpu}/test_gpu_loader.py",
            f"{gpu}/test_gpu_pinned.py",
            f"{gpu}/test_gpu_fn.py",
            "-k",
            f"not regions and not ({alone})",
            group="c",
        ),
        lambda: tests(
            "alone-tests",
            1,
            100,
            45,
            f"{gpu}/test_gpu_loader.py",
            f"{gpu}/test_gpu_pinned.py",
            "-k",
            f"not regions and ({alone})",
            group="c",
        ),
        loader_benchmark,
        raw_benchmark,
        waits,
        overhead,
        generation,
        regions,
    ]


NAMES = (
    *(
        "host",
        "resident-tests",
        "small-bench",
        "kernel-tests",
        "kernel-bench",
        "augment-tests",
        "augment-bench",
        "decode-probe",
        "loader-tests",
        "alone-tests",
    ),
    *("loader-bench", "raw-bench", "wait", "overhead", "generate", "region-tests"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"a to g, or {', '.join(NAMES)}")
    parser.add_argument("--out", type=Path, required=True, help="logs, records, and what is known of each step")
    parser.add_argument("--archive", type=Path, help="FOLDER/suite.tar.gz, unless said otherwise")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for the rehearsal")
    parser.add_argument("--photographs", type=Path, default=ROOT.parent / "shared" / "data" / "imagenet_sample")
    parser.add_argument("--resume", action="store_true", help="leave out what has passed")
    parser.add_argument("--deadline", type=float, help="seconds for all of it")
    parser.add_argument("--rounds", type=int, help="counted rounds of each benchmark")
    parser.add_argument("--only", default="", help="contenders of the loader benchmark, separated by commas")
    parser.add_argument("--scale", type=float, default=1.0, help="of all time limits, for a slow machine")
    options = parser.parse_args()
    begin = time.monotonic()
    made = [make() for make in steps(options)]
    known = {step.group for step in made} | {step.name for step in made}
    if unknown := set(options.steps) - known:
        parser.error(f"there is no step {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the step too
    sys.path.insert(0, str(ROOT))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    os.environ["PYTHONUNBUFFERED"] = "1"
    deadline = None if options.deadline is None else begin + options.deadline
    suite = Suite(options.out, options.archive or options.out / "suite.tar.gz", deadline=deadline)
    for make in steps(options):
        step = make()
        if not options.steps or {step.name, step.group} & set(options.steps):
            if options.scale != 1:
                step = Step(**{**vars(step), "limit": step.limit * options.scale})
            suite.take(step, resume=options.resume)
    print("\n".join(["", "== all that is known", *suite.table()]), flush=True)
    print(f"== {time.monotonic() - begin:.0f} s in all; the archive is whole after each step", flush=True)
    sys.exit(0 if all(row["state"] == "passed" for row in suite.known.values()) else 1)


if __name__ == "__main__":
    main()
