// The second step of every sum over blocks: always in the same order, so that it is always the same.
#pragma once

#include "device.cuh"
#include "job.h"

namespace mmuni {

constexpr int SUM_THREADS = 128;

// One thread for each sum, or one warp, whose lanes read what lies together.
template <bool WARPS>
__global__ void __launch_bounds__(SUM_THREADS) sums_kernel(const Sums job) {
  constexpr int TOGETHER = WARPS ? 32 : 1;
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * SUM_THREADS + threadIdx.x) / TOGETHER;
  if (i >= job.size) return;
  const int lane = static_cast<int>(threadIdx.x) % TOGETHER;
  float total = 0;
  for (int64_t j = lane; j < job.count; j += TOGETHER)
    total += load_global(job.partial + i * job.between + j * job.apart);
  if constexpr (WARPS)
#pragma unroll
    for (int distance = 16; distance; distance /= 2) total += from_lane(total, distance);
  if (lane == 0) store_global(job.out + i, total);
}

inline const char* run_sums(const Sums& job, Stream stream) {
  // Neighbouring threads read neighbouring numbers: of one sum where those lie together, of several where they do not.
  if (job.apart == 1 && job.count > 8)
    return launch(sums_kernel<true>, job, ceil_div(job.size, SUM_THREADS / 32), SUM_THREADS, 0, stream);
  return launch(sums_kernel<false>, job, ceil_div(job.size, SUM_THREADS), SUM_THREADS, 0, stream);
}

}  // namespace mmuni
