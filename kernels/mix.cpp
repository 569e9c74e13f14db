// The fused mix on the CPU: from decoded pieces to the training tensor, one pass, a row of output at a time.
//
// A sample's rows stay in the first-level cache from the decoded bytes to the normalised value. Threads take samples
// from a counter. A sample in which each pixel is one pixel of its source, as with crops of small images, is not
// resampled (copy_sample); its bits are those of the resample. The loops are written for the compiler's vectoriser and
// cloned for AVX2 and AVX-512; without fused multiply-adds all clones give the same bits.
#include <atomic>
#include <cstdlib>
#include <new>
#include <thread>
#include <utility>
#include <vector>

#include "augment.h"
#include "clones.h"
#include "mix_pixel.cuh"

namespace {

using namespace mix;

constexpr int kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2, kUint8 = 3;  // indices in base.native's types

// Four lanes: red, green, blue and whatever follows.
typedef float Pixel __attribute__((vector_size(16)));

MIX_INLINE Pixel load(const float* p) {
    Pixel value;
    memcpy(&value, p, sizeof value);
    return value;
}

MIX_INLINE void store(float* p, Pixel value) { memcpy(p, &value, sizeof value); }

// Output rows or columns [begin, end).
struct Range {
    int begin = 0, end = 0;

    bool empty() const { return end <= begin; }
    bool holds(Range other) const { return begin <= other.begin && other.end <= end; }
    Range cut(Range other) const {
        return {begin > other.begin ? begin : other.begin, end < other.end ? end : other.end};
    }
};

// What the taps of one axis depend on. The piece holds the source's pixels [origin, origin + size).
struct Geometry {
    Axis axis;
    bool mirrored;  // the source is read from its end, though it lies as it is
    int origin, size;

    bool operator==(const Geometry& other) const {
        return axis.start == other.axis.start && axis.extent == other.axis.extent && origin == other.origin &&
               size == other.size && axis.output == other.axis.output && axis.source == other.axis.source &&
               mirrored == other.mirrored;
    }

    uint8_t hash() const {
        uint64_t bits;
        memcpy(&bits, &axis.start, sizeof bits);
        bits ^= static_cast<uint64_t>(origin) << 33 ^ static_cast<uint64_t>(size) << 1 ^ mirrored;
        return static_cast<uint8_t>(bits * 0x9E3779B97F4A7C15u >> 56);
    }
};

// The taps of one axis, padded with weights of 0 to one number of them: a loop of fixed length for every output pixel.
struct Taps {
    std::vector<int> first, count;  // output pixel i: source pixels first[i] to first[i] + taps; count 0: outside
    std::vector<float> weights;     // (output, taps)
    int taps = 1;
    Range inside;  // output pixels whose centre is in the image
    Range copies;  // those that are one pixel of the piece and nothing else: i is copy_from + i * copy_step
    int copy_from = 0, copy_step = 1;

    // `first` counts from the piece's begin, and what lies outside the piece weighs nothing.
    void build(const Geometry& geometry) {
        const Axis& axis = geometry.axis;
        const bool mirrored = geometry.mirrored;
        const int output = axis.output, origin = geometry.origin, size = geometry.size;
        first.resize(output);
        count.resize(output);
        int most = 1;
        inside = Range{};
        for (int i = 0; i < output; ++i) {
            int from = 0, n = 0;
            if (is_inside(centre_of(axis.start, axis.extent, i, output))) {
                n = taps_of(axis, source_centre(axis, i), &from);
                if (inside.empty()) inside.begin = i;
                inside.end = i + 1;
            }
            if (mirrored) from = axis.source - from - n;
            first[i] = from;
            count[i] = n;
            most = n > most ? n : most;
        }
        taps = most < size ? most : size;
        weights.assign(static_cast<size_t>(output) * taps, 0.0f);
        exact_.resize(most);
        for (int i = 0; i < output; ++i) {
            const int from = first[i], n = count[i];
            const double centre = source_centre(axis, i);
            double total = 0;
            for (int k = 0; k < n; ++k) {
                const int at = mirrored ? axis.source - 1 - (from + k) : from + k;
                total += exact_[k] = tap_weight(axis, centre, at);
            }
            // Moved to where all `taps` of them lie in the piece.
            int start = from - origin;
            start = start > size - taps ? size - taps : start;
            start = start < 0 ? 0 : start;
            first[i] = start;
            float* out = &weights[static_cast<size_t>(i) * taps];
            for (int k = 0; k < n; ++k) {
                const int at = from + k - origin - start;
                if (at >= 0 && at < taps) out[at] = static_cast<float>(exact_[k] / total);
            }
        }
        find_copies(mirrored ? -1 : 1);
    }

