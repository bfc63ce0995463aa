// Kernels for every processor: four lanes, which are NEON on Arm and SSE on x86-64.
#define MMUNI_KERNELS portable_kernels
#define MMUNI_LANES 4
#if defined(__aarch64__)
#define MMUNI_NAME "neon"
#define MMUNI_MAX_TAPS 13
#define MMUNI_MAX_PIXELS 16
#else
#define MMUNI_NAME "portable"
#define MMUNI_MAX_TAPS 5
#define MMUNI_MAX_PIXELS 8
#endif
#include "kernels.inc"
