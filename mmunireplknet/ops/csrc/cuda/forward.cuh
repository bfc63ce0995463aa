// The depthwise convolution, and its input gradient, as products with Toeplitz matrices on tensor cores.
//
// Row ky of the kernel adds to 16 x 8 outputs the product of 16 x D inputs, rows moved by ky, with the D x 8 matrix
// t[k][n] = w[ky][k - n]. The next eight columns have the same matrix, and inputs eight columns further right: a
// fragment of the input serves up to `pieces` of them, and one of the weights serves a whole channel.
#pragma once

#include "tile.cuh"

namespace mmuni {

// A weight in any of the types.
__device__ __forceinline__ float load_number(const void* from, int type, int64_t i) {
  if (type == FLOAT) return load_global(static_cast<const float*>(from) + i);
  return type == FLOAT16 ? to_float(load_global(static_cast<const Half*>(from) + i))
                           : to_float(load_global(static_cast<const BFloat*>(from) + i));
}

// How the weights lie in shared memory. Each row of the kernel is a row of entries; entry u is about tap u - 7 - shift,
// which is k - n where k - n + 7 = u.
template <typename T>
struct Entry {  // 16 bits: two neighbouring taps, as a fragment has them
  using type = uint32_t;
  template <typename Tap>
  static __device__ __forceinline__ type make(const Tap& tap, int u) {
    return pack<T>(tap(u), tap(u + 1));
  }
};
template <>
struct Entry<float> {  // the tap as the sum of two TF32 numbers
  using type = uint2;
  template <typename Tap>
  static __device__ __forceinline__ type make(const Tap& tap, int u) {
    const float value = tap(u);
    const uint32_t high = round_tf32(value);
    return {high, round_tf32(value - float_of(high))};
  }
};

template <typename T, int P>
__device__ __forceinline__ void fill_table(const Forward& job, int c0, int kernel) {
  using E = Entry<T>;
  constexpr int COUNT = 8 * P + 8;
  const Shape& s = job.shape;
  const int before = 7 + MARGIN<P> - kernel / 2 * s.dilation;
  for (int i = threadIdx.x; i < job.group * kernel * COUNT; i += blockDim.x) {
    const int row = i / COUNT, channel = row / kernel, c = c0 + channel;
    const int ky = job.flip ? kernel - 1 - (row - channel * kernel) : row - channel * kernel;
    const auto tap = [&](int u) {
      const int distance = u - before, kx = distance / s.dilation;
      if (c >= s.c || distance < 0 || kx >= kernel || kx * s.dilation != distance) return 0.f;
      const int64_t at = (static_cast<int64_t>(c) * kernel + ky) * kernel + (job.flip ? kernel - 1 - kx : kx);
      return load_number(job.weight, job.weight_type, at);
    };
    store_shared<typename E::type>(job.table + i * sizeof(typename E::type), E::make(tap, i - row * COUNT));
  }
}

constexpr int ACROSS = SUB_COLUMNS / 8;  // matrices of output that a warp makes at a time

// Adds a row of the kernel, with the fragments b of its P pieces, an odd number. Two pieces that ldmatrix brings in
// four registers in a row make one product, which spares moving them; the piece that is left makes one of half the
// depth.
template <typename T, int P>
__device__ __forceinline__ void add_row(float (&sum)[ACROSS][4], const uint32_t (&b)[P], uint32_t from) {
#pragma unroll
  for (int q = 0; q < P + ACROSS - 1; q += 2) {
    uint32_t a[4];
    load_matrices(a, from + q * 16);
#pragma unroll
    for (int tile = 0; tile < ACROSS; ++tile) {
      const int p = q - tile;
      if (p >= 0 && p + 1 < P)
        multiply<T>(sum[tile], a[0], a[1], a[2], a[3], b[p], b[p + 1]);
      else if (p == P - 1)
        multiply_half<T>(sum[tile], a[0], a[1], b[p]);
      else if (p == -1)
        multiply_half<T>(sum[tile], a[2], a[3], b[0]);
    }
  }
}

// The same for one row in single precision: TF32, or where EXACT the three larger of the four products of halves.
template <int P, bool EXACT>
__device__ __forceinline__ void add_row_single(float (&sum)[ACROSS][4], const uint2 (&b)[P][2], uint32_t from) {
#pragma unroll
  for (int q = 0; q < P + ACROSS - 1; ++q) {
    uint32_t r[4], high[4], low[4];
    load_matrices(r, from + q * 32);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (EXACT)
        split(float_of(r[i]), high[i], low[i]);
      else
        high[i] = round_tf32(float_of(r[i]));
    }
#pragma unroll
    for (int p = 0; p < P; ++p) {
      const int tile = q - p;
      if (tile < 0 || tile >= ACROSS) continue;
      if constexpr (EXACT) {
        multiply<float>(sum[tile], low[0], low[1], low[2], low[3], b[p][0].x, b[p][1].x);
        multiply<float>(sum[tile], high[0], high[1], high[2], high[3], b[p][0].y, b[p][1].y);
      }
      multiply<float>(sum[tile], high[0], high[1], high[2], high[3], b[p][0].x, b[p][1].x);
    }
  }
}

