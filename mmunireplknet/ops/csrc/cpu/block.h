// The Dilated Reparam Block in training mode: y = sum_b BN_b(conv_b(x)) and its gradients, one block of channels at a
// time, all branches while the maps of these channels are in the cache. The channels of a depthwise convolution and of
// its batch normalization never meet, so that nothing has to be kept between two blocks.
//
// Backward, with z_b = conv_b(x), M = N H W, s_b = sqrt(var_b + eps_b), a_b = gamma_b / s_b and the gradient g of y:
//   dbeta = sum g,  dgamma_b = sum g (z_b - mean_b) / s_b,
//   dz_b = a_b (g - dbeta / M - (z_b - mean_b) dgamma_b / (M s_b)),
//   dw_b = correlate(x, dz_b),  dx = sum_b convolve(dz_b, flipped w_b).

// Tiles of the same block of channels of all images, one after the other, with rows for zeros around each.
struct Stack {
  Shape shape;
  float* memory;
  int64_t images;
  int height;
  MMUNI_INLINE int64_t first_row(int64_t n) const { return n * (height + ROWS_BESIDE) + ROWS_BESIDE; }
  MMUNI_INLINE Tile at(int64_t n) const { return shape.at(memory + shape.floats(first_row(n)), 0, height); }
};

// Sum of f(offset) over all pixels; an offset means the same pixel in all stacks of one shape. The sum is kept in single
// precision for some hundred pixels and in double precision beyond.
template <typename F>
MMUNI_INLINE Vec sum_pixels(const Stack& stack, F f) {
  constexpr int PIXELS_IN_SINGLE = 256;
  double total[L] = {};
  Vec part = {};
  int pixels = 0;
  const auto flush = [&] {
    for (int c = 0; c < L; ++c) total[c] += part[c];
    part = Vec{}, pixels = 0;
  };
  for (int64_t n = 0; n < stack.images; ++n) {
    const Tile t = stack.at(n);
    for (int y = 0; y < stack.height; ++y) {
      const int64_t first = t.data - stack.memory + y * t.pitch;
      for (int x = 0; x < t.width; ++x) part += f(first + x * L);
      if ((pixels += t.width) >= PIXELS_IN_SINGLE) flush();
    }
  }
  flush();
  Vec result = {};
  for (int c = 0; c < L; ++c) result[c] = static_cast<float>(total[c]);
  return result;
}
template <typename F>
MMUNI_INLINE void for_pixels(const Stack& stack, F f) {
  for (int64_t n = 0; n < stack.images; ++n) {
    const Tile t = stack.at(n);
    for (int y = 0; y < stack.height; ++y) {
      const int64_t first = t.data - stack.memory + y * t.pitch;
      for (int x = 0; x < t.width; ++x) f(first + x * L);
    }
  }
}

void read_stack(const Map& map, int c0, int channels, const Stack& stack) {
  for (int64_t n = 0; n < stack.images; ++n) read_tile(map, n, c0, channels, stack.at(n));
}
void write_stack(const Map& map, int c0, int channels, const Stack& stack) {
  for (int64_t n = 0; n < stack.images; ++n) write_tile(map, n, c0, channels, stack.at(n));
}
void convolve(const Filter& filter, const Stack& x, float* w, const Stack& out, bool add) {
  for (int64_t n = 0; n < x.images; ++n) convolve(filter, x.at(n), w, nullptr, out.at(n), add);
}

// Square root lane by lane: the vector extensions have none.
MMUNI_INLINE Vec inverse_root(const float* var, int c0, int channels, float eps) {
  Vec result = {};
  for (int c = 0; c < channels; ++c) result[c] = 1.f / __builtin_sqrtf(var[c0 + c] + eps);
  return result;
}
MMUNI_INLINE Vec load_lanes(const float* values, int c0, int channels) {
  alignas(64) float lanes[L];
  load_channels(values, c0, channels, lanes);
  return load(lanes);
}
MMUNI_INLINE void store_lanes(float* values, int c0, int channels, Vec v) {
  for (int c = 0; c < channels; ++c) values[c0 + c] = v[c];
}

struct Workspace {
  Shape shape;
  int64_t weight;  // floats of the largest kernel
  explicit Workspace(const Block& job) : shape{job.size.w, 0, 0}, weight(0) {
    for (int b = 0; b < job.count; ++b) {
      make_room(shape, job.branches[b].kernel, job.branches[b].dilation);
      weight = max(weight, filter(job, job.branches[b]).floats());
    }
  }
  static Filter filter(const Block& job, const Branch& branch) {
    return Filter(job.size.h, job.size.w, branch.kernel, branch.dilation);
  }
  int64_t rows(const Block& job) const { return job.size.n * (job.size.h + ROWS_BESIDE) + ROWS_BESIDE; }
  int64_t floats(const Block& job) const { return shape.floats(rows(job)); }
  Stack stack(const Block& job, float* memory) const { return {shape, memory, job.size.n, job.size.h}; }
};

