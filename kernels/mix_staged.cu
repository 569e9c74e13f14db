// The fused mix on the GPU, the staged shape: same kernels, arguments, grid and block as mix.cu, which describes them.
//
// A block makes a tile of 32 x 32 output pixels of one sample. After `measure` (mix_tile.cuh), for each source that the
// tile sees, for each chunk of up to 72 of the source columns that the tile reads:
//
//     down    a thread for each (row of the tile, four source columns): the 12 bytes of each tap row, summed down into
//             12 floats, which go to shared memory, a float4 for each source column;
//     across  a thread for each (column of the tile, four rows of it): the column's taps out of shared memory.
//
//               source                                shared memory                     output
//               ┌────┬────┬────┐ first tap row
//               │    │    │    │ ...          down    ┌────┬────┬────┐ row 0    across  ┌─┬─┬─┬─┐ row 0
//               │    │    │    │ last        ─────>   ├────┼────┼────┤ row 1   ─────>   ├─┼─┼─┼─┤ row 1
//               └────┴────┴────┘                      └────┴────┴────┘                  └─┴─┴─┴─┘
//
// At last the values of the tile go through shared memory into the tensor's order, and leave as vectors.
//
// Why this shape. What goes down is a whole row of the tile's source: each source column is summed once for an output
// row, where mix.cu sums it again for each run of four pixels that reads it, and neighbouring threads read
// neighbouring bytes. Going across, the weights of a column are computed once for four rows, and each pixel multiplies
// its own taps only. Chunks of columns and a loop over tap rows leave no ratio too large.
#include "mix_tile.cuh"

