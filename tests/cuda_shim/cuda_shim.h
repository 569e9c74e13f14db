// CUDA's words on the CPU, for tests only: a .cu file is compiled by g++ and its grid is run block after block.
//
// A block's threads are fibers: each has its own stack, runs until it reaches __syncthreads or its end, and then the
// next one runs; nobody passes a barrier before all have reached it. It is an error if one thread ends while another
// waits. Threads run in ascending or descending order: a result that depends on the order is a race. Shared memory is
// filled with a pattern before every block, so that what was never written shows.
//
// __ldg is checked: the caller says which bytes of memory may be read through it; other reads are counted and give 0.
// Alignment is checked, which the GPU insists on and x86 does not: compiled with -fsanitize=alignment, linked without.
// Multiplications and additions of floats contract as nvcc contracts them (-ffp-contract=fast); those written as
// intrinsics do not. Dynamic shared memory, of the GPU's largest size, is filled with the pattern, too.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <utility>
#include <vector>

#define __CUDA_ARCH__ 900  // take the device's branches
#define __global__ __attribute__((visibility("default"), used))
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("cuda_shared")))

extern "C" char __start_cuda_shared[], __stop_cuda_shared[];  // the linker's names for the section's ends

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

#define DYNAMIC_SHARED(name) uint4* const name = cuda_shim::dynamic

struct Dim3 {
    unsigned x, y, z;
};

static Dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_shim {

struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    bool done;
};

struct Range {
    const char *begin, *end;
};

static uint4 dynamic[227 * 1024 / sizeof(uint4)];
static ucontext_t scheduler;
static Fiber* current;
static std::vector<Range> readable;
static int64_t forbidden_reads;
static bool misaligned;

template <typename T>
bool may_read(const T* from) {
    const char* const at = reinterpret_cast<const char*>(from);
    if (reinterpret_cast<size_t>(at) % sizeof(T) == 0)
        for (const Range& range : readable)
            if (at >= range.begin && at + sizeof(T) <= range.end) return true;
    ++forbidden_reads;
    return false;
}

// The compiler does not see through it, so it cannot merge what stands on either side.
inline double rounded(double value) {
    asm("" : "+m"(value));
    return value;
}

template <typename Body>
struct Run {
    static Body* body;
    static void enter() {
        (*body)();
        current->done = true;
        swapcontext(&current->context, &scheduler);
    }
};
template <typename Body>
Body* Run<Body>::body;

// False where a thread ended while another waited at a barrier, or an access was misaligned.
template <typename Body>
bool run_block(Body body, bool descending) {
    static std::vector<Fiber> fibers;
    const unsigned count = blockDim.x * blockDim.y * blockDim.z;
    if (fibers.size() != count) fibers = std::vector<Fiber>(count);
    Run<Body>::body = &body;
    for (Fiber& fiber : fibers) {
        fiber.stack.resize(64 * 1024);
        fiber.done = false;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, &Run<Body>::enter, 0);
    }
    memset(dynamic, 0xC5, sizeof dynamic);
    memset(__start_cuda_shared, 0xC5, __stop_cuda_shared - __start_cuda_shared);
    for (;;) {
        unsigned done = 0;
        for (unsigned k = 0; k < count; ++k) {
            const unsigned t = descending ? count - 1 - k : k;
            threadIdx = {t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y};
            current = &fibers[t];
            swapcontext(&scheduler, &current->context);
            if (misaligned) return false;
            done += fibers[t].done;
        }
        if (done == count) return true;
        if (done) return false;
    }
}

template <typename... Parameters, size_t... I>
std::tuple<Parameters...> values(void** arguments, std::index_sequence<I...>) {
    return {*static_cast<Parameters*>(arguments[I])...};
}

// As cuLaunchKernel takes them: `arguments` points to the value of each parameter.
template <typename... Parameters>
int launch(void (*kernel)(Parameters...), const Dim3& grid, const Dim3& block, bool descending, void** arguments) {
    gridDim = grid, blockDim = block, misaligned = false;
    const auto parameters = values<Parameters...>(arguments, std::index_sequence_for<Parameters...>());
    const auto body = [&] { std::apply(kernel, parameters); };
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x; ++x) {
                blockIdx = {x, y, z};
                if (!run_block(body, descending)) return misaligned ? 2 : 1;
            }
    return 0;
}

}  // namespace cuda_shim

// What -fsanitize=alignment calls before the access, which the CPU might refuse too: the thread does not go on.
extern "C" inline __attribute__((used)) void __ubsan_handle_type_mismatch_v1(void*, void*) {
    cuda_shim::misaligned = true;
    setcontext(&cuda_shim::scheduler);
}

inline void __syncthreads() {
    swapcontext(&cuda_shim::current->context, &cuda_shim::scheduler);
}

template <typename T>
T __ldg(const T* from) {
    T value = 0;
    if (cuda_shim::may_read(from)) memcpy(&value, from, sizeof value);
    return value;
}

// Fibers take turns at barriers only: nothing comes between.
template <typename T>
T atomicAdd(T* to, T value) {
    return std::exchange(*to, *to + value);
}
inline int atomicMin(int* to, int value) { return std::exchange(*to, value < *to ? value : *to); }
inline int atomicMax(int* to, int value) { return std::exchange(*to, value > *to ? value : *to); }

inline double __dadd_rn(double a, double b) { return cuda_shim::rounded(a) + b; }
inline double __dmul_rn(double a, double b) { return cuda_shim::rounded(a * b); }

inline float __uint_as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
    const uint64_t both = static_cast<uint64_t>(y) << 32 | x;
    uint32_t result = 0;
    for (int k = 0; k < 4; ++k) result |= static_cast<uint32_t>(both >> ((selector >> k * 4 & 7) * 8) & 0xFF) << k * 8;
    return result;
}

inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
    return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}

// The library's entry points, for kernels of the one type given. launch: 0; 1: a barrier was not reached by
// all; 2: an access was misaligned.
#define CUDA_SHIM_LIBRARY(...)                                                                                       \
    extern "C" __global__ int cuda_shim_launch(void* kernel, const Dim3* grid, const Dim3* block, int descending,    \
                                               void** arguments) {                                                   \
        return cuda_shim::launch(reinterpret_cast<__VA_ARGS__*>(kernel), *grid, *block, descending, arguments);      \
    }                                                                                                                \
    extern "C" __global__ void cuda_shim_readable(const char* const* begin, const uint64_t* size, int count) {       \
        cuda_shim::forbidden_reads = 0;                                                                              \
        cuda_shim::readable.clear();                                                                                 \
        for (int k = 0; k < count; ++k) cuda_shim::readable.push_back({begin[k], begin[k] + size[k]});               \
    }                                                                                                                \
    extern "C" __global__ int64_t cuda_shim_forbidden_reads() { return cuda_shim::forbidden_reads; }
