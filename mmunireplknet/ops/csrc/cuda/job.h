// What the kernels are asked to do, and how it is divided among blocks and warps. Plain C++.
#pragma once

#include <algorithm>
#include <cstdint>

namespace mmuni {

enum Type { FLOAT, BFLOAT16, FLOAT16 };

inline int size_of(int type) { return type == FLOAT ? 4 : 2; }

// A map (N, C, H, W); distances in elements.
struct Map {
  void* data;
  int64_t image, plane, row, pixel;
};

// One warp makes one or two sets of 16 x 32 outputs at a time, with 16 x 8 inputs and 8 x 8 weights for each 16 x 8 of
// them. Two sets are every second row of 32: 16 inputs that row ky of the kernel takes to the one are those that row
// ky - 1 takes to the other, and are read for both at once.
constexpr int SUB_ROWS = 16, SUB_COLUMNS = 32;
// Both kernels see `pieces` * 8 columns of input for 8 columns of output. The classes: extents up to 17 and up to 33.
constexpr int NARROW = 3, WIDE = 5;
constexpr int MAX_EXTENT = 31;
// Columns before those of the output: a multiple of 8, so that what is aligned in the map is aligned in its copy.
constexpr int margin_of(int pieces) { return 4 * (pieces - 1); }

// What a block may have on every GPU from sm_80 on.
constexpr int MOST_SHARED = 96 * 1024;

struct Shape {
  int n, c, h, w, kernel, dilation;
  int extent() const { return (kernel - 1) * dilation + 1; }
  int pieces() const { return extent() <= 17 ? NARROW : WIDE; }
};

// A region of a map in shared memory, one plane after the other: `rows` of `stride` bytes with `columns` elements. With
// `sets` of 2, those rows lie first that are an even number below the first one, then the others.
struct Tile {
  int rows, columns, stride, sets;
  int bytes() const { return rows * stride; }
};

struct Forward {
  Map x, out;
  const void *weight, *bias;  // contiguous; bias may be null
  float* sums;                // (N, C, subtiles) sums of the outputs of each 16 x 32 part of a plane, or null
  int weight_type, bias_type;
  Shape shape;
  bool flip;
  // The plan.
  Tile tile;
  int group, warps, down, across;  // channels and warps of a block, subtiles of its tile, of 16 x 32 for each set
  int copy, store;                 // bytes that are copied at once along a row, 0 for one element
  bool x_vector, out_vector;       // whether the channels of a group lie together, in 16 aligned bytes
  int stages, splits, items;       // tiles in memory, blocks per group of channels, tiles of a plane in all images
  int table, staging, tiles;       // where they begin in shared memory
  int shared;
};

struct WeightGrad {
  Map x, grad;
  float* partial;  // (parts, C, K, K)
  Shape shape;
  // The plan.
  Tile x_tile, grad_tile;
  int copy, grad_copy;
  int groups, slices, splits, items, parts;  // a warp has every groups-th row of the kernel and one slice of the rows
  int stage;                                 // bytes of both tiles
  int shared;
};

// out[i] is the sum over j of partial[i * between + j * apart].
struct Sums {
  const float* partial;
  float* out;
  int64_t size, count, between, apart;
};

constexpr int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }
constexpr int round_up(int64_t a, int64_t b) { return ceil_div(a, b) * static_cast<int>(b); }

inline int subtiles_of(const Shape& s) { return ceil_div(s.h, SUB_ROWS) * ceil_div(s.w, SUB_COLUMNS); }

// The most bytes, of 16, 8 and 4, that can be copied at once along the rows of a map; 0 for none of them.
inline int bytes_at_once(const Map& m, int width, int size) {
  if (m.pixel != 1) return 0;
  for (int bytes = 16; bytes >= 4; bytes /= 2) {
    bool fits = reinterpret_cast<uintptr_t>(m.data) % bytes == 0;
    for (int64_t distance : {m.image, m.plane, m.row, static_cast<int64_t>(width)})
      fits = fits && distance * size % bytes == 0;
    if (fits && bytes >= size) return bytes;
  }
  return 0;
}

// Whether `group` neighbouring channels are 16 aligned bytes.
inline bool channels_at_once(const Map& m, int channels, int group, int size) {
  bool fits = m.plane == 1 && group * size == 16 && channels % group == 0;
  for (int64_t distance : {m.image, m.row, m.pixel}) fits = fits && distance * size % 16 == 0;
  return fits && reinterpret_cast<uintptr_t>(m.data) % 16 == 0;
}

// Divides `items` tiles of each of `groups` among blocks: enough of them for the GPU, with as equal shares as can be.
inline int splits_of(int items, int groups, int blocks_wanted) {
  const int most = std::max(1, std::min(items, ceil_div(blocks_wanted, groups)));
  return ceil_div(items, ceil_div(items, most));
}

