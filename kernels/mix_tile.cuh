// What both shapes of the GPU's mix share: arguments, filters, bytes to floats, element types, the kernels' names.
//
// mix.cu and mix_staged.cu hold a shape each. Both make a tile of kTile x kTile output pixels of one sample in a block,
// and both begin with `measure`: a thread for each (source, axis, row or column of the tile) finds where the filter
// begins, how long it is, its offset, what its weights sum to, and M.
#pragma once

#include "mix_pixel.cuh"

namespace {

using namespace mix;

constexpr int kTile = 32;  // output pixels, on both axes
constexpr int kOriginal = 0, kEdit = 1, kFractal = 2, kSources = 3;
constexpr int kY = 0, kX = 1, kAxes = 2;

struct Batch {
    const Piece* __restrict__ originals;
    const Piece* __restrict__ edits;
    const Row* __restrict__ rows;
    const uint8_t* __restrict__ bank;
    int bank_height, bank_width;
    void* __restrict__ out;
    int height, width;
    float scale[3], offset[3];
};

// The filter of one output row or column over one source: tap k reads line first + k of the piece with weight
// triangle(offset + k * step) * norm.
struct alignas(16) Filter {
    int first, count;  // count is 0 also where the source is not seen: it is not read there
    float offset;
    float norm;  // 0 where the centre lies outside the image, and only there
};

// One source of the sample.
struct View {
    const uint8_t* data;
    uint32_t size;      // bytes
    int pitch;          // bytes of a row
    float step[kAxes];  // how far the triangle goes for each source pixel
};
// What `measure` finds.
struct Measures {
    Filter filters[kSources][kAxes][kTile];  // by place in the tile: after the flip
    float cover[kTile];                      // M, across the seam
    View views[kSources];
};

MIX_FN float triangle(float distance) { return fmaxf(1.0f - fabsf(distance), 0.0f); }
// The filter of output pixel i. The piece holds lines [place, place + size) of the image; taps elsewhere are left out,
// so that a piece smaller than it should be is wrong but never read past.
MIX_FN Filter filter_of(const Axis& axis, int i, bool mirrored, int place, int size, float step) {
    int begin;
    int count = taps_of(axis, i, &begin);
    if (count == 0) return {0, 0, 0.0f, 0.0f};
    const double centre = centre_of(axis.start, axis.extent, i, axis.output);
    // A mirrored source's first tap is the last, seen from the other side; the triangle is symmetric.
    const double ahead = mirrored ? centre - (begin + count - 0.5) : begin + 0.5 - centre;
    float offset = static_cast<float>(ahead) * step, total = 0;
#pragma unroll 1
    for (int k = 0; k < count; ++k) total += triangle(offset + static_cast<float>(k) * step);
    if (mirrored) begin = axis.source - begin - count;
    const int skipped = begin < place ? place - begin : 0;
    const int end = begin + count < place + size ? begin + count : place + size;
    begin += skipped;
    offset += static_cast<float>(skipped) * step;
    return {begin - place, end > begin ? end - begin : 0, offset, 1.0f / total};
}

// Everything about the tile that more than one pixel needs; `task` is 0 to kSources * kAxes * kTile - 1.
MIX_FN void measure(const Batch& batch, Measures& tile, int task) {
    const int source = task / (kAxes * kTile), axis = task / kTile % kAxes, j = task % kTile;
    const int sample = blockIdx.z;
    const Row& row = batch.rows[sample];
    if (source == kEdit ? row.mask < 0 : source == kFractal && row.fractal < 0) return;

    View& view = tile.views[source];
    double start = row.span[axis], extent = row.span[axis + 2];
    int image, place = 0, size;
    if (source == kFractal) {
        size = image = axis == kX ? batch.bank_width : batch.bank_height;
        start *= size, extent *= size;
        if (j == 0 && axis == kY) {
            view.pitch = batch.bank_width * 3;
            view.size = static_cast<uint32_t>(batch.bank_height) * view.pitch;
            view.data = batch.bank + static_cast<size_t>(row.fractal) * view.size;
        }
    } else {
        const Piece& piece = source == kOriginal ? batch.originals[sample] : batch.edits[sample];
        image = axis == kX ? piece.image_width : piece.image_height;
        place = axis == kX ? piece.left : piece.top;
        size = axis == kX ? piece.width : piece.height;
        start = piece.box[axis], extent = piece.box[axis + 2];
        if (j == 0 && axis == kY) {
            view.pitch = piece.width * 3;
            view.size = static_cast<uint32_t>(piece.height) * view.pitch;
            view.data = piece.data;
        }
    }

    Filter filter = {0, 0, 0.0f, 0.0f};
    const int output = axis == kX ? batch.width : batch.height;
    const int position = static_cast<int>(axis == kX ? blockIdx.x : blockIdx.y) * kTile + j;
    const Axis line = make_axis(start, extent, output, image);
    const float step = 1.0f / static_cast<float>(line.widened);
    if (j == 0) view.step[axis] = step;
    if (position < output) {
        const int i = axis == kX && row.flip ? output - 1 - position : position;
        bool seen = true;
        if (source != kFractal && row.mask >= 0 && mask_is_horizontal(row.mask) == (axis == kX)) {
            const float m = edit_weight(row.mask, row.seam_width, row.span[axis], row.span[axis + 2], i, output);
            if (source == kEdit) tile.cover[j] = m;
            seen = m != (source == kEdit ? 0.0f : 1.0f);
        }
        if (seen)
            filter = filter_of(line, i, source == kFractal && row.fractal_flip[axis], place, size, step);
        else
            filter.norm = is_inside(line, i) ? 1.0f : 0.0f;
    }
    tile.filters[source][axis][j] = filter;
}

// Byte i of a word as a float: in the mantissa of 2^23, whose last bit is worth 1.
MIX_FN float byte_of(uint32_t word, int i) {
    return __uint_as_float(__byte_perm(word, 0x4B000000u, 0x7440u | i)) - 8388608.0f;
}

// Bytes at any alignment are read as the aligned words that hold them, which `align_words` then shifts.
template <int kLoads>
MIX_FN void load_words(const uint8_t* at, uint32_t (&loads)[kLoads]) {
    const size_t address = reinterpret_cast<size_t>(at);
    const uint32_t* const aligned = reinterpret_cast<const uint32_t*>(address & ~static_cast<size_t>(3));
#pragma unroll
    for (int j = 0; j < kLoads; ++j) loads[j] = __ldg(aligned + j);
}

template <int kLoads, int kWords>
MIX_FN void align_words(const uint8_t* at, const uint32_t (&loads)[kLoads], uint32_t (&words)[kWords]) {
    const uint32_t shift = static_cast<uint32_t>(reinterpret_cast<size_t>(at) & 3) * 8;
#pragma unroll
    for (int j = 0; j < kWords; ++j) words[j] = __funnelshift_r(loads[j], j + 1 < kLoads ? loads[j + 1] : 0, shift);
}

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

// Writes the first `count` of four values: as one vector where all are wanted and the address allows.
template <typename T>
MIX_FN void store(T* to, const T (&values)[4], int count) {
    struct alignas(4 * sizeof(T)) Vector {
        T values[4];
    };
    if (count >= 4 && reinterpret_cast<size_t>(to) % sizeof(Vector) == 0) {
        *reinterpret_cast<Vector*>(to) = {{values[0], values[1], values[2], values[3]}};
        return;
    }
#pragma unroll
    for (int j = 0; j < 4; ++j)
        if (j < count) to[j] = values[j];
}

}  // namespace

