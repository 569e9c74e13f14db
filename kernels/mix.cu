// The fused mix on the GPU: from decoded pieces to the training tensor, one launch for a batch.
//
// The kernels are mix_{float32,float16,bfloat16,uint8}_{nchw,channels_last}. All take the same arguments:
//
//     originals, edits  const Piece*, (samples,) in device memory, mixing.PIECE; their `data` are device pointers
//     rows              const Row*, (samples,) in device memory, mixing.ROW
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
//     measure   a thread for each (source, axis, row or column of the tile), 192 of the 256: where the filter begins,
//               how long it is, its offset, what its weights sum to, and M; into 3.3 KiB of shared memory.
//     paint     a thread for each four neighbouring pixels of a row:
//
//               source, three columns at a time                   output
//               ┌──┬──┬──┬──┬──┬──┬──┬──┬──┐
//               │  │  │  │  │  │  │  │  │  │ first tap row
//               │  │  │  │  │  │  │  │  │  │ ...               ┌──┬──┬──┬──┐
//               │  │  │  │  │  │  │  │  │  │ last              │p0│p1│p2│p3│ one vector store for each plane
//               └──┴──┴──┴──┴──┴──┴──┴──┴──┘                   └──┴──┴──┴──┘
//               down the rows first: 9 sums (3 columns x RGB); these then go into each of the four pixels
//
// Why this shape. Neighbouring outputs share taps: going down first, each source byte is read, converted and
// multiplied once for all four pixels, where taps in two dimensions would do it for each. Three columns are nine bytes,
// which lie in three aligned words at any alignment: three loads for nine bytes. Weights come from one multiply-add,
// never from a table, so no ratio is too large for registers or shared memory.
//
// What must move, for 256 samples of 224 x 224, all mixed at a hard seam, the crops 400 x 350 pixels of their images:
//     read     256 * 400 * 350 * 3          107.5 MB  what is seen of originals and edits together, halos left out
//              64 * 256 * 256 * 3            12.6 MB  a bank of 64 fractals, once
//     written  256 * 224 * 224 * 3 values    38.5 million: 154.1 MB float32, 77.1 MB in 16 bits, 38.5 MB uint8
//     together 274.2, 197.2 or 158.6 MB; piece and row tables are 0.05 MB
//
// What must be done for them is counted, not measured, in docs/kernel.md: some 500 instructions for a pixel of the
// output, and 11 word loads, where one by one its 16 taps would be 49 byte loads.
//
// mix_staged.cu is the other shape, to be measured against this one.
#include "mix_tile.cuh"

namespace {

constexpr int kRun = 4;       // neighbouring output pixels for each thread
constexpr int kThreads = kTile * kTile / kRun, kBlocks = 4;  // four blocks for each multiprocessor: 64 registers
constexpr int kColumns = 3;   // source columns summed at a time
constexpr int kBytes = kColumns * 3, kWords = 3;  // 9 bytes lie in 3 aligned words wherever they begin

typedef Measures Tile;

// sums += the column sums of `count` rows from `at` on. With `kWhole` every aligned word that holds a wanted byte lies
// in the piece; without, the `wanted` bytes are read singly, and the others are 0.
template <bool kWhole>
MIX_FN void add_rows(const uint8_t* at, int pitch, int wanted, int count, float offset, float step,
                     float (&sums)[kBytes]) {
#pragma unroll 1
    for (int k = 0; k < count; ++k, at += pitch) {
        uint32_t words[kWords] = {0, 0, 0};
        if (kWhole) {
            uint32_t loads[kWords];
            load_words(at, loads);
            align_words(at, loads, words);
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
            values[j] = Element::cast(value[from] * batch.scale[channel] + batch.offset[channel]);
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
        // mix_pixel.cuh's `blend`, one source at a time: what is there gives way, what comes is added.
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
MIX_KERNELS
