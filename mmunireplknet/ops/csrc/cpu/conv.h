// Depthwise convolution of tiles: the choice of strips.

// Scratch memory of one thread, aligned to a cache line. Up to MAX_KEPT bytes stay with the thread for its next call:
// fresh pages cost more than the small maps that are computed in them.
constexpr int64_t MAX_KEPT = 8 << 20;

struct Kept {
  float* data = nullptr;
  int64_t bytes = 0;
  ~Kept() { free(data); }
};
thread_local Kept kept;

struct Scratch {
  float* data;
  explicit Scratch(int64_t floats) {
    const int64_t bytes = floats * static_cast<int64_t>(sizeof(float));
    if (bytes <= kept.bytes) {
      data = kept.data;
      return;
    }
    data = allocate(floats);
    if (bytes > MAX_KEPT) return;
    free(kept.data);
    kept.data = data;
    kept.bytes = bytes;
  }
  ~Scratch() {
    if (data != kept.data) free(data);
  }
  Scratch(const Scratch&) = delete;
};

using StripFunction = void (*)(const Strip&);

// Numbers of taps that a row of an odd kernel is cut into, see for_strips.
constexpr bool is_used(int taps) { return taps % 2 || taps > 6 || MAX_TAPS < 6; }

// Those that paired strips are made for: of rows of 11, 13, 21 and 31. Each more is a second of compilation, and with
// fewer registers than those of AVX-512 too little work is left for each value that takes two loads and a sum.
constexpr bool is_paired(int taps) { return L == 16 && (taps == 10 || taps == 11 || taps == 13); }
constexpr int MIN_PAIRED_PIXELS = 8;

struct Table {
  StripFunction dense[MAX_PIXELS + 1][MAX_TAPS + 1];
  StripFunction paired[MAX_PIXELS + 1][MAX_TAPS + 1];
  StripFunction spread[MAX_PIXELS + 1];  // three taps
};

template <int Q, int KB>
constexpr void fill(Table& forward, Table& weight_grad) {
  if constexpr (is_used(KB)) {
    forward.dense[Q][KB] = forward_strip<Q, KB, DENSE>;
    weight_grad.dense[Q][KB] = weight_grad_strip<Q, KB, DENSE>;
    if constexpr (is_paired(KB) && Q >= MIN_PAIRED_PIXELS) {
      forward.paired[Q][KB] = forward_strip<Q, KB, PAIRED>;
      weight_grad.paired[Q][KB] = weight_grad_strip<Q, KB, PAIRED>;
    }
  }
  if constexpr (KB == 3) {
    forward.spread[Q] = forward_strip<Q, KB, SPREAD>;
    weight_grad.spread[Q] = weight_grad_strip<Q, KB, SPREAD>;
  }
  if constexpr (Q > 1) fill<Q - 1, KB>(forward, weight_grad);
  else if constexpr (KB > 1) fill<MAX_PIXELS, KB - 1>(forward, weight_grad);
}

struct Tables {
  Table forward, weight_grad;
  constexpr Tables() : forward{}, weight_grad{} { fill<MAX_PIXELS, MAX_TAPS>(forward, weight_grad); }
};
constexpr Tables tables;  // not filled when the library is loaded: the processor may lack these instructions

MMUNI_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
MMUNI_INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
MMUNI_INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How the columns of a map are shared out: by their remainder modulo `phases`, then into strips of equal width.
struct Columns {
  int width, reach, taps, phases;
  // Taps further out than the map is wide meet nothing but zeros.
  Columns(int width, int kernel, int dilation)
      : width(width), reach(static_cast<int>(min(kernel / 2, (width - 1) / dilation))), taps(2 * reach + 1),
        phases(taps <= 3 ? 1 : dilation) {}
  MMUNI_INLINE int columns(int phase) const { return static_cast<int>(divide_up(width - phase, phases)); }
  MMUNI_INLINE int strips(int phase) const { return static_cast<int>(divide_up(columns(phase), MAX_PIXELS)); }
  MMUNI_INLINE int pixels(int phase) const {
    return phase < width ? static_cast<int>(divide_up(columns(phase), strips(phase))) : 0;
  }
};

