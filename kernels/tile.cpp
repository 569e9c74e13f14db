// Divides a JPEG into tiles by restart markers, without decoding its pixels and without loss.
//
// Coefficients stay what they are. Their codes are read and written again; only where a tile begins does a code change,
// that of the first coefficient of each component, which is a difference to the block before and becomes one to zero.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "jpeg.h"

namespace {

using namespace jpeg;

// A Huffman code, both ways.
struct Code {
    bool there = false;
    uint8_t counts[16] = {}, symbols[256] = {};
    int total = 0;
    int32_t first[17] = {}, last[17] = {}, place[17] = {};  // by length: codes from first to last, where their symbols are
    uint8_t lengths[256] = {};                               // by symbol; 0: it has no code
    uint16_t codes[256] = {};

    // The content of a DHT segment for one table. False: it is none.
    bool build(const uint8_t *at, int64_t bytes) {
        if (bytes < 16) return false;
        std::memcpy(counts, at, 16);
        total = 0;
        for (int count : counts) total += count;
        if (total > 256 || bytes < 16 + total) return false;
        std::memcpy(symbols, at + 16, total);
        std::memset(lengths, 0, sizeof lengths);
        int code = 0, k = 0;
        for (int length = 1; length <= 16; ++length) {
            first[length] = code;
            place[length] = k;
            for (int i = 0; i < counts[length - 1]; ++i, ++k, ++code) {
                lengths[symbols[k]] = length;
                codes[symbols[k]] = code;
            }
            last[length] = code - 1;
            if (code > 1 << length) return false;
            code <<= 1;
        }
        return there = true;
    }
};

// The table of T.81, K.3.3.1, for luminance: it has a code for every difference of 8-bit pictures.
constexpr uint8_t kStandard[16 + 12] = {0, 1, 5, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11};

// Reads bits. At the end of the data, or at a marker, it gives zeros and counts them.
struct Reader {
    const uint8_t *at, *end;
    uint64_t bits = 0;
    int count = 0, missing = 0;

    void fill(int needed) {
        while (count < needed) {
            int byte = 0;
            if (at < end && !(at[0] == 0xFF && (end - at < 2 || at[1] != 0))) {
                byte = at[0];
                at += byte == 0xFF ? 2 : 1;
            } else {
                missing += 8;
            }
            bits = bits << 8 | byte;
            count += 8;
        }
    }
    int take(int n) {
        if (!n) return 0;
        fill(n);
        count -= n;
        return static_cast<int>(bits >> count & ((1u << n) - 1));
    }
    // A symbol, or -1.
    int symbol(const Code &code) {
        int value = 0;
        for (int length = 1; length <= 16; ++length) {
            value = value << 1 | take(1);
            if (code.counts[length - 1] && value <= code.last[length]) {
                return code.symbols[code.place[length] + value - code.first[length]];
            }
        }
        return -1;
    }
    // Whether more was taken than there was.
    bool over() const { return missing > count; }
    void align() { count = 0, bits = 0, missing = 0; }
};

struct Writer {
    std::vector<uint8_t> &out;
    uint64_t bits = 0;
    int count = 0;

    void put(int value, int n) {
        bits = bits << n | (static_cast<uint32_t>(value) & ((1u << n) - 1));
        count += n;
        while (count >= 8) {
            count -= 8;
            byte(bits >> count & 255);
        }
    }
    void byte(int value) {
        out.push_back(value);
        if (value == 0xFF) out.push_back(0);
    }
    void align() {
        if (count) put(255, 8 - count);
        bits = 0;
    }
};

int category(int value) {
    int magnitude = value < 0 ? -value : value, n = 0;
    for (; magnitude; magnitude >>= 1) ++n;
    return n;
}

struct Tables {
    Code dc[4], ac[4];

