// Augmentation on the GPU: from mixed 8-bit samples to the training tensor, one launch for a batch.
//
// The kernels are augment_{float32,float16,bfloat16,uint8}_{nchw,channels_last}. All take the same arguments:
//
//     samples      uint8_t*, (count, height, width, 3) in device memory: what mix.cu made; it is overwritten
//     scratch      uint8_t*, as large; null if a sample is kept in shared memory
//     rows         float*, as many elements; null if no sample is blurred
//     operations   const Operation*, (count, slots) in device memory, as mix.augment.lowered makes them
//     slots        int32
//     noise        const uint8_t*, (3, 4096) in device memory: values of erase_noise; null if there is none
//     out          the tensor's elements, contiguous; bfloat16 and float16 are their bits
//     height, width                          int32
//     scale_red, scale_green, scale_blue     float32: value = pixel * scale + offset
//     offset_red, offset_green, offset_blue  float32
//
//     grid  (count, 1, 1)
//     block (512, 1, 1), dynamic shared memory for a sample of height * width * 3 bytes, or none with `scratch`
//
// A block changes one sample, one operation after the other, and all its threads share each. Operations that need only
// the pixel, or a table for each channel, work in place; warps, sharpness and blur write to the other place: of shared
// memory and the sample's place in `samples`, or of this and `scratch`. Then every pixel is normalised and stored.
//
// Compiled without fused multiply-adds: the 8-bit pixels are those of augment.cpp.
#include "augment.cuh"
#include "elements.cuh"

#ifndef DYNAMIC_SHARED  // the tests' shim has its own
#define DYNAMIC_SHARED(name) extern __shared__ uint4 name[]
#endif

namespace {

using namespace augment;

constexpr int kThreads = 512, kBlocks = 1;  // with a sample of 224 x 224, a multiprocessor has no room for a second

struct Batch {
    uint8_t* samples;
    uint8_t* scratch;
    float* rows;
    const Operation* operations;
    int slots;
    const uint8_t* noise;
    void* out;
    int height, width;
    float scale[3], offset[3];
};

// What the threads of a block share.
struct Shared {
    uint32_t histogram[3][256];  // of equalize: counts, then the pixels below each value
    uint32_t step[3];
    int low[3], high[3];
    unsigned long long luma;
    uint8_t table[3][256];
    float weights[kMostTaps / 2 + 1];
};

// One sample: its pixels, and the place for changed ones.
struct Sample {
    uint8_t *pixels, *other;
    int height, width;

    MIX_FN int count() const { return height * width; }
    MIX_FN void swap() {
        uint8_t* const changed = other;
        other = pixels, pixels = changed;
    }
};

MIX_FN void copy(const uint8_t* from, uint8_t* to, int bytes) {
    const int t = static_cast<int>(threadIdx.x);
    if ((reinterpret_cast<size_t>(from) | reinterpret_cast<size_t>(to) | bytes) % sizeof(uint4) == 0)
        for (int i = t; i < bytes / static_cast<int>(sizeof(uint4)); i += kThreads)
            reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(from)[i];
    else
        for (int i = t; i < bytes; i += kThreads) to[i] = from[i];
}

MIX_FN void look_up(Sample& sample, const Shared& shared) {
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < sample.count(); i += kThreads) {
        uint8_t* const pixel = sample.pixels + 3 * i;
#pragma unroll
        for (int c = 0; c < 3; ++c) pixel[c] = shared.table[c][pixel[c]];
    }
}

MIX_FN void autocontrast(Sample& sample, Shared& shared) {
    const int t = static_cast<int>(threadIdx.x);
    if (t < 3) shared.low[t] = 255, shared.high[t] = 0;
    __syncthreads();
    int low[3] = {255, 255, 255}, high[3] = {0, 0, 0};
#pragma unroll 1
    for (int i = t; i < sample.count(); i += kThreads) {
#pragma unroll
        for (int c = 0; c < 3; ++c) {
            const int value = sample.pixels[3 * i + c];
            low[c] = value < low[c] ? value : low[c], high[c] = value > high[c] ? value : high[c];
        }
    }
#pragma unroll
    for (int c = 0; c < 3; ++c) atomicMin(&shared.low[c], low[c]), atomicMax(&shared.high[c], high[c]);
    __syncthreads();
    for (int i = t; i < 768; i += kThreads)
        shared.table[i / 256][i % 256] = augment::autocontrast(i % 256, shared.low[i / 256], shared.high[i / 256]);
    __syncthreads();
    look_up(sample, shared);
}