// Defines the kernel `name`, which calls the shape's `run<Element, channels_last>` with its `Tile` of shared memory.
#define MIX_KERNEL(name, Element, channels_last)                                                                \
    extern "C" __global__ void __launch_bounds__(kThreads, kBlocks)                                             \
    name(const Piece* originals, const Piece* edits, const Row* rows, const uint8_t* bank, int bank_height,     \
         int bank_width, void* out, int out_height, int out_width, float scale_red, float scale_green,          \
         float scale_blue, float offset_red, float offset_green, float offset_blue) {                           \
        __shared__ Tile tile;                                                                                   \
        const Batch batch = {originals, edits, rows, bank, bank_height, bank_width, out, out_height, out_width, \
                             {scale_red, scale_green, scale_blue}, {offset_red, offset_green, offset_blue}};    \
        run<Element, channels_last>(batch, tile);                                                               \
    }

// A shape's kernels; or, to compile faster, the one of MIX_NAME, MIX_ELEMENT and MIX_CHANNELS_LAST.
#ifdef MIX_NAME
#define MIX_KERNELS MIX_KERNEL(MIX_NAME, MIX_ELEMENT, MIX_CHANNELS_LAST)
#else
#define MIX_KERNELS                                        \
    MIX_KERNEL(mix_float32_nchw, Float32, false)           \
    MIX_KERNEL(mix_float32_channels_last, Float32, true)   \
    MIX_KERNEL(mix_float16_nchw, Float16, false)           \
    MIX_KERNEL(mix_float16_channels_last, Float16, true)   \
    MIX_KERNEL(mix_bfloat16_nchw, Bfloat16, false)         \
    MIX_KERNEL(mix_bfloat16_channels_last, Bfloat16, true) \
    MIX_KERNEL(mix_uint8_nchw, Uint8, false)               \
    MIX_KERNEL(mix_uint8_channels_last, Uint8, true)
#endif
