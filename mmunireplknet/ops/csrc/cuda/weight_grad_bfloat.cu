#include "weight_grad.cuh"
#include "launch.h"

namespace mmuni {
const char* weight_grad_bfloat(const WeightGrad& job, void* stream) {
  return run_weight_grad<BFloat>(job, false, static_cast<Stream>(stream));
}
}  // namespace mmuni
