"""Parts of a dataset: by indices, by stratified split, by folds."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Subset

from dali_diffusemix.errors import ConfigError
from dali_diffusemix.loading.description import part
from dali_diffusemix.loading.samplers import View, addresses, occurrences
from dali_diffusemix.loading.settled import Settled
from dali_diffusemix.plan.order import split_order

if TYPE_CHECKING:
    from dali_diffusemix.loading.dataset import DiffuseMixDataset, Sample


class Divisible(Settled, ABC):
    """A dataset or a part of one: it can be divided, and knows its labels."""

    @abstractmethod
    def _whole(self) -> "tuple[DiffuseMixDataset, NDArray[np.int64]]":
        """The dataset, and the (n,) indices in it that this holds."""

    def subset(self, indices: Iterable[int] | NDArray[np.int64]) -> "DiffuseMixSubset":
        """The part with these indices, in their order. A sample of a part is the sample of the whole.

        An index that is given several times (oversampling) has other random numbers each time.

        Raises:
            IndexError: there is no such index.
        """
        dataset, mine = self._whole()
        given = indices if isinstance(indices, np.ndarray) else list(indices)
        return DiffuseMixSubset(dataset, mine[addresses(given, len(mine))[0]])

    def split(self, *fractions: float, seed: int = 0) -> "list[DiffuseMixSubset]":
        """Disjoint random parts, each with about the same share of every class.

        In an expanded epoch the edits of an original are in its part. The parts depend on the labels and the seed only:
        split a dataset for training and one for validation (other crop, mix=None) of the same originals alike, and
        take the first part of the one and the second of the other.

        Args:
            fractions: The parts' shares, above 0, with sum 1.
            seed: Draws the parts, 0 ≤ seed < 2³². The dataset's seed has no influence.

        Raises:
            ConfigError: a fraction or their sum breaks the rule.
        """
        if not fractions or min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-6:
            raise ConfigError(f"fractions must be above 0 with sum 1, found {fractions}; for example split(0.8, 0.2).")
        ordered, mine = self._stratified(seed)
        parts, left = [], np.arange(len(ordered))
        for number, fraction in enumerate(fractions[:-1]):
            share = fraction / sum(fractions[number:])
            steps = np.floor(np.arange(len(left) + 1) * share + 1e-9)
            taken = steps[1:] > steps[:-1]
            parts.append(left[taken])
            left = left[~taken]
        return [self._of(ordered[part], mine) for part in [*parts, left]]

    def folds(self, count: int, seed: int = 0) -> "list[tuple[DiffuseMixSubset, DiffuseMixSubset]]":
        """Training and validation part for each of `count` folds of cross-validation, stratified as in `split`.

        Raises:
            ConfigError: there are fewer than two folds, or fewer originals than folds.
        """
        ordered, mine = self._stratified(seed)
        if not 2 <= count <= len(ordered):
            raise ConfigError(f"count must lie in [2, {len(ordered)}], the number of originals, found {count}.")
        fold = np.arange(len(ordered)) % count
        return [(self._of(ordered[fold != k], mine), self._of(ordered[fold == k], mine)) for k in range(count)]

    def class_weights(self) -> torch.Tensor:
        """(classes,) float32 weights that balance the classes: originals / (classes x originals of the class).

        For `CrossEntropyLoss(weight=...)`; `class_weights()[targets]` are weights for `WeightedRandomSampler`. A class
        without originals has weight 0.

        Raises:
            ConfigError: the targets are no class numbers.
        """
        dataset, mine = self._whole()
        labels = dataset.class_labels()[np.unique(dataset.planner.originals_of(mine))]
        counts = np.bincount(labels, minlength=max(len(dataset.classes), int(labels.max(initial=-1)) + 1))
        used = np.maximum(counts, 1)
        return torch.from_numpy(np.where(counts > 0, len(labels) / (len(counts) * used), 0).astype(np.float32))

    def _stratified(self, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The originals of this part, class after class, drawn within each; and the original of each index."""
        dataset, mine = self._whole()
        of_index = dataset.planner.originals_of(mine)
        originals = np.unique(of_index)
        drawn = originals[split_order(len(originals), seed)]
        labels = dataset.catalog.labels[drawn]
        return drawn[np.argsort(labels, kind="stable")], of_index

    def _of(self, originals: NDArray[np.int64], of_index: NDArray[np.int64]) -> "DiffuseMixSubset":
        """The part of this one that shows these originals."""
        return self.subset(np.flatnonzero(np.isin(of_index, originals)))


class DiffuseMixSubset(Subset[Any], Divisible):
    """A part of a `DiffuseMixDataset`, made by its `subset`, `split` or `folds`.

    It is a `torch.utils.data.Subset` with the dataset's attributes; `dataset` is the whole.
    """

    def __init__(self, dataset: "DiffuseMixDataset", indices: NDArray[np.int64]) -> None:
        super().__init__(dataset, indices)  # type: ignore[arg-type]
        self._view = occurrences(indices)
        self._views = int(self._view.max(initial=0)) + 1

    def _whole(self) -> "tuple[DiffuseMixDataset, NDArray[np.int64]]":
        return self.dataset, self.indices  # type: ignore[return-value]

    @property
    def classes(self) -> list[str]:
        """Class names of the whole, sorted."""
        return self._whole()[0].classes

    @property
    def class_to_idx(self) -> dict[str, int]:
        """Class name to label, of the whole."""
        return self._whole()[0].class_to_idx

    @property
    def targets(self) -> Any:
        """The target of every index: a list of labels, or rows of the array that the dataset was given."""
        dataset, mine = self._whole()
        originals = dataset.planner.originals_of(mine)
        whole = dataset.targets
        return [whole[row] for row in originals.tolist()] if isinstance(whole, list) else whole[originals]

    @property
    def samples(self) -> list[tuple[str, int]]:
        """(path, label) of the original of every index."""
        dataset, mine = self._whole()
        whole = dataset.samples
        return [whole[row] for row in dataset.planner.originals_of(mine).tolist()]

    imgs = samples

    @property
    def epoch(self) -> int:
        """The epoch of the whole."""
        return self._whole()[0].epoch

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the whole."""
        self._whole()[0].set_epoch(epoch)

    def __getitem__(self, index: int | View) -> "Sample":
        dataset, mine = self._whole()
        return dataset.samples_at(*self._located([index], mine))[0]

    def __getitems__(self, indices: Sequence[int | View]) -> "list[Sample]":
        """The samples of a batch of indices. DataLoader calls this instead of `part[i]`."""
        dataset, mine = self._whole()
        return dataset.samples_at(*self._located(indices, mine), counted=True)

    def _located(
        self, indices: Sequence[int | View], mine: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The indices and views in the whole."""
        rows, views = addresses(indices, len(mine))
        return mine[rows], views * self._views + self._view[rows]

    def __repr__(self) -> str:
        return part(self)