void block_forward(const Block& job, int64_t begin, int64_t end) {
  const Workspace work(job);
  const int64_t floats = work.floats(job);
  Scratch scratch(3 * floats + work.weight);
  memset(scratch.data, 0, floats * sizeof(float));
  const Stack x = work.stack(job, scratch.data);
  const Stack z = work.stack(job, scratch.data + floats);
  const Stack y = work.stack(job, scratch.data + 2 * floats);
  float* const weight = scratch.data + 3 * floats;
  const float count = static_cast<float>(job.size.n) * job.size.h * job.size.w;
  for (int64_t block = begin; block < end; ++block) {
    const int c0 = static_cast<int>(block * L), channels = static_cast<int>(min(L, job.size.c - c0));
    read_stack(job.x, c0, channels, x);
    for (int b = 0; b < job.count; ++b) {
      const Branch& branch = job.branches[b];
      const Filter filter = Workspace::filter(job, branch);
      pack_filter(filter, branch.weight, c0, channels, false, weight);
      convolve(filter, x, weight, z, false);
      const Vec mean = sum_pixels(z, [&](int64_t i) { return load(z.memory + i); }) / count;
      const Vec var = sum_pixels(z, [&](int64_t i) {
                        const Vec d = load(z.memory + i) - mean;
                        return d * d;
                      }) / count;
      store_lanes(branch.mean, c0, channels, mean);
      store_lanes(branch.var, c0, channels, var);
      if (!job.y.data) continue;
      const Vec scale = load_lanes(branch.gamma, c0, channels) * inverse_root(branch.var, c0, channels, branch.eps);
      const Vec beta = load_lanes(job.beta, c0, channels);
      for_pixels(z, [&](int64_t i) {
        store(y.memory + i, (b ? load(y.memory + i) : beta) + scale * (load(z.memory + i) - mean));
      });
    }
    if (job.y.data) write_stack(job.y, c0, channels, y);
  }
}

void block_backward(const Block& job, int64_t begin, int64_t end) {
  const Workspace work(job);
  const int64_t floats = work.floats(job);
  Scratch scratch(4 * floats + 2 * work.weight);
  memset(scratch.data, 0, 2 * floats * sizeof(float));
  const Stack x = work.stack(job, scratch.data);
  const Stack z = work.stack(job, scratch.data + floats);
  const Stack grad = work.stack(job, scratch.data + 2 * floats);
  const Stack grad_x = work.stack(job, scratch.data + 3 * floats);
  float* const weight = scratch.data + 4 * floats;
  float* const grad_weight = weight + work.weight;
  const float count = static_cast<float>(job.pixels);
  for (int64_t block = begin; block < end; ++block) {
    const int c0 = static_cast<int>(block * L), channels = static_cast<int>(min(L, job.size.c - c0));
    read_stack(job.x, c0, channels, x);
    read_stack(job.grad, c0, channels, grad);
    if (job.sums != GIVEN)
      store_lanes(job.grad_beta, c0, channels,
                  sum_pixels(grad, [&](int64_t i) { return load(grad.memory + i); }));
    const Vec grad_beta = load_lanes(job.grad_beta, c0, channels);
    for (int b = 0; b < job.count; ++b) {
      const Branch& branch = job.branches[b];
      const Filter filter = Workspace::filter(job, branch);
      pack_filter(filter, branch.weight, c0, channels, false, weight);
      convolve(filter, x, weight, z, false);
      clear_slack(work.shape, z.memory, work.rows(job));
      const Vec mean = load_lanes(branch.mean, c0, channels);
      const Vec inverse = inverse_root(branch.var, c0, channels, branch.eps);
      if (job.sums != GIVEN)
        store_lanes(branch.grad_gamma, c0, channels, inverse * sum_pixels(z, [&](int64_t i) {
                      return load(grad.memory + i) * (load(z.memory + i) - mean);
                    }));
      if (job.sums == ALONE) continue;
      const Vec grad_gamma = load_lanes(branch.grad_gamma, c0, channels);
      const Vec scale = load_lanes(branch.gamma, c0, channels) * inverse;
      const Vec offset = grad_beta / count, slope = grad_gamma * inverse / count;
      for_pixels(z, [&](int64_t i) {
        store(z.memory + i, scale * (load(grad.memory + i) - offset - slope * (load(z.memory + i) - mean)));
      });
      memset(grad_weight, 0, filter.floats() * sizeof(float));
      for (int64_t n = 0; n < job.size.n; ++n) correlate(filter, x.at(n), z.at(n), grad_weight);
      transform_weight_grad(filter, grad_weight);
      unpack_weight(grad_weight, c0, channels, branch.kernel, branch.grad_weight);
      if (!job.grad_x.data) continue;
      pack_filter(filter, branch.weight, c0, channels, true, weight);
      convolve(filter, z, weight, grad_x, b > 0);
    }
    if (job.grad_x.data && job.sums != ALONE) write_stack(job.grad_x, c0, channels, grad_x);
  }
}