namespace {

#ifndef MIX_BLOCKS
#define MIX_BLOCKS 5
#endif
constexpr int kThreads = 128, kBlocks = MIX_BLOCKS;  // blocks for each multiprocessor: 5 leave a thread 96 registers
constexpr int kRows = kTile * kTile / kThreads;  // output rows for each thread, going across
constexpr int kGroup = 4;                        // source columns for each thread, going down: 12 bytes
constexpr int kBytes = kGroup * 3, kWords = 3, kLoads = 4;  // 12 bytes lie in 4 aligned words wherever they begin
// Groups of a chunk. Column c of a chunk lies at float4 c % 4 * kGroups + c / 4: whoever writes groups side by side
// meets no other thread's banks, and 18, which is 2 modulo 8, spreads readers of columns side by side over all banks.
constexpr int kGroups = 18;
constexpr int kChunk = kGroups * kGroup;

struct alignas(16) Pixel {
    float value[3], unused;
};

struct Tile {
    Measures measures;
    int low[kSources][kAxes], high[kSources][kAxes];  // the source rows and columns that the tile reads
    union {
        Pixel sums[kTile][kChunk];
        float values[kTile * kTile * 3];
    };
};

// The source rows and columns that the tile reads.
MIX_FN void bound(Tile& tile, int task) {
    const int source = task / (kAxes * kTile), axis = task / kTile % kAxes;
    const Filter& filter = tile.measures.filters[source][axis][task % kTile];
    if (filter.count == 0) return;
    atomicMin(&tile.low[source][axis], filter.first);
    atomicMax(&tile.high[source][axis], filter.first + filter.count);
}

// What a thread has to do going down: one group of source columns, `count` output rows of the tile from `row` on, in
// the direction in which their source rows ascend.
struct Strip {
    const uint8_t* data;   // the group's bytes in the source's first row
    uint32_t pitch;
    int wanted;            // wanted: bytes of the group that lie in the chunk
    int high;              // the tile reads no source rows from here on
    float step;
    const Filter* filters;
    const float* factors;  // weigh the output rows; null: all by 1
    int row, direction, count;
    Pixel* sums;           // the group's first column in the tile's row 0
};

MIX_FN float factor_of(const Strip& strip, const Filter& filter, int row) {
    if (filter.count == 0) return 0;
    return strip.factors == nullptr ? filter.norm : filter.norm * strip.factors[row];
}

MIX_FN float weight_of(const Filter& filter, int tap, float step, float factor) {
    return triangle(filter.offset + static_cast<float>(tap) * step) * factor;
}

MIX_FN void put(const Strip& strip, int row, const float (&sums)[kBytes]) {
    Pixel* const to = strip.sums + row * kChunk;
#pragma unroll
    for (int c = 0; c < kGroup; ++c) to[c * kGroups] = {{sums[c * 3], sums[c * 3 + 1], sums[c * 3 + 2]}, 0};
}

// Shrinking, a source row counts for two output rows at most: it is read once, and added to this one and the next.
MIX_FN void shrink(const Strip& strip) {
    float sums[kBytes], later[kBytes];
    uint32_t ahead[kLoads];  // the words of source row `s`
    const uint8_t* at = strip.data;
#pragma unroll
    for (int j = 0; j < kBytes; ++j) sums[j] = later[j] = 0;
    int row = strip.row, s = -1;
    Filter filter = strip.filters[row];
    float factor = factor_of(strip, filter, row);
#pragma unroll 1
    for (int n = strip.count; n > 0; --n) {
        const int next_row = row + strip.direction;
        Filter next = {0, 0, 0.0f, 0.0f};
        if (n > 1) next = strip.filters[next_row];
        const float next_factor = factor_of(strip, next, next_row);
        if (filter.count > 0 && filter.first > s) {
            s = filter.first;
            at = strip.data + s * strip.pitch;
            load_words(at, ahead);
        }
        const int end = filter.count > 0 ? filter.first + filter.count : -1;
        // Offsets of both filters' triangles, as seen from row `s`.
        const float offset = filter.offset + static_cast<float>(s - filter.first) * strip.step;
        const float next_offset = next.offset + static_cast<float>(s - next.first) * strip.step;
#pragma unroll 1
        for (float tap = 0; s < end; tap += 1) {
            uint32_t words[kWords];
            align_words(at, ahead, words);
            ++s, at += strip.pitch;
            if (s < strip.high) load_words(at, ahead);
            const float weight = triangle(offset + tap * strip.step) * factor;
            const float next_weight = triangle(next_offset + tap * strip.step) * next_factor;
#pragma unroll
            for (int j = 0; j < kBytes; ++j) {
                const float value = byte_of(words[j / 4], j % 4);
                sums[j] += weight * value;
                later[j] += next_weight * value;
            }
        }
        put(strip, row, sums);
#pragma unroll
        for (int j = 0; j < kBytes; ++j) sums[j] = later[j], later[j] = 0;
        row = next_row, filter = next, factor = next_factor;
    }
}

// Enlarging, an output row lies between two source rows, which may be those of the output row before.
MIX_FN void enlarge(const Strip& strip) {
    float above[kBytes], below[kBytes];  // source rows `s` - 2 and `s` - 1; 0: not there
    uint32_t ahead[kLoads];              // the words of source row `s`
    const uint8_t* at = strip.data;
#pragma unroll
    for (int j = 0; j < kBytes; ++j) above[j] = below[j] = 0;
    int row = strip.row, s = -1;
#pragma unroll 1
    for (int n = strip.count; n > 0; --n, row += strip.direction) {
        const Filter filter = strip.filters[row];
        const float factor = factor_of(strip, filter, row);
        if (filter.count > 0 && filter.first > s) {
            s = filter.first;
            at = strip.data + s * strip.pitch;
            load_words(at, ahead);
#pragma unroll
            for (int j = 0; j < kBytes; ++j) below[j] = 0;
        }
        const int end = filter.count > 0 ? filter.first + filter.count : -1;
#pragma unroll 1
        while (s < end) {
            uint32_t words[kWords];
            align_words(at, ahead, words);
            ++s, at += strip.pitch;
            if (s < strip.high) load_words(at, ahead);
#pragma unroll
            for (int j = 0; j < kBytes; ++j) above[j] = below[j], below[j] = byte_of(words[j / 4], j % 4);
        }
        const float low = weight_of(filter, filter.count - 2, strip.step, factor);
        const float high = weight_of(filter, filter.count - 1, strip.step, factor);
        float sums[kBytes];
#pragma unroll
        for (int j = 0; j < kBytes; ++j) sums[j] = low * above[j] + high * below[j];
        put(strip, row, sums);
    }
}

// The same byte by byte, for a group that has bytes or words outside of the chunk or the piece.
MIX_FN void creep(const Strip& strip) {
    int row = strip.row;
#pragma unroll 1
    for (int n = strip.count; n > 0; --n, row += strip.direction) {
        const Filter filter = strip.filters[row];
        const float factor = factor_of(strip, filter, row);
        float sums[kBytes];
#pragma unroll
        for (int j = 0; j < kBytes; ++j) sums[j] = 0;
#pragma unroll 1
        for (int k = 0; k < filter.count; ++k) {
            const uint8_t* const at = strip.data + (filter.first + k) * strip.pitch;
            const float weight = weight_of(filter, k, strip.step, factor);
#pragma unroll
            for (int j = 0; j < kBytes; ++j)
                if (j < strip.wanted) sums[j] += weight * static_cast<float>(__ldg(at + j));
        }
        put(strip, row, sums);
    }
}

// Columns [from, to) of a source, summed down into tile.sums.
MIX_FN void down(Tile& tile, int source, int from, int to, bool descending, const float* factors) {
    const View& view = tile.measures.views[source];
    const int groups = (to - from + kGroup - 1) / kGroup;
    const int strips = kThreads / groups, length = (kTile + strips - 1) / strips;
    const int number = threadIdx.x / groups, group = threadIdx.x - number * groups, first = number * length;
    const int count = kTile - first < length ? kTile - first : length;
    if (count <= 0) return;
    const int column = from + group * kGroup, high = tile.high[source][kY];
    const Strip strip = {view.data + column * 3,
                         static_cast<uint32_t>(view.pitch),
                         (to - column) * 3,
                         high,
                         view.step[kY],
                         tile.measures.filters[source][kY],
                         factors,
                         descending ? first + count - 1 : first,
                         descending ? -1 : 1,
                         count,
                         &tile.sums[0][group]};
    // An aligned word begins up to 3 bytes before its byte.
    const uint32_t pitch = view.pitch, low = tile.low[source][kY];
    const bool whole = low * pitch + column * 3 >= 3 && (high - 1) * pitch + column * 3 + 16 <= view.size;
    if (!whole)
        creep(strip);
    else if (strip.step < 1)
        shrink(strip);
    else
        enlarge(strip);
}

// mix += factor * the taps that columns [from, to) hold of the thread's column, for its rows.
MIX_FN void across(const Tile& tile, int source, int from, int to, float factor, float (&mix)[kRows][3]) {
    const Filter filter = tile.measures.filters[source][kX][threadIdx.x % kTile];
    const float step = tile.measures.views[source].step[kX];
    const Pixel* const rows = tile.sums[threadIdx.x / kTile * kRows];
    const int begin = filter.first > from ? filter.first : from;
    const int end = filter.first + filter.count < to ? filter.first + filter.count : to;
    factor *= filter.norm;
#pragma unroll 1
    for (int x = begin; x < end; ++x) {
        const float weight = triangle(filter.offset + static_cast<float>(x - filter.first) * step) * factor;
        const int c = x - from;
        const Pixel* const at = rows + c % kGroup * kGroups + c / kGroup;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            const Pixel pixel = at[r * kChunk];
#pragma unroll
            for (int channel = 0; channel < 3; ++channel) mix[r][channel] += weight * pixel.value[channel];
        }
    }
}

