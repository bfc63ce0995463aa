#include "sums.cuh"
#include "launch.h"

namespace mmuni {
const char* set_device(int device) { return use_device(device); }
const char* add_up(const Sums& job, void* stream) { return run_sums(job, static_cast<Stream>(stream)); }
}  // namespace mmuni
