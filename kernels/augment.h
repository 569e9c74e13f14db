// Augmentation of one mixed 8-bit sample on the CPU.
#pragma once

#include <cstdint>
#include <vector>

#include "augment.cuh"

namespace augment {

// Where the pixels of a warp's output row are read: whole pixels before the place, and the rest.
struct Places {
    std::vector<double> x, y;
    std::vector<int> column, row;

    void resize(int width) { x.resize(width), y.resize(width), column.resize(width), row.resize(width); }
};

// What one thread reuses from sample to sample: the sample, and the place for what cannot be changed in place.
class Sample {
   public:
    // Bytes (height, width, 3), to be written.
    uint8_t* begin(int height, int width);

    // Applies operations in their order. `noise` is (3, kNoiseSteps): a channel's values; needed for kEraseNoise only.
    void apply(const Operation* operations, int count, const uint8_t* noise);

    const uint8_t* pixels() const { return from_->data(); }

   private:
    void apply_tone(const Operation& operation);

    int height_ = 0, width_ = 0;
    std::vector<uint8_t> one_, other_, *from_ = &one_, *to_ = &other_;
    std::vector<float> rows_;  // of a blur
    Places places_;            // of a warp
};

}  // namespace augment
