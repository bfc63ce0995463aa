// The depthwise convolution, and its input gradient: tiles of maps in shared memory, and what blocks and warps do.
#pragma once

#include "toeplitz.cuh"

namespace mmuni {

// Two neighbouring outputs.
template <typename T>
__device__ __forceinline__ void stage_outputs(uint32_t to, float first, float second) {
  if constexpr (sizeof(T) == 4)
    store_shared<float2>(to, {first, second});
  else
    store_shared<uint32_t>(to, pack<T>(first, second));
}

// Bytes from a row of a staged subtile to the next: what a quarter of a warp writes is in different banks.
template <typename T>
constexpr int STAGED = SUB_COLUMNS * sizeof(T) + 16;

// A set of a warp's subtile, rows y0, y0 + step and so on, from where it is staged to a map whose pixels lie one after
// the other.
template <typename T, typename Vector>
__device__ __forceinline__ void store_rows(const Map& map, const Shape& shape, T* to, uint32_t from, int y0, int x0,
                                           int step) {
  constexpr int COUNT = sizeof(Vector) / sizeof(T), ACROSS_ROW = SUB_COLUMNS / COUNT;
  for (int i = threadIdx.x % 32; i < SUB_ROWS * ACROSS_ROW; i += 32) {
    const int row = i / ACROSS_ROW, column = i % ACROSS_ROW * COUNT, y = y0 + row * step;
    if (!is_inside(y, x0 + column, shape)) continue;
    T* at = to + y * map.row + x0 + column;
    store_global(reinterpret_cast<Vector*>(at), load_shared<Vector>(from + row * STAGED<T> + column * sizeof(T)));
  }
}

// The same set of all warps, to a map whose channels lie one after the other: `group` channels of `parts` subtiles,
// which follow each other in shared memory. The tile begins at y0, x0.
template <typename T>
__device__ __forceinline__ void store_pixels(const Forward& job, int n, int c0, int y0, int x0, int first, int parts,
                                             int set) {
  constexpr int COUNT = 16 / sizeof(T);
  const Map& map = job.out;
  const int step = job.out_vector ? COUNT : 1, each = job.group / step;  // powers of two
  const int bytes = SUB_ROWS * STAGED<T>;
#pragma unroll 2
  for (int i = threadIdx.x; i < parts * SUB_ROWS * SUB_COLUMNS * each; i += blockDim.x) {
    const int channel = i % each * step, pixel = i / each, part = pixel / (SUB_ROWS * SUB_COLUMNS);
    const int row = pixel / SUB_COLUMNS % SUB_ROWS, column = pixel % SUB_COLUMNS, subtile = first + part;
    const int down = subtile / job.across, c = c0 + channel;
    const int y = y0 + (down * SUB_ROWS + row) * job.tile.sets + set;
    const int x = x0 + (subtile - down * job.across) * SUB_COLUMNS + column;
    if (down >= job.down || c >= job.shape.c || !is_inside(y, x, job.shape)) continue;
    const uint32_t from = job.staging + (part * job.group + channel) * bytes + row * STAGED<T> + column * sizeof(T);
    T* to = static_cast<T*>(map.data) + n * map.image + c * map.plane + y * map.row + x * map.pixel;
    if (!job.out_vector) {
      store_global(to, load_shared<T>(from));
      continue;
    }
    union {
      uint4 all;
      T each[COUNT];
    } values;
#pragma unroll
    for (int j = 0; j < COUNT; ++j) values.each[j] = load_shared<T>(from + j * bytes);
    store_global(reinterpret_cast<uint4*>(to), values.all);
  }
}

// Most threads of a block: with the weights in registers it has one channel.
template <typename T, int KERNEL>
constexpr int THREADS = KERNEL ? 128 : 32 * warps_of_groups(sizeof(T));
// Blocks side by side that registers are to be left for.
template <typename T, int P, int KERNEL>
constexpr int BLOCKS = KERNEL == 7 || (sizeof(T) == 4 && P == NARROW) ? 3 : 2;

// A block has `group` channels, its weights once, and every splits-th tile of all images. Its warps have one channel
// each, and share the subtiles.
template <typename T, int P, int KERNEL, bool EXACT>
__global__ void __launch_bounds__(THREADS<T, KERNEL>, BLOCKS<T, P, KERNEL>) forward_kernel(const Forward job) {
  const Shape& s = job.shape;
  const int kernel = KERNEL ? KERNEL : s.kernel, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int c0 = static_cast<int>(blockIdx.x) / job.splits * job.group;
  const int split = static_cast<int>(blockIdx.x) % job.splits;
  const int channel = warp % job.group, c = c0 + channel, part = warp / job.group, parts = job.warps / job.group;
  const int sets = job.tile.sets, sub_rows = SUB_ROWS * sets;
  const int tile_rows = job.down * sub_rows, tile_columns = job.across * SUB_COLUMNS;
  const int tiles_x = (s.w + tile_columns - 1) / tile_columns, tiles_y = (s.h + tile_rows - 1) / tile_rows;
  const int up = kernel / 2 * s.dilation, plane_bytes = job.tile.rows * job.tile.stride;
  const int stage_bytes = job.group * plane_bytes;
  // Entry k - n + 7 of row ky, for k = 2 (lane % 4) (TF32: lane % 4) and n = lane / 4.
  using E = typename Entry<T>::type;
  const int entry = channel * kernel * (8 * P + 8) + lane % 4 * (sizeof(T) == 4 ? 1 : 2) - lane / 4 + 7;
  const uint32_t table = job.table + entry * static_cast<int>(sizeof(E));
  const uint32_t staged = job.staging + warp * SUB_ROWS * STAGED<T>;
  // The row of a matrix that this lane names to ldmatrix: matrices 0 and 1 below each other, 2 and 3 to their right.
  const uint32_t my_row = (lane / 8 % 2 * 8 + lane % 8) * job.tile.stride + lane / 16 * 16;
  const int odd = job.tile.rows / 2 * job.tile.stride;
  Convolution<T, P, KERNEL, EXACT> convolution;
  float bias = 0;

  // Where there is room for two tiles, the next one is copied while one is computed, and the first time nothing is.
  const int ahead = (job.stages - 1) * job.splits;
  int stage = 0;
#pragma unroll 1
  for (int item = split - ahead; item < job.items; item += job.splits) {
    if (const int next = item + ahead; next < job.items) {
      const int n = next / (tiles_x * tiles_y), ty = next / tiles_x % tiles_y, tx = next % tiles_x;
      const Region region = {n, c0, job.group, ty * tile_rows - up, tx * tile_columns - MARGIN<P>};
      load_tile<T>(job.tiles + stage * stage_bytes, job.x, s, job.tile, region, job.copy, job.x_vector);
    }
    copy_commit();
    if (item == split - ahead) {
      fill_table<T, P>(job, c0, kernel);
      __syncthreads();
      convolution.load(table);
      if (job.bias && c < s.c) bias = load_number(job.bias, job.bias_type, c);
      stage ^= job.stages - 1;
      if (ahead) continue;
    }
    if (ahead) copy_wait<1>();
    else copy_wait<0>();
    __syncthreads();
    const int n = item / (tiles_x * tiles_y), ty = item / tiles_x % tiles_y, tx = item % tiles_x;
    const int y0 = ty * tile_rows, x0 = tx * tile_columns, now = ahead ? stage ^ 1 : 0;
    for (int first = 0; first < job.down * job.across; first += parts) {
      const int subtile = first + part, sy = subtile / job.across, sx = subtile - sy * job.across;
      const int y = y0 + sy * sub_rows, x = x0 + sx * SUB_COLUMNS;
      const bool mine = sy < job.down && c < s.c && y < s.h && x < s.w;
      Sums16x32 sum[2] = {};
      if (mine) {
        const uint32_t from = job.tiles + now * stage_bytes + channel * plane_bytes + my_row +
                              sy * SUB_ROWS * job.tile.stride + sx * SUB_COLUMNS * static_cast<int>(sizeof(T));
        if (sets == 2) convolution.two(sum, table, from, kernel, job.tile.stride, odd);
        else convolution.one(sum[0], table, from, kernel, s.dilation * job.tile.stride);
      }
      float total = 0;
#pragma unroll 1
      for (int set = 0; set < sets; ++set) {
        if (mine) {
#pragma unroll
          for (int tile = 0; tile < ACROSS; ++tile) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const int row = lane / 4 + half * 8, column = tile * 8 + lane % 4 * 2;
              const float left = sum[0][tile][2 * half] + bias, right = sum[0][tile][2 * half + 1] + bias;
              stage_outputs<T>(staged + row * STAGED<T> + column * sizeof(T), left, right);
              sum[0][tile][2 * half] = sum[1][tile][2 * half];  // what the next round takes
              sum[0][tile][2 * half + 1] = sum[1][tile][2 * half + 1];
              if (job.sums) {
                if (is_inside(y + set + row * sets, x + column, s)) total += left;
                if (is_inside(y + set + row * sets, x + column + 1, s)) total += right;
              }
            }
          }
        }
        if (job.out.pixel != 1) {
          __syncthreads();
          store_pixels<T>(job, n, c0, y0, x0, first, parts, set);
          __syncthreads();
        } else if (mine) {
          __syncwarp();
          T* to = static_cast<T*>(job.out.data) + n * job.out.image + c * job.out.plane;
          switch (job.store) {
            case 16: store_rows<T, uint4>(job.out, s, to, staged, y + set, x, sets); break;
            case 8: store_rows<T, uint2>(job.out, s, to, staged, y + set, x, sets); break;
            case 4: store_rows<T, uint32_t>(job.out, s, to, staged, y + set, x, sets); break;
            default: store_rows<T, T>(job.out, s, to, staged, y + set, x, sets);
          }
          __syncwarp();
        }
      }
      if (mine && job.sums) {
#pragma unroll
        for (int distance = 16; distance; distance /= 2) total += from_lane(total, distance);
        const int across = (s.w + SUB_COLUMNS - 1) / SUB_COLUMNS, down = (s.h + SUB_ROWS - 1) / SUB_ROWS;
        const int64_t plane = static_cast<int64_t>(n) * s.c + c;
        float* to = job.sums + (plane * down + y / SUB_ROWS) * across + x / SUB_COLUMNS;
        // There is a number for each 16 rows: the first one has the sum of both sets.
        if (lane == 0) store_global(to, total);
        if (lane == 1 && sets == 2 && y + SUB_ROWS < s.h) store_global(to + across, 0.f);
      }
    }
    __syncthreads();
    stage ^= job.stages - 1;
  }
}

