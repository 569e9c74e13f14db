// Calls functions of a library: call LIBRARY < calls > results, on another processor than the caller's. How
// other_processor.py writes a call, and reads the result: 64-bit numbers of the machine (little-endian), and bytes.
//
//     call    length of the name, name; arguments passed, values in all; then each value: 0 and a number, or 1, its
//             length and its bytes; pointers; then each: value that holds it, offset, value that it points to
//     result  what was returned, then the bytes of each value that has them
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

namespace {

constexpr int kMostArguments = 20;

[[noreturn]] void fail(const char *why) {
    std::fprintf(stderr, "%s\n", why);
    std::exit(1);
}

void input(void *to, size_t bytes) {
    if (bytes && std::fread(to, bytes, 1, stdin) != 1) fail("the call ends early");
}

int64_t number() {
    int64_t value;
    input(&value, sizeof value);
    return value;
}

struct Value {
    int64_t word;  // the number, or the address
    int64_t length;
    std::unique_ptr<char, decltype(&std::free)> bytes{nullptr, std::free};
};

void call(void *library, int64_t name_length) {
    std::vector<char> name(name_length + 1);
    input(name.data(), name_length);
    void *const function = dlsym(library, name.data());
    if (!function) fail(dlerror());
    const int64_t passed = number();
    if (passed > kMostArguments) fail("too many arguments");
    std::vector<Value> values(number());
    for (Value &value : values) {
        if (number() == 0) {
            value.word = number();
            continue;
        }
        value.length = number();
        value.bytes.reset(static_cast<char *>(std::aligned_alloc(64, value.length / 64 * 64 + 64)));
        input(value.bytes.get(), value.length);
        value.word = reinterpret_cast<int64_t>(value.bytes.get());
    }
    for (int64_t pointers = number(); pointers > 0; --pointers) {
        char *const holder = values[number()].bytes.get();
        char *const place = holder + number();
        std::memcpy(place, &values[number()].word, sizeof(int64_t));
    }
    // Integers and pointers alone: whoever takes fewer or narrower ones does not see the rest, on x86-64 and on AArch64.
    int64_t a[kMostArguments] = {};
    for (int64_t i = 0; i < passed; ++i) a[i] = values[i].word;
    const int64_t result = reinterpret_cast<int64_t (*)(...)>(function)(
        a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13], a[14], a[15], a[16],
        a[17], a[18], a[19]);
    std::fwrite(&result, sizeof result, 1, stdout);
    for (const Value &value : values) {
        if (value.bytes) std::fwrite(value.bytes.get(), 1, value.length, stdout);
    }
    if (std::fflush(stdout)) fail("no reader");
}

}  // namespace

int main(int, char **arguments) {
    void *const library = dlopen(arguments[1], RTLD_NOW);
    if (!library) fail(dlerror());
    for (int64_t name_length; std::fread(&name_length, sizeof name_length, 1, stdin) == 1;) call(library, name_length);
}
