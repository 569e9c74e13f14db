"""Training under Transformers' Trainer that writes down what each rank was given; run by test_transformers.py."""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from samples import SIZE, described, training_set

from dali_diffusemix import DiffuseMixDataset, DiffuseMixLoader, EvalCrop
from dali_diffusemix.integrations.transformers import TrainerMixin

BATCH = 7  # leaves a last batch that is not full
EPOCHS = 2

Record = list[tuple[list[int], str]]
"""(labels, pixels) of every batch."""


def expected(data: Path, rank: int = 0, world_size: int = 1) -> Record:
    """What the loader by itself delivers in the epochs."""
    loader = DiffuseMixLoader(
        training_set(data), BATCH // world_size, shuffle=True, device="cpu", rank=rank, world_size=world_size
    )
    return [described(images, labels) for _ in range(EPOCHS) for images, labels in loader]


def record(out: Path, rank: int = 0) -> Record:
    """What `Trainer` noted."""
    return [(labels, pixels) for labels, pixels in map(json.loads, (out / f"{rank}.jsonl").read_text().splitlines())]


class Classifier(torch.nn.Module):
    """A linear classifier with dropout, which draws from torch's global generator."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = torch.nn.Dropout(0.5)
        self.network = torch.nn.Linear(3 * SIZE * SIZE, 3)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = self.network(self.dropout(pixel_values.flatten(1)))
        if labels is None:
            return {"logits": logits}
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


class Trainer(TrainerMixin, transformers.Trainer):  # type: ignore[misc]
    """The Trainer, noting what it is given in RANK.jsonl."""

    def training_step(self, model: Any, inputs: Any, *rest: Any) -> Any:
        out = Path(self.args.output_dir)
        out.mkdir(parents=True, exist_ok=True)
        with (out / f"{self.args.process_index}.jsonl").open("a") as file:
            file.write(json.dumps(described(inputs["pixel_values"], inputs["labels"])) + "\n")
        return super().training_step(model, inputs, *rest)


def arguments(out: Path, *, save: bool, size: int = BATCH, accumulation: int = 1, **options: Any) -> Any:
    return transformers.TrainingArguments(
        output_dir=str(out),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
        learning_rate=0.01,
        save_strategy="steps" if save else "no",
        save_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )


def trainer_of(
    data: Path, out: Path, *, save: bool = True, ranks: int = 1, loader: Any = None, sampler: Any = None, **options: Any
) -> Trainer:
    if loader is None:
        order = {"shuffle": True} if sampler is None else {"sampler": sampler}
        loader = DiffuseMixLoader(training_set(data), BATCH // ranks, num_workers=1, device="cpu", **order)
    valid = DiffuseMixLoader(DiffuseMixDataset(data / "photos", crop=EvalCrop(SIZE)), 8, device="cpu")
    torch.manual_seed(0)
    return Trainer(
        Classifier(),
        arguments(out, save=save, size=BATCH // ranks, **options),
        train_dataset=loader,
        eval_dataset={"valid": valid},
    )


def train(data: Path, out: Path, *, resume: Path | None = None, **options: Any) -> dict[str, torch.Tensor]:
    """Train, and return the weights."""
    trainer = trainer_of(data, out, **options)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    found: dict[str, torch.Tensor] = trainer.model.state_dict()
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[2])
    trained = train(Path(sys.argv[1]), folder, ranks=2, resume=Path(sys.argv[3]) if len(sys.argv) > 3 else None)
    if torch.distributed.get_rank() == 0:
        digest = {name: hashlib.sha256(value.numpy().tobytes()).hexdigest() for name, value in trained.items()}
        (folder / "weights.json").write_text(json.dumps(digest))
    torch.distributed.destroy_process_group()
