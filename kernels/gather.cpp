// Copies the decoded pieces of a batch into one block of memory, from which one transfer takes them to a GPU.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

// Copies `count` pieces: lengths[i] bytes at addresses[i] to out + starts[i]. `threads` of them work at once, at most.
extern "C" __attribute__((visibility("default"))) void dali_diffusemix_gather(
    int64_t count, const uint64_t *addresses, const int64_t *lengths, const int64_t *starts, uint8_t *out,
    int threads) {
    std::atomic<int64_t> next{0};
    const auto work = [&] {
        for (int64_t i; (i = next.fetch_add(1)) < count;)
            std::memcpy(out + starts[i], reinterpret_cast<const uint8_t *>(addresses[i]), lengths[i]);
    };
    std::vector<std::thread> others;
    try {
        others.reserve(std::max(threads, 1));
        for (int64_t t = 1; t < std::min<int64_t>(threads, count); ++t) others.emplace_back(work);
    } catch (...) {
        // Fewer threads than wanted: the work is the same.
    }
    work();
    for (std::thread &other : others) other.join();
}
