#include "forward.cuh"
#include "launch.h"

namespace mmuni {
const char* forward_single(const Forward& job, bool exact, void* stream) {
  return run_forward<float>(job, exact, static_cast<Stream>(stream));
}
}  // namespace mmuni
