#include "forward.cuh"
#include "launch.h"

namespace mmuni {
const char* forward_bfloat(const Forward& job, void* stream) {
  return run_forward<BFloat>(job, false, static_cast<Stream>(stream));
}
}  // namespace mmuni
