// Depthwise convolution of whole maps: tiles in and out, and the choice of strips.

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

struct Table {
  StripFunction dense[MAX_PIXELS + 1][MAX_TAPS + 1];
  StripFunction spread[MAX_PIXELS + 1];  // three taps
};

template <int Q, int KB>
constexpr void fill(Table& forward, Table& weight_grad) {
  if constexpr (is_used(KB)) {
    forward.dense[Q][KB] = forward_strip<Q, KB, false>;
    weight_grad.dense[Q][KB] = weight_grad_strip<Q, KB, false>;
  }
  if constexpr (KB == 3) {
    forward.spread[Q] = forward_strip<Q, KB, true>;
    weight_grad.spread[Q] = weight_grad_strip<Q, KB, true>;
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
                             const Tile& out, bool accumulate) {
  const Columns columns(x.width, kernel, dilation);
  const int groups = static_cast<int>(divide_up(columns.taps, MAX_TAPS));
  const int row_groups = static_cast<int>(divide_up(kernel, MAX_KERNEL_ROWS));
  const bool spread = columns.taps == 3 && dilation > 1;
  const int distance = dilation / columns.phases;  // of two taps, in pixels of the same phase
  for (int r = 0; r < columns.phases && r < x.width; ++r) {
    const int pixels = columns.pixels(r), available = columns.columns(r);
    for (int s = 0; s < columns.strips(r); ++s) {
      for (int turn = 0; turn < groups * row_groups; ++turn) {
        // The middle taps come first: every pixel meets them, so that they can start the sums.
        const int g = (turn / row_groups + groups / 2) % groups, rows = turn % row_groups;
        const int first = g * columns.taps / groups, end = (g + 1) * columns.taps / groups;
        // Of the others only the pixels that meet anything but the zeros around the map.
        const int q0 = s * pixels, q1 = q0 + pixels;
        const int from = turn < row_groups ? q0 : static_cast<int>(max(q0, (columns.reach - end + 1) * distance));
        const int to = turn < row_groups ? q1 : static_cast<int>(min(q1, available + (columns.reach - first) * distance));
        if (from >= to) continue;
        const int pixel = r + columns.phases * from;
        const Strip strip = {
            x.data + (pixel + dilation * (first - columns.reach)) * L, out.data + pixel * out.step,
            w + (first - columns.reach + kernel / 2) * L, bias, x.pitch, out.pitch, static_cast<int64_t>(kernel) * L,
            columns.phases * L, dilation * L, columns.phases * out.step, kernel, rows * kernel / row_groups,
            (rows + 1) * kernel / row_groups, dilation, x.row0, x.row1, out.row0, out.row1, accumulate || turn > 0};
        (spread ? table.spread[to - from] : table.dense[to - from][end - first])(strip);
      }
    }
  }
}

// out = conv(x, w) + bias, or out += conv(x, w). Writes up to Shape::slack pixels behind each row.
void convolve(const Tile& x, const float* w, const float* bias, int kernel, int dilation, const Tile& out,
              bool accumulate) {
  for_strips(tables.forward, x, const_cast<float*>(w), bias, kernel, dilation, out, accumulate);
}

// w += the gradient for the kernel. The pixels behind each row of `grad` must be zero.
void correlate(const Tile& x, const Tile& grad, int kernel, int dilation, float* w) {
  for_strips(tables.weight_grad, x, w, nullptr, kernel, dilation, grad, false);
}

// Weights (C, K, K) of the block of channels from c0, to [tap][L] and back.
void pack_weight(const float* weight, int c0, int channels, int kernel, bool flip, float* out) {
  const int taps = kernel * kernel;
  const Map map = {reinterpret_cast<char*>(const_cast<float*>(weight)), FLOAT, 0, taps, taps, 1};
  read_tile(map, 0, c0, channels, {out, taps * L, 0, 1, taps});
  if (!flip) return;
  for (int a = 0, b = taps - 1; a < b; ++a, --b) {
    const Vec va = load(out + a * L), vb = load(out + b * L);
    store(out + a * L, vb);
    store(out + b * L, va);
  }
}
void unpack_weight(float* in, int c0, int channels, int kernel, float* weight) {
  const int taps = kernel * kernel;
  const Map map = {reinterpret_cast<char*>(weight), FLOAT, 0, taps, taps, 1};
  write_tile(map, 0, c0, channels, {in, taps * L, 0, 1, taps});
}
void load_channels(const float* values, int c0, int channels, float* out) {
  for (int c = 0; c < L; ++c) out[c] = values && c < channels ? values[c0 + c] : 0.f;
}

// Rows [band0, band1) of the output, and the rows of the input that they meet.
struct Band {
  int y0, y1, x0, x1;
  Band(const Size& size, int bands, int64_t band, int reach) {
    y0 = static_cast<int>(size.h * band / bands);
    y1 = static_cast<int>(size.h * (band + 1) / bands);
    x0 = static_cast<int>(max(0, y0 - reach));
    x1 = static_cast<int>(min(size.h, y1 + reach));
  }
};

// As many bands as keep the tile of the input inside a quarter of a megabyte, which every second-level cache holds.
int bands_for(const Shape& shape, int height, int reach) {
  const int64_t rows = 65536 / shape.pitch() - 2 * reach;
  return static_cast<int>(divide_up(height, max(rows, min(height, max(8, reach)))));
}
int most_rows(const Size& size, int bands, int reach) {
  return static_cast<int>(min(size.h, divide_up(size.h, bands) + 2 * reach));
}

int64_t plan_forward(Forward& job, int64_t threads) {
  Shape shape = {job.size.w, 0, 0};
  make_room(shape, job.kernel, job.dilation);
  const int64_t maps = job.size.n * divide_up(job.size.c, L);
  job.bands = bands_for(shape, job.size.h, job.dilation * (job.kernel / 2));
  if (threads > 1) job.bands = static_cast<int>(max(job.bands, min(job.size.h / 8, divide_up(4 * threads, maps))));
  return maps * job.bands;
}

void forward(const Forward& job, int64_t begin, int64_t end) {
  const Size& size = job.size;
  const int reach = job.dilation * (job.kernel / 2), taps = job.kernel * job.kernel;
  Shape shape = {size.w, 0, 0};
  make_room(shape, job.kernel, job.dilation);
  const int rows = most_rows(size, job.bands, reach);
  Scratch scratch(2 * shape.floats(rows) + (taps + 1) * L);
  float* const weight = scratch.data + 2 * shape.floats(rows);
  float* const bias = weight + taps * L;
  clear_margins(shape, scratch.data, rows);
  const int64_t blocks = divide_up(size.c, L);
  // Written once, a row goes where it belongs; written several times, it stays in a tile until it is done.
  const bool in_place = job.out.type == FLOAT && job.out.stride_c == 1 && job.kernel <= MAX_TAPS &&
                        !overhangs(size.w, job.kernel, job.dilation);
  int64_t packed = -1;
  for (int64_t task = begin; task < end; ++task) {
    // Blocks of channels that share their pixels follow one another, since in channels_last they share pages too.
    const int64_t block = task % blocks, n = task / blocks / job.bands;
    const int c0 = static_cast<int>(block * L), channels = static_cast<int>(min(L, size.c - c0));
    if (packed != block) {
      pack_weight(job.weight, c0, channels, job.kernel, job.flip, weight);
      load_channels(job.bias, c0, channels, bias);
      packed = block;
    }
    const Band band(size, job.bands, task / blocks % job.bands, reach);
    const Tile x = shape.at(scratch.data, band.x0, band.x1);
    const Tile out = shape.at(scratch.data + shape.floats(rows), band.y0, band.y1);
    read_tile(job.x, n, c0, channels, x);
    if (in_place && channels == L) {
      convolve(x, weight, bias, job.kernel, job.dilation, tile_of(job.out, n, c0, out), false);
    } else {
      convolve(x, weight, bias, job.kernel, job.dilation, out, false);
      write_tile(job.out, n, c0, channels, out);
    }
  }
}

int64_t plan_weight_grad(WeightGrad& job) {
  Shape shape = {job.size.w, 0, 0};
  make_room(shape, job.kernel, job.dilation);
  const int64_t blocks = divide_up(job.size.c, L);
  job.bands = bands_for(shape, job.size.h, job.dilation * (job.kernel / 2));
  job.chunks = static_cast<int>(min(job.size.n * job.bands, divide_up(32, blocks)));
  return blocks * job.chunks;
}

void weight_grad(const WeightGrad& job, int64_t begin, int64_t end) {
  const Size& size = job.size;
  const int reach = job.dilation * (job.kernel / 2), taps = job.kernel * job.kernel;
  Shape shape = {size.w, 0, 0};
  make_room(shape, job.kernel, job.dilation);
  const int rows = most_rows(size, job.bands, reach);
  const int64_t units = size.n * job.bands;
  Scratch scratch(2 * shape.floats(rows));
  clear_margins(shape, scratch.data, 2 * rows);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t block = task / job.chunks, chunk = task % job.chunks;
    const int c0 = static_cast<int>(block * L), channels = static_cast<int>(min(L, size.c - c0));
    float* const sum = job.partial + task * taps * L;
    memset(sum, 0, taps * L * sizeof(float));
    for (int64_t unit = units * chunk / job.chunks; unit < units * (chunk + 1) / job.chunks; ++unit) {
      const Band band(size, job.bands, unit % job.bands, reach);
      const Tile x = shape.at(scratch.data, band.x0, band.x1);
      const Tile grad = shape.at(scratch.data + shape.floats(rows), band.y0, band.y1);
      read_tile(job.x, unit / job.bands, c0, channels, x);
      read_tile(job.grad, unit / job.bands, c0, channels, grad);
      correlate(x, grad, job.kernel, job.dilation, sum);
    }
  }
}

void sum_partial(const WeightGrad& job, int64_t begin, int64_t end) {
  const int64_t floats = static_cast<int64_t>(job.kernel) * job.kernel * L;
  for (int64_t block = begin; block < end; ++block) {
    float* const sum = job.partial + block * job.chunks * floats;
    for (int chunk = 1; chunk < job.chunks; ++chunk)
      for (int64_t i = 0; i < floats; i += L) store(sum + i, load(sum + i) + load(sum + chunk * floats + i));
    const int c0 = static_cast<int>(block * L);
    unpack_weight(sum, c0, static_cast<int>(min(L, job.size.c - c0)), job.kernel, job.out);
  }
}
