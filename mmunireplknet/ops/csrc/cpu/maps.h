// Depthwise convolution of whole maps: their blocks of channels and bands of rows, through tiles.

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
// The same with what the filter needs besides.
void pack_filter(const Filter& filter, const float* weight, int c0, int channels, bool flip, float* out) {
  pack_weight(weight, c0, channels, filter.kernel, flip, out);
  transform_weight(filter, out);
}
void unpack_weight(float* in, int c0, int channels, int kernel, float* weight) {
  const int taps = kernel * kernel;
  const Map map = {reinterpret_cast<char*>(weight), FLOAT, 0, taps, taps, 1};
  write_tile(map, 0, c0, channels, {in, taps * L, 0, 1, taps});
}
void load_channels(const float* values, int c0, int channels, float* out) {
  for (int c = 0; c < L; ++c) out[c] = values && c < channels ? values[c0 + c] : 0.f;
}

// Rows [y0, y1) of the output, and the rows of the input that they meet. Bands begin with even rows: which rows make a
// pair must not depend on their number.
struct Band {
  int y0, y1, x0, x1;
  Band(const Size& size, int bands, int64_t band, int reach) {
    y0 = static_cast<int>(size.h * band / bands) / 2 * 2;
    y1 = band + 1 == bands ? size.h : static_cast<int>(size.h * (band + 1) / bands) / 2 * 2;
    x0 = static_cast<int>(max(0, y0 - reach));
    x1 = static_cast<int>(min(size.h, y1 + reach));
  }
};

// As many bands as keep the tile of the input inside half of the second-level cache: every processor with AVX-512 has a
// megabyte, others half of one. Small kernels gain nothing from fewer bands, and lose what the output then has to wait.
int bands_for(const Shape& shape, int height, int reach) {
  const int64_t fit = (L == 16 && reach > 4 ? 131072 : 65536) / shape.pitch();
  if (height <= fit) return 1;
  return static_cast<int>(divide_up(height, max(fit - 2 * reach, min(height, max(8, reach)))));
}
int most_rows(const Size& size, int bands, int reach) {
  return static_cast<int>(min(size.h, divide_up(size.h, bands) + 1 + 2 * reach));
}

// Reads a tile and puts the rows of zeros beside it.
void read_input(const Filter& filter, const Map& map, int64_t n, int c0, int channels, const Shape& shape,
                const Tile& t) {
  read_tile(map, n, c0, channels, t);
  const int64_t floats = shape.floats(filter.rows_beside());
  memset(t.data - shape.margin * L - floats, 0, floats * sizeof(float));
  memset(t.data - shape.margin * L + shape.floats(t.row1 - t.row0), 0, floats * sizeof(float));
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
  const Filter filter(size.h, size.w, job.kernel, job.dilation);
  Shape shape = {size.w, 0, 0};
  make_room(shape, job.kernel, job.dilation);
  const int rows = most_rows(size, job.bands, filter.reach()), beside = filter.rows_beside();
  Scratch scratch(shape.floats(2 * (rows + beside)) + filter.floats() + L);
  float* const x_memory = scratch.data + shape.floats(beside);
  float* const out_memory = x_memory + shape.floats(rows + beside);
  float* const weight = out_memory + shape.floats(rows);
  float* const bias = weight + filter.floats();
  clear_margins(shape, x_memory, rows);
  const int64_t blocks = divide_up(size.c, L);
  // Written once, a row goes where it belongs; written several times, it stays in a tile until it is done.
  const bool in_place = !filter.minimal && job.out.type == FLOAT && job.out.stride_c == 1 && job.kernel <= MAX_TAPS &&
                        !overhangs(size.w, job.kernel, job.dilation);
  int64_t packed = -1;
  for (int64_t task = begin; task < end; ++task) {
    // Blocks of channels that share their pixels follow one another, since in channels_last they share pages too.
    const int64_t block = task % blocks, n = task / blocks / job.bands;
    const int c0 = static_cast<int>(block * L), channels = static_cast<int>(min(L, size.c - c0));
    if (packed != block) {
      pack_filter(filter, job.weight, c0, channels, job.flip, weight);
      load_channels(job.bias, c0, channels, bias);
      packed = block;
    }
    const Band band(size, job.bands, task / blocks % job.bands, filter.reach());
    const Tile x = shape.at(x_memory, band.x0, band.x1);
    const Tile out = shape.at(out_memory, band.y0, band.y1);
    read_input(filter, job.x, n, c0, channels, shape, x);
    if (in_place && channels == L) {
      convolve(filter, x, weight, bias, tile_of(job.out, n, c0, out), false);
    } else {
      convolve(filter, x, weight, bias, out, false);
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
  const Filter filter(size.h, size.w, job.kernel, job.dilation);
  Shape shape = {size.w, 0, 0};
  make_room(shape, job.kernel, job.dilation);
  const int rows = most_rows(size, job.bands, filter.reach()), beside = filter.rows_beside();
  const int64_t units = size.n * job.bands, floats = job.kernel * filter.row();
  Scratch scratch(shape.floats(2 * (rows + beside)) + filter.floats());
  float* const x_memory = scratch.data + shape.floats(beside);
  float* const grad_memory = x_memory + shape.floats(rows + beside);
  float* const weight = grad_memory + shape.floats(rows);
  clear_margins(shape, x_memory, rows);
  clear_margins(shape, grad_memory, rows);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t block = task / job.chunks, chunk = task % job.chunks;
    const int c0 = static_cast<int>(block * L), channels = static_cast<int>(min(L, size.c - c0));
    memset(weight, 0, filter.floats() * sizeof(float));
    for (int64_t unit = units * chunk / job.chunks; unit < units * (chunk + 1) / job.chunks; ++unit) {
      const Band band(size, job.bands, unit % job.bands, filter.reach());
      const Tile x = shape.at(x_memory, band.x0, band.x1);
      const Tile grad = shape.at(grad_memory, band.y0, band.y1);
      read_input(filter, job.x, unit / job.bands, c0, channels, shape, x);
      read_tile(job.grad, unit / job.bands, c0, channels, grad);
      correlate(filter, x, grad, weight);
    }
    transform_weight_grad(filter, weight);
    memcpy(job.partial + task * floats, weight, floats * sizeof(float));
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
