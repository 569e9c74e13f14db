"""Benchmarks on your data and machine: this loader beside others, and what would make it faster.

    every contender in a process of its own ──> turns, A B C A B C ... ──> medians, and the gain of each change tried

    material      the images, the same for all contenders
    contenders    this loader, plain DALI, Pillow under DataLoader
    measure       turns, processes, CPU time and memory
    changes       what is tried to make loading faster
    result        what was found, as JSON and as text
    run           `bench`: the whole of it

A turn first takes the batches that the contender has ready, uncounted, and then times whole batches. Speed is wall
time; CPU time and memory are those of the contender's process and its workers.
"""

from dali_diffusemix.bench.contenders import (
    Contender,
    Factory,
    PillowCrops,
    diffusemix,
    pillow,
    plain_dali,
    plain_dali_batches,
)
from dali_diffusemix.bench.material import Material, extract
from dali_diffusemix.bench.measure import MemoryWatch, cpu_seconds, interleaved, machine
from dali_diffusemix.bench.result import BenchResult, Measurement, Trial
from dali_diffusemix.bench.run import bench

__all__ = [
    "BenchResult",
    "Contender",
    "Factory",
    "Material",
    "Measurement",
    "MemoryWatch",
    "PillowCrops",
    "Trial",
    "bench",
    "cpu_seconds",
    "diffusemix",
    "extract",
    "interleaved",
    "machine",
    "pillow",
    "plain_dali",
    "plain_dali_batches",
]