MIX_FN void equalize(Sample& sample, Shared& shared) {
    const int t = static_cast<int>(threadIdx.x);
    for (int i = t; i < 768; i += kThreads) shared.histogram[i / 256][i % 256] = 0;
    __syncthreads();
#pragma unroll 1
    for (int i = t; i < sample.count(); i += kThreads) {
#pragma unroll
        for (int c = 0; c < 3; ++c) atomicAdd(&shared.histogram[c][sample.pixels[3 * i + c]], 1u);
    }
    __syncthreads();
    if (t < 3) {
        uint32_t* const histogram = shared.histogram[t];
        uint32_t below = 0, last = 0;
        for (int v = 0; v < 256; ++v) {
            const uint32_t count = histogram[v];
            last = count ? count : last;
            histogram[v] = below;
            below += count;
        }
        shared.step[t] = equalize_step(below, last);
    }
    __syncthreads();
    for (int i = t; i < 768; i += kThreads) {
        const uint32_t step = shared.step[i / 256];
        shared.table[i / 256][i % 256] =
            step ? augment::equalize(shared.histogram[i / 256][i % 256], step) : static_cast<uint8_t>(i % 256);
    }
    __syncthreads();
    look_up(sample, shared);
}

MIX_FN void change_tone(Sample& sample, Shared& shared, const Operation& operation) {
    const int t = static_cast<int>(threadIdx.x);
    int grey = 0;
    if (operation.code == kContrast) {
        if (t == 0) shared.luma = 0;
        __syncthreads();
        unsigned long long sum = 0;
#pragma unroll 1
        for (int i = t; i < sample.count(); i += kThreads) {
            const uint8_t* const pixel = sample.pixels + 3 * i;
            sum += static_cast<unsigned>(luma(pixel[0], pixel[1], pixel[2]));
        }
        atomicAdd(&shared.luma, sum);
        __syncthreads();
        grey = mean_luma(shared.luma, static_cast<uint64_t>(sample.count()));
    }
    for (int v = t; v < 256; v += kThreads) {
        const uint8_t value = tone(operation, v, grey);
        shared.table[0][v] = value, shared.table[1][v] = value, shared.table[2][v] = value;
    }
    __syncthreads();
    look_up(sample, shared);
}

MIX_FN void change_colour(Sample& sample, const Operation& operation) {
    const float factor = operation.code == kColor ? static_cast<float>(operation.values[0]) : 0.0f;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < sample.count(); i += kThreads) {
        uint8_t* const pixel = sample.pixels + 3 * i;
        if (operation.code == kHue) {
            shift_hue(pixel[0], pixel[1], pixel[2], operation.fill[0]);
            continue;
        }
        const int grey = luma(pixel[0], pixel[1], pixel[2]);
#pragma unroll
        for (int c = 0; c < 3; ++c) pixel[c] = augment::blend(grey, pixel[c], factor);
    }
}

MIX_FN void sharpen(Sample& sample, const Operation& operation) {
    const float factor = static_cast<float>(operation.values[0]);
    const int pitch = 3 * sample.width;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < sample.count(); i += kThreads) {
        const int y = i / sample.width, x = i % sample.width;
        const bool border = y == 0 || x == 0 || y == sample.height - 1 || x == sample.width - 1;
#pragma unroll 1
        for (int c = 0; c < 3; ++c) {
            const uint8_t* const at = sample.pixels + 3 * i + c;
            int value = *at;
            if (!border) {
                int nine = 0;
#pragma unroll
                for (int dy = -1; dy <= 1; ++dy)
#pragma unroll
                    for (int dx = -1; dx <= 1; ++dx) nine += at[dy * pitch + 3 * dx];
                value = augment::blend(smooth(nine, value), value, factor);
            }
            sample.other[3 * i + c] = static_cast<uint8_t>(value);
        }
    }
    sample.swap();
}

