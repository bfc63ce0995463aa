// Operators of the depthwise convolution and of the Dilated Reparam Block.

#include "operators.h"

namespace mmuni {

float* allocate(int64_t count) {
  void* memory = nullptr;
  const int64_t bytes = count * static_cast<int64_t>(sizeof(float));
  STD_TORCH_CHECK(posix_memalign(&memory, 64, bytes) == 0, "mmuni_cpu: out of memory, ", bytes,
                  " bytes for one thread to compute in are not to be had");
  return static_cast<float*>(memory);
}

namespace {

void conv_forward(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, const Tensor& out,
                  int64_t kernel, int64_t dilation, bool flip) {
  Forward job = {};
  job.x = map_of(x, "x"), job.out = map_like(out, x, "out");
  job.size = extent_of(x);
  const Taps taps = taps_of(job.size, kernel, dilation);
  job.kernel = taps.kernel, job.dilation = taps.dilation, job.flip = flip;
  job.weight = values_of(weight, job.size.c * kernel * kernel, "weight");
  job.bias = bias ? values_of(*bias, job.size.c, "bias") : nullptr;
  const int64_t tasks = kernels().plan_forward(job, torch::stable::get_num_threads());
  run(tasks, [&](int64_t begin, int64_t end) { kernels().forward(job, begin, end); });
}

void conv_weight_grad(const Tensor& x, const Tensor& grad, const Tensor& out, int64_t kernel, int64_t dilation) {
  WeightGrad job = {};
  job.x = map_of(x, "x"), job.grad = map_like(grad, x, "grad");
  job.size = extent_of(x);
  const Taps taps = taps_of(job.size, kernel, dilation);
  job.kernel = taps.kernel, job.dilation = taps.dilation;
  job.out = values_of(out, job.size.c * kernel * kernel, "out");
  const int64_t tasks = kernels().plan_weight_grad(job);
  const std::unique_ptr<float, decltype(&std::free)> partial(
      allocate(tasks * kernel * kernel * kernels().lanes), std::free);
  job.partial = partial.get();
  run(tasks, [&](int64_t begin, int64_t end) { kernels().weight_grad(job, begin, end); });
  run(blocks_of(job.size), [&](int64_t begin, int64_t end) { kernels().sum_partial(job, begin, end); });
}

// What both directions of the block share. Weights and their gradients lie one branch after the other in one tensor,
// gamma, mean and var are (branches, C).
Block block_of(const Tensor& x, const std::vector<int64_t>& kernel, const std::vector<int64_t>& dilation,
               const std::vector<double>& eps, const Tensor& weight, const Tensor& gamma, const Tensor& mean,
               const Tensor& var) {
  STD_TORCH_CHECK(kernel.size() <= MAX_BRANCHES, "mmuni_cpu: at most ", MAX_BRANCHES, " branches");
  STD_TORCH_CHECK(dilation.size() == kernel.size() && eps.size() == kernel.size(), "mmuni_cpu: ", kernel.size(),
                  " branches have ", dilation.size(), " dilations and ", eps.size(), " eps");
  Block job = {};
  job.x = map_of(x, "x");
  job.size = extent_of(x);
  job.count = static_cast<int>(kernel.size());
  int64_t count = 0;
  for (size_t b = 0; b < kernel.size(); ++b) {
    const Taps taps = taps_of(job.size, kernel[b], dilation[b]);
    job.branches[b].kernel = taps.kernel, job.branches[b].dilation = taps.dilation;
    count += kernel[b] * kernel[b];
  }
  const int64_t c = job.size.c;
  const float* w = values_of(weight, c * count, "weight");
  for (int b = 0; b < job.count; ++b) {
    Branch& branch = job.branches[b];
    branch.weight = w;
    branch.gamma = values_of(gamma, c * job.count, "gamma") + b * c;
    branch.mean = values_of(mean, c * job.count, "mean") + b * c;
    branch.var = values_of(var, c * job.count, "var") + b * c;
    branch.eps = static_cast<float>(eps[b]);
    w += c * kernel[b] * kernel[b];
  }
  return job;
}

void block_forward(const Tensor& x, std::vector<int64_t> kernel, std::vector<int64_t> dilation,
                   std::vector<double> eps, const Tensor& weight, const Tensor& gamma, const Tensor& beta,
                   const Tensor& mean, const Tensor& var, std::optional<Tensor> y) {
  Block job = block_of(x, kernel, dilation, eps, weight, gamma, mean, var);
  if (y) job.y = map_like(*y, x, "y");
  job.beta = values_of(beta, job.size.c, "beta");
  run(blocks_of(job.size), [&](int64_t begin, int64_t end) { kernels().block_forward(job, begin, end); });
}

void block_backward(const Tensor& grad, const Tensor& x, std::vector<int64_t> kernel,
                    std::vector<int64_t> dilation, std::vector<double> eps, const Tensor& weight,
                    const Tensor& gamma, const Tensor& mean, const Tensor& var, std::optional<Tensor> grad_x,
                    std::optional<Tensor> grad_weight, const Tensor& grad_gamma, const Tensor& grad_beta,
                    bool sums_given, double pixels) {
  Block job = block_of(x, kernel, dilation, eps, weight, gamma, mean, var);
  STD_TORCH_CHECK(grad_weight || !sums_given, "mmuni_cpu: grad_weight is missing, and the sums are given already");
  job.grad = map_like(grad, x, "grad");
  if (grad_x) job.grad_x = map_like(*grad_x, x, "grad_x");
  job.grad_beta = values_of(grad_beta, job.size.c, "grad_beta");
  job.sums = sums_given ? GIVEN : grad_weight ? COMPUTED : ALONE;
  job.pixels = pixels;
  float* w = grad_weight ? values_of(*grad_weight, weight.numel(), "grad_weight") : nullptr;
  for (int b = 0; b < job.count; ++b) {
    job.branches[b].grad_weight = w;
    job.branches[b].grad_gamma = values_of(grad_gamma, job.size.c * job.count, "grad_gamma") + b * job.size.c;
    if (w) w += job.size.c * kernel[b] * kernel[b];
  }
  run(blocks_of(job.size), [&](int64_t begin, int64_t end) { kernels().block_backward(job, begin, end); });
}

std::string capability() { return kernels().name; }

}  // namespace
}  // namespace mmuni

