"""A small training script that may be killed at any moment and started again, with any number of processes.

    python tests/training.py ROOT EDITS FRACTALS OUT --epochs 3 --batch-size 16 --shuffle
    torchrun --nproc-per-node 4 tests/training.py ROOT EDITS FRACTALS OUT --epochs 3 --batch-size 4 --shuffle

It goes on from OUT/checkpoint.pt if that is there. Each start is a run, numbered from 0, and leaves in OUT

    run-N.json         written by rank 0 once the state is loaded: processes, batch size and the step it begins with
    log-N-RANK.jsonl   one line for each step, written before the step's gradients are exchanged: the samples' indices,
                       a hash of each one's pixels, and the loss

The rest of the module reads that back: `delivered` is what the training saw, all runs together.
"""

import argparse
import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

SCRIPT = Path(__file__)


# --- the script ----------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a tiny network.")
    for name in ("root", "edits", "fractals", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=8, help="of each process")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shuffle", action="store_true")
    parser.add_argument("--mix", choices=("fixed", "expanded"), default="fixed")
    parser.add_argument("--size", type=int, default=32, help="of a sample's side, pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=3, help="steps between checkpoints")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds that a step takes besides")
    return parser.parse_args(arguments)


def train(options: argparse.Namespace) -> None:
    import torch
    from torch import distributed, nn

    from dali_diffusemix import DiffuseMixDataset, DiffuseMixLoader, MixSpec, TrainCrop

    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        distributed.init_process_group("gloo")
    rank = distributed.get_rank() if world_size > 1 else 0

    dataset = DiffuseMixDataset(
        options.root,
        edits=options.edits,
        fractals=options.fractals,
        mix=MixSpec(epoch=options.mix),
        crop=TrainCrop(options.size),
        seed=options.seed,
    )
    loader = DiffuseMixLoader(
        dataset,
        options.batch_size,
        shuffle=options.shuffle,
        num_workers=options.threads,
        device="cpu",
        return_index=True,
    )
    network: nn.Module = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, len(dataset.classes)),
    )
    optimiser = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)

    checkpoint = options.out / "checkpoint.pt"
    options.out.mkdir(parents=True, exist_ok=True)
    epoch = step = 0
    if checkpoint.exists():
        stored = torch.load(checkpoint, weights_only=True)
        loader.load_state_dict(stored["loader"])
        network.load_state_dict(stored["network"])
        optimiser.load_state_dict(stored["optimiser"])
        epoch, step = stored["epoch"], stored["step"]
    run = torch.tensor(len(list(options.out.glob("run-*.json"))))
    if world_size > 1:
        distributed.broadcast(run, 0)  # so all have read the checkpoint before a new one is written
        network = nn.parallel.DistributedDataParallel(network)
    if rank == 0:
        begin = {"world_size": world_size, "batch_size": options.batch_size, "epoch": epoch, "step": step}
        replace(options.out / f"run-{run}.json", lambda file: file.write(json.dumps(begin).encode()))
    if world_size > 1:
        distributed.barrier()  # no line of a run without its beginning

    with (options.out / f"log-{run}-{rank}.jsonl").open("ab", buffering=0) as log, loader:
        while epoch < options.epochs:
            for images, labels, indices in loader:
                loss = nn.functional.cross_entropy(network(images), labels)
                hashes = [hashlib.blake2b(image.numpy().tobytes(), digest_size=12).hexdigest() for image in images]
                line = {"epoch": epoch, "step": step, "indices": indices.tolist(), "hashes": hashes}
                log.write(json.dumps({**line, "loss": loss.item().hex()}).encode() + b"\n")
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                step += 1
                epoch, step = (epoch, step) if step < len(loader) else (epoch + 1, 0)
                if rank == 0 and (step % options.every == 0 or epoch == options.epochs):
                    content = {
                        "loader": loader.state_dict(),
                        "network": getattr(network, "module", network).state_dict(),
                        "optimiser": optimiser.state_dict(),
                        "epoch": epoch,
                        "step": step,
                    }
                    replace(checkpoint, lambda file, content=content: torch.save(content, file))
                time.sleep(options.pause)
    if world_size > 1:
        distributed.destroy_process_group()


