// Kernels for x86-64 processors with avx512f, avx512bw, avx512dq, avx512vl, avx2, fma.
#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif

#define MMUNI_KERNELS avx512_kernels
#define MMUNI_NAME "avx512"
#define MMUNI_LANES 16
#define MMUNI_MAX_TAPS 13
#define MMUNI_MAX_PIXELS 16
#include "kernels.inc"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
