// The weight gradient as banded Gram matrices on tensor cores.
//
// For row ky of the kernel and 16 columns of the gradient, D[i][j] is the sum over rows y of g[y][i] x[y + ky][j]; tap
// kx is the sum of one of its diagonals. All columns of a map, all its rows and all images add to the same D, so that
// the diagonals are summed once per block. What blocks have summed is added up by another kernel: no atomics.
#pragma once

#include "tile.cuh"

namespace mmuni {

// The matrices of one step, 16 rows of the maps: of 16 columns of the gradient, and of 8 columns of the input.
template <typename T>
struct Fragments {  // 16 bits
  uint32_t a[2][4];

  // Where a lane reads in each 16 rows: what it names to ldmatrix.
  static __device__ __forceinline__ uint32_t in_grad(int stride, int lane) {
    return (lane / 16 * 8 + lane % 8) * stride + lane / 8 % 2 * 16;
  }
  static __device__ __forceinline__ uint32_t in_x(int stride, int lane) {
    return (lane / 8 % 2 * 8 + lane % 8) * stride + lane / 16 * 16;
  }

  __device__ __forceinline__ void load_grad(uint32_t from, int) {
#pragma unroll
    for (int i = 0; i < 2; ++i) load_matrices_transposed(a[i], from + i * 32);
  }

  template <int COUNT>
  __device__ __forceinline__ void add(float (&sum)[COUNT][4], uint32_t from, int) const {
#pragma unroll
    for (int q = 0; q < COUNT + 2; q += 2) {
      uint32_t r[4];
      load_matrices_transposed(r, from + q * 16);
#pragma unroll
      for (int j = q; j < q + 2; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int at = j - 2 * i;
          if (at < 0 || at >= COUNT) continue;
          multiply<T>(sum[at], a[i][0], a[i][1], a[i][2], a[i][3], r[j % 2 * 2], r[j % 2 * 2 + 1]);
        }
      }
    }
  }
};

// Single precision: two steps of 8 rows, and where EXACT the three larger of the four products of halves.
template <bool EXACT>
struct SingleFragments {
  uint32_t high[2][2][4], low[2][2][4];

  static __device__ __forceinline__ void convert(float value, uint32_t& first, uint32_t& second) {
    if constexpr (EXACT)
      split(value, first, second);
    else
      first = round_tf32(value);
  }

  static __device__ __forceinline__ uint32_t in_grad(int stride, int lane) { return lane % 4 * stride + lane / 4 * 4; }
  static __device__ __forceinline__ uint32_t in_x(int stride, int lane) { return in_grad(stride, lane); }

  __device__ __forceinline__ void load_grad(uint32_t from, int stride) {
#pragma unroll
    for (int step = 0; step < 2; ++step)
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int r = 0; r < 4; ++r)
          convert(load_shared<float>(from + (step * 8 + r / 2 * 4) * stride + (i * 16 + r % 2 * 8) * 4),
                  high[step][i][r], low[step][i][r]);
  }

  template <int COUNT>
  __device__ __forceinline__ void add(float (&sum)[COUNT][4], uint32_t from, int stride) const {
#pragma unroll
    for (int step = 0; step < 2; ++step) {
#pragma unroll
      for (int j = 0; j < COUNT + 2; ++j) {
        uint32_t b[2], rest[2];
#pragma unroll
        for (int r = 0; r < 2; ++r)
          convert(load_shared<float>(from + (step * 8 + r * 4) * stride + j * 32), b[r], rest[r]);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int at = j - 2 * i;
          if (at < 0 || at >= COUNT) continue;
          const uint32_t(&h)[4] = high[step][i];
          const uint32_t(&l)[4] = low[step][i];
          if constexpr (EXACT) {
            multiply<float>(sum[at], l[0], l[1], l[2], l[3], b[0], b[1]);
            multiply<float>(sum[at], h[0], h[1], h[2], h[3], rest[0], rest[1]);
          }
          multiply<float>(sum[at], h[0], h[1], h[2], h[3], b[0], b[1]);
        }
      }
    }
  }
};

template <typename T, bool EXACT>
struct FragmentsOf {
  using type = Fragments<T>;
};
template <bool EXACT>
struct FragmentsOf<float, EXACT> {
  using type = SingleFragments<EXACT>;
};