// All rows of the kernel for one subtile whose upper left input is at `from` for this lane. KERNEL is the size of the
// kernel if its fragments are in registers, in `b`, and 0 if they are read from the table.
template <typename T, int P, int KERNEL, bool EXACT>
__device__ __forceinline__ void convolve(float (&sum)[ACROSS][4], const uint32_t (*b)[P], uint32_t table, uint32_t from,
                                         int kernel, int step) {
  constexpr int BYTES = (8 * P + 8) * sizeof(typename Entry<T>::type);
  if constexpr (sizeof(T) == 4) {
#pragma unroll 1
    for (int ky = 0; ky < kernel; ++ky) {
      uint2 taps[P][2];
#pragma unroll
      for (int p = 0; p < P; ++p) {
        taps[p][0] = load_shared<uint2>(table + ky * BYTES + p * 64);
        taps[p][1] = load_shared<uint2>(table + ky * BYTES + p * 64 + 32);
      }
      add_row_single<P, EXACT>(sum, taps, from + ky * step);
    }
  } else if constexpr (KERNEL > 0) {
#pragma unroll
    for (int ky = 0; ky < KERNEL; ++ky) add_row<T, P>(sum, b[ky], from + ky * step);
  } else {
#pragma unroll 2
    for (int ky = 0; ky < kernel; ++ky) {
      uint32_t taps[P];
#pragma unroll
      for (int p = 0; p < P; ++p) taps[p] = load_shared<uint32_t>(table + ky * BYTES + p * 32);
      add_row<T, P>(sum, taps, from + ky * step);
    }
  }
}

// Two neighbouring outputs.
template <typename T>
__device__ __forceinline__ void stage(uint32_t to, float first, float second) {
  if constexpr (sizeof(T) == 4)
    store_shared<float2>(to, {first, second});
  else
    store_shared<uint32_t>(to, pack<T>(first, second));
}

// Bytes from a row of a staged subtile to the next: what a quarter of a warp writes is in different banks.
template <typename T>
constexpr int STAGED = SUB_COLUMNS * sizeof(T) + 16;

// A warp's subtile, from where it is staged to a map whose pixels lie one after the other.
template <typename T, typename Vector>
__device__ __forceinline__ void store_rows(const Map& map, const Shape& shape, T* to, uint32_t from, int y0, int x0) {
  constexpr int COUNT = sizeof(Vector) / sizeof(T), ACROSS_ROW = SUB_COLUMNS / COUNT;
  for (int i = threadIdx.x % 32; i < SUB_ROWS * ACROSS_ROW; i += 32) {
    const int row = i / ACROSS_ROW, column = i % ACROSS_ROW * COUNT;
    if (!is_inside(y0 + row, x0 + column, shape)) continue;
    T* at = to + (y0 + row) * map.row + x0 + column;
    store_global(reinterpret_cast<Vector*>(at), load_shared<Vector>(from + row * STAGED<T> + column * sizeof(T)));
  }
}