   private:
    // Decided by the weights, not by the box, whose rounding may leave 1e-16 of a pixel next to 1 - 1e-16 of another.
    void find_copies(int step) {
        copies = Range{}, copy_step = step;
        Range found;
        for (int i = inside.begin; i < inside.end; ++i) {
            const float* const weight = &weights[static_cast<size_t>(i) * taps];
            int at = -1;
            for (int k = 0; k < taps; ++k) {
                if (weight[k] == 0) continue;
                if (weight[k] != 1 || at >= 0) return;
                at = first[i] + k;
            }
            if (at < 0) continue;  // not in the piece
            if (found.empty()) found = {i, i}, copy_from = at - i * step;
            if (at != copy_from + i * step || found.end++ != i) return;
        }
        copies = found;
    }

    std::vector<double> exact_;
};

// The taps of small axes that a thread has built. Crops of small images have few positions, so samples share most of
// their taps; building them would take longer than the pixels. The taps of large axes are built where they are used.
class SharedTaps {
   public:
    // What `find` returned may be replaced from here on.
    void begin_sample() {
        if (used_ + kAxes <= kCapacity) return;
        used_ = 0;
        memset(slots_, 0, sizeof slots_);
    }

    const Taps* find(const Geometry& geometry, Taps& own) {
        if (geometry.axis.output > kLargest) {
            own.build(geometry);
            return &own;
        }
        uint8_t slot = geometry.hash();
        for (; slots_[slot]; ++slot)
            if (geometries_[slots_[slot] - 1] == geometry) return &taps_[slots_[slot] - 1];
        taps_[used_].build(geometry);
        geometries_[used_] = geometry;
        slots_[slot] = static_cast<uint8_t>(++used_);
        return &taps_[used_ - 1];
    }

   private:
    static constexpr int kLargest = 64, kCapacity = 128, kAxes = 6;  // a sample has three sources of two axes
    Geometry geometries_[kCapacity];
    Taps taps_[kCapacity];
    uint8_t slots_[256] = {};  // a hash table of their numbers, counted from 1; never more than half full
    int used_ = 0;
};

// One source of a sample (original, edit or fractal) on its way to rows of the output grid.
struct Source {
    const uint8_t* data = nullptr;
    int width = 0;            // of the piece
    Range down, across;       // output rows and columns that it is seen in
    int low = 0, high = 0;    // columns of the piece that these read
    const Taps *rows = nullptr, *columns = nullptr;
    std::vector<float> line;  // one output row before the horizontal pass: (width, 3) and one float to spare

    void open(SharedTaps& shared, const uint8_t* pixels, const int piece[4], const int image[2], const double box[4],
              const int out[2], bool upside_down, bool left_right) {
        // What a piece leaves out is black; so a piece without pixels is a black one.
        static const uint8_t black[3] = {0, 0, 0};
        const bool none = !pixels || piece[0] <= 0 || piece[1] <= 0;
        data = none ? black : pixels;
        const int height = none ? 1 : piece[0];
        width = none ? 1 : piece[1];
        const Axis y = make_axis(box[0], box[2], out[0], image[0]), x = make_axis(box[1], box[3], out[1], image[1]);
        rows = shared.find({y, upside_down, piece[2], height}, own_rows_);
        columns = shared.find({x, left_right, piece[3], width}, own_columns_);
        line.resize(static_cast<size_t>(width) * 3 + 1);
    }

    // The columns must lie in the image.
    void show(Range seen_down, Range seen_across) {
        down = seen_down, across = seen_across;
        low = high = 0;
        const Range read = across.cut(columns->inside);
        if (read.empty()) return;
        // The taps move one way, so the outermost columns read the outermost pixels.
        const int one = columns->first[read.begin], other = columns->first[read.end - 1];
        low = one < other ? one : other;
        high = (one < other ? other : one) + columns->taps;
    }

    void hide() { down = across = Range{}; }

    bool seen() const { return !down.empty() && !across.empty(); }
    bool seen(int y) const { return down.begin <= y && y < down.end && !across.empty(); }

    // Whether nothing that is seen of it is resampled.
    bool copied() const { return !seen() || (rows->copies.holds(down) && columns->copies.holds(across)); }

