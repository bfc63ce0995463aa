// The shipped kernels and their launchers, for the tests to call.
#include "device.h"
// After it, so that its guard keeps the GPU's device.cuh out.
#include "forward.cuh"
#include "machine.h"
#include "sums.cuh"
#include "weight_grad.cuh"

using namespace mmuni;

namespace {

Map map_of(const void* data, const int64_t* stride) {
  return {const_cast<void*>(data), stride[0], stride[1], stride[2], stride[3]};
}

}  // namespace

extern "C" {

void allow(const void* begin, size_t bytes) { emulation::allow(begin, bytes); }
void forget() { emulation::forget(); }
void set_up(unsigned seed, int processors) {
  emulation::seed(seed);
  emulation::processors = processors;
}

int64_t conflicts() { return emulation::conflicts; }

int64_t copies(int bytes) { return emulation::copies[bytes]; }

int subtiles(const Shape* shape) { return subtiles_of(*shape); }

const char* forward(int type, const void* x, const int64_t* x_stride, const void* weight, int weight_type,
                    const void* bias, int bias_type, void* out, const int64_t* out_stride, float* sums,
                    const Shape* shape, bool flip, bool exact) {
  Forward job = {};
  job.x = map_of(x, x_stride), job.out = map_of(out, out_stride);
  job.weight = weight, job.weight_type = weight_type, job.bias = bias, job.bias_type = bias_type, job.sums = sums;
  job.shape = *shape, job.flip = flip;
  if (type == FLOAT) return run_forward<float>(job, exact, nullptr);
  return type == FLOAT16 ? run_forward<Half>(job, false, nullptr) : run_forward<BFloat>(job, false, nullptr);
}

// In how many sets of rows a warp makes the outputs.
int planned_sets(int type, const int64_t* x_stride, const int64_t* out_stride, const Shape* shape) {
  Forward job = {};
  job.x = map_of(nullptr, x_stride), job.out = map_of(nullptr, out_stride), job.shape = *shape;
  plan(job, size_of(type), emulation::processors);
  return job.tile.sets;
}

// The number of partial sums of each weight.
int weight_grad_parts(int type, const Shape* shape) {
  WeightGrad job = {};
  job.shape = *shape;
  plan(job, size_of(type), emulation::processors);
  return job.parts;
}

const char* weight_grad(int type, const void* x, const int64_t* x_stride, const void* grad, const int64_t* grad_stride,
                        float* partial, const Shape* shape, bool exact) {
  WeightGrad job = {};
  job.x = map_of(x, x_stride), job.grad = map_of(grad, grad_stride), job.partial = partial, job.shape = *shape;
  plan(job, size_of(type), emulation::processors);
  if (type == FLOAT) return run_weight_grad<float>(job, exact, nullptr);
  return type == FLOAT16 ? run_weight_grad<Half>(job, false, nullptr) : run_weight_grad<BFloat>(job, false, nullptr);
}

const char* add_up(const Sums* job) { return run_sums(*job, nullptr); }
}