// Normalises the tile's values, casts them and writes them, as vectors of four elements.
template <typename Element, bool kChannelsLast>
MIX_FN void write(const Batch& batch, Tile& tile, const float (&mix)[kRows][3]) {
    const int column = threadIdx.x % kTile, first_row = threadIdx.x / kTile * kRows;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        const int pixel = (first_row + r) * kTile + column;
#pragma unroll
        for (int channel = 0; channel < 3; ++channel)
            tile.values[kChannelsLast ? pixel * 3 + channel : channel * kTile * kTile + pixel] =
                mix[r][channel] * batch.scale[channel] + batch.offset[channel];
    }
    __syncthreads();
    typedef typename Element::Value T;
    const int top = blockIdx.y * kTile, left = blockIdx.x * kTile;
    const size_t plane = static_cast<size_t>(batch.height) * batch.width;
    T* const out = static_cast<T*>(batch.out) + blockIdx.z * plane * 3;
    constexpr int kLine = (kChannelsLast ? kTile * 3 : kTile) / 4, kLines = kChannelsLast ? kTile : kTile * 3;  // vectors
    const int line_length = (batch.width - left) * (kChannelsLast ? 3 : 1);
#pragma unroll
    for (int item = 0; item < kLines * kLine; item += kThreads) {
        const int vector = item + threadIdx.x, line = vector / kLine, place = vector % kLine * 4;
        const int channel = kChannelsLast ? 0 : line / kTile, row = top + (kChannelsLast ? line : line % kTile);
        if (row >= batch.height) continue;
        T values[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) values[j] = Element::cast(tile.values[vector * 4 + j]);
        const size_t at = static_cast<size_t>(row) * batch.width + left;
        store(out + (kChannelsLast ? at * 3 : channel * plane + at) + place, values, line_length - place);
    }
}