// Room beside the map that a convolution needs: what it reads, and where its last strips overhang.
void make_room(Shape& shape, int kernel, int dilation) {
  const Columns columns(shape.width, kernel, dilation);
  const int reach = dilation * columns.reach;
  int end = shape.width;
  for (int r = 0; r < columns.phases && r < shape.width; ++r)
    end = static_cast<int>(max(end, r + columns.phases * (columns.strips(r) * columns.pixels(r) - 1) + 1));
  shape.margin = static_cast<int>(max(shape.margin, reach));
  shape.slack = static_cast<int>(max(shape.slack, reach + end - shape.width));
}

// Whether a strip reaches beyond the map.
bool overhangs(int width, int kernel, int dilation) {
  const Columns columns(width, kernel, dilation);
  for (int r = 0; r < columns.phases && r < width; ++r)
    if (columns.strips(r) * columns.pixels(r) != columns.columns(r)) return true;
  return false;
}

// The rows of `like` as they lie in a channels_last map of floats.
Tile tile_of(const Map& map, int64_t n, int c0, const Tile& like) {
  float* const data = reinterpret_cast<float*>(map.data) + n * map.stride_n + like.row0 * map.stride_h + c0;
  return {data, map.stride_h, like.row0, like.row1, like.width, map.stride_w};
}

// Zeros around the map. Reading a tile never touches them, but a convolution writes into the slack of its output.
void clear_slack(const Shape& shape, float* memory, int64_t rows) {
  for (int64_t y = 0; y < rows; ++y)
    memset(memory + y * shape.pitch() + (shape.margin + shape.width) * L, 0, shape.slack * L * sizeof(float));
}
void clear_margins(const Shape& shape, float* memory, int64_t rows) {
  for (int64_t y = 0; y < rows; ++y) memset(memory + y * shape.pitch(), 0, shape.margin * L * sizeof(float));
  clear_slack(shape, memory, rows);
}

// Rows of a kernel that are gone through together: the rows of the map and the taps that they meet stay in the first cache.
constexpr int MAX_KERNEL_ROWS = 16;

// Both directions: `out` is the result of the forward convolution, or the gradient that the weight gradient reads.
MMUNI_INLINE void for_strips(const Table& table, const Tile& x, float* w, const float* bias, int kernel, int dilation,
                             const Rows& wanted, const Tile& out, bool accumulate) {
  const Columns columns(x.width, kernel, dilation);
  const int groups = static_cast<int>(divide_up(columns.taps, MAX_TAPS));
  const int count = wanted.ky1 - wanted.ky0;
  const int row_groups = static_cast<int>(max(1, divide_up(count, MAX_KERNEL_ROWS)));
  const bool spread = columns.taps == 3 && dilation > 1;
  const int distance = dilation / columns.phases;  // of two taps, in pixels of the same phase
  const int least = wanted.far ? MIN_PAIRED_PIXELS : 1;
  for (int r = 0; r < columns.phases && r < x.width; ++r) {
    const int pixels = columns.pixels(r), available = columns.columns(r);
    for (int s = 0; s < columns.strips(r); ++s) {
      for (int turn = 0; turn < groups * row_groups; ++turn) {
        // The middle taps come first: every pixel meets them, so that they can start the sums.
        const int g = (turn / row_groups + groups / 2) % groups, part = turn % row_groups;
        const int first = g * columns.taps / groups, end = (g + 1) * columns.taps / groups;
        // Of the others only the pixels that meet anything but the zeros around the map.
        const int q0 = s * pixels, q1 = q0 + pixels;
        int from = turn < row_groups ? q0 : static_cast<int>(max(q0, (columns.reach - end + 1) * distance));
        int to = turn < row_groups ? q1 : static_cast<int>(min(q1, available + (columns.reach - first) * distance));
        if (from >= to) continue;
        from = static_cast<int>(max(q0, min(from, to - least)));
        to = static_cast<int>(max(to, from + least));
        const int pixel = r + columns.phases * from;
        Rows rows = wanted;
        rows.ky0 = wanted.ky0 + part * count / row_groups, rows.ky1 = wanted.ky0 + (part + 1) * count / row_groups;
        const Strip strip = {
            x.data + (pixel + dilation * (first - columns.reach)) * L, out.data + pixel * out.step,
            w + (first - columns.reach + kernel / 2) * L, bias, x.pitch, out.pitch, static_cast<int64_t>(kernel) * L,
            columns.phases * L, dilation * L, columns.phases * out.step, rows, x.row0, x.row1, out.row0, out.row1,
            (accumulate || turn > 0) && !wanted.second};
        (spread ? table.spread[to - from] : (wanted.far ? table.paired : table.dense)[to - from][end - first])(strip);
      }
    }
  }
}