   private:
    Taps own_rows_, own_columns_;
};

// line[j] = the weighted sum of n source rows, in their order.
template <int N>
MIX_INLINE void add_rows(float* line, const uint8_t* source, size_t pitch, const float* weights, int length, bool first) {
    const uint8_t *s0 = source, *s1 = s0 + pitch, *s2 = s1 + pitch, *s3 = s2 + pitch;
    const float w0 = weights[0], w1 = N > 1 ? weights[1] : 0, w2 = N > 2 ? weights[2] : 0, w3 = N > 3 ? weights[3] : 0;
    for (int j = 0; j < length; ++j) {
        float sum = w0 * static_cast<float>(s0[j]);
        if (!first) sum = line[j] + sum;
        if (N > 1) sum = sum + w1 * static_cast<float>(s1[j]);
        if (N > 2) sum = sum + w2 * static_cast<float>(s2[j]);
        if (N > 3) sum = sum + w3 * static_cast<float>(s3[j]);
        line[j] = sum;
    }
}

// Down: output row y before the horizontal pass, columns [low, high) of the piece.
MIX_CLONES void resample_rows(Source& source, int y) {
    const size_t pitch = static_cast<size_t>(source.width) * 3;
    const float* weights = &source.rows->weights[static_cast<size_t>(y) * source.rows->taps];
    const int length = (source.high - source.low) * 3;
    const uint8_t* from = source.data + source.rows->first[y] * pitch + source.low * 3;
    float* const line = source.line.data() + source.low * 3;
    // The padding's rows weigh nothing and need not be read.
    int n = source.rows->taps;
    while (n > 1 && weights[n - 1] == 0) --n;
    for (int k = 0; k < n; k += 4, from += 4 * pitch) {
        const bool first = k == 0;
        const int left = n - k;
        if (left >= 4) add_rows<4>(line, from, pitch, weights + k, length, first);
        else if (left == 3) add_rows<3>(line, from, pitch, weights + k, length, first);
        else if (left == 2) add_rows<2>(line, from, pitch, weights + k, length, first);
        else add_rows<1>(line, from, pitch, weights + k, length, first);
    }
}

// What becomes of a source's pixel: it is the value, or is blended over it.
struct Replace {
    MIX_INLINE_MEMBER void operator()(float* value, int, Pixel pixel) const { store(value, pixel); }
};
struct BlendBy {
    const float* weight;  // by column
    MIX_INLINE_MEMBER void operator()(float* value, int x, Pixel pixel) const {
        const float w = weight[x];
        // Where only the edit is seen the value holds nothing yet.
        store(value, w == 1 ? pixel : blend(load(value), pixel, w));
    }
};
struct BlendAll {
    float weight;
    MIX_INLINE_MEMBER void operator()(float* value, int, Pixel pixel) const {
        store(value, blend(load(value), pixel, weight));
    }
};

template <int N, typename Use>
MIX_INLINE void across(const Source& source, float* value, const Use& use) {
    const float* const line = source.line.data();
    const int taps = N ? N : source.columns->taps;
    const int* const first = source.columns->first.data();
    const float* weights = source.columns->weights.data() + static_cast<size_t>(source.across.begin) * taps;
    const int end = source.across.end;
    for (int x = source.across.begin; x < end; ++x, weights += taps) {
        const float* at = line + first[x] * 3;
        Pixel sum = weights[0] * load(at);
        for (int k = 1; k < taps; ++k) sum = sum + weights[k] * load(at + k * 3);
        use(value + x * 4, x, sum);
    }
}

// Across: columns [begin, end) of the output row into `value`, four floats a pixel.
template <typename Use>
MIX_INLINE void resample_columns(const Source& source, float* value, const Use& use) {
    switch (source.columns->taps) {
        case 1: return across<1>(source, value, use);
        case 2: return across<2>(source, value, use);
        case 3: return across<3>(source, value, use);
        case 4: return across<4>(source, value, use);
        case 5: return across<5>(source, value, use);
        case 6: return across<6>(source, value, use);
        case 7: return across<7>(source, value, use);
        case 8: return across<8>(source, value, use);
        default: return across<0>(source, value, use);
    }
}

MIX_CLONES void replace_row(const Source& source, float* value) { resample_columns(source, value, Replace{}); }
MIX_CLONES void blend_row(const Source& source, float* value, const float* weight) {
    resample_columns(source, value, BlendBy{weight});
}
MIX_CLONES void blend_whole_row(const Source& source, float* value, float weight) {
    resample_columns(source, value, BlendAll{weight});
}

// Normalise a row and turn it round if wanted: (width, 4) into three planes of `width`, or into (width, 3).
MIX_CLONES void normalise_planes(const float* value, float* red, float* green, float* blue, int width, bool flip,
                                 const float* scale, const float* offset) {
    const Pixel s = {scale[0], scale[1], scale[2], 0}, o = {offset[0], offset[1], offset[2], 0};
    const int step = flip ? -4 : 4;
    const float* from = flip ? value + (width - 1) * 4 : value;
    int x = 0;
    for (; x + 4 <= width; x += 4, from += 4 * step) {
        const Pixel a = normalise(load(from), s, o), b = normalise(load(from + step), s, o);
        const Pixel c = normalise(load(from + 2 * step), s, o), d = normalise(load(from + 3 * step), s, o);
        typedef int Lanes __attribute__((vector_size(16)));
        const Pixel ab_low = __builtin_shuffle(a, b, Lanes{0, 4, 1, 5}), cd_low = __builtin_shuffle(c, d, Lanes{0, 4, 1, 5});
        const Pixel ab_high = __builtin_shuffle(a, b, Lanes{2, 6, 3, 7}), cd_high = __builtin_shuffle(c, d, Lanes{2, 6, 3, 7});
        store(red + x, __builtin_shuffle(ab_low, cd_low, Lanes{0, 1, 4, 5}));
        store(green + x, __builtin_shuffle(ab_low, cd_low, Lanes{2, 3, 6, 7}));
        store(blue + x, __builtin_shuffle(ab_high, cd_high, Lanes{0, 1, 4, 5}));
    }
    for (; x < width; ++x, from += step) {
        const Pixel pixel = normalise(load(from), s, o);
        red[x] = pixel[0], green[x] = pixel[1], blue[x] = pixel[2];
    }
}

// `out` has room for one float more.
MIX_CLONES void normalise_pixels(const float* value, float* out, int width, bool flip, const float* scale,
                                 const float* offset) {
    const Pixel s = {scale[0], scale[1], scale[2], 0}, o = {offset[0], offset[1], offset[2], 0};
    for (int x = 0; x < width; ++x)
        store(out + x * 3, normalise(load(value + (flip ? width - 1 - x : x) * 4), s, o));
}

// A sample that resamples nothing is put together from bytes, in the order of the tensor. Then one loop computes it.

// (count, 3) the other way round.
MIX_INLINE void turn_pixels(const uint8_t* from, uint8_t* to, int count) {
    for (int i = 0; i < count; ++i) memcpy(to + 3 * i, from + 3 * (count - 1 - i), 3);
}

typedef int Whole __attribute__((vector_size(16)));

// to_uint8 of a pixel's four lanes.
MIX_INLINE Bytes rounded(const float* value) {
    Pixel pixel = load(value) + 0.5f;
    pixel = pixel > 0.0f ? pixel : Pixel{};
    pixel = pixel < 255.0f ? pixel : Pixel{255, 255, 255, 255};
    const Whole whole = __builtin_convertvector(pixel, Whole);
    Bytes bytes;
    memcpy(&bytes, &whole, sizeof bytes);
    return bytes;
}

// A row of values to bytes, turned round if wanted: (width, 4) to (width, 3). `out` has room for 16 bytes more.
MIX_CLONES void round_pixels(const float* value, uint8_t* out, int width, bool flip) {
    const Bytes two = {0, 4, 8, 16, 20, 24}, four = {0, 1, 2, 3, 4, 5, 16, 17, 18, 19, 20, 21};
    const int step = flip ? -4 : 4;
    const float* from = flip ? value + (width - 1) * 4 : value;
    int x = 0;
    for (; x + 4 <= width; x += 4, from += 4 * step) {
        const Bytes ab = __builtin_shuffle(rounded(from), rounded(from + step), two);
        const Bytes cd = __builtin_shuffle(rounded(from + 2 * step), rounded(from + 3 * step), two);
        const Bytes pixels = __builtin_shuffle(ab, cd, four);
        memcpy(out + 3 * x, &pixels, sizeof pixels);
    }
    for (; x < width; ++x, from += step) {
        const Bytes pixel = __builtin_shuffle(rounded(from), two);
        memcpy(out + 3 * x, &pixel, sizeof pixel);
    }
}

// What is seen of a source in output rows [y, y + height), turned round if wanted: (height, width, 3), or three planes
// of (height, width).
MIX_CLONES void copy_band(const Source& source, int y, int height, int width, bool flip, bool planes, uint8_t* to) {
    const Taps &rows = *source.rows, &columns = *source.columns;
    const Range across = source.across, down = source.down.cut({y, y + height});
    const size_t plane = static_cast<size_t>(height) * width;
    const int count = across.end - across.begin, begin = flip ? width - across.end : across.begin;
    const bool back = flip != (columns.copy_step < 0);
    const int left = columns.copy_from + columns.copy_step * (columns.copy_step < 0 ? across.end - 1 : across.begin);
    for (int i = down.begin; i < down.end; ++i) {
        const int row = rows.copy_from + i * rows.copy_step;
        const uint8_t* const from = source.data + (static_cast<size_t>(row) * source.width + left) * 3;
        const size_t at = static_cast<size_t>(i - y) * width + begin;
        uint8_t* const out = to + at;
        if (planes && back) split_pixels<true>(from, out, out + plane, out + 2 * plane, count);
        else if (planes) split_pixels<false>(from, out, out + plane, out + 2 * plane, count);
        else if (back) turn_pixels(from, to + at * 3, count);
        else memcpy(to + at * 3, from, static_cast<size_t>(count) * 3);
    }
}

// Pixels to channels, each `apart` behind the one before.
MIX_CLONES void split_band(const uint8_t* from, uint8_t* to, int count, int apart) {
    split_pixels<false>(from, to, to + apart, to + 2 * apart, count);
}

// Scale and offset of the values in their order: of one channel, or of three in turns.
struct Affine {
    static constexpr int kPeriod = 96;  // a multiple of three, and of the bytes that make a vector
    float scale[kPeriod], offset[kPeriod];
};

// to[i] = the value of under[i], with over[i] blended over it if wanted.
template <bool Blended>
MIX_INLINE void compute(const uint8_t* under, const uint8_t* over, float weight, const Affine& affine, float* to,
                        int count) {
    const float *const scale = affine.scale, *const offset = affine.offset;
    for (int i = 0; i < count; i += Affine::kPeriod, under += Affine::kPeriod, over += Affine::kPeriod,
             to += Affine::kPeriod) {
        const int left = count - i, n = left < Affine::kPeriod ? left : Affine::kPeriod;
#pragma GCC ivdep
        for (int j = 0; j < n; ++j) {
            float value = static_cast<float>(under[j]);
            if (Blended) value = blend(value, static_cast<float>(over[j]), weight);
            to[j] = normalise(value, scale[j], offset[j]);
        }
    }
}
MIX_CLONES void compute_plain(const uint8_t* under, const Affine& affine, float* to, int count) {
    compute<false>(under, under, 0, affine, to, count);
}
MIX_CLONES void compute_blended(const uint8_t* under, const uint8_t* over, float weight, const Affine& affine,
                                float* to, int count) {
    compute<true>(under, over, weight, affine, to, count);
}

template <typename T, T (*Cast)(float)>
MIX_INLINE void cast(const float* from, T* to, int count) {
    for (int j = 0; j < count; ++j) to[j] = Cast(from[j]);
}
MIX_CLONES void cast_float16(const float* from, uint16_t* to, int count) { cast<uint16_t, to_float16>(from, to, count); }
MIX_CLONES void cast_bfloat16(const float* from, uint16_t* to, int count) { cast<uint16_t, to_bfloat16>(from, to, count); }
MIX_CLONES void cast_uint8(const float* from, uint8_t* to, int count) { cast<uint8_t, to_uint8>(from, to, count); }

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
    const augment::Operation* operations;  // (count, slots)
    int slots;
    const uint8_t* noise;  // (3, kNoiseSteps) values of erase_noise
    Affine affine[4];  // of red, green and blue alone, and of all three in turns

