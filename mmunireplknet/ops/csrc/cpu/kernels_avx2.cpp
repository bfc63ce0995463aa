// Kernels for x86-64 processors with avx2, fma.
#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define MMUNI_KERNELS avx2_kernels
#define MMUNI_NAME "avx2"
#define MMUNI_LANES 8
#define MMUNI_MAX_TAPS 5
#define MMUNI_MAX_PIXELS 8
#include "kernels.inc"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
