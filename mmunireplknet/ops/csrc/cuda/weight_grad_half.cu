#include "weight_grad.cuh"
#include "launch.h"

namespace mmuni {
const char* weight_grad_half(const WeightGrad& job, void* stream) {
  return run_weight_grad<Half>(job, false, static_cast<Stream>(stream));
}
}  // namespace mmuni
