// What the operators share: the choice of the instruction set and the view of tensors as plain memory.
//
// They stand on the LibTorch stable ABI: no other header of torch, so that one build serves every torch from 2.10 on and
// compiles in seconds. Arguments are checked in Python, by those who call these.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdlib>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "kernels.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace mmuni {

// MMUNI_CPU_CAPABILITY names a lesser instruction set than the machine has, for tests.
inline const Kernels& choose() {
#if defined(__x86_64__)
  const char* wanted = std::getenv("MMUNI_CPU_CAPABILITY");
  const std::string limit = wanted ? wanted : "avx512";
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && limit == "avx512") return avx512_kernels;
  if (avx2 && limit != "portable") return avx2_kernels;
#endif
  return portable_kernels;
}

inline const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

inline int type_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return FLOAT;
    case ScalarType::BFloat16: return BFLOAT16;
    case ScalarType::Half: return FLOAT16;
    default: STD_TORCH_CHECK(false, "mmuni_cpu computes float32, bfloat16 and float16 only");
  }
}

inline Map map_of(const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 4, "mmuni_cpu: a map must have 4 dimensions, not ", t.dim());
  return {static_cast<char*>(t.data_ptr()), type_of(t), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

inline Map optional_map(const std::optional<Tensor>& t) { return t ? map_of(*t) : Map{}; }

inline Size size_of(const Tensor& t) {
  return {t.size(0), t.size(1), static_cast<int>(t.size(2)), static_cast<int>(t.size(3))};
}

// Contiguous single-precision values, of at least `count` elements.
inline float* floats(const Tensor& t, int64_t count) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.is_contiguous() && t.numel() >= count,
                  "mmuni_cpu: expected ", count, " contiguous float32 values");
  return static_cast<float*>(t.data_ptr());
}

template <typename Function>
inline void run(int64_t tasks, const Function& function) {
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) { function(begin, end); });
}

inline int64_t blocks_of(const Size& size) { return (size.c + kernels().lanes - 1) / kernels().lanes; }

}  // namespace mmuni
