// The fused mix on the CPU: from decoded pieces to the training tensor, one pass, a row of output at a time.
//
// A sample's rows stay in the first-level cache from the decoded bytes to the normalised value. Threads take samples
// from a counter. The loops are written for the compiler's vectoriser and cloned for AVX2 and AVX-512; without fused
// multiply-adds all clones give the same bits.
#include <atomic>
#include <cstdlib>
#include <new>
#include <thread>
#include <vector>

#include "mix_pixel.cuh"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MIX_CLONES __attribute__((target_clones("arch=skylake-avx512", "arch=haswell", "default")))
#else
#define MIX_CLONES
#endif
#define MIX_INLINE static inline __attribute__((always_inline))

namespace {

using namespace mix;

// The taps of one axis: for output pixel i the source pixels first[i] + 0 .. count[i] with their weights.
struct Taps {
    std::vector<int> first, count;
    std::vector<float> weights;  // (output, stride)
    int stride = 0;

    // `mirrored`: the taps of the mirrored source, addressed in the source as it lies.
    void build(const Axis& axis, bool mirrored) {
        const int output = axis.output;
        first.resize(output);
        count.resize(output);
        stride = static_cast<int>(2 * axis.widened) + 3;
        if (stride > axis.source) stride = axis.source;
        weights.resize(static_cast<size_t>(output) * stride);
        std::vector<double>& exact = scratch_;
        exact.resize(stride);
        for (int i = 0; i < output; ++i) {
            int begin;
            const int n = taps_of(axis, i, &begin);
            double total = 0;
            for (int k = 0; k < n; ++k) total += exact[k] = tap_weight(axis, i, begin + k);
            float* out = &weights[static_cast<size_t>(i) * stride];
            for (int k = 0; k < n; ++k) out[mirrored ? n - 1 - k : k] = static_cast<float>(exact[k] / total);
            first[i] = mirrored ? axis.source - begin - n : begin;
            count[i] = n;
        }
    }

   private:
    std::vector<double> scratch_;
};

// One source of a sample (original, edit or fractal) on its way to rows of the output grid.
struct Source {
    const uint8_t* data = nullptr;
    int height = 0, width = 0, top = 0, left = 0;  // the piece in its image
    Taps rows, columns;
    std::vector<float> line;  // one output row before the horizontal pass: (width, 3) and one float to spare
    std::vector<float> value;  // one output row: (output width, 3) and one float to spare

