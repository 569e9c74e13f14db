"""Batches of edits: images of one size together, as many as fit in memory."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dali_diffusemix.errors import ConfigError
from dali_diffusemix.generate.editors import EditTask, instruction
from dali_diffusemix.generate.editors.diffusers.adapters import Adapter

_log = logging.getLogger(__name__)

Item = TypeVar("Item")
Made = TypeVar("Made")


class DiffusersEditor:
    """Edits with a diffusion pipeline; `DiffusersConfig.load` makes it."""

    def __init__(self, adapter: Adapter, prompts: Sequence[str], batch_size: int) -> None:
        self._adapter = adapter
        self._pipeline = adapter.loaded
        self._prompts = tuple(prompts)
        self._batch_size = batch_size if adapter.in_batches else 1
        with self._computing():
            for prompt in self._prompts:
                text = self._text(prompt, "{class}")
                if "{class}" not in text:
                    adapter.embedded(text)

    def edit(self, images: Sequence[NDArray[np.uint8]], tasks: Sequence[EditTask]) -> list[NDArray[Any]]:
        """Return one edit per task, in the tasks' order; see `Editor.edit`.

        Args:
            images: Originals, each (height, width, 3) uint8 RGB; sides divisible by the config's `multiple`.
            tasks: The edits to make; each names one of the editor's prompts.

        Raises:
            ConfigError: A task names another prompt, a side is not divisible, or a single edit does not fit in the
                GPU's memory.
        """
        for task in tasks:
            if task.prompt not in self._prompts:
                raise ConfigError(
                    f"prompt must be one of {list(self._prompts)}, found {task.prompt!r}; name it in `load`."
                )
        edits: dict[int, NDArray[Any]] = {}
        # Images of one size make a batch.
        order = sorted(range(len(tasks)), key=lambda task: images[tasks[task].image].shape[:2])
        with self._computing():
            for size, group in groupby(order, key=lambda task: images[tasks[task].image].shape[:2]):
                edits |= self._edit_size(size, images, tasks, list(group))
        return [edits[task] for task in range(len(tasks))]

    def _edit_size(
        self, size: tuple[int, ...], images: Sequence[NDArray[np.uint8]], tasks: Sequence[EditTask], group: list[int]
    ) -> dict[int, NDArray[Any]]:
        """Index of each task of a group to its edit; their images are of one size, (height, width)."""
        height, width = size
        divisor = self._adapter.multiple
        if height % divisor or width % divisor:
            raise ConfigError(
                f"edit_size must be divisible by {divisor} for {self._adapter.pipeline}, found {height} x {width}."
            )
        working = self._adapter.working_size(height, width)
        inputs = self._in_batches(
            sorted({tasks[task].image for task in group}),
            lambda batch: self._adapter.encode([_resized(images[image], *working) for image in batch]),
        )

        def make(batch: list[int]) -> list[NDArray[Any]]:
            chosen = [tasks[task] for task in batch]
            made = self._adapter.make(
                [inputs[task.image] for task in chosen],
                [self._text(task.prompt, task.class_name) for task in chosen],
                [task.seed for task in chosen],
                *working,
            )
            return self._pixels(made, working, (height, width))

        return self._in_batches(group, make)

    def _text(self, prompt: str, class_name: str) -> str:
        return instruction(self._adapter.options.template, prompt, class_name)

    def _in_batches(self, items: list[Item], make: Callable[[list[Item]], Sequence[Made]]) -> dict[Item, Made]:
        """Item to what `make` makes of it; a batch that does not fit in memory is halved, from then on."""
        made: dict[Item, Made] = {}
        left = items
        while left:
            batch = left[: self._batch_size]
            try:
                made.update(zip(batch, make(batch), strict=True))
            except Exception as error:
                self._halve(error)
                continue
            left = left[len(batch) :]
        return made

    def _halve(self, error: Exception) -> None:
        """Halve the batch size if the GPU's memory was too small; else raise the error."""
        import torch

        if not isinstance(error, torch.OutOfMemoryError):
            raise error
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if self._batch_size == 1:
            raise ConfigError(
                "edit_size must be such that one edit fits in the GPU's memory, found too little for a batch of 1: "
                f"make it smaller, or the dtype ({self._adapter.options.dtype}), quantize the model, or use a GPU with "
                f"more memory. {error}"
            ) from error
        self._batch_size //= 2
        _log.warning("The batch does not fit in the GPU's memory; its size is halved to %d edits.", self._batch_size)

    def _pixels(self, images: Any, working: tuple[int, int], size: tuple[int, int]) -> list[NDArray[Any]]:
        """Tensors (n, 3, height, width) from 0 to 1 as arrays: uint8, or float32 where a number is not finite."""
        import torch

        images = images.to(torch.float32) if isinstance(images, torch.Tensor) else torch.stack(list(images)).float()
        if tuple(images.shape[-2:]) != working:
            raise ConfigError(
                f"model: {self._adapter.pipeline} must answer in the size that it is asked for, {working}, found "
                f"{tuple(images.shape[-2:])}; this model cannot be used."
            )
        if working != size:
            images = torch.nn.functional.interpolate(images, size, mode="bicubic", antialias=True)
        images = images.permute(0, 2, 3, 1)
        finite = images.isfinite().all(dim=3).all(dim=2).all(dim=1).tolist()
        whole = (images.nan_to_num() * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
        return [
            np.ascontiguousarray(whole[index]) if ok else (images[index] * 255).cpu().numpy()
            for index, ok in enumerate(finite)
        ]

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Run without gradients; on a CPU with one thread, so that results do not depend on the number of threads."""
        import torch

        threads = torch.get_num_threads()
        one = self._pipeline.device.type == "cpu"
        try:
            if one:
                torch.set_num_threads(1)
            with torch.inference_mode():
                yield
        finally:
            if one:
                torch.set_num_threads(threads)


def _resized(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
