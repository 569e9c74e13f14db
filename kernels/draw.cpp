// The draws of a plan, and the order of an epoch: base/philox.py line by line, which is many NumPy operations on a few
// hundred numbers each.
#include <cstdint>

#include "philox.cuh"

namespace {

// SplitMix64's finaliser.
uint64_t mix64(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

}  // namespace

// Four words for each field and index: out[(field * count + i) * 4 + word].
extern "C" __attribute__((visibility("default"))) void dali_diffusemix_draw(
    uint32_t seed, uint32_t epoch, const uint64_t *indices, const uint64_t *views, int64_t count, const uint64_t *fields,
    int64_t field_count, uint32_t *out) {
    for (int64_t field = 0; field < field_count; ++field) {
        const uint32_t third = static_cast<uint32_t>(fields[field]);
        for (int64_t i = 0; i < count; ++i, out += 4) {
            const philox::Words drawn =
                philox::words(static_cast<uint32_t>(indices[i]), static_cast<uint32_t>(indices[i] >> 32), third,
                               static_cast<uint32_t>(views[i]), seed, epoch);
            for (int word = 0; word < 4; ++word) out[word] = drawn.w[word];
        }
    }
}

// What stands at each position, in place: a Feistel network over 2 * half bits, walked until the value is below `length`.
extern "C" __attribute__((visibility("default"))) void dali_diffusemix_permute(
    uint64_t *values, int64_t count, const uint64_t *keys, int64_t rounds, int half, uint64_t length) {
    const uint64_t mask = (uint64_t{1} << half) - 1;
    for (int64_t i = 0; i < count; ++i) {
        uint64_t value = values[i];
        do {
            uint64_t left = value >> half, right = value & mask;
            for (int64_t round = 0; round < rounds; ++round) {
                const uint64_t next = left ^ (mix64(right ^ keys[round]) & mask);
                left = right, right = next;
            }
            value = left << half | right;
        } while (value >= length);
        values[i] = value;
    }
}