// Across into `rows`, (height, width, 3), then down.
MIX_FN void blur(Sample& sample, Shared& shared, const Operation& operation, float* rows) {
    const int radius = static_cast<int>(operation.values[1]) / 2;
    if (threadIdx.x == 0) gaussian(operation.values[0], 2 * radius + 1, shared.weights);
    __syncthreads();
    const float* const weights = shared.weights;
    const int pitch = 3 * sample.width;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < 3 * sample.count(); i += kThreads) {
        const int x = i / 3 % sample.width;
        const uint8_t* const row = sample.pixels + i / pitch * pitch + i % 3;
        float sum = weights[0] * row[3 * x];
#pragma unroll 1
        for (int k = 1; k <= radius; ++k) {
            const int left = mirrored(x - k, sample.width), right = mirrored(x + k, sample.width);
            sum = sum + weights[k] * (static_cast<float>(row[3 * left]) + static_cast<float>(row[3 * right]));
        }
        rows[i] = sum;
    }
    __syncthreads();
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < 3 * sample.count(); i += kThreads) {
        const int y = i / pitch;
        const float* const column = rows + i % pitch;
        float sum = weights[0] * rows[i];
#pragma unroll 1
        for (int k = 1; k <= radius; ++k) {
            const int above = mirrored(y - k, sample.height), below = mirrored(y + k, sample.height);
            sum = sum + weights[k] * (column[above * pitch] + column[below * pitch]);
        }
        sample.other[i] = nearest_even(sum);
    }
    sample.swap();
}

MIX_FN void fill_pixel(uint8_t* to, const uint8_t (&fill)[3]) {
#pragma unroll
    for (int c = 0; c < 3; ++c) to[c] = fill[c];
}

MIX_FN void warp_nearest(Sample& sample, const Operation& operation) {
    const Fixed a = fixed_matrix(operation.values);
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < sample.count(); i += kThreads) {
        const int y = i / sample.width, x = i % sample.width;
        const int64_t column = (a.a2 + y * a.a1 + x * a.a0) >> 16, row = (a.a5 + y * a.a4 + x * a.a3) >> 16;
        uint8_t* const to = sample.other + 3 * i;
        if (column < 0 || column >= sample.width || row < 0 || row >= sample.height) {
            fill_pixel(to, operation.fill);
            continue;
        }
        const uint8_t* const from = sample.pixels + 3 * (static_cast<int>(row) * sample.width + static_cast<int>(column));
#pragma unroll
        for (int c = 0; c < 3; ++c) to[c] = from[c];
    }
    sample.swap();
}

// Bilinear with kTaps 2, bicubic with 4.
template <int kTaps>
MIX_FN void warp_smooth(Sample& sample, const Operation& operation) {
    constexpr int kBefore = kTaps / 2 - 1;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < sample.count(); i += kThreads) {
        const int y = i / sample.width, x = i % sample.width;
        uint8_t* const to = sample.other + 3 * i;
        double at_x = source_x(operation.values, x, y), at_y = source_y(operation.values, x, y);
        if (at_x < 0 || at_x >= sample.width || at_y < 0 || at_y >= sample.height) {
            fill_pixel(to, operation.fill);
            continue;
        }
        at_x -= 0.5, at_y -= 0.5;
        const int column = floor_of(at_x), row = floor_of(at_y);
        const double dx = at_x - column, dy = at_y - row;
#pragma unroll 1
        for (int c = 0; c < 3; ++c) {
            double lines[kTaps];
#pragma unroll
            for (int k = 0; k < kTaps; ++k) {
                const int line = row - kBefore + k;
                const uint8_t* const from = sample.pixels + 3 * within(line, sample.height) * sample.width + c;
                double taps[kTaps], value;
#pragma unroll
                for (int j = 0; j < kTaps; ++j) taps[j] = from[3 * within(column - kBefore + j, sample.width)];
                if constexpr (kTaps == 2)
                    value = linear(taps[0], taps[1], dx);
                else
                    value = cubic(taps[0], taps[1], taps[kTaps - 2], taps[kTaps - 1], dx);
                // Of rows outside, Pillow takes the first one's clamped, and below it what came before.
                lines[k] = k && (line < 0 || line >= sample.height) ? lines[k ? k - 1 : 0] : value;
            }
            if constexpr (kTaps == 2)
                to[c] = clip(linear<double>(lines[0], lines[1], dy));
            else
                to[c] = clip(cubic<double>(lines[0], lines[1], lines[kTaps - 2], lines[kTaps - 1], dy));
        }
    }
    sample.swap();
}

