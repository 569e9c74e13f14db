// What DALI is given: a grammar of JPEGs and PNGs, which accepts what is known to be good and nothing else.
//
// DALI's parsers and decoders and Pillow's disagree about odd files: one refuses what the other shows, colours are
// inverted, a picture is not turned, a library prints a line an image, and a header that DALI cannot parse ends the
// process. A file that this grammar does not know goes to Pillow, whose pixels are the definition. So a rule here may be
// too strict, which costs a little time, but never too loose.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <vector>

#include "inflate.h"
#include "jpeg.h"

namespace screen {

using namespace jpeg;

constexpr int kDqt = 0xDB, kApp1 = 0xE1, kApp2 = 0xE2, kApp13 = 0xED, kCom = 0xFE;
constexpr int kMaxSide = 65500;          // pixels: libjpeg's limit
constexpr int64_t kMaxPixels = 89478485;  // `catalog.MAX_PIXELS`
constexpr int kMaxScans = 64;
constexpr int64_t kMaxText = 1 << 20;  // bytes: Pillow refuses a PNG whose profile or text inflates to more

// What the grammar has found in a safe file.
struct Picture {
    Header header;
    int orientation = 1;  // EXIF's, 1 to 8
    bool subsampled = false;
    int64_t pixels = 0, pixels_end = 0;  // a PNG's chunks of pixels
    int64_t palette = 0, palette_bytes = 0;  // and its chunk of colours, if they are taken from one
};

inline bool begins(const uint8_t *content, int64_t length, const char *with, int64_t bytes) {
    return length >= bytes && !std::memcmp(content, with, bytes);
}

// EXIF ----------------------------------------------------------------------------------------------------------------

// The orientation that an EXIF block says, 1 where it says none; 0: DALI and Pillow may not agree about it.
//
// DALI's parser gives up at a value outside the block, and looks for some tags' values where their usual type has them;
// Pillow goes by the type and skips what it cannot read. So all values must lie inside, and those tags be of that type.
inline int exif_orientation(const uint8_t *tiff, int64_t length) {
    if (length < 8 || (std::memcmp(tiff, "II*\0", 4) && std::memcmp(tiff, "MM\0*", 4))) return 0;
    const bool little = tiff[0] == 'I';
    const auto two = [&](const uint8_t *at) -> int64_t { return little ? at[1] << 8 | at[0] : at[0] << 8 | at[1]; };
    const auto four = [&](const uint8_t *at) -> int64_t {
        return little ? two(at + 2) << 16 | two(at) : two(at) << 16 | two(at + 2);
    };
    const int64_t start = four(tiff + 4);
    if (start < 8 || start + 2 > length) return 0;
    const int64_t count = two(tiff + start);
    if (start + 2 + 12 * count > length) return 0;
    static constexpr int kUnit[13] = {0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8};
    int orientation = 0;
    for (int64_t i = 0; i < count; ++i) {
        const uint8_t *entry = tiff + start + 2 + 12 * i;
        const int64_t tag = two(entry), type = two(entry + 2), values = four(entry + 4);
        if (type < 1 || type > 12) return 0;
        const int64_t bytes = values * kUnit[type];
        if (bytes > 4 && (bytes > length || four(entry + 8) > length - bytes)) return 0;
        // Resolutions, white point, primaries, coefficients, black and white: fractions, so many.
        const int fractions = tag == 0x011A || tag == 0x011B ? 1
                              : tag == 0x013E                ? 2
                              : tag == 0x0211                ? 3
                              : tag == 0x013F || tag == 0x0214 ? 6
                                                               : 0;
        if (fractions && (type != 5 || values != fractions)) return 0;
        if (tag != 0x0112) continue;
        const int64_t value = two(entry + 8);
        if (orientation || type != 3 || values != 1 || value < 1 || value > 8) return 0;
        orientation = static_cast<int>(value);
    }
    return orientation ? orientation : 1;
}

// JPEG ----------------------------------------------------------------------------------------------------------------

// The tables that segments have defined.
struct Tables {
    bool quantisation[4] = {}, dc[4] = {}, ac[4] = {};

    bool take_quantisation(const uint8_t *at, const uint8_t *end) {
        while (at < end) {
            const int wide = at[0] >> 4, number = at[0] & 15;
            if (wide > 1 || number > 3 || end - at < 1 + 64 * (1 + wide)) return false;
            quantisation[number] = true;
            at += 1 + 64 * (1 + wide);
        }
        return true;
    }

