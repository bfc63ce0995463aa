// The second step of every sum over blocks: always in the same order, so that it is always the same.
#pragma once

#include "device.cuh"
#include "job.h"

namespace mmuni {

template <int THREADS>
__global__ void __launch_bounds__(THREADS) sums_kernel(const Sums job) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (i >= job.size) return;
  float total = 0;
  for (int64_t j = 0; j < job.count; ++j) total += load_global(job.partial + i * job.between + j * job.apart);
  store_global(job.out + i, total);
}

inline const char* run_sums(const Sums& job, Stream stream) {
  return launch(sums_kernel<128>, job, ceil_div(job.size, 128), 128, 0, stream);
}

}  // namespace mmuni
