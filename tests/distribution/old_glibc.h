// Put before every source (-include) by wheels.py, so that a wheel that was built with a new glibc runs with an old one: two
// of its functions have newer names than others. As on a manylinux image, whose glibc is old itself.
#pragma once
#include <cmath>
#include <sys/stat.h>

#if defined(__x86_64__)
#define OLDEST "GLIBC_2.2.5"
constexpr int kStatVersion = 1;
#elif defined(__aarch64__)
#define OLDEST "GLIBC_2.17"
constexpr int kStatVersion = 0;
#endif

__asm__(".symver exp,exp@" OLDEST);
extern "C" int __fxstat(int, int, struct stat *) noexcept;
__asm__(".symver __fxstat,__fxstat@" OLDEST);
#define fstat(file, found) __fxstat(kStatVersion, file, found)