inline void plan_memory(Forward& job, int size) {
  const int pieces = job.shape.pieces();
  job.tile.rows = job.down * job.tile.sets * SUB_ROWS + job.shape.extent() - 1;
  job.tile.columns = job.across * SUB_COLUMNS + 2 * margin_of(pieces);
  // An odd number of 16 bytes: eight rows of a matrix are in different banks.
  job.tile.stride = job.tile.columns * size + 16;
  job.table = 0;
  job.staging = job.group * job.shape.kernel * (8 * pieces + 8) * (size == 4 ? 16 : 4);
  job.tiles = job.staging + job.warps * SUB_ROWS * (SUB_COLUMNS * size + 16);
  job.shared = job.tiles + job.stages * job.group * job.tile.bytes();
}

// Warps of a block that has several channels.
constexpr int warps_of_groups(int size) { return size == 4 ? 4 : 8; }

// Of a plane.
inline int tiles_of(const Forward& job) {
  const int rows = job.down * job.tile.sets * SUB_ROWS, columns = job.across * SUB_COLUMNS;
  return ceil_div(job.shape.h, rows) * ceil_div(job.shape.w, columns);
}

// Fills in the plan for elements of `size` bytes and a GPU of so many multiprocessors.
inline void plan(Forward& job, int size, int processors) {
  const Shape& s = job.shape;
  const bool channels_last = job.x.pixel != 1 || job.out.pixel != 1;
  job.group = 1;
  if (channels_last)
    for (job.group = 16 / size; job.group / 2 >= s.c; job.group /= 2) continue;
  job.stages = job.x.pixel == 1 ? 2 : 1;
  int64_t best = INT64_MAX;
  Forward chosen = job;
  for (int sets : {2, 1}) {
    for (int down : {4, 2, 1}) {
      for (int across : {2, 1}) {
        if (sets * down * across > 4 || (sets == 2 && s.dilation > 1)) continue;
        job.tile.sets = sets, job.down = down, job.across = across;
        job.warps = channels_last ? warps_of_groups(size) : down * across;
        plan_memory(job, size);
        if (job.shared > MOST_SHARED && sets * down * across > 1) continue;
        const int64_t tiles = tiles_of(job), subtiles = tiles * down * across;
        // Two sets make half as many warps: not where there are not even two for each quarter of a multiprocessor.
        if (sets == 2 && subtiles * s.n * s.c < processors * 8) continue;
        // Elements that are read, and outputs: one of these takes about K mma per 128, three or four times the work of
        // reading.
        const int64_t work = subtiles * sets * SUB_ROWS * SUB_COLUMNS * (sets == 2 ? 3 : 4);
        const int64_t cost = tiles * job.tile.rows * job.tile.columns + work;
        if (cost < best) best = cost, chosen = job;
      }
    }
  }
  job = chosen;
  while (job.shared > MOST_SHARED && (job.stages > 1 || job.group > 1)) {
    if (job.stages > 1) job.stages = 1;
    else job.group /= 2;
    plan_memory(job, size);
  }
  job.items = s.n * tiles_of(job);
  job.splits = splits_of(job.items, ceil_div(s.c, job.group), processors * 16 / job.warps);
  job.copy = bytes_at_once(job.x, s.w, size);
  job.store = bytes_at_once(job.out, s.w, size);
  job.x_vector = channels_at_once(job.x, s.c, job.group, size);
  job.out_vector = channels_at_once(job.out, s.c, job.group, size);
}

constexpr int GRAD_ROWS = 4;  // rows of the kernel that one warp has at most

inline void plan(WeightGrad& job, int size, int processors) {
  const Shape& s = job.shape;
  const int pieces = s.pieces();
  job.groups = ceil_div(s.kernel, GRAD_ROWS);
  job.slices = std::max(1, 4 / job.groups);
  const int rows = std::min(round_up(s.h, SUB_ROWS * job.slices), std::max(32, SUB_ROWS * job.slices));
  // 16 bits: an odd number of 16 bytes, for ldmatrix. Single precision, read by element: 8 or 24 words modulo 32.
  const int pad = size == 4 ? 32 : 16;
  job.grad_tile = {rows, SUB_COLUMNS, SUB_COLUMNS * size + pad, 1};
  job.x_tile = {rows + s.extent() - 1, SUB_COLUMNS + 2 * margin_of(pieces), 0, 1};
  job.x_tile.stride = job.x_tile.columns * size + pad;
  job.stage = job.x_tile.bytes() + job.grad_tile.bytes();
  const int scratch = job.groups * job.slices * 16 * (8 * (pieces + 1) + 1) * 4;
  job.shared = std::max(2 * job.stage, scratch);
  job.items = s.n * ceil_div(s.h, rows) * ceil_div(s.w, SUB_COLUMNS);
  job.splits = splits_of(job.items, s.c, processors * 16 / (job.groups * job.slices));
  job.parts = job.splits * job.slices;
  job.copy = bytes_at_once(job.x, s.w, size);
  job.grad_copy = bytes_at_once(job.grad, s.w, size);
}

}  // namespace mmuni