    // Takes those of a DHT segment's content.
    bool take(const uint8_t *at, const uint8_t *end) {
        while (at < end) {
            const int kind = at[0] >> 4, number = at[0] & 15;
            if (kind > 1 || number > 3) return false;
            Code &code = kind ? ac[number] : dc[number];
            if (!code.build(at + 1, end - at - 1)) return false;
            at += 17 + code.total;
        }
        return true;
    }
};

void segment(std::vector<uint8_t> &out, int marker, const uint8_t *content, int bytes) {
    const uint8_t head[4] = {0xFF, static_cast<uint8_t>(marker), static_cast<uint8_t>((bytes + 2) >> 8),
                             static_cast<uint8_t>((bytes + 2) & 255)};
    out.insert(out.end(), head, head + 4);
    out.insert(out.end(), content, content + bytes);
}

// Writes the tiled file to `out`. False: it cannot be tiled.
bool tile(const uint8_t *file, int64_t length, int width, std::vector<uint8_t> &out) {
    Tables tables;
    bool good = true;
    out.assign({0xFF, kSoi});
    int64_t scan_segment = 0;
    const Header header = read_header(file, length, [&](int marker, int64_t begin, int64_t end) {
        const uint8_t *content = file + begin + 4;
        if (marker == kDht) good = good && tables.take(content, file + end);
        if (marker == kSos) scan_segment = begin;
        // Of what programs have written about the picture only the kind of its colours is kept.
        const bool about = (marker > kApp0 && marker <= kApp15 && marker != kApp14) || marker == 0xFE;
        if (marker != kSos && marker != kDri && !about) out.insert(out.end(), file + begin, file + end);
    });
    if (!good || !header.sequential) return false;
    const int columns = up(header.width, header.mcu_width), rows = up(header.height, header.mcu_height);
    int interval = std::max(1, width / header.mcu_width);
    while (columns % interval) --interval;
    for (int c = 0; c < header.components; ++c) {
        const Component &component = header.component[c];
        if (component.dc > 3 || component.ac > 3) return false;
        if (!tables.dc[component.dc].there || !tables.ac[component.ac].there) return false;
    }

    // A table that lacks a code for some difference that may come up is replaced.
    Code dc[4];
    for (int c = 0; c < header.components; ++c) {
        const int number = header.component[c].dc;
        if (dc[number].there) continue;
        dc[number] = tables.dc[number];
        for (int symbol = 0; symbol <= 11; ++symbol) {
            if (dc[number].lengths[symbol]) continue;
            uint8_t content[1 + sizeof kStandard];
            content[0] = number;
            std::memcpy(content + 1, kStandard, sizeof kStandard);
            segment(out, kDht, content, sizeof content);
            dc[number].build(kStandard, sizeof kStandard);
            break;
        }
    }
    const uint8_t restart[2] = {static_cast<uint8_t>(interval >> 8), static_cast<uint8_t>(interval & 255)};
    segment(out, kDri, restart, 2);
    out.insert(out.end(), file + scan_segment, file + header.scan);

    Reader in{file + header.scan, file + length};
    Writer to{out};
    int before[3] = {}, written[3] = {};
    const int64_t mcus = static_cast<int64_t>(columns) * rows;
    for (int64_t mcu = 0; mcu < mcus; ++mcu) {
        if (mcu && header.interval && mcu % header.interval == 0) {  // the file's own marker
            in.align();
            while (in.end - in.at >= 2 && in.at[0] == 0xFF && in.at[1] == 0xFF) ++in.at;
            if (in.end - in.at < 2 || in.at[0] != 0xFF || (in.at[1] & 0xF8) != kRst) return false;
            in.at += 2;
            std::fill(before, before + 3, 0);
        }
        if (mcu && mcu % interval == 0) {
            to.align();
            out.push_back(0xFF);
            out.push_back(kRst + (mcu / interval - 1) % 8);
            std::fill(written, written + 3, 0);
        }
        for (int c = 0; c < header.components; ++c) {
            const Component &component = header.component[c];
            const Code &from = tables.dc[component.dc], &into = dc[component.dc], &ac = tables.ac[component.ac];
            for (int block = 0; block < component.wide * component.high; ++block) {
                const int size = in.symbol(from);
                if (size < 0 || size > 11) return false;
                const int value = in.take(size);
                before[c] += size && value < 1 << (size - 1) ? value - (1 << size) + 1 : value;
                const int difference = before[c] - written[c], needed = category(difference);
                written[c] = before[c];
                if (needed > 11 || !into.lengths[needed]) return false;
                to.put(into.codes[needed], into.lengths[needed]);
                if (needed) to.put(difference < 0 ? difference - 1 : difference, needed);
                for (int k = 1; k < 64;) {
                    const int symbol = in.symbol(ac);
                    if (symbol < 0) return false;
                    to.put(ac.codes[symbol], ac.lengths[symbol]);
                    const int run = symbol >> 4, bits = symbol & 15;
                    if (bits) {
                        to.put(in.take(bits), bits);
                        k += run + 1;
                    } else if (run == 15) {
                        k += 16;
                    } else {
                        break;
                    }
                    if (k > 64) return false;
                }
                if (in.over()) return false;
            }
        }
    }
    to.align();
    out.push_back(0xFF);
    out.push_back(kEoi);
    return true;
}

}  // namespace

// Divides a JPEG into tiles.
//
//     file, length  the file
//     width         pixels that a tile is wide at most; as wide as divides the picture evenly
//     out           room for the result
//     capacity      its bytes
//
// Returns the bytes written; 0: the file cannot be divided (progressive, damaged, not a JPEG); negative: that many bytes
// of room are needed.
extern "C" __attribute__((visibility("default"))) int64_t dali_diffusemix_tile_jpeg(
    const uint8_t *file, int64_t length, int width, uint8_t *out, int64_t capacity) {
    try {
        std::vector<uint8_t> tiled;
        tiled.reserve(length + length / 8);
        if (!tile(file, length, width, tiled)) return 0;
        const int64_t bytes = static_cast<int64_t>(tiled.size());
        if (bytes > capacity) return -bytes;
        std::memcpy(out, tiled.data(), bytes);
        return bytes;
    } catch (const std::bad_alloc &) {
        return 0;
    }
}