    bool take_codes(const uint8_t *at, const uint8_t *end) {
        while (at < end) {
            const int kind = at[0] >> 4, number = at[0] & 15;
            if (kind > 1 || number > 3 || end - at < 17) return false;
            int code = 0, total = 0;
            for (int length = 1; length <= 16; ++length) {
                total += at[length];
                code += at[length];
                if (code >= 1 << length) return false;  // none may be all ones
                code <<= 1;
            }
            if (!total || total > 256 || end - at < 17 + total) return false;
            for (int i = 0; !kind && i < total; ++i) {
                if (at[17 + i] > 15) return false;
            }
            (kind ? ac : dc)[number] = true;
            at += 17 + total;
        }
        return true;
    }
};

// What programs write about a picture. Pillow reads some of it, and refuses the file when that cannot be read.
struct About {
    bool jfif = false, adobe = false, exif = false;
    int transform = 0;  // Adobe's
    int orientation = 1;

    bool take(int marker, const uint8_t *content, int64_t bytes) {
        if (marker == kApp0 && begins(content, bytes, "JFIF", 4)) {
            jfif = true;
            return bytes >= 14 && content[4] == 0 && content[5] == 1;
        }
        if (marker == kApp1 && begins(content, bytes, "Exif", 4)) {
            if (exif || !begins(content, bytes, "Exif\0\0", 6)) return false;
            exif = true;
            orientation = exif_orientation(content + 6, bytes - 6);
            return orientation;
        }
        if (marker == kApp2 && begins(content, bytes, "ICC_PROFILE\0", 12)) return bytes >= 14;
        if (marker == kApp13 && begins(content, bytes, "Photoshop 3.0\0", 14)) return resources(content, bytes);
        if (marker == kApp14 && begins(content, bytes, "Adobe", 5)) {
            if (adobe || bytes < 12) return false;
            adobe = true;
            transform = content[11];
        }
        return true;
    }

    // Pillow refuses what ends between a resource's number and its name.
    static bool resources(const uint8_t *content, int64_t bytes) {
        for (int64_t at = 14; begins(content + at, bytes - at, "8BIM", 4);) {
            at += 6;
            if (at == bytes) return false;
            if (at > bytes) return true;
            at += 1 + content[at];
            at += at & 1;
            if (bytes - at < 4) return true;
            at += 4 + (static_cast<int64_t>(two_bytes(content + at)) << 16 | two_bytes(content + at + 2));
            at += at & 1;
            if (at > bytes) return true;
        }
        return true;
    }

    // Whether there is no doubt that three components are luma and two chromas.
    bool is_ycc(const Component *component) const {
        const int first = component[0].id;
        if (first > 1 || component[1].id != first + 1 || component[2].id != first + 2) return false;
        if (adobe) return transform == 1;
        return jfif || first == 1;
    }
};

// How precisely the scans of a progressive JPEG have given each coefficient: the lowest bit known; -1: nothing is.
struct Progress {
    int8_t low[3][64];

    Progress() { std::memset(low, -1, sizeof low); }

