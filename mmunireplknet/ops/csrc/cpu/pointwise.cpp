// Operators of what lies between the matrix products of a block.

#include "operators.h"

namespace mmuni {
namespace {

// Enough pixels to make a task worth its start, few enough for single-precision sums.
constexpr int64_t PIXELS_A_CHUNK = 256;

// `t`, which lies in memory as `x` does.
char* bytes_like(const Tensor& t, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(t.is_contiguous() && t.numel() == x.numel() && t.scalar_type() == x.scalar_type() && t.is_cpu(),
                  "mmuni_cpu: ", name, " must be ", x.numel(), " contiguous ", x.scalar_type(),
                  " values on the CPU, as x, not ", t.numel(), t.is_contiguous() ? " contiguous " : " scattered ",
                  t.scalar_type(), " values");
  return static_cast<char*>(t.data_ptr());
}
char* bytes_like(const std::optional<Tensor>& t, const Tensor& x, const char* name) {
  return t ? bytes_like(*t, x, name) : nullptr;
}
const float* optional_values(const std::optional<Tensor>& t, int64_t count, const char* name) {
  return t ? values_of(*t, count, name) : nullptr;
}

// x: (N, ..., C), contiguous.
Pointwise job_of(const Tensor& x, bool gelu) {
  STD_TORCH_CHECK(x.is_contiguous() && x.numel() > 0 && x.dim() >= 2 && x.is_cpu(),
                  "mmuni_cpu: x must be contiguous, (N, ..., C) and on the CPU, not ", x.numel(), " values of ", x.dim(),
                  " dimensions");
  Pointwise job = {};
  job.n = x.size(0), job.channels = x.size(x.dim() - 1), job.pixels = x.numel() / (job.n * job.channels);
  job.chunks = (job.pixels + PIXELS_A_CHUNK - 1) / PIXELS_A_CHUNK;
  job.type = type_of(x, "x"), job.gelu = gelu;
  job.x = static_cast<const char*>(x.data_ptr());
  return job;
}

void apply(const Tensor& x, std::optional<Tensor> scale, std::optional<Tensor> shift, std::optional<Tensor> residual,
           const Tensor& out, bool gelu) {
  Pointwise job = job_of(x, gelu);
  const int64_t count = job.n * job.channels;
  job.scale = optional_values(scale, count, "scale"), job.shift = optional_values(shift, count, "shift");
  job.residual = bytes_like(residual, x, "residual"), job.out = bytes_like(out, x, "out");
  run(job.n * job.chunks, [&](int64_t begin, int64_t end) { kernels().apply(job, begin, end); });
}

void grad(const Tensor& grad, const Tensor& x, std::optional<Tensor> scale, std::optional<Tensor> shift,
          std::optional<Tensor> slope, const Tensor& out, bool gelu) {
  Pointwise job = job_of(x, gelu);
  const int64_t count = job.n * job.channels;
  job.scale = optional_values(scale, count, "scale"), job.shift = optional_values(shift, count, "shift");
  job.slope = optional_values(slope, count, "slope");
  job.grad = bytes_like(grad, x, "grad"), job.out = bytes_like(out, x, "out");
  run(job.n * job.chunks, [&](int64_t begin, int64_t end) { kernels().grad(job, begin, end); });
}

void sums(const Tensor& x, std::optional<Tensor> grad, std::optional<Tensor> pivot, std::optional<Tensor> out,
          const Tensor& result, bool gelu) {
  Pointwise job = job_of(x, gelu);
  const int64_t row = 2 * job.channels;
  float* const total = values_of(result, job.n * row, "result");
  job.grad = bytes_like(grad, x, "grad"), job.out = bytes_like(out, x, "out");
  job.pivot = optional_values(pivot, job.channels, "pivot");
  std::vector<float> partial(job.n * job.chunks * row);
  job.sums = partial.data();
  run(job.n * job.chunks, [&](int64_t begin, int64_t end) { kernels().sums(job, begin, end); });
  for (int64_t image = 0; image < job.n; ++image) {
    const float* const first = job.sums + image * job.chunks * row;
    for (int64_t c = 0; c < row; ++c) {
      double sum = 0;
      for (int64_t chunk = 0; chunk < job.chunks; ++chunk) sum += first[chunk * row + c];
      total[image * row + c] = static_cast<float>(sum);
    }
  }
}

}  // namespace
}  // namespace mmuni

STABLE_TORCH_LIBRARY_FRAGMENT(mmuni_cpu, m) {
  m.def("apply(Tensor x, Tensor? scale, Tensor? shift, Tensor? residual, Tensor(a!) out, bool gelu) -> ()");
  m.def(
      "grad(Tensor grad, Tensor x, Tensor? scale, Tensor? shift, Tensor? slope, Tensor(a!) out, bool gelu) -> ()");
  m.def("sums(Tensor x, Tensor? grad, Tensor? pivot, Tensor(a!)? out, Tensor(b!) result, bool gelu) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mmuni_cpu, CPU, m) {
  m.impl("apply", TORCH_BOX(&mmuni::apply));
  m.impl("grad", TORCH_BOX(&mmuni::grad));
  m.impl("sums", TORCH_BOX(&mmuni::sums));
}