template <typename T, int P, int KERNEL, bool EXACT>
const char* start_forward(const Forward& job, Stream stream) {
  const int64_t blocks = static_cast<int64_t>(ceil_div(job.shape.c, job.group)) * job.splits;
  return launch(forward_kernel<T, P, KERNEL, EXACT>, job, blocks, job.warps * 32, job.shared, stream);
}

// With the weights of 13x13 and 7x7 kernels in registers, where that leaves room for several blocks. `exact` is about
// single precision alone.
template <typename T>
const char* run_forward(Forward job, bool exact, Stream stream) {
  plan(job, sizeof(T), multiprocessors());
  const bool wide = job.shape.pieces() == WIDE;
  if constexpr (sizeof(T) == 4) {
    if (exact && wide) return start_forward<T, WIDE, 0, true>(job, stream);
    if (exact) return start_forward<T, NARROW, 0, true>(job, stream);
  } else if (!wide && job.group == 1) {
    switch (job.shape.kernel) {
      case 13: return start_forward<T, NARROW, 13, false>(job, stream);
      case 7: return start_forward<T, NARROW, 7, false>(job, stream);
    }
  }
  return wide ? start_forward<T, WIDE, 0, false>(job, stream) : start_forward<T, NARROW, 0, false>(job, stream);
}

}  // namespace mmuni