def replace(file: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file whole or not at all."""
    temporary = file.with_name(f".{file.name}.tmp")
    with temporary.open("wb") as stream:
        write(stream)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)
    folder = os.open(file.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


# --- for the tests: start, kill, read back --------------------------------------------------------------------------


class Training:
    """A started training, of one process or of several under torchrun; `warm` is as in warm.py, of one."""

    def __init__(
        self, arguments: Sequence[object], processes: int = 1, script: Path = SCRIPT, *, warm: bool = False
    ) -> None:
        command = [str(script), *map(str, arguments)]
        if processes > 1:
            launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
            command = [*launch, *command]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        self._process: Any = None
        if warm:
            from warm import Script

            self._process = Script(*command, env=environment)
            return
        self._process = subprocess.Popen(
            [sys.executable, *command],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def running(self) -> bool:
        return self._process.poll() is None

    def finish(self) -> None:
        """Wait for its end, which must be a good one."""
        errors = self._process.communicate(timeout=600)[1]
        assert self._process.returncode == 0, errors[-4000:]

    def kill(self) -> None:
        """End it, with all its processes, without a warning."""
        # What is stopped starts no more processes while they are looked for.
        with_children = [self._process.pid]
        for pid in with_children:
            _signal(pid, signal.SIGSTOP)
            with_children += _children(pid)
        for pid in with_children:
            _signal(pid, signal.SIGKILL)
        self._process.communicate()

    def kill_one(self, which: int) -> None:
        """End one of its worker processes without a warning, and wait until torchrun has ended the others."""
        workers = _children(self._process.pid)
        if not workers:
            return self.kill()
        _signal(workers[which % len(workers)], signal.SIGKILL)
        self._process.communicate(timeout=120)
        return None


def _children(pid: int) -> list[int]:
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:  # it has ended
        return []


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended
        os.kill(pid, number)


Step = tuple[int, int]
"""Epoch, and step in it."""


@dataclass(frozen=True)
class Run:
    """What a run left."""

    begin: Step
    world_size: int
    steps: dict[Step, dict[int, dict[str, Any]]]  # by rank: the line that it logged

    def batch(self, step: Step) -> list[tuple[int, str]]:
        """(index, hash) of a global batch's samples, rank after rank; every rank must have logged it."""
        lines = self.steps[step]
        assert sorted(lines) == list(range(self.world_size)), f"step {step}: logged by the ranks {sorted(lines)}"
        return [
            sample
            for rank in range(self.world_size)
            for sample in zip(lines[rank]["indices"], lines[rank]["hashes"], strict=True)
        ]

    def losses(self, step: Step) -> list[str]:
        return [self.steps[step][rank]["loss"] for rank in range(self.world_size)]


def runs(out: Path) -> list[Run]:
    """All runs that got as far as loading their state, in order."""
    found = []
    for number in range(len(list(out.glob("run-*.json")))):
        begin = json.loads((out / f"run-{number}.json").read_text())
        steps: dict[Step, dict[int, dict[str, Any]]] = {}
        for file in out.glob(f"log-{number}-*.jsonl"):
            *lines, _ = file.read_bytes().split(b"\n")  # the last is empty, or cut short by the kill
            for line in map(json.loads, lines):
                of_step = steps.setdefault((line["epoch"], line["step"]), {})
                rank = int(file.stem.rsplit("-", 1)[1])
                assert rank not in of_step, f"{file.name}: step {line['step']} twice"
                of_step[rank] = line
        found.append(Run((begin["epoch"], begin["step"]), begin["world_size"], steps))
    return found


def logged(out: Path) -> int:
    """How many lines all runs have logged; cheap enough to ask often."""
    return sum(file.read_bytes().count(b"\n") for file in out.glob("log-*-0.jsonl"))


def delivered(out: Path) -> dict[Step, list[tuple[int, str]]]:
    """(index, hash) of the samples of every step that counts: what came after a run's last checkpoint does not."""
    found = runs(out)
    steps: dict[Step, list[tuple[int, str]]] = {}
    for run, following in zip(found, [*found[1:], None], strict=True):
        for step in sorted(run.steps):
            if following is None or step < following.begin:
                assert step not in steps, f"step {step} counts twice"
                steps[step] = run.batch(step)
    return steps


def check_all_lines(out: Path, expected: dict[Step, list[tuple[int, str]]]) -> None:
    """Also what a run did after its last checkpoint must have been the right samples, of each rank by itself."""
    for run in runs(out):
        for step, lines in run.steps.items():
            batch = expected[step]
            full = len(expected[(0, 0)])
            for rank, line in lines.items():
                # `EpochOrder`'s rule; no test here has fewer samples than ranks in a last batch.
                low, high = (len(batch) * (rank + i) // run.world_size for i in (0, 1))
                assert len(batch) <= full
                assert list(zip(line["indices"], line["hashes"], strict=True)) == batch[low:high], (step, rank)


def kill_somewhere(
    training: Training,
    out: Path,
    draw: np.random.Generator,
    *,
    steps: tuple[int, int],
    seconds: float | None = None,
    one: int | None = None,
) -> dict[str, float | int | str]:
    """Kill a training after a random number of further steps, or at a random time after its start.

    Args:
        steps: From and to how many steps.
        seconds: Kill it at the latest so long after its start, wherever it is; None waits for the steps.
        one: Kill only this one of its processes.

    Returns:
        What was drawn, to be logged.
    """
    before, begin = logged(out), time.monotonic()
    wanted = int(draw.integers(steps[0], steps[1], endpoint=True))
    delay = float(draw.uniform(0, 0.05))
    limit = None if seconds is None else float(draw.uniform(0, seconds))
    while training.running() and logged(out) - before < wanted:
        if limit is not None and time.monotonic() - begin > limit:
            break
        if time.monotonic() - begin > 120:
            raise TimeoutError("the training does not get on")
        time.sleep(0.004)
    else:
        time.sleep(delay)
    assert training.running(), "the training was over before it was killed"
    if one is None:
        training.kill()
    else:
        training.kill_one(one)
    return {"steps": logged(out) - before, "wanted": wanted, "seconds": round(time.monotonic() - begin, 2)}


if __name__ == "__main__":
    train(parse())
