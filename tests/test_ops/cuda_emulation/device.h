// Takes the place of csrc/cuda/device.cuh, whose guard it has: the same functions, with what the PTX ISA says of them,
// for threads that are coroutines of one thread of the CPU. They go on in random order, and it is an error
// - to read shared memory that was never written, or that an asynchronous copy may still write;
// - to read or write it where another thread wrote or read it, with no barrier of the two in between;
// - to touch global memory outside the tensors, off its alignment, to write it twice, or to read what was written;
// - to wait for threads that are elsewhere.
#ifndef MMUNI_CUDA_DEVICE_CUH
#define MMUNI_CUDA_DEVICE_CUH

#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct Dim3 {
  unsigned x = 1;
};
extern Dim3 threadIdx, blockIdx, blockDim, gridDim;

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};

namespace emulation {

void fail(const char* format, ...);

void* shared_read(uint32_t address, size_t bytes);
void* shared_write(uint32_t address, size_t bytes);
void global_read(const void* from, size_t bytes);
void global_write(const void* to, size_t bytes);
void copy_async(uint32_t to, const void* from, size_t bytes, bool inside);
void copy_commit();
void copy_wait(int pending);

// What the 32 lanes of a warp do together: `operand` of every lane, as soon as all have come, to `together`.
void collective(const char* name, void* operand, const std::function<void(void**)>& together);
void barrier();
void load_matrices(uint32_t (&r)[4], uint32_t address, bool transposed);

float half_to_float(uint16_t bits);
uint16_t float_to_half(float value);
uint16_t float_to_bfloat(float value);

// D += A B, by the row and column of each element of each lane as in the tables "Matrix Fragments for mma.m16n8k16" and
// "mma.m16n8k8" of the PTX ISA, 9.7.14.5.
struct Product {
  float* d;
  float a[8], b[4];
};
void multiply_16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], float (*read)(uint16_t));
void multiply_8(float (&d)[4], const uint32_t (&a)[2], uint32_t b, float (*read)(uint16_t));
void multiply_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

const char* run(const std::function<void()>& thread, int64_t blocks, int threads, int shared);
extern int processors;

}  // namespace emulation

inline void __syncthreads() { emulation::barrier(); }
void __syncwarp();

namespace mmuni {

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

template <typename T>
T load_shared(uint32_t address) {
  T value;
  std::memcpy(&value, emulation::shared_read(address, sizeof(T)), sizeof(T));
  return value;
}
template <typename T>
void store_shared(uint32_t address, T value) {
  std::memcpy(emulation::shared_write(address, sizeof(T)), &value, sizeof(T));
}
template <typename T>
T load_global(const T* from) {
  emulation::global_read(from, sizeof(T));
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}
template <typename T>
void store_global(T* to, T value) {
  emulation::global_write(to, sizeof(T));
  std::memcpy(to, &value, sizeof(T));
}

template <int BYTES>
void copy_async(uint32_t to, const void* from, bool inside) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "what cp.async can copy");
  emulation::copy_async(to, from, BYTES, inside);
}
inline void copy_commit() { emulation::copy_commit(); }
template <int PENDING>
void copy_wait() {
  emulation::copy_wait(PENDING);
}

inline void load_matrices(uint32_t (&r)[4], uint32_t address) { emulation::load_matrices(r, address, false); }
inline void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) { emulation::load_matrices(r, address, true); }

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float to_float(float value) { return value; }
inline float to_float(BFloat value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }
inline float to_float(Half value) { return emulation::half_to_float(value.bits); }

template <typename T>
void multiply(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, float>)
    emulation::multiply_tf32(d, {a0, a1, a2, a3}, {b0, b1});
  else
    emulation::multiply_16(d, {a0, a1, a2, a3}, {b0, b1}, [](uint16_t bits) { return to_float(T{bits}); });
}

template <typename T>
void multiply_half(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
  emulation::multiply_8(d, {a0, a1}, b0, [](uint16_t bits) { return to_float(T{bits}); });
}

float from_lane(float value, int distance);

inline uint32_t round_tf32(float value) {
  const uint32_t bits = bits_of(value);
  return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & ~0x1fffu;
}

inline void split(float value, uint32_t& high, uint32_t& low) {
  high = bits_of(value) & 0xffffe000u;
  low = bits_of(value - float_of(high));
}

template <typename T>
uint32_t pack(float first, float second) {
  const auto narrow = std::is_same_v<T, Half> ? emulation::float_to_half : emulation::float_to_bfloat;
  return narrow(first) | static_cast<uint32_t>(narrow(second)) << 16;
}

using Stream = void*;

inline int multiprocessors() { return emulation::processors; }

template <typename Job>
const char* launch(void (*kernel)(Job), const Job& job, int64_t blocks, int threads, int shared, Stream) {
  return emulation::run([&] { kernel(job); }, blocks, threads, shared);
}

}  // namespace mmuni

#endif  // MMUNI_CUDA_DEVICE_CUH
