// The fused mix on the GPU: from decoded pieces to the training tensor, one launch for a batch.
//
// The kernels are mix_{float32,float16,bfloat16,uint8}_{nchw,channels_last}. All take the same arguments:
//
//     pieces            const Piece*, (2, samples) in device memory, mix.call.PIECE: originals, edits; their `data` are
//                       device pointers
//     rows              const Row*, (samples,) in device memory, mix.call.ROW
//     bank              const uint8_t*, (count, bank_height, bank_width, 3) in device memory; null: no fractals
//     bank_height, bank_width                int32
//     out               the tensor's elements, contiguous; bfloat16 and float16 are their bits
//     out_height, out_width                  int32
//     scale_red, scale_green, scale_blue     float32: value = pixel * scale + offset
//     offset_red, offset_green, offset_blue  float32
//
//     grid  (ceil(out_width / 32), ceil(out_height / 32), samples), at most 65535 samples
//     block (256, 1, 1), no dynamic shared memory
//
// A block makes a tile of 32 x 32 output pixels of one sample, in two phases with one barrier between them:
//
//     measure   one thread for each (source, axis, row or column of the tile), 192 of the 256: where the filter begins,
//               its length, its offset, the sum of its weights, and M. 3.3 KiB of shared memory hold the results.
//     paint     one thread for four neighbouring pixels of a row:
//
//               source, three columns at a time                   output
//               ┌──┬──┬──┬──┬──┬──┬──┬──┬──┐
//               │  │  │  │  │  │  │  │  │  │ first tap row
//               │  │  │  │  │  │  │  │  │  │ ...               ┌──┬──┬──┬──┐
//               │  │  │  │  │  │  │  │  │  │ last              │p0│p1│p2│p3│ one vector store for each plane
//               └──┴──┴──┴──┴──┴──┴──┴──┴──┘                   └──┴──┴──┴──┘
//               down the rows first: 9 sums (3 columns x RGB); each sum is then added to the four pixels
//
// Neighbouring pixels share taps. Going down first, a thread reads, converts and multiplies each source byte once for
// its four pixels. Three columns are nine bytes, which lie in three aligned words at any alignment. A weight is one
// multiply-add, not a table entry, so any ratio fits into registers and shared memory.
//
// docs/kernel.md has the times on an H100, the bytes and instructions, and what was tried and deleted.
#include "elements.cuh"
#include "mix_pixel.cuh"