    void repeat_affine() {
        for (int j = 0; j < Affine::kPeriod; ++j) {
            for (int c = 0; c < 3; ++c) affine[c].scale[j] = scale[c], affine[c].offset[j] = offset[c];
            affine[3].scale[j] = scale[j % 3], affine[3].offset[j] = offset[j % 3];
        }
    }
};

// What one thread reuses from sample to sample.
struct Workspace {
    SharedTaps shared;
    Source original, edit, fractal;
    std::vector<float> weight;      // M along the seam's axis
    std::vector<float> value;       // one row of the sample: (width, 4)
    std::vector<float> normalised;  // the same as it is stored, before the cast, and one float to spare
    std::vector<uint8_t> under, over;  // a band of a sample without a resample: original and edit, and the fractal
    augment::Sample sample;
};

void open_piece(SharedTaps& shared, Source& source, const Piece& piece, const Row& row, const int out[2]) {
    const int shape[4] = {piece.height, piece.width, piece.top, piece.left};
    const int image[2] = {piece.image_height, piece.image_width};
    source.open(shared, piece.data, shape, image, row.box, out, false, false);
}

void store_values(const Batch& batch, const float* from, size_t at, int count) {
    if (batch.dtype == kFloat32) memcpy(static_cast<float*>(batch.out) + at, from, count * sizeof(float));
    else if (batch.dtype == kFloat16) cast_float16(from, static_cast<uint16_t*>(batch.out) + at, count);
    else if (batch.dtype == kBfloat16) cast_bfloat16(from, static_cast<uint16_t*>(batch.out) + at, count);
    else cast_uint8(from, static_cast<uint8_t*>(batch.out) + at, count);
}

