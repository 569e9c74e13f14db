// The fused mix on the GPU, the staged shape: same kernels, arguments and grid as mix.cu, which describes them; block
// (128, 1, 1), no dynamic shared memory.
//
// A block makes a tile of 32 x 32 output pixels of one sample. After `measure` (mix_tile.cuh), for each source that the
// tile sees, for each chunk of up to 72 of the source columns that the tile reads:
//
//     down    a thread for each (row of the tile, four source columns): the 12 bytes of each tap row, summed down into
//             12 floats, which go to shared memory, a float4 for each source column;
//     across  a thread for each (column of the tile, eight rows of it): the column's taps out of shared memory.
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
// neighbouring bytes. Going across, the weights of a column are computed once for eight rows, and each pixel multiplies
// its own taps only. Chunks of columns and a loop over tap rows leave no ratio too large.
#include "mix_tile.cuh"

namespace {

// Tap rows read before the first of them is used, and blocks for each multiprocessor that registers must allow. Five
// leave a thread 96 registers, four 128; shared memory allows five on sm_90.
#ifndef MIX_AHEAD
#define MIX_AHEAD 2
#define MIX_BLOCKS 5
#endif
constexpr int kAhead = MIX_AHEAD, kThreads = 128, kBlocks = MIX_BLOCKS;
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

// sums += the tap rows of a filter, from `at` on, by aligned words.
MIX_FN void add_rows(const uint8_t* at, int pitch, const Filter& filter, float step, float factor,
                     float (&sums)[kBytes]) {
#pragma unroll 1
    for (int k = 0; k < filter.count; k += kAhead) {
        uint32_t loads[kAhead][kLoads];
        const uint8_t* row = at;
#pragma unroll
        for (int i = 0; i < kAhead; ++i, row += pitch)
            if (k + i < filter.count) load_words(row, loads[i]);
#pragma unroll
        for (int i = 0; i < kAhead; ++i, at += pitch) {
            if (k + i >= filter.count) break;
            uint32_t words[kWords];
            align_words(at, loads[i], words);
            const float weight = triangle(filter.offset + static_cast<float>(k + i) * step) * factor;
#pragma unroll
            for (int j = 0; j < kBytes; ++j) sums[j] += weight * byte_of(words[j / 4], j % 4);
        }
    }
}

// The same for a group of which bytes or words leave the chunk or the piece: byte by byte, straight to where they go.
MIX_FN void put_bytes(const uint8_t* at, int pitch, int wanted, const Filter& filter, float step, float factor,
                      Pixel* to) {
#pragma unroll 1
    for (int j = 0; j < kBytes; ++j) {
        float sum = 0;
#pragma unroll 1
        for (int k = 0; j < wanted && k < filter.count; ++k) {
            const float weight = triangle(filter.offset + static_cast<float>(k) * step) * factor;
            sum += weight * static_cast<float>(__ldg(at + k * pitch + j));
        }
        to[j / 3 * kGroups].value[j % 3] = sum;
    }
}

// Columns [from, to) of a source, summed down into tile.sums. `factors` weigh the output rows; null: all by 1.
MIX_FN void down(Tile& tile, int source, int from, int to, const float* factors) {
    const View& view = tile.measures.views[source];
    // A thread keeps to one group of columns, and makes every `stride`-th row of it.
    const int groups = (to - from + kGroup - 1) / kGroup, stride = kThreads / groups;
    const int first_row = threadIdx.x / groups, group = threadIdx.x - first_row * groups;
    if (first_row >= stride) return;
    const int column = from + group * kGroup;
    const uint8_t* const data = view.data + column * 3;
    // An aligned word begins up to 3 bytes before its byte.
    const uint32_t pitch = view.pitch, low = tile.low[source][kY], high = tile.high[source][kY];
    const bool whole = low * pitch + column * 3 >= 3 && (high - 1) * pitch + column * 3 + kLoads * 4 <= view.size;
    const float step = view.step[kY];
#pragma unroll 1
    for (int row = first_row; row < kTile; row += stride) {
        const Filter filter = tile.measures.filters[source][kY][row];
        const uint8_t* const at = data + filter.first * pitch;
        const float factor = factors == nullptr ? filter.norm : filter.norm * factors[row];
        Pixel* const put = tile.sums[row] + group;
        if (!whole) {
            put_bytes(at, pitch, (to - column) * 3, filter, step, factor, put);
            continue;
        }
        float sums[kBytes];
#pragma unroll
        for (int j = 0; j < kBytes; ++j) sums[j] = 0;
        add_rows(at, pitch, filter, step, factor, sums);
#pragma unroll
        for (int c = 0; c < kGroup; ++c) put[c * kGroups] = {{sums[c * 3], sums[c * 3 + 1], sums[c * 3 + 2]}, 0};
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
#pragma unroll 1
        for (int from = tile.low[source][kX]; from < high; from += kChunk) {
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
