// One shape of the mix on the GPU as a library of the CPU's: -DMIX_SHAPE="mix.cu".
#include "cuda_shim.h"

#include MIX_SHAPE

CUDA_SHIM_LIBRARY(decltype(mix_float32_nchw))
