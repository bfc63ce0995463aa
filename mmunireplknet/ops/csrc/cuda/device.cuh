// What only a GPU has: tensor cores, shared memory, asynchronous copies, and the launch of a kernel.
//
// The kernels use nothing of CUDA but this and the built-in variables. The tests put another file with the same guard
// in its place and run the kernels on the CPU.
#ifndef MMUNI_CUDA_DEVICE_CUH
#define MMUNI_CUDA_DEVICE_CUH

#include <cuda_runtime.h>

#include <cstdint>

#include "job.h"

namespace mmuni {

// Storage of the 16-bit types.
struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

// ---- Memory. Addresses in shared memory are bytes from its beginning.

extern __shared__ __align__(128) unsigned char shared_memory[];

template <typename T>
__device__ __forceinline__ T load_shared(uint32_t address) {
  return *reinterpret_cast<const T*>(shared_memory + address);
}

template <typename T>
__device__ __forceinline__ void store_shared(uint32_t address, T value) {
  *reinterpret_cast<T*>(shared_memory + address) = value;
}

__device__ __forceinline__ uint32_t shared_pointer(uint32_t address) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory)) + address;
}

// Read-only for the whole kernel.
template <typename T>
__device__ __forceinline__ T load_global(const T* from) {
  return __ldg(from);
}
template <>
__device__ __forceinline__ Half load_global(const Half* from) {
  return {__ldg(&from->bits)};
}
template <>
__device__ __forceinline__ BFloat load_global(const BFloat* from) {
  return {__ldg(&from->bits)};
}

template <typename T>
__device__ __forceinline__ void store_global(T* to, T value) {
  *to = value;
}

// Starts to copy BYTES from global to shared memory, or zeros where `inside` is false; `from` must be an address either
// way. What is copied may be read after copy_wait and a barrier.
template <int BYTES>
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, bool inside) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "what cp.async can copy");
  const int bytes = inside ? BYTES : 0;
  if constexpr (BYTES == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_pointer(to)), "l"(from), "r"(bytes)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_pointer(to)), "l"(from), "n"(BYTES),
                 "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most PENDING of the groups committed last are under way.
template <int PENDING>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// ---- Warps.

// Four 8x8 matrices of 16 bits, the rows of matrix i at the addresses of lanes 8 i to 8 i + 7.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_pointer(address))
               : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_pointer(address))
               : "memory");
}

// d += a b with a of 16x16 (16x8 for single precision), b of 16x8 (8x8).
#define MMUNI_MMA(NAME)                                                                                            \
  asm volatile("mma.sync.aligned." NAME " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"          \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                    \
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1))

template <typename T>
__device__ __forceinline__ void multiply(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                         uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void multiply<Half>(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                               uint32_t b0, uint32_t b1) {
  MMUNI_MMA("m16n8k16.row.col.f32.f16.f16.f32");
}
template <>
__device__ __forceinline__ void multiply<BFloat>(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                                 uint32_t b0, uint32_t b1) {
  MMUNI_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
}
template <>
__device__ __forceinline__ void multiply<float>(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                                uint32_t b0, uint32_t b1) {
  MMUNI_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
}
#undef MMUNI_MMA

// d += a b with a of 16x8, b of 8x8, in 16 bits.
#define MMUNI_MMA(NAME)                                                                                            \
  asm volatile("mma.sync.aligned." NAME " {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"                      \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                    \
               : "r"(a0), "r"(a1), "r"(b0))

template <typename T>
__device__ __forceinline__ void multiply_half(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b0);
template <>
__device__ __forceinline__ void multiply_half<Half>(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
  MMUNI_MMA("m16n8k8.row.col.f32.f16.f16.f32");
}
template <>
__device__ __forceinline__ void multiply_half<BFloat>(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
  MMUNI_MMA("m16n8k8.row.col.f32.bf16.bf16.f32");
}
#undef MMUNI_MMA

__device__ __forceinline__ float from_lane(float value, int distance) {
  return __shfl_xor_sync(0xffffffffu, value, distance);
}

// ---- Numbers.

// The nearest number with 10 bits after the point, ties away from zero.
__device__ __forceinline__ uint32_t round_tf32(float value) {
  uint32_t r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(value));
  return r;
}

// As the sum of two TF32 numbers, the first of them cut off; tensor cores do not see the last bits of the second.
__device__ __forceinline__ void split(float value, uint32_t& high, uint32_t& low) {
  high = __float_as_uint(value) & 0xffffe000u;
  low = __float_as_uint(value - __uint_as_float(high));
}

__device__ __forceinline__ uint32_t bits_of(float value) { return __float_as_uint(value); }
__device__ __forceinline__ float float_of(uint32_t bits) { return __uint_as_float(bits); }

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(BFloat value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }
__device__ __forceinline__ float to_float(Half value) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(value.bits));
  return r;
}

// Two values as T one after the other, the first in the lower half.
template <typename T>
__device__ __forceinline__ uint32_t pack(float first, float second);
template <>
__device__ __forceinline__ uint32_t pack<Half>(float first, float second) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(second), "f"(first));
  return r;
}
template <>
__device__ __forceinline__ uint32_t pack<BFloat>(float first, float second) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(second), "f"(first));
  return r;
}

// ---- The host's side.

using Stream = cudaStream_t;

inline const char* what(cudaError_t error) {
  if (error == cudaSuccess) return "";
  cudaGetLastError();  // or the next launch would report it once more, as its own
  return cudaGetErrorString(error);
}

// Makes `device` the one that launches go to. This library has a copy of CUDA's runtime to itself. It works in the
// context that is current to the thread, as torch's copy does and has set it; a thread without one is sent to device 0.
inline const char* use_device(int device) {
  int current = -1;
  const cudaError_t error = cudaGetDevice(&current);
  return what(error == cudaSuccess && current != device ? cudaSetDevice(device) : error);
}

// Multiprocessors of the current device, 0 where there is none.
inline int multiprocessors() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  return cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess ? count : 0;
}

// Returns what went wrong, or an empty string.
template <typename Job>
const char* launch(void (*kernel)(Job), const Job& job, int64_t blocks, int threads, int shared, Stream stream) {
  if (shared > 48 * 1024) {
    // Always the same: other threads launch the kernel with other sizes, maybe between this line and the next.
    const char* error = what(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, MOST_SHARED));
    if (*error) return error;
  }
  kernel<<<static_cast<unsigned>(blocks), threads, shared, stream>>>(job);
  return what(cudaGetLastError());
}

}  // namespace mmuni

#endif  // MMUNI_CUDA_DEVICE_CUH