// The subtile of one warp or, for maps whose channels lie one after the other, those of all warps that have the same
// pixels: `group` channels of `parts` subtiles, which follow each other in shared memory.
template <typename T>
__device__ __forceinline__ void store_pixels(const Forward& job, int n, int c0, int y0, int x0, int first, int parts) {
  constexpr int COUNT = 16 / sizeof(T);
  const Map& map = job.out;
  const int step = job.out_vector ? COUNT : 1, each = job.group / step;  // powers of two
  const int bytes = SUB_ROWS * STAGED<T>;
  for (int i = threadIdx.x; i < parts * SUB_ROWS * SUB_COLUMNS * each; i += blockDim.x) {
    const int channel = i % each * step, pixel = i / each, part = pixel / (SUB_ROWS * SUB_COLUMNS);
    const int row = pixel / SUB_COLUMNS % SUB_ROWS, column = pixel % SUB_COLUMNS, subtile = first + part;
    const int down = subtile / job.across, c = c0 + channel;
    const int y = y0 + down * SUB_ROWS + row, x = x0 + (subtile - down * job.across) * SUB_COLUMNS + column;
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

// A block has `group` channels, its weights once, and every splits-th tile of all images. Its warps have one channel
// each, and share the subtiles.
template <typename T, int P, int KERNEL, bool EXACT>
__global__ void __launch_bounds__(256, KERNEL > 11 ? 1 : 2) forward_kernel(const Forward job) {
  const Shape& s = job.shape;
  const int kernel = KERNEL ? KERNEL : s.kernel, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int c0 = static_cast<int>(blockIdx.x) / job.splits * job.group;
  const int split = static_cast<int>(blockIdx.x) % job.splits;
  const int channel = warp % job.group, c = c0 + channel, part = warp / job.group, parts = job.warps / job.group;
  const int tiles_x = (s.w + job.across * SUB_COLUMNS - 1) / (job.across * SUB_COLUMNS);
  const int tiles_y = (s.h + job.down * SUB_ROWS - 1) / (job.down * SUB_ROWS);
  const int up = kernel / 2 * s.dilation, plane_bytes = job.tile.rows * job.tile.stride;
  const int stage_bytes = job.group * plane_bytes;

  const auto load = [&](int item, int stage) {
    const int n = item / (tiles_x * tiles_y), ty = item / tiles_x % tiles_y, tx = item % tiles_x;
    const Region region = {n, c0, job.group, ty * job.down * SUB_ROWS - up, tx * job.across * SUB_COLUMNS - MARGIN<P>};
    load_tile<T>(job.tiles + stage * stage_bytes, job.x, s, job.tile, region, job.copy, job.x_vector);
  };

  if (job.stages == 2) load(split, 0);
  copy_commit();
  fill_table<T, P>(job, c0, kernel);
  __syncthreads();
  // Entry k - n + 7 of row ky, for k = 2 (lane % 4) (TF32: lane % 4) and n = lane / 4.
  using E = typename Entry<T>::type;
  const int entry = channel * kernel * (8 * P + 8) + lane % 4 * (sizeof(T) == 4 ? 1 : 2) - lane / 4 + 7;
  const uint32_t table = job.table + entry * static_cast<int>(sizeof(E));
  uint32_t b[KERNEL ? KERNEL : 1][P];
#pragma unroll
  for (int i = 0; i < KERNEL * P; ++i)
    b[i / P][i % P] = load_shared<uint32_t>(table + (i / P * (8 * P + 8) + i % P * 8) * 4);
  const float bias = job.bias && c < s.c ? load_number(job.bias, job.bias_type, c) : 0.f;
  const uint32_t staged = job.staging + warp * SUB_ROWS * STAGED<T>;
  // The row of a matrix that this lane names to ldmatrix: matrices 0 and 1 below each other, 2 and 3 to their right.
  const uint32_t my_row = (lane / 8 % 2 * 8 + lane % 8) * job.tile.stride + lane / 16 * 16;

  int now = 0;
  for (int item = split; item < job.items; item += job.splits) {
    if (job.stages == 2) {
      if (item + job.splits < job.items) load(item + job.splits, now ^ 1);
    } else {
      load(item, 0);
    }
    copy_commit();
    if (job.stages == 2) copy_wait<1>();
    else copy_wait<0>();
    __syncthreads();
    const int n = item / (tiles_x * tiles_y), ty = item / tiles_x % tiles_y, tx = item % tiles_x;
    const int y0 = ty * job.down * SUB_ROWS, x0 = tx * job.across * SUB_COLUMNS;
    for (int first = 0; first < job.down * job.across; first += parts) {
      const int subtile = first + part, sy = subtile / job.across, sx = subtile - sy * job.across;
      const int y = y0 + sy * SUB_ROWS, x = x0 + sx * SUB_COLUMNS;
      if (sy < job.down && c < s.c && y < s.h && x < s.w) {
        float sum[ACROSS][4] = {};
        const uint32_t from = job.tiles + now * stage_bytes + channel * plane_bytes + my_row +
                              sy * SUB_ROWS * job.tile.stride + sx * SUB_COLUMNS * static_cast<int>(sizeof(T));
        convolve<T, P, KERNEL, EXACT>(sum, b, table, from, kernel, s.dilation * job.tile.stride);
        float total = 0;
#pragma unroll
        for (int tile = 0; tile < ACROSS; ++tile) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int row = lane / 4 + half * 8, column = tile * 8 + lane % 4 * 2;
            const float left = sum[tile][2 * half] + bias, right = sum[tile][2 * half + 1] + bias;
            stage<T>(staged + row * STAGED<T> + column * sizeof(T), left, right);
            if (job.sums) {
              if (is_inside(y + row, x + column, s)) total += left;
              if (is_inside(y + row, x + column + 1, s)) total += right;
            }
          }
        }
        if (job.sums) {
#pragma unroll
          for (int distance = 16; distance; distance /= 2) total += from_lane(total, distance);
          const int across = (s.w + SUB_COLUMNS - 1) / SUB_COLUMNS, down = (s.h + SUB_ROWS - 1) / SUB_ROWS;
          const int64_t plane = static_cast<int64_t>(n) * s.c + c;
          if (lane == 0) store_global(job.sums + (plane * down + y / SUB_ROWS) * across + x / SUB_COLUMNS, total);
        }
        if (job.out.pixel == 1) {
          __syncwarp();
          T* to = static_cast<T*>(job.out.data) + n * job.out.image + c * job.out.plane;
          switch (job.store) {
            case 16: store_rows<T, uint4>(job.out, s, to, staged, y, x); break;
            case 8: store_rows<T, uint2>(job.out, s, to, staged, y, x); break;
            case 4: store_rows<T, uint32_t>(job.out, s, to, staged, y, x); break;
            default: store_rows<T, T>(job.out, s, to, staged, y, x);
          }
          __syncwarp();
        }
      }
      if (job.out.pixel != 1) {
        __syncthreads();
        store_pixels<T>(job, n, c0, y0, x0, first, parts);
        __syncthreads();
      }
    }
    __syncthreads();
    now ^= job.stages - 1;
  }
}

template <typename T, int P, int KERNEL, bool EXACT>
const char* start_forward(const Forward& job, Stream stream) {
  const int64_t blocks = static_cast<int64_t>(ceil_div(job.shape.c, job.group)) * job.splits;
  return launch(forward_kernel<T, P, KERNEL, EXACT>, job, blocks, job.warps * 32, job.shared, stream);
}

// With the fragments of 13x13 and 7x7 kernels in registers, where that leaves room for several blocks. `exact` is about
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