namespace {

using namespace mix;

constexpr int kTile = 32;    // output pixels, on both axes
constexpr int kRun = 4;      // neighbouring output pixels for each thread
constexpr int kThreads = kTile * kTile / kRun, kBlocks = 4;  // four blocks for each multiprocessor: 64 registers
constexpr int kColumns = 3;  // source columns summed at a time
constexpr int kBytes = kColumns * 3, kWords = 3;  // 9 bytes lie in 3 aligned words wherever they begin
constexpr int kOriginal = 0, kEdit = 1, kFractal = 2, kSources = 3;
constexpr int kY = 0, kX = 1, kAxes = 2;

struct Batch {
    const Piece* __restrict__ pieces;
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
struct Tile {
    Filter filters[kSources][kAxes][kTile];  // by position in the tile: after the flip
    float cover[kTile];                      // M, across the seam
    View views[kSources];
};

// The filter of output pixel i, whose centre is inside. The piece holds lines [origin, origin + size) of the image; taps
// elsewhere are left out, so that a piece smaller than it should be is wrong but never read past.
MIX_FN Filter filter_of(const Axis& axis, int i, bool mirrored, int origin, int size, float step) {
    const double centre = source_centre(axis, i);
    int begin;
    const int count = taps_of(axis, centre, &begin);
    // A mirrored source's first tap is the last, seen from the other side; the triangle is symmetric.
    const double ahead = mirrored ? centre - (begin + count - 0.5) : begin + 0.5 - centre;
    float offset = static_cast<float>(ahead) * step, total = 0;
#pragma unroll 1
    for (int k = 0; k < count; ++k) total += triangle(offset + static_cast<float>(k) * step);
    if (mirrored) begin = axis.source - begin - count;
    const int skipped = begin < origin ? origin - begin : 0;
    const int end = begin + count < origin + size ? begin + count : origin + size;
    begin += skipped;
    offset += static_cast<float>(skipped) * step;
    return {begin - origin, end > begin ? end - begin : 0, offset, 1.0f / total};
}

// Everything about the tile that more than one pixel needs; `task` is 0 to kSources * kAxes * kTile - 1.
MIX_FN void measure(const Batch& batch, Tile& tile, int task) {
    const int source = task / (kAxes * kTile), axis = task / kTile % kAxes, j = task % kTile;
    const int sample = blockIdx.z;
    const Row& row = batch.rows[sample];
    if (source == kEdit ? row.mask < 0 : source == kFractal && row.fractal < 0) return;

    View& view = tile.views[source];
    const double* const box = source == kFractal ? row.span : row.box;
    int image, origin = 0, size;
    if (source == kFractal) {
        size = image = axis == kX ? batch.bank_width : batch.bank_height;
        if (j == 0 && axis == kY) {
            view.pitch = batch.bank_width * 3;
            view.size = static_cast<uint32_t>(batch.bank_height) * view.pitch;
            view.data = batch.bank + static_cast<size_t>(row.fractal) * view.size;
        }
    } else {
        const Piece& piece = batch.pieces[source * gridDim.z + sample];
        image = axis == kX ? piece.image_width : piece.image_height;
        origin = axis == kX ? piece.left : piece.top;
        size = axis == kX ? piece.width : piece.height;
        if (j == 0 && axis == kY) {
            view.pitch = piece.width * 3;
            view.size = static_cast<uint32_t>(piece.height) * view.pitch;
            view.data = piece.data;
        }
    }

    Filter filter = {0, 0, 0.0f, 0.0f};
    const int output = axis == kX ? batch.width : batch.height;
    const int position = static_cast<int>(axis == kX ? blockIdx.x : blockIdx.y) * kTile + j;
    const Axis line = make_axis(box[axis], box[axis + 2], output, image);
    const float step = 1.0f / static_cast<float>(line.reach);
    if (j == 0) view.step[axis] = step;
    if (position < output) {
        const int i = axis == kX && row.flip ? output - 1 - position : position;
        const bool inside = is_inside(centre_of(line.start, line.extent, i, output));
        bool seen = inside;
        if (source != kFractal && row.mask >= 0 && mask_is_horizontal(row.mask) == (axis == kX)) {
            const float m = edit_weight(row.mask, row.seam_width, row.span[axis], row.span[axis + 2], i, output);
            if (source == kEdit) tile.cover[j] = m;
            seen = inside && m != (source == kEdit ? 0.0f : 1.0f);
        }
        if (seen)
            filter = filter_of(line, i, source == kFractal && row.fractal_flip[axis], origin, size, step);
        else
            filter.norm = inside ? 1.0f : 0.0f;
    }
    tile.filters[source][axis][j] = filter;
}

// Byte i of a word as a float: in the mantissa of 2^23, whose last bit is worth 1.
MIX_FN float byte_of(uint32_t word, int i) {
    return __uint_as_float(__byte_perm(word, 0x4B000000u, 0x7440u | i)) - 8388608.0f;
}

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

// sums += the column sums of `count` rows from `at` on. With `kWhole` every aligned word that holds a wanted byte lies
// in the piece; without, the `wanted` bytes are read singly, and the others are 0.
template <bool kWhole>
MIX_FN void add_rows(const uint8_t* at, int pitch, int wanted, int count, float offset, float step,
                     float (&sums)[kBytes]) {
#pragma unroll 1
    for (int k = 0; k < count; ++k, at += pitch) {
        uint32_t words[kWords] = {0, 0, 0};
        if (kWhole) {
            // The aligned words that hold the bytes, shifted.
            const size_t address = reinterpret_cast<size_t>(at);
            const uint32_t* const aligned = reinterpret_cast<const uint32_t*>(address & ~static_cast<size_t>(3));
            const uint32_t shift = static_cast<uint32_t>(address & 3) * 8;
            uint32_t loads[kWords];
#pragma unroll
            for (int j = 0; j < kWords; ++j) loads[j] = __ldg(aligned + j);
#pragma unroll
            for (int j = 0; j < kWords; ++j)
                words[j] = __funnelshift_r(loads[j], j + 1 < kWords ? loads[j + 1] : 0, shift);
        } else {
#pragma unroll
            for (int j = 0; j < kBytes; ++j)
                if (j < wanted) words[j / 4] |= static_cast<uint32_t>(__ldg(at + j)) << (j % 4 * 8);
        }
        const float weight = triangle(offset + static_cast<float>(k) * step);
#pragma unroll
        for (int j = 0; j < kBytes; ++j) sums[j] += weight * byte_of(words[j / 4], j % 4);
    }
}

// mix += weights * the source at the thread's run of pixels; weights hold the filters' norms too.
MIX_FN void add_source(const View& view, const Filter& row, const Filter* columns, const float (&weights)[kRun],
                       float (&mix)[kRun * 3]) {
    // The source columns [low, high) that the run reads.
    int low = 0x7FFFFFFF, high = 0;
#pragma unroll
    for (int p = 0; p < kRun; ++p) {
        const int first = columns[p].first, count = columns[p].count;
        if (count == 0) continue;
        low = first < low ? first : low;
        high = first + count > high ? first + count : high;
    }
    if (row.count == 0 || low >= high) return;
    const float step = view.step[kX];
    // Offsets of the pixels' triangles, all seen from column `low`.
    float offsets[kRun];
#pragma unroll
    for (int p = 0; p < kRun; ++p)
        offsets[p] = columns[p].offset - static_cast<float>(columns[p].first - low) * step;
    const uint32_t first = static_cast<uint32_t>(row.first) * view.pitch + low * 3;
    const uint32_t last = first + static_cast<uint32_t>(row.count - 1) * view.pitch;
    high -= low;
#pragma unroll 1
    for (int x = 0; x < high; x += kColumns) {
        float sums[kBytes];
#pragma unroll
        for (int j = 0; j < kBytes; ++j) sums[j] = 0;
        const uint8_t* const at = view.data + (first + x * 3);
        // An aligned word begins up to 3 bytes before its byte.
        if (first + x * 3 >= 3 && last + x * 3 + kWords * 4 <= view.size)
            add_rows<true>(at, view.pitch, kBytes, row.count, row.offset, view.step[kY], sums);
        else
            add_rows<false>(at, view.pitch, (high - x) * 3, row.count, row.offset, view.step[kY], sums);
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
            // Past the run's last column, which may be the image's or the piece's, nothing counts.
            const float distance = x + c < high ? static_cast<float>(x + c) * step : 1e9f;
#pragma unroll
            for (int p = 0; p < kRun; ++p) {
                const float weight = triangle(offsets[p] + distance) * weights[p];
#pragma unroll
                for (int channel = 0; channel < 3; ++channel) mix[p * 3 + channel] += weight * sums[c * 3 + channel];
            }
        }
    }
}

// Normalises, casts and writes the run, of which `count` pixels lie in the image.
template <typename Element, bool kChannelsLast>
MIX_FN void write(const Batch& batch, int y, int x, int count, const float (&value)[kRun * 3]) {
    typedef typename Element::Value T;
    const size_t plane = static_cast<size_t>(batch.height) * batch.width;
    const size_t sample = blockIdx.z * plane * 3, pixel = static_cast<size_t>(y) * batch.width + x;
    T* const out = static_cast<T*>(batch.out) + sample + (kChannelsLast ? pixel * 3 : pixel);
#pragma unroll
    for (int group = 0; group < 3; ++group) {
        T values[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int from = kChannelsLast ? group * 4 + j : j * 3 + group, channel = from % 3;
            values[j] = Element::cast(normalise(value[from], batch.scale[channel], batch.offset[channel]));
        }
        if (kChannelsLast)
            store(out + group * 4, values, count * 3 - group * 4);
        else
            store(out + group * plane, values, count);
    }
}

template <typename Element, bool kChannelsLast>
MIX_FN void paint(const Batch& batch, const Tile& tile) {
    const int row_in_tile = threadIdx.x / (kTile / kRun), run = threadIdx.x % (kTile / kRun) * kRun;
    const int y = static_cast<int>(blockIdx.y) * kTile + row_in_tile, x = static_cast<int>(blockIdx.x) * kTile + run;
    if (y >= batch.height || x >= batch.width) return;
    const Row& row = batch.rows[blockIdx.z];
    const bool mixed = row.mask >= 0, across = mask_is_horizontal(row.mask);
    float mix[kRun * 3];
#pragma unroll
    for (int j = 0; j < kRun * 3; ++j) mix[j] = 0;
#pragma unroll 1
    for (int source = kOriginal; source < kSources; ++source) {
        if (source == kEdit ? !mixed : source == kFractal && row.fractal < 0) continue;
        const Filter& rows = tile.filters[source][kY][row_in_tile];
        const Filter* const columns = &tile.filters[source][kX][run];
        // mix_pixel.cuh's `blend` in its two terms, for what comes over is a sum of taps that no register holds: what is
        // there is multiplied by 1 - weight, `add_source` adds the taps times weight.
        float weights[kRun];
#pragma unroll
        for (int p = 0; p < kRun; ++p) {
            const float weight = source == kOriginal ? 1.0f
                                 : source == kEdit   ? tile.cover[across ? run + p : row_in_tile]
                                                     : row.fractal_weight;
#pragma unroll
            for (int channel = 0; channel < 3; ++channel) mix[p * 3 + channel] *= 1 - weight;
            weights[p] = weight * (columns[p].norm * rows.norm);
        }
        add_source(tile.views[source], rows, columns, weights, mix);
    }
    if (row.fractal >= 0) {
        // Outside the image there is no fractal either.
        const bool inside = tile.filters[kOriginal][kY][row_in_tile].norm > 0;
#pragma unroll
        for (int p = 0; p < kRun; ++p) {
            if (inside && tile.filters[kOriginal][kX][run + p].norm > 0) continue;
#pragma unroll
            for (int channel = 0; channel < 3; ++channel) mix[p * 3 + channel] = 0;
        }
    }
    write<Element, kChannelsLast>(batch, y, x, batch.width - x < kRun ? batch.width - x : kRun, mix);
}

template <typename Element, bool kChannelsLast>
MIX_FN void run(const Batch& batch, Tile& tile) {
    if (threadIdx.x < kSources * kAxes * kTile) measure(batch, tile, threadIdx.x);
    __syncthreads();
    paint<Element, kChannelsLast>(batch, tile);
}

}  // namespace

