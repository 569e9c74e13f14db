"""The plan: everything random about a batch, as arrays, decided before an image is opened.

    spec, crops      the user's choices: `MixSpec`, `TrainCrop`, `RandomCrop`, `EvalCrop`
    augment          the user's choices of what follows the mix, and the operations that they draw
    schedule         choices that change with the epoch: `Schedule`
    numbers          how those are checked and read
    order            the samples of a rank's batches
    batch            (seed, epoch, indices) to a `BatchPlan`, one row per sample
    geometry         centres, inside, seam and taps: the law that windows, specification and kernels share
    windows          the pixels of each source that those rows show

All of it is a pure function of its arguments, and all sample randomness is drawn here; `base.philox` has the register.
"""

from dali_diffusemix.plan.batch import PLAN_VERSION, BatchPlan, Planner
from dali_diffusemix.plan.crops import Crop, EvalCrop, RandomCrop, TrainCrop
from dali_diffusemix.plan.order import EpochOrder
from dali_diffusemix.plan.schedule import Schedule
from dali_diffusemix.plan.spec import MASKS, MixSpec
from dali_diffusemix.plan.windows import visible_parts

__all__ = [
    "MASKS",
    "PLAN_VERSION",
    "BatchPlan",
    "Crop",
    "EpochOrder",
    "EvalCrop",
    "MixSpec",
    "Planner",
    "RandomCrop",
    "Schedule",
    "TrainCrop",
    "visible_parts",
]
