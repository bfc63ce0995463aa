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
struct Entry<float> {  // a tap and the fourth after it, as a fragment has them, as sums of two TF32 numbers each
  using type = uint4;
  template <typename Tap>
  static __device__ __forceinline__ type make(const Tap& tap, int u) {
    const float first = tap(u), second = tap(u + 4);
    const uint32_t a = round_tf32(first), b = round_tf32(second);
    return {a, b, round_tf32(first - float_of(a)), round_tf32(second - float_of(b))};
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

constexpr int ACROSS = SUB_COLUMNS / 8;  // matrices of output that a warp makes at a time, for each set
using Sums16x32 = float[ACROSS][4];

// The weights of a row of the kernel, as a lane has them, and their products with the inputs at `from`. What these add
// to is up to two sets of outputs, each with a row of its own.
template <typename T, int P, bool EXACT>
struct Taps {
  uint32_t b[P];

  __device__ __forceinline__ void load(uint32_t table) {
#pragma unroll
    for (int p = 0; p < P; ++p) b[p] = load_shared<uint32_t>(table + p * 32);
  }

  // With pieces q and q + 1 of the input. Two pieces that ldmatrix brings in four registers in a row make one product,
  // which spares moving them; of an odd number P the one that is left makes one of half the depth.
  __device__ __forceinline__ void multiply_by(const uint32_t (&a)[4], int q, Sums16x32& sum) const {
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

  template <typename Add>
  static __device__ __forceinline__ void each_piece(uint32_t from, const Add& add) {
#pragma unroll
    for (int q = 0; q < P + ACROSS - 1; q += 2) {
      uint32_t a[4];
      load_matrices(a, from + q * 16);
      add(a, q);
    }
  }
};

// Single precision: TF32, or where EXACT the three larger of the four products of halves.
template <int P, bool EXACT>
struct Taps<float, P, EXACT> {
  struct Piece {
    uint32_t high[4], low[4];
  };
  uint4 b[P];

  __device__ __forceinline__ void load(uint32_t table) {
#pragma unroll
    for (int p = 0; p < P; ++p) b[p] = load_shared<uint4>(table + p * 128);
  }

  __device__ __forceinline__ void multiply_by(const Piece& a, int q, Sums16x32& sum) const {
    const uint32_t(&h)[4] = a.high;
    const uint32_t(&l)[4] = a.low;
#pragma unroll
    for (int p = 0; p < P; ++p) {
      const int tile = q - p;
      if (tile < 0 || tile >= ACROSS) continue;
      if constexpr (EXACT) {
        multiply<float>(sum[tile], l[0], l[1], l[2], l[3], b[p].x, b[p].y);
        multiply<float>(sum[tile], h[0], h[1], h[2], h[3], b[p].z, b[p].w);
      }
      multiply<float>(sum[tile], h[0], h[1], h[2], h[3], b[p].x, b[p].y);
    }
  }

  template <typename Add>
  static __device__ __forceinline__ void each_piece(uint32_t from, const Add& add) {
#pragma unroll
    for (int q = 0; q < P + ACROSS - 1; ++q) {
      uint32_t r[4];
      load_matrices(r, from + q * 32);
      Piece a;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (EXACT)
          split(float_of(r[i]), a.high[i], a.low[i]);
        else
          a.high[i] = round_tf32(float_of(r[i]));
      }
      add(a, q);
    }
  }
};

template <typename Taps>
__device__ __forceinline__ void add_row(Sums16x32& sum, const Taps& taps, uint32_t from) {
  Taps::each_piece(from, [&](const auto& a, int q) { taps.multiply_by(a, q, sum); });
}
template <typename Taps>
__device__ __forceinline__ void add_rows(Sums16x32 (&sum)[2], const Taps& taps, const Taps& above, uint32_t from) {
  Taps::each_piece(from, [&](const auto& a, int q) {
    taps.multiply_by(a, q, sum[0]);
    above.multiply_by(a, q, sum[1]);
  });
}

// All rows of the kernel for one subtile whose upper left input is at `from` for this lane, `row` bytes before that of
// the next row of its set, and `odd` before the one below it.
template <typename T, int P, int KERNEL, bool EXACT>
struct Convolution {
  using Row = Taps<T, P, EXACT>;
  static constexpr int BYTES = (8 * P + 8) * sizeof(typename Entry<T>::type);
  Row taps[KERNEL ? KERNEL : 1];  // those of all rows, if KERNEL is the size of the kernel; 0 reads them from the table

  __device__ __forceinline__ void load(uint32_t table) {
#pragma unroll
    for (int ky = 0; ky < KERNEL; ++ky) taps[ky].load(table + ky * BYTES);
  }

  // One set, with any dilation: `step` bytes from what a row of the kernel takes to what the next one does.
  __device__ __forceinline__ void one(Sums16x32& sum, uint32_t table, uint32_t from, int kernel, int step) const {
    if constexpr (KERNEL > 0) {
#pragma unroll
      for (int ky = 0; ky < KERNEL; ++ky) add_row(sum, taps[ky], from + ky * step);
    } else {
#pragma unroll 1
      for (int ky = 0; ky < kernel; ++ky) {
        Row now;
        now.load(table);
        add_row(sum, now, from);
        table += BYTES, from += step;
      }
    }
  }

  __device__ __forceinline__ void two(Sums16x32 (&sum)[2], uint32_t table, uint32_t from, int kernel, int row,
                                      int odd) const {
    if constexpr (KERNEL > 0) {
      add_row(sum[0], taps[0], from);
#pragma unroll
      for (int ky = 1; ky < KERNEL; ++ky)
        add_rows(sum, taps[ky], taps[ky - 1], from + ky / 2 * row + (ky % 2 ? odd : 0));
      add_row(sum[1], taps[KERNEL - 1], from + KERNEL / 2 * row + odd);
    } else {
      Row even, next;
      even.load(table);
      add_row(sum[0], even, from);
#pragma unroll 1
      for (int ky = 1; ky < kernel; ky += 2) {  // an odd number: two at a time
        next.load(table + BYTES);
        add_rows(sum, next, even, from + odd);
        even.load(table + 2 * BYTES);
        add_rows(sum, even, next, from + row);
        table += 2 * BYTES, from += row;
      }
      add_row(sum[1], even, from + odd);
    }
  }
};

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

// A set of a warp's subtile, from where it is staged to a map whose pixels lie one after the other: rows y0, y0 + step...
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

// The same set of all warps, to a map whose channels lie one after the other: `group` channels of `parts` subtiles, which
// follow each other in shared memory. The tile begins at y0, x0.
template <typename T>
__device__ __forceinline__ void store_pixels(const Forward& job, int n, int c0, int y0, int x0, int first, int parts,
                                             int set) {
  constexpr int COUNT = 16 / sizeof(T);
  const Map& map = job.out;
  const int step = job.out_vector ? COUNT : 1, each = job.group / step;  // powers of two
  const int bytes = SUB_ROWS * STAGED<T>;
  for (int i = threadIdx.x; i < parts * SUB_ROWS * SUB_COLUMNS * each; i += blockDim.x) {
    const int channel = i % each * step, pixel = i / each, part = pixel / (SUB_ROWS * SUB_COLUMNS);
    const int row = pixel / SUB_COLUMNS % SUB_ROWS, column = pixel % SUB_COLUMNS, subtile = first + part;
    const int down = subtile / job.across, c = c0 + channel;
    const int y = y0 + (down * SUB_ROWS + row) * job.tile.sets + set, x = x0 + (subtile - down * job.across) * SUB_COLUMNS + column;
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

// Those whose weights are in registers have one channel in a block.
template <int KERNEL>
constexpr int THREADS = KERNEL ? 128 : 256;

// A block has `group` channels, its weights once, and every splits-th tile of all images. Its warps have one channel
// each, and share the subtiles.
template <typename T, int P, int KERNEL, bool EXACT>
__global__ void __launch_bounds__(THREADS<KERNEL>, KERNEL || (P == WIDE && sizeof(T) == 4) ? 1 : 2) forward_kernel(const Forward job) {
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
#pragma unroll
      for (int set = 0; set < 2; ++set) {
        if (set >= sets) break;
        if (mine) {
#pragma unroll
          for (int tile = 0; tile < ACROSS; ++tile) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const int row = lane / 4 + half * 8, column = tile * 8 + lane % 4 * 2;
              const float left = sum[set][tile][2 * half] + bias, right = sum[set][tile][2 * half + 1] + bias;
              stage_outputs<T>(staged + row * STAGED<T> + column * sizeof(T), left, right);
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
