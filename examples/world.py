"""The training processes: one, or those started by torchrun."""

import os
from types import TracebackType
from typing import Self

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from dali_diffusemix.errors import ConfigError


class World:
    """This process and its device. With several processes it joins their group, and leaves it at the end."""

    def __init__(self, device: str) -> None:
        self.size, self.rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        self.device = torch.device(device)
        if self.device.type == "cuda":
            if not torch.cuda.is_available():
                raise ConfigError("--device cuda needs a GPU that torch can use, found none; use --device cpu.")
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", self.device.index or 0)))
            torch.cuda.set_device(self.device)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def __enter__(self) -> Self:
        if "WORLD_SIZE" in os.environ:
            distributed.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After an error the other processes may be waiting for this one: it exits, and torchrun stops them.
        if error is None and distributed.is_initialized():
            distributed.destroy_process_group()

    def parallel(self, model: nn.Module) -> nn.Module:
        """Wrap the model so that its gradients are averaged over the processes."""
        if self.size == 1:
            return model
        return DistributedDataParallel(model, [self.device.index] if self.device.type == "cuda" else None)

    def same_buffers(self, model: nn.Module) -> None:
        """Give every process the running means of the first one, as DDP does at the next batch."""
        if self.size > 1:
            for buffer in model.buffers():
                distributed.broadcast(buffer, 0)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        if self.size > 1:
            distributed.all_reduce(values)
            values /= self.size
        return values

    def largest(self, values: torch.Tensor) -> torch.Tensor:
        if self.size > 1:
            distributed.all_reduce(values, distributed.ReduceOp.MAX)
        return values

    def gathered(self, value: torch.Tensor) -> list[torch.Tensor]:
        """Return every process's tensor (all of one shape), by rank."""
        if self.size == 1:
            return [value]
        value = value.to(self.device)
        found = [torch.empty_like(value) for _ in range(self.size)]
        distributed.all_gather(found, value)
        return [one.cpu() for one in found]
