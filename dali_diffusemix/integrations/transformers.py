"""The loader under Hugging Face Transformers' Trainer.

    class Trainer(TrainerMixin, transformers.Trainer):
        pass

    trainer = Trainer(model, arguments, train_dataset=DiffuseMixLoader(...), eval_dataset=DiffuseMixLoader(...))

The Trainer would make DataLoaders of datasets; here it gets the loaders. It resumes within an epoch by its own
checkpoints: `skip_first_batches` of Accelerate makes a DataLoader from the attributes of a loader, and those of
`TrainerLoader` make one that delivers the loader's own batches, beginning after the skipped ones.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Final

from torch.utils.data import Dataset, SequentialSampler

from dali_diffusemix.errors import ConfigError
from dali_diffusemix.integrations.accelerate import AcceleratedLoader, check
from dali_diffusemix.loading.loader import DiffuseMixLoader

Inputs = Mapping[str, Any]

_ALIKE_IN_ALL_EPOCHS: Final = (list, tuple, range, SequentialSampler)


class TrainerMixin:
    """Put before `transformers.Trainer` among the bases of a class: it then takes loaders in place of datasets.

    `train_dataset`, `eval_dataset` (also several by name) and those given to `evaluate` and `predict` may be a
    `DiffuseMixLoader`. The loader's arguments decide about batches; the Trainer's `dataloader_*` arguments have no
    effect on it. Other datasets are left to the Trainer.
    """

    input_names: ClassVar[tuple[str, str]] = ("pixel_values", "labels")
    """The model's arguments that get images and labels."""

    # What is used of the Trainer.
    accelerator: Any
    args: Any
    state: Any
    train_dataset: Any
    eval_dataset: Any
    _train_batch_size: int

    def get_train_dataloader(self) -> Any:
        """The batches to train on; the Trainer calls this."""
        loader = self.train_dataset
        if not isinstance(loader, DiffuseMixLoader):
            return super().get_train_dataloader()  # type: ignore[misc]
        if loader.batch_size not in (None, self._train_batch_size):
            raise ConfigError(
                f"batch_size of the loader must be the Trainer's, {self._train_batch_size}, found {loader.batch_size}; "
                f"give TrainingArguments(per_device_train_batch_size={loader.batch_size}), and no auto_find_batch_size."
            )
        order = loader.sampler
        if not _setters(loader) and not isinstance(order, _ALIKE_IN_ALL_EPOCHS):
            raise ConfigError(
                f"sampler of the loader must have set_epoch, found {type(order).__name__}; the Trainer's checkpoints "
                "hold the number of the epoch only, so give DiffuseMixLoader(shuffle=True) instead, or a "
                "DistributedSampler."
            )
        return self._prepared(loader)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """The batches to evaluate on; the Trainer calls this."""
        chosen = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(chosen, str):
            chosen = self.eval_dataset[chosen]
        if not isinstance(chosen, DiffuseMixLoader):
            return super().get_eval_dataloader(eval_dataset)  # type: ignore[misc]
        return self._prepared(chosen)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """The batches to predict; the Trainer calls this."""
        if not isinstance(test_dataset, DiffuseMixLoader):
            return super().get_test_dataloader(test_dataset)  # type: ignore[misc]
        return self._prepared(test_dataset)

    def _prepared(self, loader: DiffuseMixLoader) -> "TrainerLoader":
        check(loader, self.accelerator)
        if loader.return_index:
            raise ConfigError(
                "return_index of the loader must be False, found True; the Trainer gives a model images and labels."
            )
        return TrainerLoader(AcceleratedLoader(loader, self.accelerator), self.input_names, self._epoch_of)

    def _epoch_of(self, batches: int) -> int:
        """The epoch that is trained, if each has so many batches."""
        steps = max(1, -(-batches // int(self.args.gradient_accumulation_steps)))
        return int(self.state.global_step) // steps


class TrainerLoader:
    """A `DiffuseMixLoader` as the Trainer uses its DataLoaders; `TrainerMixin` makes it.

    Args:
        prepared: The loader, which tells Accelerate where an epoch ends.
        names: Names of the images and the labels in the dictionaries that are delivered.
        epoch_of: The epoch that is being resumed, by the number of batches in one.
    """

    def __init__(
        self, prepared: AcceleratedLoader, names: tuple[str, str], epoch_of: Callable[[int], int] = lambda batches: 0
    ) -> None:
        self.prepared = prepared
        self._names = names
        self._epoch_of = epoch_of

    @property
    def batch_size(self) -> int | None:
        """Samples per batch, on each process."""
        return self.prepared.batch_size

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self.prepared)

    def __iter__(self) -> Iterator[Inputs]:
        for batch in self.prepared:
            yield dict(zip(self._names, batch, strict=True))

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration, also for a sampler."""
        for one in _setters(self.prepared.loader):
            one.set_epoch(epoch)
        self.prepared.set_epoch(epoch)

    # What `skip_first_batches` makes a DataLoader of: `dataset[step]` is a whole batch, made by the loader's threads.

    num_workers: Final = 0
    prefetch_factor: Final = None

    @property
    def dataset(self) -> "_Epoch":
        """The batches of the epoch that the Trainer resumes, by their number. Its length is that in samples."""
        return _Epoch(self)

    @property
    def sampler(self) -> None:
        """None: batches are numbered by `batch_sampler`."""
        return None

    @property
    def batch_sampler(self) -> list[list[int]]:
        """The numbers of the batches."""
        return [[step] for step in range(len(self))]

    @property
    def collate_fn(self) -> Callable[[list[Inputs]], Inputs]:
        """A function that returns the only batch in a list."""
        return _only


class _Epoch(Dataset[Inputs]):
    """The rest of an epoch. Batches are asked for one after the other, the first of them at any number."""

    def __init__(self, loader: TrainerLoader) -> None:
        self._loader = loader
        self._batches: Any = None
        self._next = 0

    def __len__(self) -> int:
        return len(self._loader.prepared.dataset)

    def __getitem__(self, step: int) -> Inputs:
        loader = self._loader
        if self._batches is None:
            loader.set_epoch(loader._epoch_of(len(loader)))
            loader.prepared.skip_first_batches(step)
            self._batches, self._next = iter(loader), step
        if step != self._next:
            raise ConfigError(
                f"batches must be taken in order: batch {self._next} is next, found {step}; iterate over the loader."
            )
        batch: Inputs = next(self._batches)
        self._next += 1
        if self._next == len(loader):
            self._batches.close()
            self._batches = None
        return batch


def _setters(loader: DiffuseMixLoader) -> list[Any]:
    """The samplers of a loader that take an epoch."""
    return [one for one in (loader.batch_sampler, loader.sampler) if hasattr(one, "set_epoch")]


def _only(batches: list[Inputs]) -> Inputs:
    (batch,) = batches
    return batch
