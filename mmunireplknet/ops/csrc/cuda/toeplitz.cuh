// The weights of a channel as Toeplitz matrices, and their products with rows of the input on tensor cores.
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
#pragma unroll 2
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

}  // namespace mmuni