    bool is_complete(int components) const {
        for (int c = 0; c < components; ++c) {
            for (int8_t bit : low[c]) {
                if (bit) return false;
            }
        }
        return true;
    }
};

// Whether a scan's header is safe. `component` gets the numbers of its tables.
inline bool take_scan(const uint8_t *content, int64_t bytes, Header &header, const Tables &tables, Progress *progress) {
    if (bytes < 1) return false;
    const int count = content[0];
    if (count < 1 || count > header.components || bytes != 4 + 2 * count) return false;
    const uint8_t *ends = content + 1 + 2 * count;
    const int first = ends[0], last = ends[1], high = ends[2] >> 4, low = ends[2] & 15;
    if (progress) {
        if (first > last || last > 63 || low > 13 || (first == 0) != (last == 0) || (first && count != 1)) return false;
        if (high && high != low + 1) return false;
    } else if (count != header.components || first != 0 || last != 63 || high || low) {
        return false;
    }
    for (int i = 0, c = 0; i < count; ++i, ++c) {
        while (c < header.components && header.component[c].id != content[1 + 2 * i]) ++c;
        if (c == header.components) return false;
        Component &component = header.component[c];
        component.dc = content[2 + 2 * i] >> 4;
        component.ac = content[2 + 2 * i] & 15;
        if (component.dc > 3 || component.ac > 3) return false;
        if (first == 0 && high == 0 && !tables.dc[component.dc]) return false;
        if (last != 0 && !tables.ac[component.ac]) return false;
        for (int k = first; progress && k <= last; ++k) {
            if (progress->low[c][k] != (high ? high : -1)) return false;
            if (k && progress->low[c][0] < 0) return false;
            progress->low[c][k] = static_cast<int8_t>(low);
        }
    }
    return true;
}

// The next marker of a scan, at its first byte; null: there is none, or a byte of filling.
inline const uint8_t *next_marker(const uint8_t *at, const uint8_t *end) {
    while ((at = static_cast<const uint8_t *>(std::memchr(at, 0xFF, end - at))) && end - at >= 2) {
        if (at[1] == 0xFF) return nullptr;
        if (at[1] != 0x00) return at;
        at += 2;
    }
    return nullptr;
}

// Whether a sequential JPEG's codes are all there, up to the end, and have their restart markers and no others. `starts`
// gets where the pieces between them begin, and the end's.
inline bool divide(const uint8_t *file, int64_t length, const Header &header, std::vector<int64_t> &starts) {
    const int64_t mcus = static_cast<int64_t>(up(header.width, header.mcu_width)) * up(header.height, header.mcu_height);
    const int64_t pieces = header.interval ? (mcus + header.interval - 1) / header.interval : 1;
    starts.clear();
    const uint8_t *at = file + header.scan, *const end = file + length;
    for (int64_t piece = 0; piece < pieces; ++piece) {
        starts.push_back(at - file);
        at = next_marker(at, end);
        if (!at || at[1] != (piece + 1 == pieces ? kEoi : kRst + piece % 8)) return false;
        at += 2;
    }
    starts.push_back(at - file);
    return true;
}

// Whether a progressive JPEG's scans are all there: every coefficient to its last bit, then the end.
inline bool take_scans(const uint8_t *file, int64_t length, Header &header, Tables &tables, Progress &progress) {
    const uint8_t *const end = file + length, *at = next_marker(file + header.scan, end);
    for (int scans = 1; at && scans <= kMaxScans;) {
        const int marker = at[1];
        if (marker == kEoi) return progress.is_complete(header.components);
        const int64_t left = end - at - 4;
        const int bytes = left < 0 ? -1 : two_bytes(at + 2) - 2;
        if (bytes < 0 || left < bytes) return false;
        const uint8_t *content = at + 4;
        if (marker == kSos) {
            if (!take_scan(content, bytes, header, tables, &progress)) return false;
            ++scans;
            at = next_marker(content + bytes, end);
        } else {
            if (marker != kDht || !tables.take_codes(content, content + bytes)) return false;
            at = content + bytes;
            if (end - at < 2 || at[0] != 0xFF) return false;
        }
    }
    return false;
}

// Whether a file is a JPEG that DALI decodes as Pillow does. `starts` is as `divide` leaves it if it is sequential.
inline bool is_safe_jpeg(const uint8_t *file, int64_t length, Picture &picture, std::vector<int64_t> &starts) {
    Header &header = picture.header;
    const uint8_t *at = file, *const end = file + length;
    if (length < 4 || at[0] != 0xFF || at[1] != kSoi) return false;
    at += 2;
    Tables tables;
    About about;
    Progress progress;
    bool frame = false, progressive = false;
    int quantisation[3] = {};
    while (end - at >= 4 && at[0] == 0xFF) {
        const int marker = at[1], bytes = two_bytes(at + 2) - 2;
        const uint8_t *content = at + 4;
        if (bytes < 0 || end - content < bytes) return false;
        at = content + bytes;
        if (marker == kDqt) {
            if (!tables.take_quantisation(content, at)) return false;
        } else if (marker == kDht) {
            if (!tables.take_codes(content, at)) return false;
        } else if (marker == kDri) {
            if (bytes != 2) return false;
            header.interval = two_bytes(content);
        } else if ((marker >= kApp0 && marker <= kApp15) || marker == kCom) {
            const bool turned = about.exif;
            if (!about.take(marker, content, bytes)) return false;
            // Behind the frame, some programs put XMP. What says colours or orientation is not looked for there by all.
            if (frame && (marker == kApp0 || marker == kApp14 || about.exif != turned)) return false;
        } else if (!frame && marker >= 0xC0 && marker <= 0xC2) {
            frame = true;
            progressive = marker == 0xC2;
            if (bytes < 6 || content[0] != 8) return false;
            const int count = content[5];
            if ((count != 1 && count != 3) || bytes != 6 + 3 * count) return false;
            header.size = content + 1 - file;
            header.height = two_bytes(content + 1);
            header.width = two_bytes(content + 3);
            if (!header.height || !header.width || header.height > kMaxSide || header.width > kMaxSide ||
                static_cast<int64_t>(header.height) * header.width > kMaxPixels) {
                return false;
            }
            header.components = count;
            for (int c = 0; c < count; ++c) {
                const uint8_t *of = content + 6 + 3 * c;
                header.component[c] = {of[0], of[1] >> 4, of[1] & 15, 0, 0};
                quantisation[c] = of[2];
            }
            Component *component = header.component;
            if (count == 1) {  // nothing to interleave: an MCU is a block
                if (component[0].wide != component[0].high || component[0].wide > 2) return false;
                component[0].wide = component[0].high = 1;
            } else {
                if (component[0].wide > 2 || component[0].high > 2 || !component[0].wide || !component[0].high) return false;
                for (int c : {1, 2}) {
                    if (component[c].wide != 1 || component[c].high != 1) return false;
                }
                if (!about.is_ycc(component)) return false;
            }
            header.mcu_width = 8 * component[0].wide;
            header.mcu_height = 8 * component[0].high;
            picture.subsampled = header.mcu_width > 8;
        } else if (frame && marker == kSos) {
            header.scan = at - file;
            picture.orientation = about.orientation;
            header.sequential = !progressive;
            for (int c = 0; c < header.components; ++c) {
                if (quantisation[c] > 3 || !tables.quantisation[quantisation[c]]) return false;
            }
            if (!take_scan(content, bytes, header, tables, progressive ? &progress : nullptr)) return false;
            if (!progressive) return divide(file, length, header, starts);
            return !header.interval && take_scans(file, length, header, tables, progress);
        } else {
            return false;
        }
    }
    return false;
}

// PNG -----------------------------------------------------------------------------------------------------------------

constexpr std::array<uint32_t, 256> make_crc_table() {
    std::array<uint32_t, 256> table{};
    for (uint32_t i = 0; i < 256; ++i) {
        table[i] = i;
        for (int bit = 0; bit < 8; ++bit) table[i] = table[i] & 1 ? table[i] >> 1 ^ 0xEDB88320u : table[i] >> 1;
    }
    return table;
}

inline constexpr auto kCrc = make_crc_table();

inline uint32_t crc32(const uint8_t *at, int64_t length) {
    uint32_t crc = ~0u;
    for (; length > 0; ++at, --length) crc = crc >> 8 ^ kCrc[(crc ^ at[0]) & 255];
    return ~crc;
}

inline int64_t four_bytes(const uint8_t *at) { return static_cast<int64_t>(two_bytes(at)) << 16 | two_bytes(at + 2); }

// Whether a text's name is one that says nothing to Pillow: of "exif" it takes the orientation.
inline bool is_text(const uint8_t *content, int64_t bytes, bool international) {
    const auto *zero = static_cast<const uint8_t *>(std::memchr(content, 0, bytes));
    if (!zero || zero == content || zero - content > 79) return false;
    // What Pillow keeps of texts stands beside what it keeps of the picture itself, under names of its own.
    for (const char *name : {"exif", "interlace", "bbox", "transparency", "gamma", "dpi", "icc_profile", "srgb", "aspect",
                             "chromaticity", "loop", "duration", "default_image"}) {
        if (zero - content == static_cast<int64_t>(std::strlen(name)) && !std::memcmp(content, name, zero - content))
            return false;
    }
    if (!international) return true;
    const int64_t left = content + bytes - zero;
    return left >= 5 && zero[1] == 0 && zero[2] == 0;  // not compressed
}

// Whether Pillow takes a profile. Most of a folder's are alike: the last one that was good is remembered.
inline bool is_profile(const uint8_t *content, int64_t bytes) {
    static thread_local std::vector<uint8_t> known;
    if (static_cast<int64_t>(known.size()) == bytes && !std::memcmp(known.data(), content, bytes)) return true;
    const auto *zero = static_cast<const uint8_t *>(std::memchr(content, 0, bytes));
    if (!zero || zero == content || zero - content > 79 || content + bytes - zero < 2 || zero[1]) return false;
    if (inflate::inflated_bytes(zero + 2, content + bytes - zero - 2, kMaxText) < 0) return false;
    if (bytes < 1 << 16) known.assign(content, content + bytes);
    return true;
}

// Whether a file is a PNG that DALI decodes as Pillow does: of 8 bits, grey or a palette, without frames or compressed
// texts.
inline bool is_safe_png(const uint8_t *file, int64_t length, Picture &picture) {
    if (length < 57 || std::memcmp(file, "\x89PNG\r\n\x1a\n\0\0\0\rIHDR", 16)) return false;
    const int64_t width = four_bytes(file + 16), height = four_bytes(file + 20);
    if (!width || !height || width > kMaxSide || height > kMaxSide || width * height > kMaxPixels) return false;
    const int depth = file[24], colours = file[25];
    const bool grey = colours == 0 && (depth == 1 || depth == 2 || depth == 4 || depth == 8 || depth == 16);
    const bool full = (colours == 2 || colours == 4 || colours == 6) && depth == 8;
    const bool palette = colours == 3 && (depth == 1 || depth == 2 || depth == 4 || depth == 8);
    if (!(grey || full || palette) || file[26] || file[27] || file[28] > 1) return false;
    picture.header.width = static_cast<int>(width);
    picture.header.height = static_cast<int>(height);
    bool seen[9] = {}, data = false, after = false;
    int64_t texts = 0;
    for (int64_t at = 8; length - at >= 12;) {
        const int64_t bytes = four_bytes(file + at);
        if (bytes > length - at - 12) return false;
        const uint8_t *kind = file + at + 4, *content = kind + 4;
        const auto is = [&](const char *name) { return !std::memcmp(kind, name, 4); };
        // One that may stand once, before the pixels.
        const auto once = [&](int which, bool good) {
            const bool first = !seen[which] && !data;
            seen[which] = true;
            return first && good;
        };
        if (is("IHDR")) {
            if (at != 8) return false;
        } else if (is("IDAT")) {
            // Without a dictionary, a window of at most 32 KiB.
            if (!data && (bytes < 2 || (content[0] & 15) != 8 || content[0] >> 4 > 7 || two_bytes(content) % 31 ||
                          content[1] & 32)) {
                return false;
            }
            if (after || (palette && !seen[7])) return false;
            if (!data) picture.pixels = at;
            picture.pixels_end = at + 12 + bytes;
            data = true;
        } else if (is("IEND")) {
            if (bytes || !data || at + 12 != length) return false;
        } else {
            after = data;
            if (is("tEXt") || is("iTXt")) {
                if (!is_text(content, bytes, kind[0] == 'i') || (texts += bytes) > kMaxText) return false;
            } else if (is("iCCP")) {
                if (!once(0, is_profile(content, bytes))) return false;
            } else if (is("PLTE")) {
                const bool good = bytes > 0 && bytes % 3 == 0 && bytes <= (palette ? 3 << depth : 768);
                if (!(colours & 2) || seen[8] || !once(7, good)) return false;
                if (palette) {
                    picture.palette = at;
                    picture.palette_bytes = 12 + bytes;
                }
            } else if (is("tRNS")) {
                const bool good = palette ? bytes > 0 && 3 * bytes <= picture.palette_bytes - 12
                                          : bytes == (colours == 0 ? 2 : 6) && !(colours & 4);
                if (!once(8, good)) return false;
            } else if (is("gAMA")) {
                if (!once(1, bytes == 4)) return false;
            } else if (is("cHRM")) {
                if (!once(2, bytes == 32)) return false;
            } else if (is("sRGB")) {
                if (!once(3, bytes == 1)) return false;
            } else if (is("pHYs")) {
                if (!once(4, bytes == 9)) return false;
            } else if (is("bKGD")) {
                if (!once(5, bytes == (palette ? 1 : colours & 2 ? 6 : 2))) return false;
            } else if (is("tIME")) {
                if (seen[6] || bytes != 7) return false;
                seen[6] = true;
            } else if (!is("sBIT") && !is("oFFs") && !is("iDOT") && !is("vpAg")) {  // these say nothing to Pillow
                return false;
            }
        }
        // Of the pixels, DALI looks at the sums itself; Pillow does not, and has the last word.
        if (!is("IDAT") && crc32(kind, 4 + bytes) != static_cast<uint32_t>(four_bytes(content + bytes))) return false;
        at += 12 + bytes;
        if (at == length) return is("IEND");
    }
    return false;
}

// Takes out of a safe PNG what is not its pixels (or their palette), in place: libpng finds fault with some of it and
// says so, and nobody wants transparency. Returns where the file now begins; `length` is what is left of it.
inline int64_t strip_png(uint8_t *file, int64_t &length, const Picture &picture) {
    constexpr int64_t kHead = 8 + 25;
    const int64_t palette = picture.pixels - picture.palette_bytes, begin = palette - kHead;
    std::memmove(file + palette, file + picture.palette, picture.palette_bytes);
    std::memmove(file + begin, file, kHead);
    std::memcpy(file + picture.pixels_end, "\0\0\0\0IEND\xAE\x42\x60\x82", 12);
    length = picture.pixels_end + 12 - begin;
    return begin;
}

// Whether DALI decodes a file as Pillow does.
inline bool is_safe(const uint8_t *file, int64_t length, Picture &picture, std::vector<int64_t> &starts) {
    return is_safe_jpeg(file, length, picture, starts) || is_safe_png(file, length, picture);
}

}  // namespace screen
