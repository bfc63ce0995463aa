// Regions of maps in shared memory, with zeros where they reach over the border.
#pragma once

#include "device.cuh"
#include "job.h"

namespace mmuni {

template <int P>
constexpr int MARGIN = margin_of(P);

struct Region {
  int n, c, channels, y, x;  // image, first channel and their number, upper left corner, which may lie outside
};

__device__ __forceinline__ bool is_inside(int y, int x, const Shape& shape) {
  return static_cast<unsigned>(y) < static_cast<unsigned>(shape.h) &&
         static_cast<unsigned>(x) < static_cast<unsigned>(shape.w);
}

// Which row of a tile is at a place of it.
__device__ __forceinline__ int row_at(int place, const Tile& tile) {
  if (tile.sets == 1) return place;
  const int half = tile.rows / 2;  // there is an even number
  return place < half ? 2 * place : 2 * (place - half) + 1;
}

// i / divisor for i below 2^16, with the reciprocal of a divisor above 1.
__device__ __forceinline__ unsigned reciprocal_of(unsigned divisor) { return 0xffffffffu / divisor + 1; }
__device__ __forceinline__ unsigned divide(unsigned i, unsigned reciprocal) {
  return static_cast<unsigned>(static_cast<uint64_t>(i) * reciprocal >> 32);
}

// Planes whose pixels lie one after the other, BYTES at a time: asynchronously but for single 16-bit elements.
template <typename T, int BYTES>
__device__ __forceinline__ void load_rows(uint32_t to, const Map& map, const Shape& shape, const Tile& tile,
                                          const Region& region) {
  constexpr int COUNT = BYTES / sizeof(T);
  const unsigned vectors = tile.columns / COUNT, reciprocal = reciprocal_of(vectors);
  const T* data = static_cast<const T*>(map.data);
  for (int plane = 0; plane < region.channels; ++plane) {
    const bool exists = region.c + plane < shape.c;
    const T* from = data + region.n * map.image + (region.c + plane) * map.plane;
    for (unsigned i = threadIdx.x; i < vectors * tile.rows; i += blockDim.x) {
      const unsigned place = divide(i, reciprocal), column = (i - place * vectors) * COUNT;
      const int y = region.y + row_at(place, tile), x = region.x + static_cast<int>(column);
      const bool inside = exists && is_inside(y, x, shape);
      const uint32_t address = to + (plane * tile.rows + place) * tile.stride + column * sizeof(T);
      if constexpr (BYTES >= 4)
        copy_async<BYTES>(address, inside ? from + y * map.row + x : data, inside);
      else
        store_shared<T>(address, inside ? load_global(from + y * map.row + x) : T{});
    }
  }
}

// Maps whose channels lie one after the other: 16 bytes of channels at a time where `vector`, otherwise one by one,
// wherever they lie.
template <typename T>
__device__ __forceinline__ void load_pixels(uint32_t to, const Map& map, const Shape& shape, const Tile& tile,
                                            const Region& region, bool vector) {
  constexpr int COUNT = 16 / sizeof(T);
  const unsigned columns = tile.columns, reciprocal = reciprocal_of(columns);
  const int step = vector ? COUNT : 1, bytes = tile.rows * tile.stride;
  const T* data = static_cast<const T*>(map.data) + region.n * map.image;
  // Neighbouring threads have neighbouring channels, then neighbouring pixels.
  const int parts = region.channels / step;  // a power of two
  for (unsigned i = threadIdx.x; i < columns * tile.rows * parts; i += blockDim.x) {
    const int channel = static_cast<int>(i % parts) * step;
    const unsigned pixel = i / parts, place = divide(pixel, reciprocal), column = pixel - place * columns;
    const int y = region.y + row_at(place, tile), x = region.x + static_cast<int>(column), c = region.c + channel;
    const bool inside = c < shape.c && is_inside(y, x, shape);
    const T* from = data + c * map.plane + y * map.row + x * map.pixel;
    const uint32_t address = to + channel * bytes + place * tile.stride + column * sizeof(T);
    if (!vector) {
      store_shared<T>(address, inside ? load_global(from) : T{});
      continue;
    }
    union {
      uint4 all;
      T each[COUNT];
    } values = {};
    if (inside) values.all = load_global(reinterpret_cast<const uint4*>(from));
#pragma unroll
    for (int j = 0; j < COUNT; ++j) store_shared<T>(address + j * bytes, values.each[j]);
  }
}

// Every thread of the block takes part; what has been loaded may be read after copy_commit, copy_wait and a barrier.
template <typename T>
__device__ __forceinline__ void load_tile(uint32_t to, const Map& map, const Shape& shape, const Tile& tile,
                                          const Region& region, int copy, bool vector) {
  if (map.pixel != 1) return load_pixels<T>(to, map, shape, tile, region, vector);
  switch (copy) {
    case 16: return load_rows<T, 16>(to, map, shape, tile, region);
    case 8: return load_rows<T, 8>(to, map, shape, tile, region);
    case 4: return load_rows<T, 4>(to, map, shape, tile, region);
    default: return load_rows<T, sizeof(T)>(to, map, shape, tile, region);
  }
}

}  // namespace mmuni