STABLE_TORCH_LIBRARY(mmuni_cpu, m) {
  m.def("capability() -> str");
  m.def("forward(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) out, int kernel, int dilation, bool flip) -> ()");
  m.def("weight_grad(Tensor x, Tensor grad, Tensor(a!) out, int kernel, int dilation) -> ()");
  m.def(
      "block_forward(Tensor x, int[] kernel, int[] dilation, float[] eps, Tensor weight, Tensor gamma, Tensor beta, "
      "Tensor(a!) mean, Tensor(b!) var, Tensor(c!)? y) -> ()");
  m.def(
      "block_backward(Tensor grad, Tensor x, int[] kernel, int[] dilation, float[] eps, "
      "Tensor weight, Tensor gamma, Tensor mean, Tensor var, Tensor(a!)? grad_x, Tensor(b!)? grad_weight, "
      "Tensor(c!) grad_gamma, Tensor(d!) grad_beta, bool sums_given, float pixels) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mmuni_cpu, CompositeExplicitAutograd, m) { m.impl("capability", TORCH_BOX(&mmuni::capability)); }

STABLE_TORCH_LIBRARY_IMPL(mmuni_cpu, CPU, m) {
  m.impl("forward", TORCH_BOX(&mmuni::conv_forward));
  m.impl("weight_grad", TORCH_BOX(&mmuni::conv_weight_grad));
  m.impl("block_forward", TORCH_BOX(&mmuni::block_forward));
  m.impl("block_backward", TORCH_BOX(&mmuni::block_backward));
}