MIX_FN void erase(Sample& sample, const Operation& operation, const uint8_t* noise) {
    const int top = static_cast<int>(operation.values[0]), left = static_cast<int>(operation.values[1]);
    const int height = static_cast<int>(operation.values[2]), width = static_cast<int>(operation.values[3]);
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < height * width; i += kThreads) {
        const int at = (top + i / width) * sample.width + left + i % width;
        uint8_t* const to = sample.pixels + 3 * at;
        if (operation.code == kErase) {
            fill_pixel(to, operation.fill);
            continue;
        }
        const philox::Words words = noise_words(operation, static_cast<uint32_t>(at));
#pragma unroll
        for (int c = 0; c < 3; ++c) to[c] = noise[c * kNoiseSteps + noise_step(words.w[c])];
    }
}

MIX_FN void apply(Sample& sample, Shared& shared, const Operation& operation, float* rows, const uint8_t* noise) {
    const int code = operation.code;
    if (code == kAutocontrast) autocontrast(sample, shared);
    else if (code == kEqualize) equalize(sample, shared);
    else if (is_tone(code)) change_tone(sample, shared, operation);
    else if (code == kColor || code == kGrayscale || code == kHue) change_colour(sample, operation);
    else if (code == kSharpness) sharpen(sample, operation);
    else if (code == kBlur) blur(sample, shared, operation, rows);
    else if (code == kErase || code == kEraseNoise) erase(sample, operation, noise);
    else if (operation.filter == kNearest) warp_nearest(sample, operation);
    else if (operation.filter == kBilinear) warp_smooth<2>(sample, operation);
    else warp_smooth<4>(sample, operation);
}

template <typename Element, bool kChannelsLast>
MIX_FN void run(const Batch& batch, Shared& shared, uint8_t* dynamic) {
    const Operation* const operations = batch.operations + static_cast<size_t>(blockIdx.x) * batch.slots;
    const int count = batch.height * batch.width;
    const size_t begin = static_cast<size_t>(blockIdx.x) * count * 3;
    Sample sample = {batch.samples + begin, batch.scratch + begin, batch.height, batch.width};
    if (!batch.scratch) {
        copy(sample.pixels, dynamic, 3 * count);
        sample.other = sample.pixels, sample.pixels = dynamic;
        __syncthreads();
    }
#pragma unroll 1
    for (const Operation* one = operations; one < operations + batch.slots; ++one) {
        if (one->code == kIdentity) continue;
        apply(sample, shared, *one, batch.rows + begin, batch.noise);
        __syncthreads();
    }
    typename Element::Value* const out = static_cast<typename Element::Value*>(batch.out) + begin;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
#pragma unroll
        for (int c = 0; c < 3; ++c) {
            const float value = mix::normalise(static_cast<float>(sample.pixels[3 * i + c]), batch.scale[c], batch.offset[c]);
            out[kChannelsLast ? 3 * i + c : c * count + i] = Element::cast(value);
        }
    }
}

}  // namespace

#define AUGMENT_KERNEL(name, Element, channels_last)                                                                 \
    extern "C" __global__ void __launch_bounds__(kThreads, kBlocks)                                                  \
    name(uint8_t* samples, uint8_t* scratch, float* rows, const Operation* operations, int slots,                    \
         const uint8_t* noise, void* out, int height, int width, float scale_red, float scale_green,                 \
         float scale_blue, float offset_red, float offset_green, float offset_blue) {                                \
        DYNAMIC_SHARED(dynamic);                                                                                     \
        __shared__ Shared shared;                                                                                    \
        const Batch batch = {samples, scratch, rows, operations, slots, noise, out, height, width,                   \
                             {scale_red, scale_green, scale_blue}, {offset_red, offset_green, offset_blue}};         \
        run<mix::Element, channels_last>(batch, shared, reinterpret_cast<uint8_t*>(dynamic));                        \
    }

#ifdef MIX_NAME  // one kernel alone compiles faster
AUGMENT_KERNEL(MIX_NAME, MIX_ELEMENT, MIX_CHANNELS_LAST)
#else
AUGMENT_KERNEL(augment_float32_nchw, Float32, false)
AUGMENT_KERNEL(augment_float32_channels_last, Float32, true)
AUGMENT_KERNEL(augment_float16_nchw, Float16, false)
AUGMENT_KERNEL(augment_float16_channels_last, Float16, true)
AUGMENT_KERNEL(augment_bfloat16_nchw, Bfloat16, false)
AUGMENT_KERNEL(augment_bfloat16_channels_last, Bfloat16, true)
AUGMENT_KERNEL(augment_uint8_nchw, Uint8, false)
AUGMENT_KERNEL(augment_uint8_channels_last, Uint8, true)
#endif