    void open(const uint8_t* pixels, const int piece[4], const int image[2], const double box[4], const int out[2],
              bool upside_down, bool left_right) {
        data = pixels;
        height = piece[0], width = piece[1], top = piece[2], left = piece[3];
        rows.build(make_axis(box[0], box[2], out[0], image[0]), upside_down);
        columns.build(make_axis(box[1], box[3], out[1], image[1]), left_right);
        line.resize(static_cast<size_t>(width) * 3 + 1);
        value.resize(static_cast<size_t>(out[1]) * 3 + 1);
    }
};

MIX_INLINE void accumulate(float* line, const uint8_t* source, float weight, int n, bool start) {
    if (start) {
        for (int j = 0; j < n; ++j) line[j] = weight * static_cast<float>(source[j]);
    } else {
        for (int j = 0; j < n; ++j) line[j] = line[j] + weight * static_cast<float>(source[j]);
    }
}

// Four lanes: red, green, blue and whatever follows.
typedef float Pixel __attribute__((vector_size(16)));

MIX_INLINE Pixel load(const float* p) {
    Pixel value;
    memcpy(&value, p, sizeof value);
    return value;
}

// Row y of the output, columns [begin, end), into source.value.
MIX_INLINE void resample_row(Source& source, int y, int begin, int end) {
    // Every index is clamped to the piece, so that a piece smaller than it should be is wrong but never read past.
    int low = source.width, high = 0;
    for (int x = begin; x < end; ++x) {
        if (!source.columns.count[x]) continue;
        const int first = source.columns.first[x] - source.left, last = first + source.columns.count[x];
        low = first < low ? first : low;
        high = last > high ? last : high;
    }
    low = low < 0 ? 0 : low;
    high = high > source.width ? source.width : high;
    float* const line = source.line.data();
    bool start = true;
    if (low < high) {
        const float* weights = &source.rows.weights[static_cast<size_t>(y) * source.rows.stride];
        for (int k = 0; k < source.rows.count[y]; ++k) {
            const int row = source.rows.first[y] + k - source.top;
            if (row < 0 || row >= source.height) continue;
            const uint8_t* pixels = source.data + (static_cast<size_t>(row) * source.width + low) * 3;
            accumulate(line + low * 3, pixels, weights[k], (high - low) * 3, start);
            start = false;
        }
    }
    float* const value = source.value.data();
    for (int x = begin; x < end; ++x) {
        Pixel sum = {0, 0, 0, 0};
        if (!start) {
            const float* weights = &source.columns.weights[static_cast<size_t>(x) * source.columns.stride];
            int first = source.columns.first[x] - source.left, n = source.columns.count[x];
            if (first < 0) n += first, weights -= first, first = 0;
            if (first + n > source.width) n = source.width - first;
            const float* at = line + first * 3;
            for (int k = 0; k < n; ++k) sum = sum + weights[k] * load(at + k * 3);
        }
        value[x * 3] = sum[0], value[x * 3 + 1] = sum[1], value[x * 3 + 2] = sum[2];
    }
}

template <typename T, T (*Cast)(float)>
MIX_INLINE void store_row(T* out, const float* value, int width, size_t plane, const float* scale,
                          const float* offset, bool channels_last, bool flip) {
    for (int c = 0; c < 3; ++c) {
        const int step = channels_last ? 3 : 1;
        T* const to = channels_last ? out + c : out + c * plane;
        if (flip) {
            for (int x = 0; x < width; ++x) to[x * step] = Cast(value[(width - 1 - x) * 3 + c] * scale[c] + offset[c]);
        } else {
            for (int x = 0; x < width; ++x) to[x * step] = Cast(value[x * 3 + c] * scale[c] + offset[c]);
        }
    }
}

MIX_INLINE float identity(float value) { return value; }

struct Batch {
    const Piece* originals;
    const Piece* edits;
    const Row* rows;
    int64_t count;
    const uint8_t* bank;
    int bank_height, bank_width;
    void* out;
    int out_height, out_width, dtype, channels_last;
    float scale[3], offset[3];
};

// What one thread reuses from sample to sample.
struct Workspace {
    Source original, edit, fractal;
    std::vector<float> weight, mixed;  // M along the seam's axis; one row of the sample
};

void open_piece(Source& source, const Piece& piece, const int out[2]) {
    const int shape[4] = {piece.height, piece.width, piece.top, piece.left};
    const int image[2] = {piece.image_height, piece.image_width};
    source.open(piece.data, shape, image, piece.box, out, false, false);
}

MIX_CLONES void mix_sample(const Batch& batch, int64_t index, Workspace& work) {
    const Row& row = batch.rows[index];
    const int out[2] = {batch.out_height, batch.out_width};
    const int height = out[0], width = out[1];
    const bool mixed = row.mask >= 0, across = mask_is_horizontal(row.mask);
    open_piece(work.original, batch.originals[index], out);
    if (mixed) {
        open_piece(work.edit, batch.edits[index], out);
        const int axis = across ? 1 : 0;
        work.weight.resize(out[axis]);
        for (int i = 0; i < out[axis]; ++i)
            work.weight[i] = edit_weight(row.mask, row.seam_width, row.span[axis], row.span[axis + 2], i, out[axis]);
    }
    const bool fractal = row.fractal >= 0;
    if (fractal) {
        const int h = batch.bank_height, w = batch.bank_width;
        const int shape[4] = {h, w, 0, 0}, image[2] = {h, w};
        const double box[4] = {row.span[0] * h, row.span[1] * w, row.span[2] * h, row.span[3] * w};
        const uint8_t* pixels = batch.bank + static_cast<size_t>(row.fractal) * h * w * 3;
        work.fractal.open(pixels, shape, image, box, out, row.fractal_flip[0], row.fractal_flip[1]);
    }
    // Columns that each source is seen in. M is monotonous, so they are one range.
    int original_begin = 0, original_end = width, edit_begin = 0, edit_end = width;
    if (mixed && across) {
        while (edit_begin < width && work.weight[edit_begin] == 0) ++edit_begin;
        while (edit_end > edit_begin && work.weight[edit_end - 1] == 0) --edit_end;
        while (original_begin < width && work.weight[original_begin] == 1) ++original_begin;
        while (original_end > original_begin && work.weight[original_end - 1] == 1) --original_end;
    }
    work.mixed.resize(static_cast<size_t>(width) * 3 + 1);
    float* const value = work.mixed.data();
    const size_t plane = static_cast<size_t>(height) * width;
    for (int y = 0; y < height; ++y) {
        const float m = mixed && !across ? work.weight[y] : 0;
        const bool see_edit = mixed && (across ? edit_begin < edit_end : m > 0);
        const bool see_original = !mixed || (across ? original_begin < original_end : m < 1);
        if (see_original) {
            resample_row(work.original, y, original_begin, original_end);
            const float* from = work.original.value.data();
            for (int j = original_begin * 3; j < original_end * 3; ++j) value[j] = from[j];
        }
        if (see_edit) {
            resample_row(work.edit, y, edit_begin, edit_end);
            const float* from = work.edit.value.data();
            for (int x = edit_begin; x < edit_end; ++x) {
                const float weight = across ? work.weight[x] : m;
                for (int c = 0; c < 3; ++c) {
                    const int j = x * 3 + c;
                    // Where only the edit is seen `value` holds nothing yet.
                    value[j] = weight == 1 ? from[j] : blend(value[j], from[j], weight);
                }
            }
        }
        if (fractal) {
            resample_row(work.fractal, y, 0, width);
            const float* from = work.fractal.value.data();
            const bool inside = work.original.rows.count[y] > 0;
            for (int x = 0; x < width; ++x) {
                const bool seen = inside && work.original.columns.count[x] > 0;
                for (int c = 0; c < 3; ++c) {
                    const int j = x * 3 + c;
                    value[j] = seen ? blend(value[j], from[j], row.fractal_weight) : 0;
                }
            }
        }
        const size_t at = static_cast<size_t>(index) * plane * 3 + static_cast<size_t>(y) * width * (batch.channels_last ? 3 : 1);
        const bool last = batch.channels_last, flip = row.flip;
        if (batch.dtype == kFloat32)
            store_row<float, identity>(static_cast<float*>(batch.out) + at, value, width, plane, batch.scale, batch.offset, last, flip);
        else if (batch.dtype == kFloat16)
            store_row<uint16_t, to_float16>(static_cast<uint16_t*>(batch.out) + at, value, width, plane, batch.scale, batch.offset, last, flip);
        else if (batch.dtype == kBfloat16)
            store_row<uint16_t, to_bfloat16>(static_cast<uint16_t*>(batch.out) + at, value, width, plane, batch.scale, batch.offset, last, flip);
        else
            store_row<uint8_t, to_uint8>(static_cast<uint8_t*>(batch.out) + at, value, width, plane, batch.scale, batch.offset, last, flip);
    }
}

void work_through(const Batch& batch, std::atomic<int64_t>& next, std::atomic<bool>& failed) {
    try {
        Workspace work;
        for (int64_t i; !failed && (i = next++) < batch.count;) mix_sample(batch, i, work);
    } catch (const std::bad_alloc&) {
        failed = true;
    }
}

}  // namespace

// Returns 0, or 1 when memory ran out.
extern "C" __attribute__((visibility("default"))) int dali_diffusemix_mix(
    const Piece* originals, const Piece* edits, const Row* rows, int64_t count, const uint8_t* bank, int bank_height,
    int bank_width, void* out, int out_height, int out_width, int dtype, int channels_last, const float* scale,
    const float* offset, int threads) {
    Batch batch{originals, edits, rows, count, bank, bank_height, bank_width, out, out_height, out_width, dtype,
                channels_last, {scale[0], scale[1], scale[2]}, {offset[0], offset[1], offset[2]}};
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    std::vector<std::thread> others;
    try {
        for (int t = 1; t < threads && t < count; ++t)
            others.emplace_back([&] { work_through(batch, next, failed); });
    } catch (...) {
        // Fewer threads than wanted: the work is the same.
    }
    work_through(batch, next, failed);
    for (std::thread& other : others) other.join();
    return failed;
}
