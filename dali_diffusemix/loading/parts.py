"""The datasets behind a loader, which may be given a Subset or ConcatDataset of them, nested in any way.

A part draws what the whole draws for the same index. Where it holds an index several times (oversampling), the second
time is another view, and so on, whichever rank draws it.
"""

import hashlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import ConcatDataset, Subset

from dali_diffusemix.errors import ConfigError
from dali_diffusemix.loading.dataset import DiffuseMixDataset
from dali_diffusemix.loading.samplers import addresses, occurrences
from dali_diffusemix.loading.settled import SCHEDULED, check_unchanged
from dali_diffusemix.plan.schedule import Schedule, epochs_of, setting_at


class Share(NamedTuple):
    """The samples of a batch that one dataset makes."""

    number: int  # of the dataset
    rows: NDArray[np.int64]  # (m,) in the batch
    indices: NDArray[np.int64]  # (m,) in the dataset
    views: NDArray[np.int64]  # (m,)


class Parts:
    """The datasets behind a dataset, Subset or ConcatDataset, nested in any way, and where its indices lie in them.

    Args:
        dataset: What the loader was given.

    Raises:
        ConfigError: it is something else or holds something else, or the datasets' samples differ in size.
    """

    def __init__(self, dataset: Any) -> None:
        self.datasets: list[DiffuseMixDataset] = []
        self._places: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None  # dataset and index of each index
        places = _resolve(dataset, self.datasets)
        if not isinstance(dataset, DiffuseMixDataset):
            self._places = places
            self._view = occurrences(places[0] << 44 | places[1])
            self._views = int(self._view.max(initial=0)) + 1
        for epoch in sorted({epoch for one in self.datasets for epoch in epochs_of(one.crop)}):
            sizes = {setting_at(one.crop, epoch).output_size for one in self.datasets}
            if len(sizes) > 1:
                raise ConfigError(
                    f"crop must give one size in all datasets of a loader, found {sorted(sizes)} in epoch {epoch}."
                )

    @property
    def whole(self) -> bool:
        """True for a dataset itself: an index is the dataset's."""
        return self._places is None

    @property
    def first(self) -> DiffuseMixDataset:
        """The dataset whose seed orders the epochs."""
        return self.datasets[0]

    @property
    def fingerprint(self) -> str:
        """Identifies the originals, and which of them come where."""
        if self._places is None:
            return self.first.catalog.fingerprint
        found = hashlib.sha256()
        for number, one in enumerate(self.datasets):
            seed = one.seed if number else None  # that of the first is in a state by itself
            found.update(f"{one.catalog.fingerprint} {len(one)} {seed};".encode())
        for column in self._places:
            found.update(column.astype("<i8").tobytes())
        return found.hexdigest()

    @property
    def schedules(self) -> list[dict[str, str]]:
        """The settings of each dataset that change with the epoch, as text; empty if there are none at all."""
        found = [
            {name: _described(value) for name in SCHEDULED if isinstance(value := getattr(one, name), Schedule)}
            for one in self.datasets
        ]
        return found if any(found) else []

    def output_size(self, epoch: int) -> tuple[int, int]:
        """(height, width) of the samples of an epoch, pixels."""
        return setting_at(self.first.crop, epoch).output_size

    def set_epoch(self, epoch: int) -> None:
        """Tell the datasets, for whoever asks them for samples."""
        for one in self.datasets:
            if one.epoch != epoch:
                one.set_epoch(epoch)

    def shares(self, indices: NDArray[np.int64], views: NDArray[np.int64]) -> Iterator[Share]:
        """Divide a batch, (n,) indices and views of what the loader was given, among the datasets."""
        if self._places is None:
            yield Share(0, np.arange(len(indices)), indices, views)
            return
        which, index = (column[indices] for column in self._places)
        views = views * self._views + self._view[indices]
        for number in np.unique(which).tolist():
            rows = np.flatnonzero(which == number)
            yield Share(number, rows, index[rows], views[rows])


def _described(schedule: Schedule[Any]) -> str:
    """A Schedule as text that another process can compare: without addresses in memory."""
    values = [_text(value) for _, value in schedule.steps]
    steps = ", ".join(f"{epoch}: {text}" for epoch, text in zip(schedule.epochs, values, strict=True))
    return re.sub(r" at 0x[0-9a-fA-F]+", "", f"Schedule({{{steps}}})")


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_text, value))}{',' * (len(value) == 1)})"
    text = repr(value)
    # Python's own repr, as of a user's crop, hides the attributes.
    return f"{text} {getattr(value, '__dict__', '')}" if " at 0x" in text else text


def _resolve(dataset: Any, into: list[DiffuseMixDataset]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The number of the dataset and the index in it, of every index of `dataset`; new datasets are appended."""
    if isinstance(dataset, DiffuseMixDataset):
        number = next((i for i, one in enumerate(into) if one is dataset), len(into))
        if number == len(into):
            into.append(dataset)
        return np.full(len(dataset), number), np.arange(len(dataset))
    if isinstance(dataset, Subset | ConcatDataset):
        check_unchanged(dataset)
    if isinstance(dataset, Subset):
        which, index = _resolve(dataset.dataset, into)
        given: Any = dataset.indices  # torch says a sequence; arrays work too
        given = given if isinstance(given, np.ndarray) else list(given)
        rows, _ = addresses(given, len(which))
        return which[rows], index[rows]
    if isinstance(dataset, ConcatDataset):
        found = [_resolve(one, into) for one in dataset.datasets]
        return np.concatenate([which for which, _ in found]), np.concatenate([index for _, index in found])
    raise ConfigError(
        f"dataset must be a DiffuseMixDataset, or a Subset or ConcatDataset of such, found {type(dataset).__name__}. "
        "Instead of it write\n"
        '    dataset = DiffuseMixDataset("path/to/train", crop=TrainCrop(224))\n'
        "    loader = DiffuseMixLoader(dataset, batch_size=...)\n"
        "or keep torch.utils.data.DataLoader for datasets of other kinds."
    )
