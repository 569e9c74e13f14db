// The chaos game of a fractal flame on the CPU, behind a C interface (see dali_diffusemix/native.py).
//
// Points live in clouds of 1024. In one step every point draws its map; the cloud is then sorted by map, so that each
// map is applied to one contiguous run of points, which vectorises. A point's place in its cloud changes from step to
// step, and the random word of a step belongs to the place, so words need not travel with the points.
//
// Clouds are independent and sums are integers: any number of threads gives the same bits.

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "flame.cuh"

// Versions of the hot loop, chosen when the library is loaded. Without contraction they round alike.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__gnu_linux__)
#define FLAME_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FLAME_CLONES
#endif

namespace {

using namespace flame;

constexpr int kCloud = 1024;
constexpr uint32_t kKey = 0x464C414D;  // "FLAM", as base/philox.py has it: apart from the plan's draws, whose key ends in the epoch

struct Job {
    const float* maps;  // (map_count, kRow)
    int map_count;
    const uint8_t* palette;  // (256, 3) RGB
    const float* frame;      // x and y of the upper left corner, then pixels per unit in x and in y
    int width, height;       // without the border
    uint32_t seed, index, attempt;
    int first_step, steps;
};

template <int V>
FLAME_FN void add(const float* __restrict x, const float* __restrict y, const uint32_t* __restrict bits, float weight,
                  float* __restrict sum_x, float* __restrict sum_y, int n) {
    for (int i = 0; i < n; ++i) {
        const Point p = variation<V>(x[i], y[i], bits[i]);
        sum_x[i] = sum_x[i] + weight * p.x;
        sum_y[i] = sum_y[i] + weight * p.y;
    }
}

template <int... V>
FLAME_FN void add_variations(const float* row, const float* x, const float* y, const uint32_t* bits, float* sum_x,
                             float* sum_y, int n, std::integer_sequence<int, V...>) {
    ((row[kWeights + V] != 0.0f ? add<V>(x, y, bits, row[kWeights + V], sum_x, sum_y, n) : void()), ...);
}

// Plays `steps` rounds with one cloud: points is (3, kCloud), x, y and colour. The histogram, if any, is
// (height + 2, width + 2, 4): how often a pixel was hit, and the sum of the colours; its border takes what falls outside.
FLAME_CLONES void play(const Job& job, int cloud, float* points, uint32_t* histogram) {
    alignas(64) float px[kCloud], py[kCloud], pc[kCloud], ax[kCloud], ay[kCloud], sx[kCloud], sy[kCloud];
    alignas(64) uint32_t bits[kCloud];
    alignas(64) int32_t choice[kCloud], bin[kCloud], shade[kCloud];
    alignas(64) uint32_t colours[256][4];
    float *x = points, *y = points + kCloud, *c = points + 2 * kCloud;
    for (int i = 0; i < 256; ++i) {
        const uint8_t* rgb = job.palette + 3 * i;
        colours[i][0] = 1, colours[i][1] = rgb[0], colours[i][2] = rgb[1], colours[i][3] = rgb[2];
    }

    for (int step = job.first_step; step < job.first_step + job.steps; ++step) {
        constexpr int kBlocks = kCloud / 4;
        for (int i = 0; i < kBlocks; ++i) {
            const Words words = philox::words(static_cast<uint32_t>(cloud * kBlocks + i), static_cast<uint32_t>(step),
                                       job.index, job.attempt, job.seed, kKey);
            for (int j = 0; j < 4; ++j) bits[j * kBlocks + i] = words.w[j];
        }

        // A stable counting sort: the points that chose map m come to stand at [start[m], start[m + 1]).
        int start[kMaps + 1] = {0}, place[kMaps] = {0};
        for (int i = 0; i < kCloud; ++i) choice[i] = 0;
        for (int m = 1; m < job.map_count; ++m) {
            const float threshold = job.maps[m * kRow + kThreshold];
            int below = 0;
            for (int i = 0; i < kCloud; ++i) {
                const int32_t reached = uniform(bits[i]) >= threshold;
                choice[i] += reached;
                below += 1 - reached;
            }
            start[m] = place[m] = below;
        }
        start[job.map_count] = kCloud;
        for (int i = 0; i < kCloud; ++i) {
            const int to = place[choice[i]]++;
            px[to] = x[i], py[to] = y[i], pc[to] = c[i];
        }

        for (int m = 0; m < job.map_count; ++m) {
            const float* row = job.maps + m * kRow;
            const float *a = row + kAffine, *b = row + kPost;
            const int from = start[m], n = start[m + 1] - start[m];
            for (int i = 0; i < n; ++i) {
                ax[i] = a[0] * px[from + i] + a[1] * py[from + i] + a[2];
                ay[i] = a[3] * px[from + i] + a[4] * py[from + i] + a[5];
                sx[i] = sy[i] = 0.0f;
            }
            add_variations(row, ax, ay, bits + from, sx, sy, n, std::make_integer_sequence<int, kVariations>());
            const float speed = row[kSpeed], pull = row[kSpeed] * row[kColour];
            for (int i = 0; i < n; ++i) {
                x[from + i] = b[0] * sx[i] + b[1] * sy[i] + b[2];
                y[from + i] = b[3] * sx[i] + b[4] * sy[i] + b[5];
                c[from + i] = pc[from + i] * (1.0f - speed) + pull;
            }
        }

        for (int i = 0; i < kCloud; ++i) {
            const bool near = (std::fabs(x[i]) < kFar) & (std::fabs(y[i]) < kFar);  // false for NaN as well
            const float fresh_x = 2.0f * uniform(bits[i]) - 1.0f, fresh_y = 2.0f * uniform(bits[i] << 12) - 1.0f;
            x[i] = near ? x[i] : fresh_x;
            y[i] = near ? y[i] : fresh_y;
        }
        if (histogram == nullptr) continue;

        const float right = static_cast<float>(job.width) + 1.5f, bottom = static_cast<float>(job.height) + 1.5f;
        for (int i = 0; i < kCloud; ++i) {
            float u = (x[i] - job.frame[0]) * job.frame[2] + 1.0f, v = (y[i] - job.frame[1]) * job.frame[3] + 1.0f;
            u = u < 0.0f ? 0.0f : u, u = u > right ? right : u;
            v = v < 0.0f ? 0.0f : v, v = v > bottom ? bottom : v;
            bin[i] = static_cast<int32_t>(v) * (job.width + 2) + static_cast<int32_t>(u);
            shade[i] = static_cast<int32_t>(c[i] * 255.9f);
        }
        for (int i = 0; i < kCloud; ++i) {
            uint32_t* sum = histogram + 4 * static_cast<int64_t>(bin[i]);
            const uint32_t* colour = colours[shade[i]];
            for (int j = 0; j < 4; ++j) sum[j] += colour[j];
        }
    }
}

}  // namespace

