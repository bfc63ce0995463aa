// Operators of what lies between the matrix products of a block.

#include "operators.h"

namespace mmuni {
namespace {

// Enough pixels to make a task worth its start, few enough for single-precision sums.
constexpr int64_t PIXELS_A_CHUNK = 256;

char* bytes(const std::optional<Tensor>& t) { return t ? static_cast<char*>(t->data_ptr()) : nullptr; }
const float* coefficients(const std::optional<Tensor>& t, int64_t count) { return t ? floats(*t, count) : nullptr; }

// x: (N, ..., C), contiguous.
Pointwise job_of(const Tensor& x, bool gelu) {
  STD_TORCH_CHECK(x.is_contiguous() && x.numel() > 0, "mmuni_cpu: expected contiguous memory (N, ..., C)");
  Pointwise job = {};
  job.n = x.size(0), job.channels = x.size(x.dim() - 1), job.pixels = x.numel() / (job.n * job.channels);
  job.chunks = (job.pixels + PIXELS_A_CHUNK - 1) / PIXELS_A_CHUNK;
  job.type = type_of(x), job.gelu = gelu;
  job.x = static_cast<const char*>(x.data_ptr());
  return job;
}

void apply(const Tensor& x, std::optional<Tensor> scale, std::optional<Tensor> shift, std::optional<Tensor> residual,
           const Tensor& out, bool gelu) {
  Pointwise job = job_of(x, gelu);
  job.scale = coefficients(scale, job.n * job.channels), job.shift = coefficients(shift, job.n * job.channels);
  job.residual = bytes(residual), job.out = bytes(out);
  run(job.n * job.chunks, [&](int64_t begin, int64_t end) { kernels().apply(job, begin, end); });
}

void grad(const Tensor& grad, const Tensor& x, std::optional<Tensor> scale, std::optional<Tensor> shift,
          std::optional<Tensor> slope, const Tensor& out, bool gelu) {
  Pointwise job = job_of(x, gelu);
  const int64_t count = job.n * job.channels;
  job.scale = coefficients(scale, count), job.shift = coefficients(shift, count);
  job.slope = coefficients(slope, count);
  job.grad = bytes(grad), job.out = bytes(out);
  run(job.n * job.chunks, [&](int64_t begin, int64_t end) { kernels().grad(job, begin, end); });
}

void sums(const Tensor& x, std::optional<Tensor> grad, std::optional<Tensor> pivot, std::optional<Tensor> out,
          const Tensor& result, bool gelu) {
  Pointwise job = job_of(x, gelu);
  const int64_t row = 2 * job.channels;
  job.grad = bytes(grad), job.out = bytes(out), job.pivot = coefficients(pivot, job.channels);
  std::vector<float> partial(job.n * job.chunks * row);
  job.sums = partial.data();
  run(job.n * job.chunks, [&](int64_t begin, int64_t end) { kernels().sums(job, begin, end); });
  float* const total = floats(result, job.n * row);
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
