// How long a zlib stream is when it is inflated; nothing of it is kept.
#pragma once

#include <cstdint>

namespace inflate {

// A canonical Huffman code (RFC 1951, 3.2.2): how many codes of each length there are, and their symbols in order.
struct Code {
    int16_t counts[16], symbols[320];

    // False: there are more codes than bits have room for.
    bool build(const uint8_t *lengths, int count) {
        for (int16_t &c : counts) c = 0;
        for (int i = 0; i < count; ++i) ++counts[lengths[i]];
        int left = 1, place[16] = {};
        for (int length = 1; length < 16; ++length) {
            left = 2 * left - counts[length];
            if (left < 0) return false;
            if (length < 15) place[length + 1] = place[length] + counts[length];
        }
        for (int i = 0; i < count; ++i) {
            if (lengths[i]) symbols[place[lengths[i]]++] = static_cast<int16_t>(i);
        }
        return true;
    }
};

struct Bits {
    const uint8_t *at, *end;
    uint32_t held = 0;
    int count = 0;
    bool over = false;  // more was asked for than there is

    int take(int n) {
        while (count < n) {
            if (at == end) {
                over = true;
                return 0;
            }
            held |= static_cast<uint32_t>(*at++) << count;
            count += 8;
        }
        const int value = static_cast<int>(held & ((1u << n) - 1));
        held >>= n;
        count -= n;
        return value;
    }
    // A symbol, or -1.
    int symbol(const Code &code) {
        int value = 0, first = 0, place = 0;
        for (int length = 1; length < 16; ++length) {
            value |= take(1);
            if (over) return -1;
            const int here = code.counts[length];
            if (value - first < here) return code.symbols[place + value - first];
            place += here;
            first = (first + here) << 1;
            value <<= 1;
        }
        return -1;
    }
};

// The bytes that a stream's blocks hold; -1: they are damaged, or more than `most`.
inline int64_t inflated_bytes(const uint8_t *stream, int64_t length, int64_t most) {
    static constexpr int16_t kLength[] = {3,  4,  5,  6,  7,  8,  9,  10, 11,  13,  15,  17,  19,  23, 27,
                                          31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195, 227, 258};
    static constexpr uint8_t kLengthBits[] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2,
                                              2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0};
    static constexpr uint8_t kOrder[] = {16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15};
    if (length < 2 || (stream[0] & 15) != 8 || stream[0] >> 4 > 7 || (stream[0] << 8 | stream[1]) % 31 || stream[1] & 32) {
        return -1;
    }
    Bits in{stream + 2, stream + length};
    int64_t bytes = 0;
    for (bool last = false; !last;) {
        last = in.take(1);
        const int kind = in.take(2);
        if (in.over || kind == 3) return -1;
        if (kind == 0) {
            in.held = in.count = 0;
            if (in.end - in.at < 4) return -1;
            const int64_t plain = in.at[0] | in.at[1] << 8;
            if (plain != (~(in.at[2] | in.at[3] << 8) & 0xFFFF) || in.end - in.at - 4 < plain) return -1;
            in.at += 4 + plain;
            bytes += plain;
            if (bytes > most) return -1;
            continue;
        }
        uint8_t lengths[320] = {};
        int literals = 288, distances = 30;
        if (kind == 1) {
            for (int i = 0; i < 288; ++i) lengths[i] = i < 144 ? 8 : i < 256 ? 9 : i < 280 ? 7 : 8;
            for (int i = 0; i < 30; ++i) lengths[288 + i] = 5;
        } else {
            literals = in.take(5) + 257;
            distances = in.take(5) + 1;
            const int given = in.take(4) + 4;
            if (in.over || literals > 286 || distances > 30) return -1;
            uint8_t of[19] = {};
            for (int i = 0; i < given; ++i) of[kOrder[i]] = static_cast<uint8_t>(in.take(3));
            Code code;
            if (!code.build(of, 19)) return -1;
            for (int i = 0; i < literals + distances;) {
                const int symbol = in.symbol(code);
                if (symbol < 0) return -1;
                if (symbol < 16) {
                    lengths[i++] = static_cast<uint8_t>(symbol);
                    continue;
                }
                if (symbol == 16 && !i) return -1;
                const uint8_t value = symbol == 16 ? lengths[i - 1] : 0;
                int times = symbol == 16 ? 3 + in.take(2) : symbol == 17 ? 3 + in.take(3) : 11 + in.take(7);
                if (in.over || i + times > literals + distances) return -1;
                while (times--) lengths[i++] = value;
            }
            if (!lengths[256]) return -1;
        }
        Code literal, distance;
        if (!literal.build(lengths, literals) || !distance.build(lengths + literals, distances)) return -1;
        for (int symbol; (symbol = in.symbol(literal)) != 256;) {
            if (symbol < 0 || symbol > 285) return -1;
            if (symbol < 256) {
                ++bytes;
            } else {
                const int run = kLength[symbol - 257] + in.take(kLengthBits[symbol - 257]);
                const int far = in.symbol(distance);
                if (far < 0 || far > 29) return -1;
                const int bits = far < 2 ? 0 : far / 2 - 1;
                const int back = (far < 2 ? far : (2 + (far & 1)) << bits) + in.take(bits) + 1;
                if (in.over || back > bytes) return -1;
                bytes += run;
            }
            if (bytes > most) return -1;
        }
    }
    return bytes;
}

}  // namespace inflate
