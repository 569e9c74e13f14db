// Keeps decoders' libraries from printing to stderr what they find odd about a file: a line an image an epoch.
//
// Whether a JPEG's codes are damaged, only decoding them tells, and libjpeg then prints a line, decodes on and gives
// what Pillow gives, who keeps libjpeg quiet. In the libraries that come with DALI nothing can be set, but each has a
// place of its own (in its global offset table) that says where the variable `stderr` lies. That one is pointed at a
// variable here, which names a stream that leads nowhere. Nobody else's `stderr` is touched; errors still are errors.
#include <elf.h>
#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <mutex>

namespace {

// Where the libraries lie: in these folders, under names that begin so.
constexpr const char *kQuiet[] = {"/nvimgcodec/extensions/libjpeg_turbo_ext.so", "/nvimgcodec/extensions/libopencv_ext.so",
                                  "/nvimgcodec/extensions/libtiff_ext.so", "/pillow.libs/libtiff-"};

FILE *nowhere = nullptr;

void point(const dl_phdr_info *library) {
    const ElfW(Dyn) *entry = nullptr;
    uintptr_t locked = 0, locked_end = 0;  // read-only since it was loaded
    const uintptr_t base = library->dlpi_addr;
    for (int i = 0; i < library->dlpi_phnum; ++i) {
        const auto &header = library->dlpi_phdr[i];
        if (header.p_type == PT_DYNAMIC) entry = reinterpret_cast<const ElfW(Dyn) *>(base + header.p_vaddr);
        if (header.p_type == PT_GNU_RELRO) {
            locked = base + header.p_vaddr;
            locked_end = locked + header.p_memsz;
        }
    }
    const ElfW(Rela) *relocation = nullptr;
    const ElfW(Sym) *symbols = nullptr;
    const char *names = nullptr;
    size_t bytes = 0;
    for (; entry && entry->d_tag != DT_NULL; ++entry) {
        const uintptr_t value = entry->d_un.d_ptr, at = value < base ? base + value : value;
        if (entry->d_tag == DT_RELA) relocation = reinterpret_cast<const ElfW(Rela) *>(at);
        if (entry->d_tag == DT_RELASZ) bytes = entry->d_un.d_val;
        if (entry->d_tag == DT_SYMTAB) symbols = reinterpret_cast<const ElfW(Sym) *>(at);
        if (entry->d_tag == DT_STRTAB) names = reinterpret_cast<const char *>(at);
    }
    if (!relocation || !symbols || !names) return;
    for (const auto *const end = relocation + bytes / sizeof *relocation; relocation < end; ++relocation) {
        const auto symbol = relocation->r_info >> 32;
        if (!symbol || std::strcmp(names + symbols[symbol].st_name, "stderr")) continue;
        auto *place = reinterpret_cast<FILE ***>(base + relocation->r_offset);
        if (__atomic_load_n(place, __ATOMIC_RELAXED) != &stderr) continue;  // done, or not what it looks like
        const uintptr_t page = sysconf(_SC_PAGESIZE), at = reinterpret_cast<uintptr_t>(place), first = at / page * page;
        const bool open = at >= locked && at < locked_end;
        if (open && mprotect(reinterpret_cast<void *>(first), page, PROT_READ | PROT_WRITE)) continue;
        __atomic_store_n(place, &nowhere, __ATOMIC_RELAXED);
        // Only a page that is locked as a whole was read-only.
        if (open && first + page <= locked_end / page * page) mprotect(reinterpret_cast<void *>(first), page, PROT_READ);
    }
}

int look(dl_phdr_info *library, size_t, void *) {
    for (const char *name : kQuiet) {
        if (library->dlpi_name && std::strstr(library->dlpi_name, name)) point(library);
    }
    return 0;
}

}  // namespace

// Keeps those of the libraries quiet that are loaded by now.
extern "C" __attribute__((visibility("default"))) void dali_diffusemix_quiet() {
    static std::mutex one;
    const std::lock_guard<std::mutex> alone(one);
    if (!nowhere) nowhere = std::fopen("/dev/null", "we");
    if (nowhere && sizeof(void *) == 8) dl_iterate_phdr(look, nullptr);
}
