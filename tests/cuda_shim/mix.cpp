// kernels/mix.cu as a library of the CPU's.
#include "cuda_shim.h"

#include "../../kernels/mix.cu"

CUDA_SHIM_LIBRARY(decltype(mix_float32_nchw))
