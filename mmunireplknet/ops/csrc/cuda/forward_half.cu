#include "forward.cuh"
#include "launch.h"

namespace mmuni {
const char* forward_half(const Forward& job, void* stream) {
  return run_forward<Half>(job, false, static_cast<Stream>(stream));
}
}  // namespace mmuni
