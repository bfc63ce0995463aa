// What the operators share: the choice of the instruction set and the view of tensors as plain memory.
//
// They stand on the LibTorch stable ABI: no other header of torch, so that one build serves every torch from 2.10 on and
// compiles in seconds. What would read or write beside the memory of a tensor is refused here; everything else is
// checked in Python, by those who call these.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <exception>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "kernels.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace mmuni {

// MMUNI_CPU_CAPABILITY names a lesser instruction set than the machine has, for tests.
inline const Kernels& best_kernels() {
  const char* wanted = std::getenv("MMUNI_CPU_CAPABILITY");
  const std::string limit = wanted && *wanted ? wanted : "avx512";
  STD_TORCH_CHECK(limit == "avx512" || limit == "avx2" || limit == "portable", "MMUNI_CPU_CAPABILITY=", limit,
                  " is unknown: it must be avx512, avx2 or portable.");
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && limit == "avx512") return avx512_kernels;
  if (avx2 && limit != "portable") return avx2_kernels;
#endif
  return portable_kernels;
}

inline const Kernels& kernels() {
  static const Kernels& chosen = best_kernels();
  return chosen;
}

inline int type_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return FLOAT;
    case ScalarType::BFloat16: return BFLOAT16;
    case ScalarType::Half: return FLOAT16;
    default:
      STD_TORCH_CHECK(false, "mmuni_cpu: ", name, " must be float32, bfloat16 or float16, not ", t.scalar_type());
  }
}

inline Map map_of(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 4 && t.is_cpu(), "mmuni_cpu: ", name, " must be a map (N, C, H, W) on the CPU, not of ",
                  t.dim(), " dimensions");
  return {static_cast<char*>(t.data_ptr()), type_of(t, name), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

// `t` has the size of the map `x`.
inline Map map_like(const Tensor& t, const Tensor& x, const char* name) {
  const Map map = map_of(t, name);
  for (int d = 0; d < 4; ++d)
    STD_TORCH_CHECK(t.size(d) == x.size(d), "mmuni_cpu: ", name, " has ", t.size(d), " elements in dimension ", d,
                    ", but x has ", x.size(d));
  return map;
}

// Sizes and distances are counted in int, and so are sums of a few of them.
constexpr int64_t MOST = 1 << 28;

inline Size extent_of(const Tensor& x) {
  STD_TORCH_CHECK(x.size(2) < MOST && x.size(3) < MOST, "mmuni_cpu: a map of ", x.size(2), "x", x.size(3),
                  " is too large");
  return {x.size(0), x.size(1), static_cast<int>(x.size(2)), static_cast<int>(x.size(3))};
}

struct Taps {
  int kernel, dilation;
};

// Taps further apart than the map is large meet nothing but the zeros around it, and they do so at that distance.
inline Taps taps_of(const Size& size, int64_t kernel, int64_t dilation) {
  STD_TORCH_CHECK(kernel > 0 && kernel % 2 && kernel < 1 << 12, "mmuni_cpu: kernel ", kernel,
                  " must be odd, and between 1 and 4095");
  STD_TORCH_CHECK(dilation > 0, "mmuni_cpu: dilation ", dilation, " must be at least 1");
  const int64_t distance = std::min<int64_t>(dilation, std::max({size.h, size.w, 1}));
  STD_TORCH_CHECK(distance * kernel < MOST, "mmuni_cpu: kernel ", kernel, " with dilation ", dilation, " is too large");
  return {static_cast<int>(kernel), static_cast<int>(distance)};
}

// Single-precision values, `count` of them one after the other.
inline float* values_of(const Tensor& t, int64_t count, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.is_contiguous() && t.numel() == count && t.is_cpu(),
                  "mmuni_cpu: ", name, " must be ", count, " contiguous float32 values on the CPU, not ", t.numel(),
                  t.is_contiguous() ? " contiguous " : " scattered ", t.scalar_type(), " values");
  return static_cast<float*>(t.data_ptr());
}

// Runs function(begin, end) for parts of [0, tasks). An exception is thrown again from here: of one that passes through
// its own parallel_for, torch 2.10 keeps no message.
template <typename Function>
inline void run(int64_t tasks, const Function& function) {
  std::exception_ptr error;
  std::atomic<bool> failed{false};
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    try {
      function(begin, end);
    } catch (...) {
      if (!failed.exchange(true)) error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

inline int64_t blocks_of(const Size& size) { return (size.c + kernels().lanes - 1) / kernels().lanes; }

}  // namespace mmuni
