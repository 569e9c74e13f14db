"""Hugging Face Accelerate asks the DataLoaders that it prepared where an epoch ends, for gradient accumulation.

`Accelerator.prepare(loader)` passes over what is no DataLoader and reads nothing of it, so it would not know, and
gradients of an epoch's last batches would be stepped on in the next epoch. So iterators say it themselves.
"""

import sys
from typing import Any


class Ending:
    """One epoch, as Accelerate's GradientState sees it, if the program uses Accelerate."""

    end_of_dataloader = False  # True from the last batch on
    remainder = -1  # samples of the last batch to keep when gathering: all

    def __init__(self) -> None:
        module: Any = sys.modules.get("accelerate.state")
        in_use = module is not None and module.is_initialized()
        self._state: Any = module.GradientState() if in_use else None
        if self._state is not None:
            self._state._add_dataloader(self)

    def close(self) -> None:
        """The loop over the epoch has ended, or was left."""
        if self._state is not None:
            self._state._remove_dataloader(self)
            self._state = None
