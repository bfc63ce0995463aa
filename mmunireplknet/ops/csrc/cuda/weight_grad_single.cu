#include "weight_grad.cuh"
#include "launch.h"

namespace mmuni {
const char* weight_grad_single(const WeightGrad& job, bool exact, void* stream) {
  return run_weight_grad<float>(job, exact, static_cast<Stream>(stream));
}
void plan_weight_grad(WeightGrad& job, int size) { plan(job, size, multiprocessors()); }
}  // namespace mmuni
