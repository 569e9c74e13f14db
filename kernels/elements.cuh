// The elements of a tensor on the GPU, for mix.cu and augment.cu.
#pragma once

#include "mix_pixel.cuh"

namespace mix {

// The elements of the tensor.
struct Float32 {
    typedef float Value;
    static MIX_FN Value cast(float value) { return value; }
};
struct Float16 {
    typedef uint16_t Value;
    static MIX_FN Value cast(float value) { return to_float16(value); }
};
struct Bfloat16 {
    typedef uint16_t Value;
    static MIX_FN Value cast(float value) { return to_bfloat16(value); }
};
struct Uint8 {
    typedef uint8_t Value;
    static MIX_FN Value cast(float value) { return to_uint8(value); }
};

}  // namespace mix
