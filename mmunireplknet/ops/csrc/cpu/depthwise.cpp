// Operators of the depthwise convolution and of the Dilated Reparam Block.

#include "operators.h"

namespace mmuni {
namespace {

void conv_forward(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, const Tensor& out,
                  int64_t kernel, int64_t dilation, bool flip) {
  Forward job = {};
  job.size = size_of(x);
  job.x = map_of(x), job.out = map_of(out);
  job.weight = floats(weight, job.size.c * kernel * kernel);
  job.bias = bias ? floats(*bias, job.size.c) : nullptr;
  job.kernel = static_cast<int>(kernel), job.dilation = static_cast<int>(dilation), job.flip = flip;
  const int64_t tasks = kernels().plan_forward(job, torch::stable::get_num_threads());
  run(tasks, [&](int64_t begin, int64_t end) { kernels().forward(job, begin, end); });
}

void conv_weight_grad(const Tensor& x, const Tensor& grad, const Tensor& out, int64_t kernel, int64_t dilation) {
  WeightGrad job = {};
  job.size = size_of(x);
  job.x = map_of(x), job.grad = map_of(grad);
  job.out = floats(out, job.size.c * kernel * kernel);
  job.kernel = static_cast<int>(kernel), job.dilation = static_cast<int>(dilation);
  const int64_t tasks = kernels().plan_weight_grad(job);
  const int64_t count = tasks * kernel * kernel * kernels().lanes;
  void* memory = nullptr;
  STD_TORCH_CHECK(posix_memalign(&memory, 64, count * sizeof(float)) == 0, "mmuni_cpu: out of memory");
  job.partial = static_cast<float*>(memory);
  run(tasks, [&](int64_t begin, int64_t end) { kernels().weight_grad(job, begin, end); });
  run(blocks_of(job.size), [&](int64_t begin, int64_t end) { kernels().sum_partial(job, begin, end); });
  std::free(memory);
}

// What both directions of the block share. Weights and their gradients lie one branch after the other in one tensor,
// gamma, mean and var are (branches, C).
Block block_of(const Tensor& x, const std::vector<int64_t>& kernel, const std::vector<int64_t>& dilation,
               const std::vector<double>& eps, const Tensor& weight, const Tensor& gamma, const Tensor& mean,
               const Tensor& var) {
  STD_TORCH_CHECK(kernel.size() <= MAX_BRANCHES, "mmuni_cpu: at most ", MAX_BRANCHES, " branches");
  Block job = {};
  job.size = size_of(x);
  job.x = map_of(x);
  job.count = static_cast<int>(kernel.size());
  int64_t taps = 0;
  for (const int64_t k : kernel) taps += k * k;
  const int64_t c = job.size.c;
  const float* w = floats(weight, c * taps);
  for (int b = 0; b < job.count; ++b) {
    Branch& branch = job.branches[b];
    branch.kernel = static_cast<int>(kernel[b]), branch.dilation = static_cast<int>(dilation[b]);
    branch.weight = w;
    branch.gamma = floats(gamma, c * job.count) + b * c;
    branch.mean = floats(mean, c * job.count) + b * c;
    branch.var = floats(var, c * job.count) + b * c;
    branch.eps = static_cast<float>(eps[b]);
    w += c * kernel[b] * kernel[b];
  }
  return job;
}

void block_forward(const Tensor& x, std::vector<int64_t> kernel, std::vector<int64_t> dilation,
                   std::vector<double> eps, const Tensor& weight, const Tensor& gamma, const Tensor& beta,
                   const Tensor& mean, const Tensor& var, std::optional<Tensor> y) {
  Block job = block_of(x, kernel, dilation, eps, weight, gamma, mean, var);
  job.y = optional_map(y);
  job.beta = floats(beta, job.size.c);
  run(blocks_of(job.size), [&](int64_t begin, int64_t end) { kernels().block_forward(job, begin, end); });
}

void block_backward(const Tensor& grad, const Tensor& x, std::vector<int64_t> kernel,
                    std::vector<int64_t> dilation, std::vector<double> eps, const Tensor& weight,
                    const Tensor& gamma, const Tensor& mean, const Tensor& var, std::optional<Tensor> grad_x,
                    std::optional<Tensor> grad_weight, const Tensor& grad_gamma, const Tensor& grad_beta,
                    bool sums_given, double pixels) {
  Block job = block_of(x, kernel, dilation, eps, weight, gamma, mean, var);
  job.grad = map_of(grad);
  job.grad_x = optional_map(grad_x);
  job.grad_beta = floats(grad_beta, job.size.c);
  job.sums = sums_given ? GIVEN : grad_weight ? COMPUTED : ALONE;
  job.pixels = pixels;
  float* w = grad_weight ? floats(*grad_weight, weight.numel()) : nullptr;
  for (int b = 0; b < job.count; ++b) {
    job.branches[b].grad_weight = w;
    job.branches[b].grad_gamma = floats(grad_gamma, job.size.c * job.count) + b * job.size.c;
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