// Row y of a sample into the tensor.
void store_row(const Batch& batch, Workspace& work, int64_t place, int y, bool flip) {
    const int width = batch.out_width;
    const size_t plane = static_cast<size_t>(batch.out_height) * width, sample = static_cast<size_t>(place) * plane * 3;
    const float* const value = work.value.data();
    float* const row = work.normalised.data();
    if (batch.channels_last && batch.dtype == kUint8) {  // which is never normalised
        work.over.resize(static_cast<size_t>(width) * 3 + 16);
        round_pixels(value, work.over.data(), width, flip);
        memcpy(static_cast<uint8_t*>(batch.out) + sample + static_cast<size_t>(y) * width * 3, work.over.data(), width * 3);
        return;
    }
    if (batch.channels_last) {
        normalise_pixels(value, row, width, flip, batch.scale, batch.offset);
        store_values(batch, row, sample + static_cast<size_t>(y) * width * 3, width * 3);
        return;
    }
    const size_t at = sample + static_cast<size_t>(y) * width;
    if (batch.dtype == kFloat32) {
        float* const out = static_cast<float*>(batch.out) + at;
        normalise_planes(value, out, out + plane, out + 2 * plane, width, flip, batch.scale, batch.offset);
        return;
    }
    normalise_planes(value, row, row + width, row + 2 * width, width, flip, batch.scale, batch.offset);
    for (int c = 0; c < 3; ++c) store_values(batch, row + c * width, at + c * plane, width);
}

