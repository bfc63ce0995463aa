// What lies between the matrix products of a block: f(x) times a scale plus a shift, for each image and channel, the
// sums that such scales are made of, and the gradients. f is GELU or the identity. Maps are (N, pixels, C).

// exp(x) for x <= 0, to a unit in the last place (Cephes, expf).
MMUNI_INLINE Vec exp_of(Vec x) {
  x = as_float(select(x < -87.f, as_bits(splat(-87.f)), as_bits(x)));
  const Vec shifted = x * 1.44269504f + 12582912.f;  // the sum holds the rounded integer in its last bits
  const Vec n = shifted - 12582912.f;
  const Vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return (p * r * r + r + 1.f) * as_float((as_bits(shifted) << 23) + 0x3f800000);
}

struct Gelu {
  Vec value, slope;
};

// x * Phi(x) and its derivative. Phi by Abramowitz and Stegun 7.1.26, as torch's own: off by 7.5e-8 at most.
MMUNI_INLINE Gelu gelu_of(Vec x) {
  const Vec magnitude = as_float(as_bits(x) & 0x7fffffff);
  const Vec t = 1.f / (1.f + 0.3275911f * 0.70710678f * magnitude);
  // Where the density is zero already, the square of x would overflow, and x times the least density would not be zero.
  const Vec near = as_float(select(magnitude < 20.f, as_bits(x), as_bits(splat(20.f))));
  const Vec density = exp_of(-0.5f * near * near);
  Vec p = splat(1.061405429f);
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const Vec tail = 0.5f * p * t * density;
  const Vec phi = as_float(select(x < 0.f, as_bits(tail), as_bits(1.f - tail)));
  return {x * phi, phi + near * density * 0.39894228f};
}

template <bool GELU>
MMUNI_INLINE Gelu activate(Vec x) {
  if constexpr (GELU) return gelu_of(x);
  else return {x, splat(1.f)};
}

MMUNI_INLINE Vec load_up_to(const char* p, int type, int n) { return n == L ? load_as(p, type) : load_some(p, type, n); }
MMUNI_INLINE void store_up_to(char* p, int type, Vec v, int n) {
  if (n == L) store_as(p, type, v);
  else store_some(p, type, v, n);
}
// A value a channel, of image n; `missing` where there is none.
MMUNI_INLINE Vec coefficient(const float* values, int64_t offset, int n, float missing) {
  if (!values) return splat(missing);
  return load_up_to(reinterpret_cast<const char*>(values + offset), FLOAT, n);
}

// Calls f(ic, c, n, i) for each pixel of the task and each block of n <= L channels from c on. ic is the place of their
// coefficients (N, C), i that of their values in the map.
template <typename F>
MMUNI_INLINE void for_chunk(const Pointwise& job, int64_t task, F f) {
  const int64_t chunk = task % job.chunks, image = task / job.chunks;
  const int64_t begin = job.pixels * chunk / job.chunks, end = job.pixels * (chunk + 1) / job.chunks;
  for (int64_t pixel = begin; pixel < end; ++pixel)
    for (int64_t c = 0; c < job.channels; c += L)
      f(image * job.channels + c, c, static_cast<int>(min(L, job.channels - c)),
        (image * job.pixels + pixel) * job.channels + c);
}

template <int TYPE, bool GELU>
void apply_typed(const Pointwise& job, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task)
    for_chunk(job, task, [&](int64_t ic, int64_t, int n, int64_t i) {
      const Vec a = activate<GELU>(load_up_to(job.x + i * size_of(TYPE), TYPE, n)).value;
      Vec y = a * coefficient(job.scale, ic, n, 1.f) + coefficient(job.shift, ic, n, 0.f);
      if (job.residual) y += load_up_to(job.residual + i * size_of(TYPE), TYPE, n);
      store_up_to(job.out + i * size_of(TYPE), TYPE, y, n);
    });
}

template <int TYPE, bool GELU>
void grad_typed(const Pointwise& job, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task)
    for_chunk(job, task, [&](int64_t ic, int64_t, int n, int64_t i) {
      const Gelu a = activate<GELU>(load_up_to(job.x + i * size_of(TYPE), TYPE, n));
      const Vec g = load_up_to(job.grad + i * size_of(TYPE), TYPE, n);
      const Vec inner = g * coefficient(job.scale, ic, n, 1.f) + coefficient(job.shift, ic, n, 0.f) +
                        a.value * coefficient(job.slope, ic, n, 0.f);
      store_up_to(job.out + i * size_of(TYPE), TYPE, inner * a.slope, n);
    });
}

template <int TYPE, bool GELU>
void sums_typed(const Pointwise& job, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    float* const first = job.sums + task * 2 * job.channels;
    memset(first, 0, 2 * job.channels * sizeof(float));
    for_chunk(job, task, [&](int64_t, int64_t c, int n, int64_t i) {
      const Vec value = activate<GELU>(load_up_to(job.x + i * size_of(TYPE), TYPE, n)).value;
      if (job.out) store_up_to(job.out + i * size_of(TYPE), TYPE, value, n);
      const Vec a = value - coefficient(job.pivot, c, n, 0.f);
      const Vec g = job.grad ? load_up_to(job.grad + i * size_of(TYPE), TYPE, n) : a;
      char* const p = reinterpret_cast<char*>(first + c);
      char* const q = reinterpret_cast<char*>(first + job.channels + c);
      store_up_to(p, FLOAT, load_up_to(p, FLOAT, n) + (job.grad ? a * g : a), n);
      store_up_to(q, FLOAT, load_up_to(q, FLOAT, n) + (job.grad ? g : a * a), n);
    });
  }
}

#define MMUNI_BY_TYPE(name)                                                     \
  void name(const Pointwise& job, int64_t begin, int64_t end) {                 \
    if (job.type == FLOAT && job.gelu) name##_typed<FLOAT, true>(job, begin, end);        \
    else if (job.type == FLOAT) name##_typed<FLOAT, false>(job, begin, end);              \
    else if (job.type == BFLOAT16 && job.gelu) name##_typed<BFLOAT16, true>(job, begin, end);  \
    else if (job.type == BFLOAT16) name##_typed<BFLOAT16, false>(job, begin, end);        \
    else if (job.gelu) name##_typed<FLOAT16, true>(job, begin, end);                      \
    else name##_typed<FLOAT16, false>(job, begin, end);                                   \
  }
MMUNI_BY_TYPE(apply)
MMUNI_BY_TYPE(grad)
MMUNI_BY_TYPE(sums)
#undef MMUNI_BY_TYPE
