// Reads the encoded images of a batch into one block of memory, and cuts out of each JPEG what its sample shows (of each
// PNG, its pixels).
//
// Cutting decodes nothing. A restart marker sets the decoder's predictions to zero, so what lies between two of them is
// a piece that can be moved: where they divide every row of a picture's minimum coded units (MCUs) evenly, they divide
// the picture into tiles, and any rectangle of tiles is a JPEG of its own. Its header is the file's with another height
// and width, its pieces are the file's bytes with their markers numbered anew. Decoding it costs what its own tiles
// cost; a decoder that is given the file and a window has to go through all that lies above and beside it.
//
//     +----+----+----+----+
//     | 0  | 1  | 2  | 3  |        the window touches tiles 5, 6, 9, 10:
//     +----+-##-+-##-+----+
//     | 4  | 5# | #6 | 7  |        header (two tiles by two), 5, RST0, 6, RST1, 9, RST2, 10, EOI
//     +----+-##-+-##-+----+
//     | 8  | 9  | 10 | 11 |
//     +----+----+----+----+
//
// A pixel's colour may depend on the chroma sample beside its own, so a window is widened by one of them before the
// tiles are chosen; its pixels are then those that decoding everything gives, bit for bit.
#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "screen.h"

namespace {

using namespace jpeg;

// Cuts what the window touches out of a safe file, in place, and moves the window along. Returns the bytes that are
// left: `length` if the file cannot be cut or nothing would be gained. Piece i of its codes is [starts[i], starts[i + 1] -
// 2), and a marker follows.
int64_t cut(uint8_t *file, int64_t length, const Header &header, int32_t *window, const std::vector<int64_t> &starts) {
    const int columns = up(header.width, header.mcu_width);
    const bool whole_rows = header.interval % columns == 0;
    if (!whole_rows && columns % header.interval) return length;
    const int tile_height = header.mcu_height * (whole_rows ? header.interval / columns : 1);
    const int tile_width = header.mcu_width * (whole_rows ? columns : header.interval);
    const int down = up(header.height, tile_height), across = up(header.width, tile_width);

    if (window[0] < 0 || window[1] < 0 || window[2] > header.height || window[3] > header.width) return length;
    const int chroma_height = header.mcu_height / 8, chroma_width = header.mcu_width / 8;
    const int top = std::max(window[0] - chroma_height, 0) / tile_height;
    int left = std::max(window[1] - chroma_width, 0) / tile_width;
    const int bottom = std::min(up(window[2] + chroma_height, tile_height), down);
    const int right = std::min(up(window[3] + chroma_width, tile_width), across);
    // Of two chroma samples a row, decoders do not interpolate.
    if (left && std::min(right * tile_width, header.width) - left * tile_width <= 2 * chroma_width) --left;
    if (top == 0 && left == 0 && bottom == down && right == across) return length;

    const int y = top * tile_height, x = left * tile_width;
    const int height = (bottom == down ? header.height : bottom * tile_height) - y;
    const int width = (right == across ? header.width : right * tile_width) - x;
    uint8_t *size = file + header.size;
    size[0] = height >> 8, size[1] = height & 255, size[2] = width >> 8, size[3] = width & 255;
    uint8_t *to = file + header.scan;  // never ahead of what is read
    int piece = 0;
    for (int row = top; row < bottom; ++row) {
        for (int column = left; column < right; ++column, ++piece) {
            const int64_t *start = &starts[static_cast<size_t>(row) * across + column];
            const int64_t bytes = start[1] - 2 - start[0];
            std::memmove(to, file + start[0], bytes);
            to += bytes;
            *to++ = 0xFF;
            *to++ = kRst + piece % 8;
        }
    }
    to[-1] = kEoi;
    window[0] -= y, window[2] -= y, window[1] -= x, window[3] -= x;
    return to - file;
}

constexpr int64_t kMostBytes = int64_t{1} << 30;  // of a file: `pixels.MOST_BYTES`

constexpr int kEndsEarly = -1, kEmpty = -2, kNotAFile = -3, kOtherSize = -4, kTooLarge = -5;  // beside the system's error numbers

// Reads [offset, offset + length) of an open file to `to`. Returns the bytes that there were; sets the error number.
int64_t read_bytes(int file, int64_t offset, int64_t length, uint8_t *to, int32_t &error) {
    int64_t done = 0;
    while (done < length) {
        const ssize_t bytes = pread(file, to + done, length - done, offset + done);
        if (bytes < 0 && errno == EINTR) continue;
        if (bytes < 0) error = errno;
        if (bytes <= 0) break;
        done += bytes;
    }
    return done;
}

long waits() {
    struct rusage usage;
    getrusage(RUSAGE_THREAD, &usage);
    return usage.ru_nvcsw;
}

// Calls read(i, starts) for 0 <= i < count, once each. A read that has to wait shows that storage is slow: then, and only
// then, others go on beside it, `threads` at most. `starts` is memory that a thread uses again.
template <typename Read>
void read_all(int64_t count, int threads, const Read &read) {
    std::atomic<int64_t> next{0};
    const auto work = [&](bool until_waiting) {
        std::vector<int64_t> starts;
        const long before = until_waiting ? waits() : 0;
        for (int64_t i; (i = next.fetch_add(1)) < count;) {
            read(i, starts);
            if (until_waiting && (i < 8 || i % 8 == 0) && waits() > before) return;  // asking costs half a read of 3 KB
        }
    };
    work(threads > 1);
    std::vector<std::thread> others;
    const int64_t left = count - std::min(next.load(), count);
    try {
        for (int64_t i = 1; i < std::min<int64_t>(threads, left); ++i) others.emplace_back([&work] { work(false); });
    } catch (const std::system_error &) {  // no more threads: those that there are do it
    }
    work(false);
    for (std::thread &other : others) other.join();
}

// What a batch is read from and to.
struct Batch {
    int64_t count;
    const char *paths;
    const int64_t *path_starts;
    const int32_t *files;
    const int64_t *offsets;
    int64_t *lengths;
    int32_t *windows;
    const int32_t *sizes;
    uint8_t *out;
    int64_t capacity;
    int64_t *begins;
    uint8_t *safe;
    int32_t *errors;
    std::atomic<int64_t> used{0};

