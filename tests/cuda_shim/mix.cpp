// The mix on the GPU as a library of the CPU's.
#include "cuda_shim.h"

#include "mix.cu"

CUDA_SHIM_LIBRARY(decltype(mix_float32_nchw))
