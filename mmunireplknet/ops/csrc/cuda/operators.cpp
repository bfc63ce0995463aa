// Operators of the depthwise convolution on GPUs.
//
// They stand on the LibTorch stable ABI, as those of csrc/cpu do. What would read or write beside the memory of a
// tensor is refused here; everything else is checked in Python, by those who call these.
#define USE_CUDA  // the shim's functions for streams; none of CUDA's own headers comes with them

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "launch.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

namespace mmuni {
namespace {

int type_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return FLOAT;
    case ScalarType::BFloat16: return BFLOAT16;
    case ScalarType::Half: return FLOAT16;
    default:
      STD_TORCH_CHECK(false, "mmuni_cuda: ", name, " must be float32, bfloat16 or float16, not ", t.scalar_type());
  }
}

Map map_of(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 4 && t.is_cuda(), "mmuni_cuda: ", name, " must be a map (N, C, H, W) on a GPU, not of ",
                  t.dim(), " dimensions");
  // Where there is one column alone, its distance to the next may be anything.
  return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2), t.size(3) == 1 ? 1 : t.stride(3)};
}

// `t` has the size, dtype and device of the map `x`.
Map map_like(const Tensor& t, const Tensor& x, const char* name) {
  const Map map = map_of(t, name);
  for (int d = 0; d < 4; ++d)
    STD_TORCH_CHECK(t.size(d) == x.size(d), "mmuni_cuda: ", name, " has ", t.size(d), " elements in dimension ", d,
                    ", but x has ", x.size(d));
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type() && t.get_device_index() == x.get_device_index(),
                  "mmuni_cuda: ", name, " must have the dtype and the device of x");
  return map;
}

// Rows, columns, channels, and tiles of all images are counted in int.
constexpr int64_t MOST = 1 << 24;

Shape shape_of(const Tensor& x, int64_t kernel, int64_t dilation) {
  STD_TORCH_CHECK(x.numel() > 0 && x.size(0) < MOST && x.size(1) < MOST && x.size(2) < MOST && x.size(3) < MOST &&
                      x.size(0) * ((x.size(2) + 15) / 16) * ((x.size(3) + 31) / 32) < 1 << 30,
                  "mmuni_cuda: a map of ", x.size(0), "x", x.size(1), "x", x.size(2), "x", x.size(3),
                  " is empty or too large");
  STD_TORCH_CHECK(kernel > 0 && kernel % 2 && dilation > 0 && kernel <= MAX_EXTENT && dilation <= MAX_EXTENT &&
                      (kernel - 1) * dilation < MAX_EXTENT,
                  "mmuni_cuda: kernel ", kernel, " with dilation ", dilation, " must be odd, and reach over at most ",
                  MAX_EXTENT, " pixels");
  return {static_cast<int>(x.size(0)), static_cast<int>(x.size(1)), static_cast<int>(x.size(2)),
          static_cast<int>(x.size(3)), static_cast<int>(kernel), static_cast<int>(dilation)};
}

const void* numbers_of(const Tensor& t, const Tensor& x, int64_t count, const char* name) {
  const bool is_there = t.is_cuda() && t.get_device_index() == x.get_device_index();
  STD_TORCH_CHECK(is_there && t.is_contiguous() && t.numel() == count,
                  "mmuni_cuda: ", name, " must be ", count, " contiguous values on the device of x, not ", t.numel());
  return t.data_ptr();
}

float* floats_of(const Tensor& t, const Tensor& x, int64_t count, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, "mmuni_cuda: ", name, " must be float32");
  return static_cast<float*>(const_cast<void*>(numbers_of(t, x, count, name)));
}

// Room on the device of x, in the care of torch's allocator.
Tensor allocate(const Tensor& x, int64_t count) {
  return torch::stable::new_empty(x, {count}, ScalarType::Float);
}

void check(const char* error) { STD_TORCH_CHECK(!*error, "mmuni_cuda: the kernel could not be started: ", error); }

// The stream that is current on the device of x, for what is launched there from here on.
void* begin(const Tensor& x) {
  check(set_device(x.get_device_index()));
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return stream;
}

void add(const Tensor& partial, float* out, int64_t size, int64_t between, int64_t apart, void* stream) {
  const float* from = static_cast<const float*>(partial.data_ptr());
  check(add_up({from, out, size, partial.numel() / size, between, apart}, stream));
}

void conv_forward(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, const Tensor& out,
                  std::optional<Tensor> sums, int64_t kernel, int64_t dilation, bool flip, bool tf32) {
  Forward job = {};
  job.x = map_of(x, "x"), job.out = map_like(out, x, "out");
  job.shape = shape_of(x, kernel, dilation), job.flip = flip;
  const int type = type_of(x, "x");
  const int64_t c = x.size(1), planes = x.size(0) * c;
  job.weight = numbers_of(weight, x, c * kernel * kernel, "weight"), job.weight_type = type_of(weight, "weight");
  if (bias) job.bias = numbers_of(*bias, x, c, "bias"), job.bias_type = type_of(*bias, "bias");
  float* total = sums ? floats_of(*sums, x, planes, "sums") : nullptr;

  const DeviceGuard guard(x.get_device_index());
  void* stream = begin(x);
  const int64_t parts = subtiles_of(job.shape);
  std::optional<Tensor> partial;
  if (total) {
    partial = allocate(x, planes * parts);
    job.sums = static_cast<float*>(partial->data_ptr());
  }
  check(type == FLOAT     ? forward_single(job, !tf32, stream)
        : type == FLOAT16 ? forward_half(job, stream)
                          : forward_bfloat(job, stream));
  if (total) add(*partial, total, planes, parts, 1, stream);
}

void conv_weight_grad(const Tensor& x, const Tensor& grad, const Tensor& out, int64_t kernel, int64_t dilation,
                      bool tf32) {
  WeightGrad job = {};
  job.x = map_of(x, "x"), job.grad = map_like(grad, x, "grad");
  job.shape = shape_of(x, kernel, dilation);
  const int type = type_of(x, "x");
  const int64_t size = x.size(1) * kernel * kernel;
  float* total = floats_of(out, x, size, "out");

  const DeviceGuard guard(x.get_device_index());
  void* stream = begin(x);
  plan_weight_grad(job, size_of(type));
  const Tensor partial = allocate(x, job.parts * size);
  job.partial = static_cast<float*>(partial.data_ptr());
  check(type == FLOAT     ? weight_grad_single(job, !tf32, stream)
        : type == FLOAT16 ? weight_grad_half(job, stream)
                          : weight_grad_bfloat(job, stream));
  add(partial, total, size, 1, size, stream);
}

}  // namespace
}  // namespace mmuni

STABLE_TORCH_LIBRARY(mmuni_cuda, m) {
  m.def(
      "forward(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) out, Tensor(b!)? sums, int kernel, int dilation, "
      "bool flip, bool tf32) -> ()");
  m.def("weight_grad(Tensor x, Tensor grad, Tensor(a!) out, int kernel, int dilation, bool tf32) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mmuni_cuda, CUDA, m) {
  m.impl("forward", TORCH_BOX(&mmuni::conv_forward));
  m.impl("weight_grad", TORCH_BOX(&mmuni::conv_weight_grad));
}
