"""Train an image classifier, ImageNet-style, from a recipe.

    python examples/train.py examples/recipes/cub.toml --data data/CUB_200_2011 --cache cache/cub --out runs/cub
    torchrun --nproc-per-node 8 examples/train.py examples/recipes/imagenet.toml --data data/imagenet ... --amp float16

The edits and fractals of the recipe are made in --cache if they are missing, by one process; --prepare does only this.
--edits and --fractals name others. Run the same command again to resume an interrupted run from the last checkpoint,
also in the middle of an epoch. On a CPU the weights then equal those of an uninterrupted run.

--out gets train.csv (every update), valid.csv, run.json, last.pt, best.pt (best on validation), curve.png if matplotlib
is installed, and tensorboard/ if TensorBoard is. --set changes a recipe: --set train.epochs=2 --set mix.preset=none.

--resident host keeps raw copies of images and edits in memory, once for all processes of the machine, so that nothing
is decoded while training. The samples are the same.
"""

import argparse
import contextlib
import csv
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import models
import torch
from batch_transforms import batch_transform
from data import Parts, parts, plain_set, prepare, raw_fits, train_set
from evaluate import evaluate
from recipe import Recipe, Train
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record
from world import World

import dali_diffusemix
from dali_diffusemix import DiffuseMixLoader
from dali_diffusemix.bench import machine
from dali_diffusemix.errors import ConfigError, DiffuseMixError

VERSION = 1


class TrainingError(DiffuseMixError):
    """Training cannot continue."""


def learning_rate(settings: Train, update: int, updates: int, warmup: float) -> float:
    """Return the rate of an update, counted from 0: linear up to `lr` during warm-up, then a cosine to `lr_min`."""
    if update < warmup:
        return settings.lr * (update + 1) / (warmup + 1)
    share = (update - warmup) / max(updates - warmup, 1)
    return settings.lr_min + (settings.lr - settings.lr_min) * (1 + math.cos(math.pi * share)) / 2


class Table:
    """A CSV file that a resumed run appends to. Lines after the checkpoint, from a killed run, are dropped."""

    def __init__(self, file: Path, columns: Sequence[str], step: int) -> None:
        self.columns = columns
        rows = []
        if step and file.exists():
            with file.open(newline="") as stream:
                rows = [row for row in csv.DictReader(stream) if row["step"] and int(row["step"]) <= step]
        temporary = file.with_suffix(".tmp")
        with temporary.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, columns)
            writer.writeheader()
            writer.writerows(rows)
        temporary.replace(file)
        self.stream = file.open("a", newline="")
        self.writer = csv.DictWriter(self.stream, columns)

    def add(self, **row: object) -> None:
        self.writer.writerow(
            {name: f"{value:.9g}" if isinstance(value, float) else value for name, value in row.items()}
        )
        self.stream.flush()


class Log:
    """The first process's tables and TensorBoard files."""

    def __init__(self, out: Path, step: int) -> None:
        self.train = Table(out / "train.csv", ("step", "epoch", "lr", "loss"), step)
        self.valid = Table(out / "valid.csv", ("step", "epoch", "loss", "top1", "top5", "images"), step)
        self.board = None
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(out / "tensorboard"), purge_step=step or None)

    def add(self, table: str, **row: Any) -> None:
        getattr(self, table).add(**row)
        if self.board is not None:
            for name in set(row) - {"step", "epoch", "images"}:
                self.board.add_scalar(f"{table}/{name}", row[name], row["step"])

    def close(self) -> None:
        self.train.stream.close()
        self.valid.stream.close()
        if self.board is not None:
            self.board.close()


class Checkpoint:
    """last.pt and best.pt of a run."""

    def __init__(self, out: Path, recipe: Recipe, classes: Sequence[str]) -> None:
        self.last, self.best, self.recipe, self.classes = out / "last.pt", out / "best.pt", recipe, list(classes)

    def read(self) -> dict[str, Any] | None:
        """Return the last checkpoint, or None. Raises ConfigError if it is from another recipe or has other classes."""
        if not self.last.exists():
            return None
        try:
            found = torch.load(self.last, map_location="cpu", weights_only=True)
        except Exception as error:  # damaged bytes can raise anything
            raise ConfigError(f"{self.last} cannot be read ({error}); remove it to start again.") from error
        if found.get("version") != VERSION:
            raise ConfigError(f"{self.last} must be of version {VERSION}, found {found.get('version')!r}.")
        self.recipe.check_same(found["recipe"], str(self.last))
        if found["classes"] != self.classes:
            raise ConfigError(
                f"{self.last} is of other classes; give the data that it was trained on, or another --out."
            )
        return found

    def write(self, file: Path, **state: Any) -> None:
        """Write a checkpoint, completely or not at all."""
        content = {"version": VERSION, "recipe": self.recipe.tables(), "classes": self.classes, **state}
        temporary = file.with_suffix(".tmp")
        torch.save(content, temporary)
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(file)