// A sample whose sources are copied and whose seam is hard, a band of rows at a time.
void copy_sample(const Batch& batch, Workspace& work, int64_t place, const Row& row) {
    constexpr int kBand = 1024;  // pixels: all that a band needs stays in the first-level cache
    const int width = batch.out_width, most = width < kBand ? kBand / width : 1;
    const size_t plane = static_cast<size_t>(batch.out_height) * width, sample = static_cast<size_t>(place) * plane * 3;
    const bool planes = !batch.channels_last, blended = work.fractal.seen();
    for (int y = 0, height; y < batch.out_height; y += height) {
        height = y + most < batch.out_height ? most : batch.out_height - y;
        const int pixels = height * width, count = planes ? pixels : pixels * 3;
        const auto copy = [&](const Source& source, std::vector<uint8_t>& to) {
            if (source.seen()) copy_band(source, y, height, width, row.flip, planes, to.data());
        };
        work.under.assign(static_cast<size_t>(pixels) * 3, 0);
        copy(work.original, work.under);
        copy(work.edit, work.under);
        if (blended) work.over.assign(static_cast<size_t>(pixels) * 3, 0);
        copy(work.fractal, work.over);
        work.normalised.resize(static_cast<size_t>(count));
        for (int c = 0; c < (planes ? 3 : 1); ++c) {
            const size_t from = static_cast<size_t>(c) * pixels, before = static_cast<size_t>(y) * width;
            const size_t at = sample + (planes ? c * plane + before : before * 3);
            const Affine& affine = batch.affine[planes ? c : 3];
            if (batch.dtype == kUint8 && !blended) {
                memcpy(static_cast<uint8_t*>(batch.out) + at, &work.under[from], count);
                continue;
            }
            const bool direct = batch.dtype == kFloat32;
            float* const to = direct ? static_cast<float*>(batch.out) + at : work.normalised.data();
            if (blended)
                compute_blended(&work.under[from], &work.over[from], row.fractal_weight, affine, to, count);
            else
                compute_plain(&work.under[from], affine, to, count);
            if (!direct) store_values(batch, to, at, count);
        }
    }
}