// Returns 0, or 1 if memory is short. See native.play_flame for the arguments.
extern "C" __attribute__((visibility("default"))) int dali_diffusemix_flame(
    const float* maps, int map_count, const uint8_t* palette, const float* frame, int width, int height, uint32_t seed,
    uint32_t index, uint32_t attempt, int first_step, int steps, float* points, int clouds, uint32_t* histogram,
    int threads) try {
    const Job job{maps, map_count, palette, frame, width, height, seed, index, attempt, first_step, steps};
    threads = std::clamp(threads, 1, clouds);
    const size_t sums = histogram == nullptr ? 0 : static_cast<size_t>(height + 2) * (width + 2) * 4;
    // Every thread but the first counts for itself; what they found is added up at the end.
    std::vector<uint32_t> counted(sums * (threads - 1));
    std::vector<std::thread> others;
    others.reserve(threads - 1);

    std::atomic<int> next{0};
    const auto work = [&](uint32_t* own) {
        for (int cloud; (cloud = next++) < clouds;) {
            play(job, cloud, points + static_cast<size_t>(cloud) * 3 * kCloud, own);
        }
    };
    try {
        for (int t = 1; t < threads; ++t) {
            others.emplace_back(work, sums == 0 ? nullptr : counted.data() + sums * (t - 1));
        }
    } catch (const std::system_error&) {  // no more threads to be had: those there are do all of it
    }
    work(histogram);
    for (std::thread& other : others) other.join();
    for (size_t t = 0; sums != 0 && t < others.size(); ++t) {
        for (size_t i = 0; i < sums; ++i) histogram[i] += counted[sums * t + i];
    }
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}
