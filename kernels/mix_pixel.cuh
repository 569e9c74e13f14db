// The arithmetic of the mix, for mix.cpp on the CPU and mix.cu on the GPU: geometry, blend, normalise, cast.
//
// The geometry is dali_diffusemix/plan/geometry.py line by line, the pixels are dali_diffusemix/mix/pixel.py; they
// change together. Geometry is computed in double in the same order of operations and never contracted to fused
// multiply-adds, so that a pixel falls on the same side of a seam or an edge everywhere. Pixels are float; device
// compilers may contract them, which stays within the tests' tolerance.
//
// Both kernels use all of it, with two exceptions for speed:
//
//     tap_weight  mix.cpp alone, once for each row and column of a sample, in double. mix.cu has no table of weights:
//                 it evaluates `triangle` at each tap, in float, from an offset that `measure` computed in double.
//     blend       mix.cpp alone, on vectors of four lanes. mix.cu has no pixel of the source that it blends, but a sum
//                 that grows tap by tap: it multiplies what is there by 1 - weight and adds taps times weight.
#pragma once

#include "portable.cuh"

namespace mix {

constexpr int kLeft = 0, kRight = 1, kTop = 2, kBottom = 3;  // indices in plan.MASKS; -1 is no mask

struct Piece {            // mix.call.PIECE
    const uint8_t* data;  // (height, width, 3), contiguous; null: no piece
    int32_t height, width;
    int32_t top, left;  // its origin in its image
    int32_t image_height, image_width;
};

struct Row {          // mix.call.ROW
    double box[4];     // the crop (top, left, height, width), relative to the image, which it may leave
    double span[4];    // the output within what mask and fractal span
    double seam_width;
    float fractal_weight;
    int32_t fractal;  // row of the bank; -1: none
    int32_t mask;     // -1: not mixed
    uint8_t flip;
    uint8_t fractal_flip[2];  // upside down, left to right
};

static_assert(sizeof(Piece) == 32 && sizeof(Row) == 88, "mix.call declares the same");

// --- geometry ---------------------------------------------------------------------------------------------------------

// a + b * c, rounded twice. Device compilers contract by default; these intrinsics they leave alone.
MIX_FN double add_product(double a, double b, double c) {
#ifdef __CUDA_ARCH__
    return __dadd_rn(a, __dmul_rn(b, c));
#else
    return a + b * c;
#endif
}

// Centre of output pixel i in the box [start, start + extent), in the unit that the box has.
MIX_FN double centre_of(double start, double extent, int i, int output) {
    return add_product(start, extent, (i + 0.5) / output);
}

// Whether a centre, relative to the image, lies in it.
MIX_FN bool is_inside(double centre) { return centre >= 0 && centre < 1; }

// m at t, the coordinate across the seam of what the mask spans.
MIX_FN double seam_ramp(double t, double seam_width) {
    if (seam_width > 0) {
        const double m = (t - 0.5) / seam_width + 0.5;
        return m < 0 ? 0 : m > 1 ? 1 : m;
    }
    return t >= 0.5 ? 1 : 0;
}

// The resample of one axis: the box [start, start + extent), relative to an image of `source` pixels, to `output`
// pixels by a triangle filter of half-width `reach` source pixels.
struct Axis {
    double start, extent, reach;
    int output, source;
};

MIX_FN Axis make_axis(double start, double extent, int output, int source) {
    const double scale = extent * source / output;
    return {start, extent, scale > 1.0 ? scale : 1.0, output, source};
}

// Centre of output pixel i, source pixels.
MIX_FN double source_centre(const Axis& axis, int i) {
    return centre_of(axis.start * axis.source, axis.extent * axis.source, i, axis.output);
}

// First source pixel and number of them that the output pixel of a source centre reads: at least one, if it is inside.
MIX_FN int taps_of(const Axis& axis, double centre, int* first) {
    const double low = centre - axis.reach + 0.5, high = centre + axis.reach + 0.5;
    const int begin = low > 0 ? static_cast<int>(low) : 0;
    const int end = high < axis.source ? static_cast<int>(high) : axis.source;
    *first = begin;
    return end - begin;
}

// The filter at a distance in units of its reach.
template <typename Real>
MIX_FN Real triangle(Real distance) {
#ifdef __CUDA_ARCH__
    return fmax(1 - fabs(distance), Real(0));  // an instruction less for each tap than the same by comparisons
#else
    const Real weight = 1 - (distance < 0 ? -distance : distance);
    return weight > 0 ? weight : 0;  // fmax would be a call
#endif
}

// Not yet normalised weight of source pixel x for the output pixel of a source centre.
MIX_FN double tap_weight(const Axis& axis, double centre, int x) {
    return triangle((x + 0.5 - centre) / axis.reach);
}

// --- pixels -----------------------------------------------------------------------------------------------------------

MIX_FN bool mask_is_horizontal(int mask) { return mask == kLeft || mask == kRight; }

// M at output pixel i along the axis across the seam.
MIX_FN float edit_weight(int mask, double seam_width, double start, double extent, int i, int output) {
    const double m = seam_ramp(centre_of(start, extent, i, output), seam_width);
    return static_cast<float>(mask == kRight || mask == kBottom ? m : 1 - m);
}

// (1 - weight) under + weight over: H from M, A from lambda. A value is a channel or a vector of them.
template <typename Value>
MIX_FN Value blend(Value under, Value over, float weight) {
    return weight * over + (1 - weight) * under;
}

template <typename Value>
MIX_FN Value normalise(Value pixel, Value scale, Value offset) {
    return pixel * scale + offset;
}

MIX_FN uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

MIX_FN float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// Casts round half to even, but uint8 rounds half up.
MIX_FN uint8_t to_uint8(float value) {
    value = value + 0.5f;
    value = value > 0 ? value : 0;  // one at a time: an instruction each
    value = value < 255 ? value : 255;
    return static_cast<uint8_t>(static_cast<int>(value));
}

MIX_FN uint16_t to_bfloat16(float value) {
    const uint32_t bits = bits_of(value);
    return static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

// Finite values only, which is all that a normalised pixel can be; beyond half's range becomes infinity.
MIX_FN uint16_t to_float16(float value) {
    const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
    // Below 2^-14 the result is subnormal: adding 0.5 makes the adder round at the right bit.
    const uint32_t small = bits_of(float_of(magnitude) + 0.5f) - 0x3F000000u;
    const uint32_t normal = (magnitude + 0xC8000FFFu + (magnitude >> 13 & 1u)) >> 13;
    // Chosen by a mask: a choice of floats that may trap would keep compilers from making vectors of it.
    const uint32_t is_small = 0u - static_cast<uint32_t>(magnitude < 0x38800000u);
    const uint32_t half = (small & is_small) | (normal & ~is_small);
    return static_cast<uint16_t>(sign | (half < 0x7C00u ? half : 0x7C00u));
}

}  // namespace mix
