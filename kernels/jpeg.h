// What a JPEG's header says about where things are in it.
#pragma once

#include <cstdint>
#include <cstring>

namespace jpeg {

constexpr int kDht = 0xC4, kJpg = 0xC8, kDac = 0xCC, kRst = 0xD0, kSoi = 0xD8, kEoi = 0xD9, kSos = 0xDA, kDri = 0xDD,
              kApp0 = 0xE0, kApp14 = 0xEE, kApp15 = 0xEF;

inline int two_bytes(const uint8_t *at) { return at[0] << 8 | at[1]; }
inline int up(int a, int b) { return (a + b - 1) / b; }

struct Component {
    int id, wide, high;  // wide, high: blocks in an MCU
    int dc, ac;          // numbers of its tables
};

struct Header {
    int height = 0, width = 0;          // pixels; 0: there is no frame
    int64_t size = 0;                   // offset of the two bytes of the height, which those of the width follow
    int64_t scan = 0;                   // offset of the first byte after the header; 0: there is no scan
    int mcu_height = 0, mcu_width = 0;  // pixels
    int interval = 0;                   // MCUs between two restart markers; 0: there are none
    // One pass over all components of a picture of 8 bits, in Huffman codes: MCUs follow each other row by row.
    bool sequential = false;
    int components = 0;
    Component component[3] = {};
};

// Reads a header, as far as it goes. Calls `segment(marker, begin, end)` for each of its segments, with offsets from
// the marker's first byte to behind its content.
template <typename Segment>
Header read_header(const uint8_t *file, int64_t length, Segment segment) {
    Header header;
    const uint8_t *at = file, *const end = file + length;
    if (length < 4 || at[0] != 0xFF || at[1] != kSoi) return header;
    at += 2;
    bool plain = false;
    while (end - at >= 4 && at[0] == 0xFF) {
        const int marker = at[1];
        if (marker == 0xFF) {  // a fill byte
            ++at;
            continue;
        }
        const uint8_t *content = at + 4;
        const int bytes = two_bytes(at + 2) - 2;
        if (bytes < 0 || end - content < bytes) return header;
        segment(marker, at - file, content + bytes - file);
        if (marker >= 0xC0 && marker <= 0xCF && marker != kDht && marker != kJpg && marker != kDac) {
            if (header.height || bytes < 6) return header;
            header.size = content + 1 - file;
            header.height = two_bytes(content + 1);
            header.width = two_bytes(content + 3);
            const int count = content[5];
            plain = marker <= 0xC1 && content[0] == 8 && (count == 1 || count == 3) && bytes >= 6 + 3 * count &&
                    header.height && header.width;
            int high = 1, wide = 1;
            header.components = plain ? count : 0;
            for (int c = 0; c < header.components; ++c) {
                const uint8_t *of = content + 6 + 3 * c;
                Component &component = header.component[c];
                component = {of[0], of[1] >> 4, of[1] & 15, 0, 0};
                plain = plain && component.wide >= 1 && component.wide <= 4 && component.high >= 1 && component.high <= 4;
                if (component.wide > wide) wide = component.wide;
                if (component.high > high) high = component.high;
            }
            if (header.components == 1) {  // nothing to interleave: an MCU is a block
                wide = high = header.component[0].wide = header.component[0].high = 1;
            }
            header.mcu_height = 8 * high;
            header.mcu_width = 8 * wide;
        } else if (marker == kDri) {
            if (bytes < 2) return header;
            header.interval = two_bytes(content);
        } else if (marker == kSos) {
            header.scan = content + bytes - file;
            header.sequential = plain && bytes >= 4 + 2 * header.components && content[0] == header.components;
            for (int c = 0; header.sequential && c < header.components; ++c) {
                Component &component = header.component[c];
                header.sequential = content[1 + 2 * c] == component.id;
                component.dc = content[2 + 2 * c] >> 4;
                component.ac = content[2 + 2 * c] & 15;
            }
            return header;
        }
        at = content + bytes;
    }
    return header;
}

}  // namespace jpeg