class Clock:
    """Where the time of a run went, over all its starts; what a killed start did after its last checkpoint is lost."""

    def __init__(self, before: dict[str, float]) -> None:
        self.seconds = {"total": 0.0, "training": 0.0, "waiting": 0.0} | before
        self._start, self._paused = time.perf_counter(), 0.0

    def batches(self, loader: DiffuseMixLoader) -> Iterator[Any]:
        """Yield the loader's batches. Their time is training, the wait for them is waiting."""
        asked = time.perf_counter()
        for batch in loader:
            got, self._paused = time.perf_counter(), 0.0
            self.seconds["waiting"] += got - asked
            yield batch
            asked = time.perf_counter()
            self.seconds["training"] += asked - got - self._paused

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Validation and checkpoints are no training."""
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start

    def read(self) -> dict[str, float]:
        """Return the seconds so far, for a checkpoint."""
        now = time.perf_counter()
        self.seconds["total"], self._start = self.seconds["total"] + now - self._start, now
        return dict(self.seconds)


def train(options: argparse.Namespace, recipe: Recipe, divided: Parts, world: World) -> None:
    settings = recipe.train
    raw = options.raw if options.resident else None
    if settings.batch_size % world.size:
        raise ConfigError(
            f"train.batch_size is {settings.batch_size}, which {world.size} processes cannot share evenly."
        )
    training = train_set(recipe, divided, edits=options.edits, fractals=options.fractals, cache=options.cache, raw=raw)
    classes = training.classes
    if len(training) < settings.batch_size:
        raise ConfigError(f"train.batch_size is {settings.batch_size}, but there are {len(training)} training samples.")
    memory_format = torch.channels_last if options.channels_last else torch.contiguous_format
    delivery: dict[str, Any] = {
        "num_workers": options.workers,
        "device": world.device,
        "memory_format": memory_format,
        "resident": options.resident,
    }
    loader = DiffuseMixLoader(
        training,
        settings.batch_size // world.size,
        shuffle=True,
        drop_last=True,
        batch_transform=batch_transform(settings.mixer, len(classes)),
        **delivery,
    )
    valid_raw = raw and raw / ("train" if recipe.data.held_out else "test")
    valid_loader = DiffuseMixLoader(
        plain_set(recipe, divided.valid, raw=valid_raw), options.valid_batch_size, return_index=True, **delivery
    )
    updates = settings.updates or settings.epochs * len(loader)
    warmup = settings.warmup_epochs * len(loader) + settings.warmup_updates
    validate_every = settings.validate_every or len(loader)

    torch.manual_seed(settings.seed)
    model = models.build(
        recipe.model.name,
        len(classes),
        weights=recipe.model.weights,
        small=recipe.model.small,
        width=recipe.model.width,
    ).to(world.device, memory_format=memory_format)
    optimizer = torch.optim.SGD(
        model.parameters(),
        settings.lr,
        momentum=settings.momentum,
        nesterov=settings.nesterov,
        weight_decay=settings.weight_decay,
    )
    criterion = nn.CrossEntropyLoss(label_smoothing=settings.label_smoothing)
    amp = getattr(torch, options.amp) if options.amp else None
    scaler = torch.amp.GradScaler(world.device.type, enabled=amp is torch.float16)

    checkpoint = Checkpoint(options.out, recipe, classes)
    state = checkpoint.read()
    step, best = 0, {"step": 0, "top1": -1.0}
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        loader.load_state_dict(state["loader"])
        if len(state["random"]) == world.size:
            torch.set_rng_state(state["random"][world.rank])
        step, best = state["step"], state["best"]
    parallel = world.parallel(torch.compile(model) if options.compile else model)
    log = Log(options.out, step) if world.is_first else None
    clock = Clock({} if state is None else state.get("clock", {}))
    started = Started(options, recipe, divided, world, updates, step, clock)

    def save(file: Path) -> None:
        random = world.gathered(torch.get_rng_state())
        if not world.is_first:
            return
        if not all(bool(torch.isfinite(one).all()) for one in model.parameters()):
            raise TrainingError(
                f"after step {step} weights are not finite; {checkpoint.last} is the last good checkpoint."
            )
        checkpoint.write(
            file,
            step=step,
            best=best,
            model=model.state_dict(),
            optimizer=optimizer.state_dict(),
            scaler=scaler.state_dict(),
            loader=loader.state_dict(),
            random=random,
            clock=clock.read(),
        )

    def validate() -> None:
        world.same_buffers(model)
        scores = evaluate(model, valid_loader, world)
        if scores.top1 > best["top1"]:
            best.update(step=step, top1=scores.top1)
            save(checkpoint.best)
        if log is not None:
            row = {"loss": float(scores.loss.mean()), "top1": scores.top1, "top5": scores.top5}
            log.add("valid", step=step, epoch=step / len(loader), images=len(scores.rank), **row)
            print(
                f"step {step:,}: validation top-1 {scores.top1:.2%}, best {best['top1']:.2%} at {best['step']:,}",
                flush=True,
            )

    pending: list[tuple[int, float, torch.Tensor]] = []  # updates whose losses are not checked yet

    def flush() -> None:
        if not pending:
            return
        losses = world.mean(torch.stack([loss for _, _, loss in pending]).float()).tolist()
        for (at, rate, _), loss in zip(pending, losses, strict=True):
            if not math.isfinite(loss):
                where = f"{checkpoint.last} is the last good one" if checkpoint.last.exists() else "there is none yet"
                raise TrainingError(
                    f"the loss of step {at} is {loss}: training stops, and no checkpoint was written since; {where}. "
                    "Lower train.lr, lengthen train.warmup_epochs, or use bfloat16."
                )
            if log is not None:
                log.add("train", step=at, epoch=at / len(loader), lr=rate, loss=loss)
        pending.clear()

    try:
        while step < updates:
            for images, labels in clock.batches(loader):
                parallel.train()
                rate = learning_rate(settings, step, updates, warmup)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                labels = labels.to(images.device, non_blocking=True)
                with torch.autocast(world.device.type, amp, enabled=amp is not None):
                    loss = criterion(parallel(images), labels)
                optimizer.zero_grad(set_to_none=True)
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                step += 1
                pending.append((step, rate, loss.detach()))
                last = step == updates
                due = last or step % options.checkpoint_every == 0
                if due or step % options.log_every == 0 or step % validate_every == 0:
                    flush()
                    started.show(step, step / len(loader))
                with clock.pause():
                    if last or step % validate_every == 0:
                        validate()
                    if due:
                        save(checkpoint.last)
                if last:
                    break
    finally:
        loader.close()
        valid_loader.close()
        if log is not None:
            log.close()
    if log is not None:
        started.finish(best)
        plot(options.out)


class Started:
    """Progress lines and run.json."""

    def __init__(
        self,
        options: argparse.Namespace,
        recipe: Recipe,
        divided: Any,
        world: World,
        updates: int,
        step: int,
        clock: Clock,
    ) -> None:
        self.options, self.updates, self.world, self.clock = options, updates, world, clock
        self.batch_size, self.before = recipe.train.batch_size, (time.perf_counter(), step, clock.seconds["waiting"])
        self.file = options.out / "run.json"
        self.run: dict[str, Any] = {"starts": 0}
        if step and self.file.exists():
            self.run = json.loads(self.file.read_text())
        self.run |= {
            "recipe": recipe.tables(),
            "data": {
                name: {"images": len(catalog), "fingerprint": catalog.fingerprint}
                for name, catalog in (
                    ("train", divided.train),
                    ("valid", divided.valid.catalog),
                    ("test", divided.test.catalog),
                )
            },
            "processes": world.size,
            "device": str(world.device),
            "amp": options.amp,
            "resident": options.resident,
            "updates": updates,
            "starts": self.run["starts"] + 1,
            "version": dali_diffusemix.__version__,
            "machine": machine(),
            "finished": False,
        }
        if world.is_first:
            self._write()
            counts = ", ".join(f"{one['images']:,} for {name}" for name, one in self.run["data"].items())
            print(f"images: {counts}; {updates:,} updates of {self.batch_size}", flush=True)
            if step:
                print(f"resuming after step {step:,}", flush=True)

    def show(self, step: int, epoch: float) -> None:
        now, (before, step_before, waited_before) = time.perf_counter(), self.before
        if not self.world.is_first or (now - before < self.options.show_every and step < self.updates):
            return
        rate = (step - step_before) / (now - before)
        waited = (self.clock.seconds["waiting"] - waited_before) / (now - before)
        left = (self.updates - step) / rate
        self.before = (now, step, self.clock.seconds["waiting"])
        print(
            f"step {step:,} of {self.updates:,}  epoch {epoch:.2f}  "
            f"{rate * self.batch_size:,.0f} images/s  "
            f"in the loader {waited:.0%}  left {int(left) // 3600}:{int(left) // 60 % 60:02d}:{int(left) % 60:02d}",
            flush=True,
        )

    def finish(self, best: dict[str, Any]) -> None:
        seconds = self.clock.read()
        steps = seconds["training"] + seconds["waiting"]
        self.run |= {
            "finished": True,
            "best": best,
            "seconds": seconds["total"],
            "images_per_second": round(self.updates * self.batch_size / steps, 1),
            "loader_share": round(seconds["waiting"] / steps, 4),
        }
        self._write()

    def _write(self) -> None:
        temporary = self.file.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.run, indent=1) + "\n")
        temporary.replace(self.file)


def plot(out: Path) -> None:
    """Write curve.png: losses and validation accuracy over updates."""
    try:
        import matplotlib
    except ImportError:
        print("no curve.png: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    def column(name: str, of: str) -> tuple[list[float], list[float]]:
        with (out / f"{name}.csv").open(newline="") as stream:
            rows = list(csv.DictReader(stream))
        return [float(row["step"]) for row in rows], [float(row[of]) for row in rows]

    steps, losses = column("train", "loss")
    window = max(len(losses) // 100, 1)
    smooth = [
        sum(losses[max(0, i - window) : i + 1]) / len(losses[max(0, i - window) : i + 1]) for i in range(len(losses))
    ]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    left.plot(steps, losses, color="#bbccdd", linewidth=0.7, label="training, each update")
    left.plot(steps, smooth, color="#1f5fa8", label="training, mean of neighbours")
    left.plot(*column("valid", "loss"), color="#c04a1a", marker=".", label="validation")
    left.set(xlabel="updates", ylabel="loss", title="Loss")
    left.legend(frameon=False)
    for of, colour in (("top1", "#c04a1a"), ("top5", "#d9a07f")):
        x, y = column("valid", of)
        right.plot(x, [100 * one for one in y], color=colour, marker=".", label=f"{of[:3]}-{of[3]}")
    right.set(xlabel="updates", ylabel="%", title="Validation accuracy")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.savefig(out / "curve.png", dpi=120)
    pyplot.close(figure)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="a TOML file; see examples/recipes")
    parser.add_argument("--data", type=Path, required=True, help="the dataset's folder, as unpacked")
    parser.add_argument("--out", type=Path, help="the run's folder; default runs/RECIPE")
    parser.add_argument("--cache", type=Path, help="folder for edits and fractals; default cache/RECIPE")
    parser.add_argument("--edits", type=Path, help="an edit store to use instead")
    parser.add_argument("--fractals", type=Path, help="a fractal bank to use instead")
    parser.add_argument("--prepare", action="store_true", help="only make edits and fractals")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="change the recipe")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=4, help="loader threads per process")
    parser.add_argument(
        "--resident", choices=("host", "device", "auto"), help="keep raw images there; auto: if they fit"
    )
    parser.add_argument("--raw", type=Path, help="folder for the raw copies of images; default CACHE/raw")
    parser.add_argument("--amp", choices=("bfloat16", "float16"), help="mixed precision")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--valid-batch-size", type=int, default=128, help="per device")
    parser.add_argument("--log-every", type=int, default=20, help="updates between checks of the losses")
    parser.add_argument("--checkpoint-every", type=int, default=500, help="updates between checkpoints")
    parser.add_argument("--show-every", type=float, default=5.0, help="seconds between progress lines")
    options = parser.parse_args(arguments)
    options.out = options.out or Path("runs") / options.recipe.stem
    options.cache = options.cache or Path("cache") / options.recipe.stem
    return options


@record
def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    recipe = Recipe.read(options.recipe, options.set)
    with World(options.device) as world:
        ours = options.edits is None
        options.edits = options.edits or options.cache / "edits"
        options.fractals = options.fractals or options.cache / "fractals.npy"
        options.raw = options.raw or options.cache / "raw"
        options.cache.mkdir(parents=True, exist_ok=True)
        divided = parts(recipe, options.data)
        if options.resident == "auto":
            options.resident = "host" if raw_fits(recipe, divided) else None
        if (ours and world.size == 1) or options.prepare:
            prepare(recipe, divided, options.cache, options.raw if options.resident else None)
        if not options.prepare:
            options.out.mkdir(parents=True, exist_ok=True)
            train(options, recipe, divided, world)


if __name__ == "__main__":
    try:
        main()
    except DiffuseMixError as error:
        sys.exit(f"train.py: {error}")
    except KeyboardInterrupt:
        print("train.py: interrupted; the same command resumes from the last checkpoint", file=sys.stderr)
        sys.exit(130)
