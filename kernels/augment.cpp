// Augmentation on the CPU, on the mixed sample while it is in cache: a loop over the sample for each operation.
//
// The arithmetic is augment.cuh's. The loops are written for the compiler's vectoriser and cloned as mix.cpp's are.
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed to functions, which are inlined
#include "augment.h"

#include <algorithm>

#include "clones.h"

namespace augment {
namespace {

constexpr int kSpare = 64;   // bytes behind a sample that may be read and written
constexpr int kBlock = 64;   // pixels that are taken apart at a time

// Channels of a block of pixels.
struct Planes {
    uint8_t red[kBlock], green[kBlock], blue[kBlock];
};

// change(planes) for each block of `count` pixels; what it changes is put back.
template <typename Change>
MIX_INLINE void each_block(uint8_t* pixels, size_t count, const Change& change) {
    Planes planes = {};
    for (size_t i = 0; i < count; i += kBlock, pixels += 3 * kBlock) {
        // The last block has fewer pixels: it works on what lies behind the sample, too, and leaves it.
        const int n = count - i < kBlock ? static_cast<int>(count - i) : kBlock;
        if (n == kBlock) mix::split_pixels<false>(pixels, planes.red, planes.green, planes.blue, kBlock);
        else
            for (int j = 0; j < n; ++j)
                planes.red[j] = pixels[3 * j], planes.green[j] = pixels[3 * j + 1], planes.blue[j] = pixels[3 * j + 2];
        change(planes, n);
        mix::join_pixels(planes.red, planes.green, planes.blue, pixels, n);
    }
}

MIX_CLONES uint64_t sum_of_luma(const uint8_t* pixels, size_t count) {
    uint64_t sum = 0;
    Planes planes = {};
    for (size_t i = 0; i < count; i += kBlock, pixels += 3 * kBlock) {
        const int n = count - i < kBlock ? static_cast<int>(count - i) : kBlock;
        if (n < kBlock) {
            for (int j = 0; j < n; ++j) sum += luma(pixels[3 * j], pixels[3 * j + 1], pixels[3 * j + 2]);
            break;
        }
        mix::split_pixels<false>(pixels, planes.red, planes.green, planes.blue, kBlock);
        uint32_t some = 0;
        for (int j = 0; j < kBlock; ++j) some += luma(planes.red[j], planes.green[j], planes.blue[j]);
        sum += some;
    }
    return sum;
}

// color and grayscale: each value between the pixel's luma and itself; grayscale is the factor 0.
MIX_CLONES void blend_with_luma(uint8_t* pixels, size_t count, float factor) {
    each_block(pixels, count, [factor](Planes& planes, int) MIX_INLINE_MEMBER {
        for (int j = 0; j < kBlock; ++j) {
            const int grey = luma(planes.red[j], planes.green[j], planes.blue[j]);
            planes.red[j] = blend(grey, planes.red[j], factor);
            planes.green[j] = blend(grey, planes.green[j], factor);
            planes.blue[j] = blend(grey, planes.blue[j], factor);
        }
    });
}

// shift_hue in steps of one type each, which makes vectors.
MIX_CLONES void turn_hue(uint8_t* pixels, size_t count, int shift) {
    int high[kBlock], span[kBlock], sector[kBlock], one[kBlock], other[kBlock], hue[kBlock], saturation[kBlock];
    int red[kBlock], green[kBlock], blue[kBlock];
    each_block(pixels, count, [&](Planes& planes, int) MIX_INLINE_MEMBER {
        for (int j = 0; j < kBlock; ++j) {
            const Extremes found = extremes_of(planes.red[j], planes.green[j], planes.blue[j]);
            high[j] = found.high, span[j] = found.span;
            sector[j] = found.sector, one[j] = found.one, other[j] = found.other;
        }
        for (int j = 0; j < kBlock; ++j) hue[j] = hue_of(sector[j], one[j], other[j], span[j]);
        for (int j = 0; j < kBlock; ++j) {
            // As whole numbers divide: the half keeps the float at least 1 / 510 away from them.
            const float part = static_cast<float>(255 * span[j]) + 0.5f, whole = static_cast<float>(high[j] + (high[j] == 0));
            saturation[j] = static_cast<int>(part / whole);
            hue[j] = ((hue[j] & -(span[j] != 0)) + shift) & 255;
        }
        for (int j = 0; j < kBlock; ++j) colour_of(hue[j], saturation[j], high[j], red[j], green[j], blue[j]);
        for (int j = 0; j < kBlock; ++j) {
            planes.red[j] = static_cast<uint8_t>(red[j]), planes.green[j] = static_cast<uint8_t>(green[j]);
            planes.blue[j] = static_cast<uint8_t>(blue[j]);
        }
    });
}

// Tables of 256 for red, green and blue.
void look_up(uint8_t* pixels, size_t count, const uint8_t (*table)[256]) {
    for (size_t i = 0; i < 3 * count; i += 3) {
        pixels[i] = table[0][pixels[i]];
        pixels[i + 1] = table[1][pixels[i + 1]];
        pixels[i + 2] = table[2][pixels[i + 2]];
    }
}

// Lowest and highest value of each channel.
MIX_CLONES void extremes(const uint8_t* pixels, size_t count, int low[3], int high[3]) {
    constexpr int kWide = 96;  // a multiple of three, and of the bytes that make a vector
    uint8_t least[kWide], most[kWide];
    memset(least, 255, kWide), memset(most, 0, kWide);
    const size_t bytes = 3 * count;
    for (size_t i = 0; i < bytes; i += kWide) {
        const int n = bytes - i < kWide ? static_cast<int>(bytes - i) : kWide;
        for (int j = 0; j < n; ++j) {
            const uint8_t value = pixels[i + j];
            least[j] = value < least[j] ? value : least[j];
            most[j] = value > most[j] ? value : most[j];
        }
    }
    for (int c = 0; c < 3; ++c) {
        low[c] = 255, high[c] = 0;
        for (int j = c; j < kWide; j += 3) low[c] = std::min<int>(low[c], least[j]), high[c] = std::max<int>(high[c], most[j]);
    }
}

void histograms(const uint8_t* pixels, size_t count, uint32_t (*found)[256]) {
    // Two of each: neighbours are often alike, and a count waits for the one before.
    uint32_t second[3][256] = {};
    memset(found, 0, sizeof second);
    size_t i = 0;
    for (; i + 2 <= count; i += 2, pixels += 6) {
        ++found[0][pixels[0]], ++found[1][pixels[1]], ++found[2][pixels[2]];
        ++second[0][pixels[3]], ++second[1][pixels[4]], ++second[2][pixels[5]];
    }
    if (i < count) ++found[0][pixels[0]], ++found[1][pixels[1]], ++found[2][pixels[2]];
    for (int c = 0; c < 3; ++c)
        for (int v = 0; v < 256; ++v) found[c][v] += second[c][v];
}

void equalize_table(const uint32_t* histogram, uint32_t pixels, uint8_t* table) {
    int last = 255;
    while (last > 0 && !histogram[last]) --last;
    const uint32_t step = equalize_step(pixels, histogram[last]);
    uint32_t below = 0;
    for (int v = 0; v < 256; below += histogram[v], ++v)
        table[v] = step ? equalize(below, step) : static_cast<uint8_t>(v);
}

// One row of sharpness: between the smoothed and the pixel itself. `up` and `down` are its neighbours.
MIX_CLONES void sharpen_row(const uint8_t* up, const uint8_t* row, const uint8_t* down, uint8_t* out, int width,
                            float factor) {
    const int bytes = 3 * width;
    constexpr int kSome = 192;
    uint16_t sums[kSome + 6];
    for (int begin = 3; begin < bytes - 3; begin += kSome) {
        const int n = std::min(kSome, bytes - 3 - begin);
        for (int j = 0; j < n + 6; ++j) {
            const int at = begin + j - 3;
            sums[j] = static_cast<uint16_t>(up[at] + row[at] + down[at]);
        }
        for (int j = 0; j < n; ++j) {
            const int nine = sums[j] + sums[j + 3] + sums[j + 6], centre = row[begin + j];
            out[begin + j] = blend(smooth(nine, centre), centre, factor);
        }
    }
    memcpy(out, row, 3), memcpy(out + bytes - 3, row + bytes - 3, 3);
}

// Across: a row of `width` pixels with `radius` mirrored ones on both sides, as floats, to its blur.
MIX_CLONES void blur_across(const float* padded, float* out, int width, const float* weights, int radius) {
    const float* const middle = padded + 3 * radius;
    const int count = 3 * width;
    for (int j = 0; j < count; ++j) out[j] = weights[0] * middle[j];
    for (int k = 1; k <= radius; ++k) {
        const float weight = weights[k];
        const float *const left = middle - 3 * k, *const right = middle + 3 * k;
        for (int j = 0; j < count; ++j) out[j] = out[j] + weight * (left[j] + right[j]);
    }
}

// Down: rows[0] is the middle, rows[2k - 1] and rows[2k] lie k above and below.
MIX_CLONES void blur_down(const float* const* rows, uint8_t* out, int width, const float* weights, int radius) {
    constexpr int kSome = 256;
    float sums[kSome];
    for (int begin = 0; begin < 3 * width; begin += kSome) {
        const int n = std::min(kSome, 3 * width - begin);
        for (int j = 0; j < n; ++j) sums[j] = weights[0] * rows[0][begin + j];
        for (int k = 1; k <= radius; ++k) {
            const float weight = weights[k];
            const float *const up = rows[2 * k - 1] + begin, *const down = rows[2 * k] + begin;
            for (int j = 0; j < n; ++j) sums[j] = sums[j] + weight * (up[j] + down[j]);
        }
        for (int j = 0; j < n; ++j) out[begin + j] = nearest_even(sums[j]);
    }
}

// Output pixels i for which 0 <= start + i * step < size, in 16.16; [begin, end) of [0, count).
void range_of(int64_t start, int64_t step, int64_t size, int count, int& begin, int& end) {
    const int64_t limit = size << 16;
    if (step == 0) {
        if (start < 0 || start >= limit) end = begin;
        return;
    }
    const auto up = [](int64_t a, int64_t b) { return a / b + (a % b > 0); };  // b > 0; a's quotient rounded up
    const int64_t first = step > 0 ? up(-start, step) : up(start - limit + 1, -step);
    const int64_t after = step > 0 ? up(limit - start, step) : up(start + 1, -step);
    begin = static_cast<int>(std::clamp<int64_t>(first, begin, count));
    end = static_cast<int>(std::clamp<int64_t>(after, begin, end));
}

void fill_pixels(uint8_t* out, int count, const uint8_t fill[3]) {
    for (int i = 0; i < count; ++i) memcpy(out + 3 * i, fill, 3);
}

void warp_nearest(const uint8_t* from, uint8_t* to, int height, int width, const Operation& operation) {
    const Fixed a = fixed_matrix(operation.values);
    for (int y = 0; y < height; ++y, to += 3 * static_cast<size_t>(width)) {
        const int64_t x0 = a.a2 + y * a.a1, y0 = a.a5 + y * a.a4;
        int begin = 0, end = width;
        range_of(x0, a.a0, width, width, begin, end);
        range_of(y0, a.a3, height, width, begin, end);
        fill_pixels(to, begin, operation.fill);
        if (a.a0 == 65536 && a.a3 == 0) {
            const size_t at = static_cast<size_t>(y0 >> 16) * width + (begin + (x0 >> 16));
            if (end > begin) memcpy(to + 3 * begin, from + 3 * at, 3 * static_cast<size_t>(end - begin));
        } else {
            int64_t xx = x0 + begin * a.a0, yy = y0 + begin * a.a3;
            for (int x = begin; x < end; ++x, xx += a.a0, yy += a.a3)
                // A byte more, which the next pixel overwrites.
                memcpy(to + 3 * x, from + 3 * (static_cast<size_t>(yy >> 16) * width + (xx >> 16)), 4);
        }
        fill_pixels(to + 3 * end, width - end, operation.fill);
    }
}

typedef double Four __attribute__((vector_size(32)));
typedef int Whole __attribute__((vector_size(16)));
using mix::Bytes;

// Red, green, blue and the byte that follows.
MIX_INLINE Four load_pixel(const uint8_t* at) {
    Bytes bytes = {};
    memcpy(&bytes, at, 4);
    bytes = __builtin_shuffle(bytes, Bytes{}, Bytes{0, 16, 16, 16, 1, 16, 16, 16, 2, 16, 16, 16, 3, 16, 16, 16});
    Whole whole;
    memcpy(&whole, &bytes, sizeof whole);
    return __builtin_convertvector(whole, Four);
}

// A byte more, which the next pixel overwrites.
MIX_INLINE void store_pixel(uint8_t* to, Four value) {
    value = value > 0.0 ? value : Four{};
    value = value < 255.0 ? value : Four{255, 255, 255, 255};
    const Whole whole = __builtin_convertvector(value, Whole);
    Bytes bytes;
    memcpy(&bytes, &whole, sizeof bytes);
    bytes = __builtin_shuffle(bytes, Bytes{0, 4, 8, 12});
    memcpy(to, &bytes, 4);
}

template <int Filter>
MIX_INLINE void warp_smooth(const uint8_t* from, uint8_t* to, int height, int width, const Operation& operation,
                            Places& places) {
    constexpr int kTaps = Filter == kBilinear ? 2 : 4, kBefore = kTaps / 2 - 1;
    const double* const a = operation.values;
    const size_t pitch = 3 * static_cast<size_t>(width);
    places.resize(width);
    double *const dx = places.x.data(), *const dy = places.y.data();
    int *const column = places.column.data(), *const row = places.row.data();
    const auto inside = [&](int x) { return dx[x] >= 0 && dx[x] < width && dy[x] >= 0 && dy[x] < height; };
    for (int y = 0; y < height; ++y, to += pitch) {
        for (int x = 0; x < width; ++x) dx[x] = source_x(a, x, y), dy[x] = source_y(a, x, y);
        // Places go one way, so those inside are neighbours.
        int begin = 0, end = width;
        while (begin < end && !inside(begin)) ++begin;
        while (begin < end && !inside(end - 1)) --end;
        fill_pixels(to, begin, operation.fill);
        for (int x = begin; x < end; ++x) {
            const double at_x = dx[x] - 0.5, at_y = dy[x] - 0.5;
            column[x] = floor_of(at_x), row[x] = floor_of(at_y);
            dx[x] = at_x - column[x], dy[x] = at_y - row[x];
        }
        for (int x = begin; x < end; ++x) {
            // Columns outside are the nearest one inside. A weight of 0 leaves nothing of the others: shears and
            // translations work along one axis.
            const int first = column[x] - kBefore;
            const auto read_line = [&](int line, Four& value) {
                const uint8_t* const pixels = from + pitch * within(line, height);
                if (dx[x] == 0) {
                    value = load_pixel(pixels + 3 * (first + kBefore));
                    return;
                }
                Four taps[kTaps];
                if (first >= 0 && first + kTaps <= width)
                    for (int i = 0; i < kTaps; ++i) taps[i] = load_pixel(pixels + 3 * (first + i));
                else
                    for (int i = 0; i < kTaps; ++i) taps[i] = load_pixel(pixels + 3 * within(first + i, width));
                if constexpr (Filter == kBilinear) value = linear(taps[0], taps[1], dx[x]);
                else value = cubic(taps[0], taps[1], taps[kTaps - 2], taps[kTaps - 1], dx[x]);
            };
            Four lines[kTaps];
            if (dy[x] == 0) {
                read_line(row[x], lines[0]);
                store_pixel(to + 3 * x, lines[0]);
                continue;
            }
            for (int i = 0; i < kTaps; ++i) {
                // Of rows outside, Pillow takes the first one's clamped, and below it what came before.
                const int line = row[x] - kBefore + i;
                if (i && (line < 0 || line >= height)) lines[i] = lines[i ? i - 1 : 0];
                else read_line(line, lines[i]);
            }
            if constexpr (Filter == kBilinear) store_pixel(to + 3 * x, linear(lines[0], lines[1], dy[x]));
            else store_pixel(to + 3 * x, cubic(lines[0], lines[1], lines[kTaps - 2], lines[kTaps - 1], dy[x]));
        }
        fill_pixels(to + 3 * end, width - end, operation.fill);
    }
}
MIX_CLONES void warp_bilinear(const uint8_t* from, uint8_t* to, int height, int width, const Operation& operation,
                              Places& places) {
    warp_smooth<kBilinear>(from, to, height, width, operation, places);
}
MIX_CLONES void warp_bicubic(const uint8_t* from, uint8_t* to, int height, int width, const Operation& operation,
                             Places& places) {
    warp_smooth<kBicubic>(from, to, height, width, operation, places);
}

void blur(const uint8_t* from, uint8_t* to, int height, int width, double sigma, int side, std::vector<float>& rows) {
    const int radius = side / 2;
    const size_t length = 3 * static_cast<size_t>(width), padded = length + 6 * static_cast<size_t>(radius);
    float weights[kMostTaps / 2 + 1];
    gaussian(sigma, side, weights);
    // A ring of rows that are blurred across; a row's place is its number modulo the ring.
    const int ring = std::min(height, side);
    rows.resize(padded + length * ring);
    float* const line = rows.data();
    float* const blurred = line + padded;
    int done = 0;  // rows that are blurred across
    for (int y = 0; y < height; ++y) {
        for (; done < height && done <= y + radius; ++done) {
            const uint8_t* const row = from + length * done;
            for (size_t j = 0; j < length; ++j) line[3 * radius + j] = row[j];
            for (int k = 1; k <= radius; ++k)
                for (int c = 0; c < 3; ++c) {
                    line[3 * (radius - k) + c] = row[3 * mirrored(-k, width) + c];
                    line[3 * (radius + width - 1 + k) + c] = row[3 * mirrored(width - 1 + k, width) + c];
                }
            blur_across(line, blurred + length * (done % ring), width, weights, radius);
        }
        const float* lines[kMostTaps + 1];
        lines[0] = blurred + length * (y % ring);
        for (int k = 1; k <= radius; ++k) {
            lines[2 * k - 1] = blurred + length * (mirrored(y - k, height) % ring);
            lines[2 * k] = blurred + length * (mirrored(y + k, height) % ring);
        }
        blur_down(lines, to + length * y, width, weights, radius);
    }
}

}  // namespace

uint8_t* Sample::begin(int height, int width) {
    height_ = height, width_ = width;
    const size_t bytes = 3 * static_cast<size_t>(height) * width + kSpare;
    one_.resize(bytes), other_.resize(bytes);
    from_ = &one_, to_ = &other_;
    return one_.data();
}

void Sample::apply_tone(const Operation& operation) {
    uint8_t* const pixels = from_->data();
    const size_t count = static_cast<size_t>(height_) * width_;
    uint8_t table[3][256];
    if (operation.code == kAutocontrast) {
        int low[3], high[3];
        extremes(pixels, count, low, high);
        for (int c = 0; c < 3; ++c)
            for (int v = 0; v < 256; ++v) table[c][v] = autocontrast(v, low[c], high[c]);
    } else if (operation.code == kEqualize) {
        uint32_t histogram[3][256];
        histograms(pixels, count, histogram);
        for (int c = 0; c < 3; ++c) equalize_table(histogram[c], static_cast<uint32_t>(count), table[c]);
    } else {
        const int grey = operation.code == kContrast ? mean_luma(sum_of_luma(pixels, count), count) : 0;
        for (int v = 0; v < 256; ++v) table[0][v] = table[1][v] = table[2][v] = tone(operation, v, grey);
    }
    look_up(pixels, count, table);
}

void Sample::apply(const Operation* operations, int number, const uint8_t* noise) {
    const size_t count = static_cast<size_t>(height_) * width_, pitch = 3 * static_cast<size_t>(width_);
    for (const Operation* one = operations; one < operations + number; ++one) {
        const double* const values = one->values;
        uint8_t *const pixels = from_->data(), *const out = to_->data();
        if (is_tone(one->code)) {
            apply_tone(*one);
        } else if (is_warp(one->code)) {
            if (one->filter == kNearest) warp_nearest(pixels, out, height_, width_, *one);
            else if (one->filter == kBilinear) warp_bilinear(pixels, out, height_, width_, *one, places_);
            else warp_bicubic(pixels, out, height_, width_, *one, places_);
            std::swap(from_, to_);
        } else if (one->code == kColor || one->code == kGrayscale) {
            blend_with_luma(pixels, count, one->code == kColor ? static_cast<float>(values[0]) : 0);
        } else if (one->code == kHue) {
            turn_hue(pixels, count, one->fill[0]);
        } else if (one->code == kSharpness) {
            if (height_ < 3 || width_ < 3) continue;  // all of it is border
            memcpy(out, pixels, pitch), memcpy(out + pitch * (height_ - 1), pixels + pitch * (height_ - 1), pitch);
            for (int y = 1; y < height_ - 1; ++y) {
                const uint8_t* const row = pixels + pitch * y;
                sharpen_row(row - pitch, row, row + pitch, out + pitch * y, width_, static_cast<float>(values[0]));
            }
            std::swap(from_, to_);
        } else if (one->code == kBlur) {
            blur(pixels, out, height_, width_, values[0], static_cast<int>(values[1]), rows_);
            std::swap(from_, to_);
        } else if (one->code == kErase || one->code == kEraseNoise) {
            const int top = static_cast<int>(values[0]), left = static_cast<int>(values[1]);
            for (int y = top; y < top + static_cast<int>(values[2]); ++y) {
                uint8_t* const row = pixels + pitch * y + 3 * static_cast<size_t>(left);
                const int length = static_cast<int>(values[3]);
                if (one->code == kErase) {
                    fill_pixels(row, length, one->fill);
                    continue;
                }
                for (int x = 0; x < length; ++x) {
                    const philox::Words words = noise_words(*one, static_cast<uint32_t>(y) * width_ + left + x);
                    for (int c = 0; c < 3; ++c) row[3 * x + c] = noise[c * kNoiseSteps + noise_step(words.w[c])];
                }
            }
        }
    }
}

}  // namespace augment
