"""The mix: the one law of every pixel, and the one call that computes it for a batch.

pixel     the specification, in NumPy
tensor    type, layout and normalisation of the result
call      the same for a batch, by kernels/mix.cpp or kernels/mix.cu
"""

from dali_diffusemix.mix.tensor import IMAGENET, IMAGENET_MEAN, IMAGENET_STD, Normalize, TensorFormat

__all__ = ["IMAGENET", "IMAGENET_MEAN", "IMAGENET_STD", "Normalize", "TensorFormat"]