// Sample `index` of the batch, into place `place` of the tensor.
void mix_sample(const Batch& batch, int64_t index, int64_t place, Workspace& work) {
    const Row& row = batch.rows[index];
    const int out[2] = {batch.out_height, batch.out_width};
    const int height = out[0], width = out[1];
    const bool mixed = row.mask >= 0, horizontal = mask_is_horizontal(row.mask);
    Source &original = work.original, &edit = work.edit, &fractal = work.fractal;
    work.shared.begin_sample();
    open_piece(work.shared, original, batch.originals[index], row, out);
    // Where a centre lies outside the image the value is 0, the fractal included.
    const Range inside[2] = {original.rows->inside, original.columns->inside};
    original.show(inside[0], inside[1]);
    edit.hide();
    fractal.hide();
    bool hard = true;
    if (mixed) {
        open_piece(work.shared, edit, batch.edits[index], row, out);
        const int axis = horizontal ? 1 : 0;
        work.weight.resize(out[axis]);
        for (int i = 0; i < out[axis]; ++i)
            work.weight[i] = edit_weight(row.mask, row.seam_width, row.span[axis], row.span[axis + 2], i, out[axis]);
        // Rows or columns that each source is seen in. M is monotonous, so they are one range.
        Range of_original = {0, out[axis]}, of_edit = of_original;
        const std::vector<float>& m = work.weight;
        while (!of_edit.empty() && m[of_edit.begin] == 0) ++of_edit.begin;
        while (!of_edit.empty() && m[of_edit.end - 1] == 0) --of_edit.end;
        while (!of_original.empty() && m[of_original.begin] == 1) ++of_original.begin;
        while (!of_original.empty() && m[of_original.end - 1] == 1) --of_original.end;
        hard = of_original.cut(of_edit).empty();
        of_original = of_original.cut(inside[axis]), of_edit = of_edit.cut(inside[axis]);
        original.show(horizontal ? inside[0] : of_original, horizontal ? of_original : inside[1]);
        edit.show(horizontal ? inside[0] : of_edit, horizontal ? of_edit : inside[1]);
    }
    if (row.fractal >= 0) {
        const int h = batch.bank_height, w = batch.bank_width;
        const int shape[4] = {h, w, 0, 0}, image[2] = {h, w};
        const uint8_t* pixels = batch.bank + static_cast<size_t>(row.fractal) * h * w * 3;
        fractal.open(work.shared, pixels, shape, image, row.span, out, row.fractal_flip[0], row.fractal_flip[1]);
        fractal.show(inside[0], inside[1]);
    }
    if (hard && original.copied() && edit.copied() && fractal.copied()) return copy_sample(batch, work, place, row);
    work.value.assign(static_cast<size_t>(width) * 4, 0.0f);
    work.normalised.resize(static_cast<size_t>(width) * 3 + 1);
    float* const value = work.value.data();
    for (int y = 0; y < height; ++y) {
        if (y == inside[0].end) work.value.assign(work.value.size(), 0.0f);
        if (original.seen(y)) {
            resample_rows(original, y);
            replace_row(original, value);
        }
        if (edit.seen(y)) {
            resample_rows(edit, y);
            if (horizontal) blend_row(edit, value, work.weight.data());
            else if (work.weight[y] == 1) replace_row(edit, value);
            else blend_whole_row(edit, value, work.weight[y]);
        }
        if (fractal.seen(y)) {
            resample_rows(fractal, y);
            blend_whole_row(fractal, value, row.fractal_weight);
        }
        store_row(batch, work, place, y, row.flip);
    }
}

// The batch whose tensor is 8-bit pixels, (height, width, 3).
Batch of_bytes(const Batch& batch) {
    Batch bytes = batch;
    bytes.dtype = kUint8, bytes.channels_last = 1;
    for (int c = 0; c < 3; ++c) bytes.scale[c] = 1, bytes.offset[c] = 0;
    bytes.repeat_affine();
    return bytes;
}

