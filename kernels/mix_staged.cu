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

#ifndef MIX_THREADS
#define MIX_THREADS 256
#endif
constexpr int kThreads = MIX_THREADS;
// Blocks for each multiprocessor that registers must allow: 64 for a thread of 256, 96 of 128. Shared memory allows 5.
constexpr int kBlocks = kThreads == 256 ? 4 : 5;
constexpr int kRows = kTile * kTile / kThreads;  // output rows for each thread
constexpr int kGroup = 4;                        // source columns for each thread: 12 bytes
constexpr int kBytes = kGroup * 3, kWords = 3;
constexpr int kAhead = kThreads == 256 ? 2 : 4;  // tap rows read before the first of them is used
// Groups of a chunk. Column c of a chunk lies at float4 c % 4 * kGroups + c / 4: whoever writes groups side by side
// meets no other thread's banks, and 18, which is 2 modulo 8, spreads readers of columns side by side over all banks.
constexpr int kGroups = 18;
constexpr int kChunk = kGroups * kGroup;

struct alignas(16) Pixel {
    float value[3], unused;
};

struct Tile {
    Measures measures;
    int low[kSources], high[kSources];  // the source columns that the tile reads
    int rows_seen[kSources];
    union {
        Pixel sums[kTile][kChunk];
        float values[kTile * kTile * 3];
    };
};

// The source columns that the tile reads.
MIX_FN void bound(Tile& tile, int task) {
    const int source = task / (kAxes * kTile), axis = task / kTile % kAxes;
    const Filter& filter = tile.measures.filters[source][axis][task % kTile];
    if (filter.count == 0) return;
    if (axis == kX) {
        atomicMin(&tile.low[source], filter.first);
        atomicMax(&tile.high[source], filter.first + filter.count);
    } else {
        tile.rows_seen[source] = 1;
    }
}

// sums += weights * rows; see `read_words`.
template <bool kWhole>
MIX_FN void add_rows(const uint8_t* at, int pitch, int wanted, const Filter& filter, float step, float factor,
                     float (&sums)[kBytes]) {
#pragma unroll 1
    for (int k = 0; k < filter.count; k += kAhead, at += kAhead * pitch) {
        uint32_t words[kAhead][kWords];
#pragma unroll
        for (int i = 0; i < kAhead; ++i)
            if (k + i < filter.count) read_words<kWhole, kBytes>(at + i * pitch, wanted, words[i]);
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            if (k + i >= filter.count) break;
            const float weight = triangle(filter.offset + static_cast<float>(k + i) * step) * factor;
#pragma unroll
            for (int j = 0; j < kBytes; ++j) sums[j] += weight * byte_of(words[i][j / 4], j % 4);
        }
    }
}

// Columns [from, to) of a source, summed down into tile.sums. `factors` weighs the rows; null: all by 1.
MIX_FN void down(Tile& tile, int source, int from, int to, const float* factors) {
    const View& view = tile.measures.views[source];
    const int groups = (to - from + kGroup - 1) / kGroup;
    // item / groups, exact for items below 2048 and at most 18 groups.
    const uint32_t inverse = 65536u / groups + 1;
#pragma unroll 1
    for (uint32_t item = threadIdx.x; item < static_cast<uint32_t>(groups * kTile); item += kThreads) {
        const int row = item * inverse >> 16, group = item - row * groups, column = from + group * kGroup;
        const Filter filter = tile.measures.filters[source][kY][row];
        float sums[kBytes];
#pragma unroll
        for (int j = 0; j < kBytes; ++j) sums[j] = 0;
        if (filter.count > 0) {
            const uint32_t first = static_cast<uint32_t>(filter.first) * view.pitch + column * 3;
            const uint32_t last = first + static_cast<uint32_t>(filter.count - 1) * view.pitch;
            const float factor = factors == nullptr ? filter.norm : filter.norm * factors[row];
            // An aligned word begins up to 3 bytes before its byte, and 4 of them hold the 12.
            if (first >= 3 && last + 16 <= view.size)
                add_rows<true>(view.data + first, view.pitch, kBytes, filter, view.step[kY], factor, sums);
            else
                add_rows<false>(view.data + first, view.pitch, (to - column) * 3, filter, view.step[kY], factor, sums);
        }
#pragma unroll
        for (int c = 0; c < kGroup; ++c)
            tile.sums[row][c * kGroups + group] = {{sums[c * 3], sums[c * 3 + 1], sums[c * 3 + 2]}, 0};
    }
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
    if (thread < kSources) tile.low[thread] = 0x7FFFFFFF, tile.high[thread] = tile.rows_seen[thread] = 0;
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
        if (!tile.rows_seen[source]) continue;
        const int high = tile.high[source];
#pragma unroll 1
        for (int from = tile.low[source]; from < high; from += kChunk) {
            const int to = from + kChunk < high ? from + kChunk : high;
            down(tile, source, from, to, by_row ? tile.measures.cover : nullptr);
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
