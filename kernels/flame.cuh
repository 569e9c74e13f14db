// The arithmetic of a fractal flame, once, for host and device.
//
// Source: Draves and Reckase, "The Fractal Flame Algorithm" (2008), appendix "Catalog of Variations".
//
// Only +, -, *, / and sqrt in float32, which IEEE 754 rounds exactly, and no library function: an orbit is chaotic,
// one last bit would change the picture. Compiled without contraction (-ffp-contract=off) the same genome therefore
// gives the same bits on every machine, and the NumPy definition in dali_diffusemix/fractals.py gives them too, as
// long as both keep the same order of operations. Change them together.

#pragma once

#include <cmath>
#include <cstdint>

#include "philox.cuh"

#ifdef __CUDACC__
#define FLAME_FN __host__ __device__ __forceinline__
#else
#define FLAME_FN inline __attribute__((always_inline))
#endif

namespace flame {

// One row of `maps` is one affine map with its variations:
//   0..5    a b c d e f of the affine map before the variations: x' = a x + b y + c, y' = d x + e y + f
//   6..11   the same after them (the post transform)
//   12, 13  where on the palette the map pulls the colour, and how fast (0 leaves it)
//   14      the map is chosen by uniform draws from here up to the next row's number; row 0 has 0
//   15..32  the weight of each variation
constexpr int kAffine = 0, kPost = 6, kColour = 12, kSpeed = 13, kThreshold = 14, kWeights = 15;
constexpr int kVariations = 18;
constexpr int kRow = kWeights + kVariations;
constexpr int kMaps = 16;  // at most so many rows

// A point further out than this, or not a number, is dropped and a fresh one takes its place.
constexpr float kFar = 1e3f;

struct Point {
    float x, y;
};

using philox::Words;

// The upper 24 bits as a float in [0, 1), exactly.
FLAME_FN float uniform(uint32_t word) {
    return static_cast<float>(static_cast<int32_t>(word >> 8)) * (1.0f / 16777216.0f);
}

// sin(2 pi t), within 4e-6 while |t| < 2^22.
FLAME_FN float sin_turns(float t) {
    t = t - ((t + 12582912.0f) - 12582912.0f);  // 1.5 * 2^23: leaves t minus its nearest integer
    const float a = std::fabs(t);
    const float b = 0.5f - a;
    const float u = a < b ? a : b;
    const float q = u * u;
    const float s =
        u * (6.2831853f + q * (-41.341702f + q * (81.605249f + q * (-76.705860f + q * 42.058694f))));
    return t < 0.0f ? -s : s;
}

// The angle of (x, y) in turns, measured from the y axis as the catalogue does: atan2(x, y) / (2 pi).
FLAME_FN float angle_turns(float x, float y) {
    const float ax = std::fabs(x), ay = std::fabs(y);
    const float low = ax < ay ? ax : ay, high = ax < ay ? ay : ax;
    const float z = low / (high + 1e-20f);
    const float q = z * z;
    float t = z * (0.15915132f + q * (-0.05293867f + q * (0.03080340f +
              q * (-0.01853087f + q * (0.00838004f + q * -0.00186549f)))));
    t = ax < ay ? t : 0.25f - t;
    t = y < 0.0f ? 0.5f - t : t;
    return x < 0.0f ? -t : t;
}

constexpr float kTurn = 0.15915494f;  // radians to turns

FLAME_FN float sine(float radians) { return sin_turns(radians * kTurn); }
FLAME_FN float cosine(float radians) { return sin_turns(radians * kTurn + 0.25f); }

// Variation V of the catalogue at (x, y). `bits` gives julia its coin.
template <int V>
FLAME_FN Point variation(float x, float y, uint32_t bits) {
    const float r2 = x * x + y * y + 1e-12f;
    const float r = std::sqrt(r2);
    if constexpr (V == 0) return {x, y};                    // linear
    if constexpr (V == 1) return {sine(x), sine(y)};        // sinusoidal
    if constexpr (V == 2) return {x / r2, y / r2};          // spherical
    if constexpr (V == 3) {                                 // swirl
        const float s = sine(r2), c = cosine(r2);
        return {x * s - y * c, x * c + y * s};
    }
    if constexpr (V == 4) return {(x - y) * (x + y) / r, 2.0f * x * y / r};       // horseshoe
    if constexpr (V == 5) return {2.0f * angle_turns(x, y), r - 1.0f};            // polar
    if constexpr (V == 6) {                                                       // handkerchief
        const float s = sine(r), c = cosine(r);
        return {x * c + y * s, y * c + x * s};
    }
    if constexpr (V == 7) {                                                       // heart
        const float t = angle_turns(x, y) * r;
        return {r * sin_turns(t), -r * sin_turns(t + 0.25f)};
    }
    if constexpr (V == 8) {                                                       // disc
        const float t = 2.0f * angle_turns(x, y), h = 0.5f * r;
        return {t * sin_turns(h), t * sin_turns(h + 0.25f)};
    }
    if constexpr (V == 9) return {(y / r + sine(r)) / r, (x / r - cosine(r)) / r};  // spiral
    if constexpr (V == 10) return {x / r2, y};                                      // hyperbolic
    if constexpr (V == 11) return {x / r * cosine(r), y / r * sine(r)};             // diamond
    if constexpr (V == 12) {                                                        // ex
        const float s = sine(r), c = cosine(r);
        const float p = (x * c + y * s) / r, q = (y * c + x * s) / r;
        const float p3 = p * p * p, q3 = q * q * q;
        return {r * (p3 + q3), r * (p3 - q3)};
    }
    if constexpr (V == 13) {                                                        // julia
        const float p = std::sqrt(0.5f * (r + std::fabs(y)));
        const float q = 0.5f * std::fabs(x) / (p + 1e-20f);
        const float u = y < 0.0f ? q : p, v = y < 0.0f ? p : q;
        const float w = x < 0.0f ? -v : v;
        return {(bits & 1u) ? -u : u, (bits & 1u) ? -w : w};
    }
    if constexpr (V == 14) return {x < 0.0f ? 2.0f * x : x, y < 0.0f ? 0.5f * y : y};  // bent
    if constexpr (V == 15) return {2.0f * x / (r + 1.0f), 2.0f * y / (r + 1.0f)};      // eyefish
    if constexpr (V == 16) return {4.0f * x / (r2 + 4.0f), 4.0f * y / (r2 + 4.0f)};    // bubble
    if constexpr (V == 17) return {sine(x), y};                                        // cylinder
}

}  // namespace flame
