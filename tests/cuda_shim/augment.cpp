// Augmentation on the GPU as a library of the CPU's.
#include "cuda_shim.h"

#include "augment.cu"

CUDA_SHIM_LIBRARY(decltype(augment_float32_nchw))
