// What the CPU's kernels share: clones for several processors, and pixels taken apart into channels.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(MIX_CLONES)  // given on the command line by tests that compare processors
#elif defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
// "arch=" is one model of processor, a feature is every one that has it.
#define MIX_CLONES __attribute__((target_clones("arch=skylake-avx512", "avx2", "default")))
#else
#define MIX_CLONES
#endif
#define MIX_INLINE static inline __attribute__((always_inline))
#define MIX_INLINE_MEMBER __attribute__((always_inline))

namespace mix {

typedef uint8_t Bytes __attribute__((vector_size(16)));

// Channel C of the 16 pixels that lie in a, b and c, the last one first if Back.
template <int C, bool Back, int... At>
MIX_INLINE Bytes channel(Bytes a, Bytes b, Bytes c, std::integer_sequence<int, At...>) {
    constexpr int from[] = {3 * (Back ? 15 - At : At) + C...};  // of the 48 bytes
    const Bytes ab = __builtin_shuffle(a, b, Bytes{from[At] % 32 ...});
    return __builtin_shuffle(ab, c, Bytes{(from[At] < 32 ? At : from[At] - 16)...});
}

template <bool Back>
MIX_INLINE void split_pixels(const uint8_t* from, uint8_t* red, uint8_t* green, uint8_t* blue, int count) {
    constexpr int kBlock = sizeof(Bytes);
    constexpr std::make_integer_sequence<int, kBlock> kAt{};
    if (count < kBlock) {
        for (int i = 0; i < count; ++i) {
            const uint8_t* const at = from + 3 * (Back ? count - 1 - i : i);
            red[i] = at[0], green[i] = at[1], blue[i] = at[2];
        }
        return;
    }
    for (int i = 0; i < count; i += kBlock) {
        if (i > count - kBlock) i = count - kBlock;  // the last block overlaps the one before
        Bytes a, b, c;
        const uint8_t* const at = from + 3 * (Back ? count - kBlock - i : i);
        memcpy(&a, at, kBlock), memcpy(&b, at + kBlock, kBlock), memcpy(&c, at + 2 * kBlock, kBlock);
        const Bytes channels[3] = {channel<0, Back>(a, b, c, kAt), channel<1, Back>(a, b, c, kAt),
                                   channel<2, Back>(a, b, c, kAt)};
        memcpy(red + i, &channels[0], kBlock), memcpy(green + i, &channels[1], kBlock);
        memcpy(blue + i, &channels[2], kBlock);
    }
}

// The reverse: channels to pixels, the first one first.
MIX_INLINE void join_pixels(const uint8_t* red, const uint8_t* green, const uint8_t* blue, uint8_t* to, int count) {
    constexpr int kBlock = sizeof(Bytes);
    int i = 0;
    for (; i + kBlock <= count; i += kBlock) {
        Bytes r, g, b;
        memcpy(&r, red + i, kBlock), memcpy(&g, green + i, kBlock), memcpy(&b, blue + i, kBlock);
        // Bytes 0 to 31 of a pair are red and green, then blue comes between them.
        const Bytes rg0 = __builtin_shuffle(r, g, Bytes{0, 16, 0, 1, 17, 0, 2, 18, 0, 3, 19, 0, 4, 20, 0, 5});
        const Bytes rg1 = __builtin_shuffle(r, g, Bytes{21, 0, 6, 22, 0, 7, 23, 0, 8, 24, 0, 9, 25, 0, 10, 26});
        const Bytes rg2 = __builtin_shuffle(r, g, Bytes{0, 11, 27, 0, 12, 28, 0, 13, 29, 0, 14, 30, 0, 15, 31, 0});
        const Bytes parts[3] = {
            __builtin_shuffle(rg0, b, Bytes{0, 1, 16, 3, 4, 17, 6, 7, 18, 9, 10, 19, 12, 13, 20, 15}),
            __builtin_shuffle(rg1, b, Bytes{0, 21, 2, 3, 22, 5, 6, 23, 8, 9, 24, 11, 12, 25, 14, 15}),
            __builtin_shuffle(rg2, b, Bytes{26, 1, 2, 27, 4, 5, 28, 7, 8, 29, 10, 11, 30, 13, 14, 31})};
        memcpy(to + 3 * i, parts, sizeof parts);
    }
    for (; i < count; ++i) to[3 * i] = red[i], to[3 * i + 1] = green[i], to[3 * i + 2] = blue[i];
}

}  // namespace mix
