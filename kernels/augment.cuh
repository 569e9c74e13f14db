// The arithmetic of augmentation after the mix, for augment.cpp on the CPU and augment.cu on the GPU.
//
// The law is dali_diffusemix/mix/augment.py: what Pillow computes on 8-bit pixels, to the bit, in the same types and
// order of operations. It must be compiled without fused multiply-adds (-ffp-contract=off, --fmad=false).
#pragma once

#include "philox.cuh"

#ifndef __CUDACC_RTC__
#include <cmath>
#endif

namespace augment {

enum Code {  // indices in plan.augment.OPERATIONS
    kIdentity, kShearX, kShearY, kTranslateX, kTranslateY, kRotate,
    kBrightness, kContrast, kColor, kSharpness, kHue, kGrayscale,
    kPosterize, kSolarize, kSolarizeAdd, kAutocontrast, kEqualize, kInvert,
    kBlur, kErase, kEraseNoise,
};
enum Filter { kNearest, kBilinear, kBicubic };

constexpr uint32_t kNoiseField = 1u << 30;  // base.philox.NOISE
constexpr int kNoiseSteps = 4096;           // of the table of noise, for each channel
constexpr int kMostTaps = 63;               // of a blur

// plan.augment.OPERATION after mix.augment.lowered: of warps, `values` are the matrix from output to input pixels; of a
// hue, fill[0] is the shift; of an erasure, `fill` is the colour.
struct Operation {
    uint8_t code, filter, fill[3], unused[3];
    double values[8];
};
static_assert(sizeof(Operation) == 72, "plan.augment declares the same");

MIX_FN bool is_warp(int code) { return code >= kShearX && code <= kRotate; }
MIX_FN bool is_tone(int code) {
    return code == kBrightness || code == kContrast || (code >= kPosterize && code <= kInvert);
}

// --- pointwise --------------------------------------------------------------------------------------------------------

MIX_FN uint8_t clip(float value) {
    value = value > 0 ? value : 0;
    value = value < 255 ? value : 255;
    return static_cast<uint8_t>(static_cast<int>(value));
}

// Pillow's blend: `from` at factor 0, `to` at 1, beyond that extrapolated.
MIX_FN uint8_t blend(int from, int to, float factor) {
    return clip(static_cast<float>(from) + factor * static_cast<float>(to - from));
}

MIX_FN int luma(int red, int green, int blue) { return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16; }

// What becomes of a value under an operation that needs no other pixel; of contrast, `grey` is the mean luma.
MIX_FN uint8_t tone(const Operation& operation, int value, int grey) {
    const double amount = operation.values[0];
    switch (operation.code) {
        case kBrightness: return blend(0, value, static_cast<float>(amount));
        case kContrast: return blend(grey, value, static_cast<float>(amount));
        case kPosterize: return static_cast<uint8_t>(value & ~((1 << (8 - static_cast<int>(amount))) - 1));
        case kSolarize: return static_cast<uint8_t>(value < amount ? value : 255 - value);
        case kSolarizeAdd: {
            const int sum = value + static_cast<int>(amount);
            return static_cast<uint8_t>(value >= 128 ? value : sum < 255 ? sum : 255);
        }
        case kInvert: return static_cast<uint8_t>(255 - value);
        default: return static_cast<uint8_t>(value);
    }
}

// The mean of a sum of lumas, as ImageEnhance.Contrast rounds it.
MIX_FN int mean_luma(uint64_t sum, uint64_t count) {
    return static_cast<int>(static_cast<double>(sum) / static_cast<double>(count) + 0.5);
}

// What becomes of a value of a channel whose values go from `low` to `high`.
MIX_FN uint8_t autocontrast(int value, int low, int high) {
    if (high <= low) return static_cast<uint8_t>(value);
    const double scale = 255.0 / (high - low), offset = -low * scale;
    const int found = static_cast<int>(value * scale + offset);
    return static_cast<uint8_t>(found < 0 ? 0 : found > 255 ? 255 : found);
}

// A channel's equalisation: pixels for each step of the result, 0 if it stays. `last` is the count of its highest value.
template <typename Count>
MIX_FN Count equalize_step(Count pixels, Count last) { return (pixels - last) / 255; }

// What becomes of a value with `below` pixels of lower values.
template <typename Count>
MIX_FN uint8_t equalize(Count below, Count step) {
    const Count found = (step / 2 + below) / step;
    return static_cast<uint8_t>(found < 255 ? found : 255);
}

// A pixel's hue, saturation and value, 0 to 255 each, in two steps: whole numbers, then a hue.
struct Extremes {
    int high, span;           // value; high - low
    int sector, one, other;   // the hue is sector + (one - other) / span of 6
};

MIX_FN Extremes extremes_of(int r, int g, int b) {
    const int high = r > g ? (r > b ? r : b) : (g > b ? g : b), low = r < g ? (r < b ? r : b) : (g < b ? g : b);
    const bool is_red = r == high, is_green = g == high;
    return {high, high - low, is_red ? 0 : is_green ? 2 : 4, high - (is_red ? b : is_green ? r : g),
            high - (is_red ? g : is_green ? b : r)};
}

// As Pillow rounds it, which divides floats.
MIX_FN int hue_of(int sector, int one, int other, int span) {
    const float whole = static_cast<float>(span + (span == 0));
    const double first = static_cast<float>(one) / whole, second = static_cast<float>(other) / whole;
    const float angle = static_cast<float>(sector + first - second);
    const double turn = angle / 6.0 + 1.0;
    const float hue = static_cast<float>(turn - static_cast<int>(turn));
    return static_cast<int>(hue * 255.0);
}

// Back to red, green and blue. Pillow divides floats; whole numbers give the same for every hue, saturation and value.
MIX_FN void colour_of(int hue, int saturation, int value, int& red, int& green, int& blue) {
    const int side = hue * 6 / 255, part = hue * 6 - side * 255;
    const auto rounded = [value](int taken) { return (2 * value * (65025 - taken) + 65025) / 130050; };
    const int p = rounded(saturation * 255), q = rounded(saturation * part), t = rounded(saturation * (255 - part));
    // Chosen by masks, which makes vectors.
    const auto some = [side](int one, int other, int chosen) { return -((side == one) | (side == other)) & chosen; };
    red = some(1, 1, q) | some(4, 4, t) | some(2, 3, p) | some(0, 5, value) | some(6, 6, value);
    green = some(0, 6, t) | some(3, 3, q) | some(4, 5, p) | some(1, 2, value);
    blue = some(2, 2, t) | some(5, 5, q) | some(3, 4, value) | some(0, 1, p) | some(6, 6, p);
}

// The hue turned by `shift` of 256, through Pillow's HSV of 8 bits.
MIX_FN void shift_hue(uint8_t& red, uint8_t& green, uint8_t& blue, int shift) {
    const Extremes found = extremes_of(red, green, blue);
    const int hue = found.span ? hue_of(found.sector, found.one, found.other, found.span) : 0;
    const int saturation = 255 * found.span / (found.high ? found.high : 1);
    int r, g, b;
    colour_of((hue + shift) & 255, saturation, found.high, r, g, b);
    red = static_cast<uint8_t>(r), green = static_cast<uint8_t>(g), blue = static_cast<uint8_t>(b);
}

// --- neighbours -------------------------------------------------------------------------------------------------------

// ImageFilter.SMOOTH: a pixel's nine neighbours, itself among them, and four times itself more.
MIX_FN int smooth(int nine, int centre) { return (2 * (nine + 4 * centre) + 13) / 26; }

// A position with both ends mirrored; the end itself comes once.
MIX_FN int mirrored(int i, int size) {
    if (i >= 0 && i < size) return i;
    if (size == 1) return 0;
    const int period = 2 * (size - 1);
    i %= period;
    i = i < 0 ? i + period : i;
    return i < size ? i : period - i;
}

// Weights of a Gaussian at distances 0 to side / 2.
MIX_FN void gaussian(double sigma, int side, float* weights) {
    double total = 0;
    for (int k = side / 2; k >= 0; --k) {
        const double at = k / sigma;
        total += (k ? 2 : 1) * exp(-0.5 * (at * at));
    }
    for (int k = 0; k <= side / 2; ++k) {
        const double at = k / sigma;
        weights[k] = static_cast<float>(exp(-0.5 * (at * at)) / total);
    }
}

// A value of 0 to 255 to the nearest whole number, halves to even.
MIX_FN uint8_t nearest_even(float value) {
    const float shifted = value + 12582912.0f;  // 1.5 * 2^23: the last bit is worth 1
    return static_cast<uint8_t>(static_cast<int>(shifted - 12582912.0f));
}

// --- warps ------------------------------------------------------------------------------------------------------------

MIX_FN int floor_of(double value) {
    const int whole = static_cast<int>(value);
    return value < whole ? whole - 1 : whole;
}

// A matrix in 16.16 fixed point, with which nearest pixels are found.
struct Fixed {
    int64_t a0, a1, a2, a3, a4, a5;
};
MIX_FN int64_t fixed(double value) {
    const double scaled = value * 65536.0 + 0.5;
    const int64_t whole = static_cast<int64_t>(scaled);
    return scaled < static_cast<double>(whole) ? whole - 1 : whole;
}
MIX_FN Fixed fixed_matrix(const double* a) {
    return {fixed(a[0]), fixed(a[1]), fixed(a[2] + a[0] * 0.5 + a[1] * 0.5),
            fixed(a[3]), fixed(a[4]), fixed(a[5] + a[3] * 0.5 + a[4] * 0.5)};
}

// Where an output pixel is read, in input pixels.
MIX_FN double source_x(const double* a, int x, int y) { return a[0] * (x + 0.5) + a[1] * (y + 0.5) + a[2]; }
MIX_FN double source_y(const double* a, int x, int y) { return a[3] * (x + 0.5) + a[4] * (y + 0.5) + a[5]; }

MIX_FN int within(int i, int size) { return i < 0 ? 0 : i < size ? i : size - 1; }

template <typename Value>
MIX_FN Value linear(Value one, Value other, double at) { return one + (other - one) * at; }

template <typename Value>
MIX_FN Value cubic(Value v1, Value v2, Value v3, Value v4, double at) {
    const Value p2 = v3 - v1, p3 = 2.0 * (v1 - v2) + v3 - v4, p4 = v2 - v1 - v3 + v4;
    return v2 + at * (p2 + at * (p3 + at * p4));
}

MIX_FN uint8_t clip(double value) { return value <= 0 ? 0 : value >= 255 ? 255 : static_cast<uint8_t>(value); }

// --- noise ------------------------------------------------------------------------------------------------------------

// The steps of noise of a pixel's channels.
MIX_FN philox::Words noise_words(const Operation& operation, uint32_t pixel) {
    return philox::words(pixel, 0, kNoiseField, 0, static_cast<uint32_t>(operation.values[4]),
                         static_cast<uint32_t>(operation.values[5]));
}
MIX_FN int noise_step(uint32_t word) { return static_cast<int>(word >> 20); }

}  // namespace augment