// 8-bit pixels into the tensor.
void store_bytes(const Batch& batch, Workspace& work, int64_t place, const uint8_t* pixels) {
    constexpr int kBand = 1024;
    const size_t plane = static_cast<size_t>(batch.out_height) * batch.out_width;
    const size_t sample = static_cast<size_t>(place) * plane * 3;
    const bool planes = !batch.channels_last, direct = batch.dtype == kFloat32;
    work.under.resize(3 * kBand), work.normalised.resize(3 * kBand);
    uint8_t* const channels = work.under.data();
    for (size_t begin = 0; begin < plane; begin += kBand) {
        const int count = static_cast<int>(plane - begin < kBand ? plane - begin : kBand);
        const uint8_t* from = pixels + 3 * begin;
        if (planes) split_band(from, channels, count, kBand), from = channels;
        for (int c = 0; c < (planes ? 3 : 1); ++c) {
            const int values = planes ? count : 3 * count;
            const size_t at = sample + (planes ? c * plane + begin : 3 * begin);
            float* const to = direct ? static_cast<float*>(batch.out) + at : work.normalised.data();
            compute_plain(from + c * kBand, batch.affine[planes ? c : 3], to, values);
            if (!direct) store_values(batch, to, at, values);
        }
    }
}

// A sample with its operations: mixed into 8-bit pixels, changed, then stored.
void augment_sample(const Batch& batch, Batch& bytes, int64_t index, Workspace& work) {
    bytes.out = work.sample.begin(batch.out_height, batch.out_width);
    mix_sample(bytes, index, 0, work);
    work.sample.apply(batch.operations + index * batch.slots, batch.slots, batch.noise);
    store_bytes(batch, work, index, work.sample.pixels());
}

// How many of the threads are worth starting: a start takes as long as some 2^16 pixels, read or written.
int64_t useful_threads(const Batch& batch, int64_t threads) {
    constexpr int64_t kLeast = 1 << 16;
    const int64_t fixed = static_cast<int64_t>(batch.out_height) * batch.out_width;
    const int64_t fractal = static_cast<int64_t>(batch.bank_height) * batch.bank_width;
    int64_t pixels = 0;
    for (int64_t i = 0; i < batch.count && pixels < threads * kLeast; ++i) {
        pixels += fixed + (batch.rows[i].fractal >= 0 ? fractal : 0);
        for (const Piece* piece : {&batch.originals[i], &batch.edits[i]})
            if (piece->data) pixels += static_cast<int64_t>(piece->height) * piece->width;
    }
    const int64_t worth = pixels / kLeast;
    return worth < threads ? worth : threads;
}

void work_through(const Batch& batch, std::atomic<int64_t>& next, std::atomic<bool>& failed) {
    try {
        Workspace work;
        Batch bytes = batch.slots ? of_bytes(batch) : Batch{};
        for (int64_t i; !failed && (i = next++) < batch.count;) {
            if (batch.slots) augment_sample(batch, bytes, i, work);
            else mix_sample(batch, i, i, work);
        }
    } catch (const std::bad_alloc&) {
        failed = true;
    }
}

}  // namespace

// The number of this library's interface: base/native.py refuses a library of another one, which an update of the
// sources leaves behind until it is built again. It grows with every change of an argument or of a struct.
extern "C" __attribute__((visibility("default"))) int dali_diffusemix_interface() { return 4; }

// `pieces` is (2, count): originals, edits; `operations` is (count, slots), and without slots nothing is rounded to 8
// bits. Returns 0, or 1 when memory ran out.
extern "C" __attribute__((visibility("default"))) int dali_diffusemix_mix(
    const Piece* pieces, const Row* rows, int64_t count, const uint8_t* bank, int bank_height, int bank_width,
    void* out, int out_height, int out_width, int dtype, int channels_last, const float* scale, const float* offset,
    const augment::Operation* operations, int slots, const uint8_t* noise, int threads) {
    Batch batch{pieces, pieces + count, rows, count, bank, bank_height, bank_width, out, out_height, out_width, dtype,
                channels_last, {scale[0], scale[1], scale[2]}, {offset[0], offset[1], offset[2]}, operations, slots,
                noise, {}};
    batch.repeat_affine();
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    std::vector<std::thread> others;
    try {
        const int64_t useful = useful_threads(batch, threads < count ? threads : count);
        for (int64_t t = 1; t < useful; ++t)
            others.emplace_back([&] { work_through(batch, next, failed); });
    } catch (...) {
        // Fewer threads than wanted: the work is the same.
    }
    work_through(batch, next, failed);
    for (std::thread& other : others) other.join();
    return failed;
}