template <typename Element, bool kChannelsLast>
MIX_FN void run(const Batch& batch, Tile& tile) {
    constexpr int kTasks = kSources * kAxes * kTile;
    const int thread = threadIdx.x;
    const Row& row = batch.rows[blockIdx.z];
    const bool mixed = row.mask >= 0, horizontal = mask_is_horizontal(row.mask);
    if (thread < kSources * kAxes) {
        tile.low[thread / kAxes][thread % kAxes] = 0x7FFFFFFF;
        tile.high[thread / kAxes][thread % kAxes] = 0;
    }
    for (int task = thread; task < kTasks; task += kThreads) measure(batch, tile.measures, task);
    __syncthreads();
    for (int task = thread; task < kTasks; task += kThreads) {
        const int source = task / (kAxes * kTile);
        if (source == kOriginal || (source == kEdit ? mixed : row.fractal >= 0)) bound(tile, task);
    }
    __syncthreads();

    const int column = thread % kTile, first_row = thread / kTile * kRows;
    float mix[kRows][3];
#pragma unroll
    for (int r = 0; r < kRows; ++r) mix[r][0] = mix[r][1] = mix[r][2] = 0;
#pragma unroll 1
    for (int source = kOriginal; source < kSources; ++source) {
        if (source == kEdit ? !mixed : source == kFractal && row.fractal < 0) continue;
        // mix_pixel.cuh's `blend`, one source at a time: what is there gives way, what comes is added.
        const bool by_row = source == kEdit && !horizontal;
        const float factor = source == kOriginal || by_row ? 1.0f
                             : source == kEdit             ? tile.measures.cover[column]
                                                           : row.fractal_weight;
        if (source != kOriginal) {
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                const float keep = 1 - (by_row ? tile.measures.cover[first_row + r] : factor);
#pragma unroll
                for (int channel = 0; channel < 3; ++channel) mix[r][channel] *= keep;
            }
        }
        if (tile.high[source][kY] == 0) continue;
        const int high = tile.high[source][kX];
        const bool descending = source == kFractal && row.fractal_flip[kY];
#pragma unroll 1
        for (int from = tile.low[source][kX]; from < high; from += kChunk) {
            const int to = from + kChunk < high ? from + kChunk : high;
            down(tile, source, from, to, descending, by_row ? tile.measures.cover : nullptr);
            __syncthreads();
            across(tile, source, from, to, factor, mix);
            __syncthreads();
        }
    }
    if (row.fractal >= 0) {
        // Outside the image there is no fractal either.
        const bool inside = tile.measures.filters[kOriginal][kX][column].norm > 0;
#pragma unroll
        for (int r = 0; r < kRows; ++r)
            if (!inside || tile.measures.filters[kOriginal][kY][first_row + r].norm == 0)
                mix[r][0] = mix[r][1] = mix[r][2] = 0;
    }
    write<Element, kChannelsLast>(batch, tile, mix);
}

}  // namespace

MIX_KERNELS