#define MIX_KERNEL(name, Element, channels_last)                                                                \
    extern "C" __global__ void __launch_bounds__(kThreads, kBlocks)                                             \
    name(const Piece* pieces, const Row* rows, const uint8_t* bank, int bank_height, int bank_width, void* out, \
         int out_height, int out_width, float scale_red, float scale_green, float scale_blue, float offset_red, \
         float offset_green, float offset_blue) {                                                               \
        __shared__ Tile tile;                                                                                   \
        const Batch batch = {pieces, rows, bank, bank_height, bank_width, out, out_height, out_width,           \
                             {scale_red, scale_green, scale_blue}, {offset_red, offset_green, offset_blue}};    \
        run<Element, channels_last>(batch, tile);                                                               \
    }

#ifdef MIX_NAME  // one kernel alone compiles faster
MIX_KERNEL(MIX_NAME, MIX_ELEMENT, MIX_CHANNELS_LAST)
#else
MIX_KERNEL(mix_float32_nchw, Float32, false)
MIX_KERNEL(mix_float32_channels_last, Float32, true)
MIX_KERNEL(mix_float16_nchw, Float16, false)
MIX_KERNEL(mix_float16_channels_last, Float16, true)
MIX_KERNEL(mix_bfloat16_nchw, Bfloat16, false)
MIX_KERNEL(mix_bfloat16_channels_last, Bfloat16, true)
MIX_KERNEL(mix_uint8_nchw, Uint8, false)
MIX_KERNEL(mix_uint8_channels_last, Uint8, true)
#endif
