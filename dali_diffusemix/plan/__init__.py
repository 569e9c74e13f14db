"""The plan: everything random about a batch, as arrays, decided before an image is opened.

    spec, crops      what users choose: `MixSpec`, `TrainCrop` and its kin
    order            which samples a rank's batches hold
    batch            (seed, epoch, indices) to a `BatchPlan`, one row per sample
    windows          which pixels of each source those rows show

All of it is a pure function of its arguments, and all sample randomness is drawn here.
"""

from dali_diffusemix.plan.batch import PLAN_VERSION, BatchPlan, Planner
from dali_diffusemix.plan.crops import Crop, EvalCrop, RandomCrop, TrainCrop
from dali_diffusemix.plan.order import Schedule
from dali_diffusemix.plan.spec import MASKS, MixSpec
from dali_diffusemix.plan.windows import visible_parts

__all__ = [
    "MASKS",
    "PLAN_VERSION",
    "BatchPlan",
    "Crop",
    "EvalCrop",
    "MixSpec",
    "Planner",
    "RandomCrop",
    "Schedule",
    "TrainCrop",
    "visible_parts",
]