// A block has one channel and every splits-th tile of all images. Warp (group, slice) has rows group, group + groups,
// ... of the kernel, and of each tile every slices-th 16 rows.
template <typename T, int P, bool EXACT>
__global__ void __launch_bounds__(256, 1) weight_grad_kernel(const WeightGrad job) {
  constexpr int COUNT = P + 1;  // 8 columns of input for 16 of the gradient
  const Shape& s = job.shape;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = warp % job.groups, slice = warp / job.groups;
  const int c = static_cast<int>(blockIdx.x) / job.splits, split = static_cast<int>(blockIdx.x) % job.splits;
  const int rows = job.grad_tile.rows, up = s.kernel / 2 * s.dilation;
  const int tiles_x = (s.w + SUB_COLUMNS - 1) / SUB_COLUMNS, tiles_y = (s.h + rows - 1) / rows;
  const int grad_offset = job.x_tile.rows * job.x_tile.stride;

  using Matrices = typename FragmentsOf<T, EXACT>::type;
  const int x_stride = job.x_tile.stride, grad_stride = job.grad_tile.stride;
  const uint32_t my_x = Matrices::in_x(x_stride, lane) + group * s.dilation * x_stride;
  const uint32_t my_grad = Matrices::in_grad(grad_stride, lane) + grad_offset;
  const int step = job.groups * s.dilation * x_stride;  // to the next row of the kernel that the warp has

  float sum[GRAD_ROWS][COUNT][4] = {};
  int stage = 0;
  // The next tile is copied while one is computed, and the first time nothing is.
#pragma unroll 1
  for (int item = split - job.splits; item < job.items; item += job.splits, stage ^= 1) {
    if (const int next = item + job.splits; next < job.items) {
      const int n = next / (tiles_x * tiles_y), y = next / tiles_x % tiles_y * rows, x = next % tiles_x * SUB_COLUMNS;
      const uint32_t to = stage * job.stage;
      load_tile<T>(to, job.x, s, job.x_tile, {n, c, 1, y - up, x - MARGIN<P>}, job.copy, false);
      load_tile<T>(to + grad_offset, job.grad, s, job.grad_tile, {n, c, 1, y, x}, job.grad_copy, false);
    }
    copy_commit();
    if (item < split) continue;
    copy_wait<1>();
    __syncthreads();
    const uint32_t tiles = (stage ^ 1) * job.stage;
    const int filled = s.h - item / tiles_x % tiles_y * rows;  // rows of the map from here on
#pragma unroll 1
    for (int y = slice * SUB_ROWS; y < rows && y < filled; y += job.slices * SUB_ROWS) {
      Matrices grad;
      grad.load_grad(tiles + my_grad + y * grad_stride, grad_stride);
      uint32_t from = tiles + my_x + y * x_stride;
#pragma unroll
      for (int r = 0; r < GRAD_ROWS; ++r, from += step) {
        if (group + r * job.groups >= s.kernel) break;
        if constexpr (EXACT) {
          // Tensor cores cut sums off, towards zero, so that the errors of long sums of positive numbers add up: they
          // sum these 16 rows alone, and what rounds to the nearest does the rest.
          float part[COUNT][4] = {};
          grad.add(part, from, x_stride);
#pragma unroll
          for (int j = 0; j < COUNT; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) sum[r][j][i] += part[j][i];
        } else {
          grad.add(sum[r], from, x_stride);
        }
      }
    }
    __syncthreads();
  }
  copy_wait<0>();
  __syncthreads();

  // Tap kx is the sum of D[i][i + first + kx * dilation]. Every warp has its own room for one D.
  constexpr int ROW = (8 * COUNT + 1) * 4;
  const uint32_t scratch = warp * 16 * ROW;
  const int first = MARGIN<P> - up, area = s.kernel * s.kernel;
  float* out = job.partial + (static_cast<int64_t>(split * job.slices + slice) * s.c + c) * area;
#pragma unroll
  for (int r = 0; r < GRAD_ROWS; ++r) {
    const int ky = group + r * job.groups;
    if (ky >= s.kernel) break;
#pragma unroll
    for (int j = 0; j < COUNT; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        store_shared<float>(scratch + (lane / 4 + i / 2 * 8) * ROW + (j * 8 + lane % 4 * 2 + i % 2) * 4, sum[r][j][i]);
    __syncwarp();
    if (lane < s.kernel) {
      float total = 0;
      for (int i = 0; i < 16; ++i) total += load_shared<float>(scratch + i * ROW + (i + first + lane * s.dilation) * 4);
      store_global(out + ky * s.kernel + lane, total);
    }
    __syncwarp();
  }
}

template <typename T, int P, bool EXACT>
const char* start_weight_grad(const WeightGrad& job, Stream stream) {
  const int64_t blocks = static_cast<int64_t>(job.shape.c) * job.splits;
  return launch(weight_grad_kernel<T, P, EXACT>, job, blocks, job.groups * job.slices * 32, job.shared, stream);
}

// `exact` is about single precision alone. The plan is made by the caller, who allocates what it needs.
template <typename T>
const char* run_weight_grad(const WeightGrad& job, bool exact, Stream stream) {
  const bool wide = job.shape.pieces() == WIDE;
  if constexpr (sizeof(T) == 4) {
    if (exact && wide) return start_weight_grad<T, WIDE, true>(job, stream);
    if (exact) return start_weight_grad<T, NARROW, true>(job, stream);
  }
  return wide ? start_weight_grad<T, WIDE, false>(job, stream) : start_weight_grad<T, NARROW, false>(job, stream);
}

}  // namespace mmuni