    void read_open(int64_t i, int file, int64_t offset, int64_t length, bool whole, std::vector<int64_t> &starts) {
        const int64_t begin = used.fetch_add(length);
        lengths[i] = length;
        if (begin + length > capacity) return;  // the caller comes back with more room
        begins[i] = begin;
        uint8_t *to = out + begin;
        const int64_t bytes = read_bytes(file, offset, length, to, errors[i]);
        if (errors[i]) return;
        if (bytes < length && !whole) {
            errors[i] = kEndsEarly;
            return;
        }
        lengths[i] = bytes;
        screen::Picture picture;
        if (!screen::is_safe(to, bytes, picture, starts)) return;
        const Header &header = picture.header;
        const int32_t *size = sizes + 2 * i;
        const bool swapped = picture.orientation > 4;
        if (size[0] && !(size[swapped] == header.height && size[!swapped] == header.width)) {
            errors[i] = kOtherSize;
            return;
        }
        int32_t *window = windows + 4 * i;
        const bool seen = window[2] > window[0] && window[3] > window[1];
        // DALI does not interpolate the chroma of a single column.
        if (seen && picture.subsampled && window[3] - window[1] == 1) return;
        if (seen && header.sequential && header.interval && picture.orientation == 1) {
            lengths[i] = cut(to, bytes, header, window, starts);
        }
        if (picture.pixels) begins[i] += screen::strip_png(to, lengths[i], picture);
        safe[i] = true;
    }

    void read(int64_t i, std::vector<int64_t> &starts) {
        if (files[i] >= 0) return read_open(i, files[i], offsets[i], lengths[i], false, starts);
        if (path_starts[i] < 0) return;
        // Opening a pipe would wait for somebody to write to it.
        const int file = open(paths + path_starts[i], O_RDONLY | O_CLOEXEC | O_NONBLOCK);
        struct stat found;
        if (file < 0 || fstat(file, &found)) {
            errors[i] = errno;
        } else if (!S_ISREG(found.st_mode)) {
            errors[i] = S_ISDIR(found.st_mode) ? EISDIR : kNotAFile;
        } else if (!found.st_size) {
            errors[i] = kEmpty;
        } else if (found.st_size > kMostBytes) {
            errors[i] = kTooLarge;
        } else {
            read_open(i, file, 0, found.st_size, true, starts);
        }
        if (file >= 0) close(file);
    }
};

}  // namespace

// Reads a batch.
//
//     count        images
//     paths        files' names, each with a final zero
//     path_starts  (count) where an image's name begins; negative: it has none
//     files        (count) descriptors of open files; negative: the whole file of that name is read, if it has one
//     offsets      (count) where in the open file it begins
//     lengths      (count) its bytes; in turn those of what is to be decoded
//     windows      (count, 4) top, left, bottom, right in pixels, empty: not looked at; in turn in what is to be decoded
//     sizes        (count, 2) height and width that JPEGs and PNGs must have, upright; zeros: any
//     out          (capacity) where to
//     begins       (count) where in `out` what is to be decoded begins
//     safe         (count) zeros; becomes true for a JPEG or PNG that DALI decodes as Pillow does
//     errors       (count) zeros; in turn 0, an error number or one of those above
//     threads      that read at once, at most
//
// Returns the bytes that `out` must have room for: if that is more than `capacity`, call again with the arguments as
// they were. Negative: there is no memory.
extern "C" __attribute__((visibility("default"))) int64_t dali_diffusemix_read(
    int64_t count, const char *paths, const int64_t *path_starts, const int32_t *files, const int64_t *offsets,
    int64_t *lengths, int32_t *windows, const int32_t *sizes, uint8_t *out, int64_t capacity, int64_t *begins,
    uint8_t *safe, int32_t *errors, int threads) {
    try {
        Batch batch{count,   paths, path_starts, files,    offsets, lengths,
                    windows, sizes, out,         capacity, begins,  safe,  errors};
        read_all(count, threads, [&batch](int64_t i, std::vector<int64_t> &starts) { batch.read(i, starts); });
        return batch.used;
    } catch (const std::bad_alloc &) {
        return -1;
    }
}

// Reads stretches of open files: `lengths[i]` bytes from `offsets[i]` of `files[i]` to `out + begins[i]`; `errors[i]`, zero
// before, becomes an error number or one of those above.
extern "C" __attribute__((visibility("default"))) void dali_diffusemix_read_stretches(
    int64_t count, const int32_t *files, const int64_t *offsets, const int64_t *lengths, const int64_t *begins,
    uint8_t *out, int32_t *errors, int threads) {
    read_all(count, threads, [=](int64_t i, std::vector<int64_t> &) {
        const int64_t bytes = read_bytes(files[i], offsets[i], lengths[i], out + begins[i], errors[i]);
        if (!errors[i] && bytes < lengths[i]) errors[i] = kEndsEarly;
    });
}
