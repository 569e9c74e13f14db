// What NVRTC, nvcc and a C++ compiler share: integers of known size, and functions for both sides.
#pragma once

#ifdef __CUDACC_RTC__  // NVRTC has no standard headers
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long uint64_t;
typedef int int32_t;
typedef long int64_t;
#else
#include <cstdint>
#include <cstring>
#endif

#ifdef __CUDACC__
#define MIX_FN __host__ __device__ __forceinline__
#else
#define MIX_FN inline __attribute__((always_inline))
#endif
