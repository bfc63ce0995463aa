// The two inner loops of the depthwise convolution, on tiles: [row][pixel][L] floats, channels in the lanes.
//
// A strip is Q pixels wide and runs down the tile. KB neighbouring taps of a kernel row are held in registers. In a dense
// strip the pixels are as far apart as the taps, so that a pixel, once loaded, meets all of them: Q * KB multiply-adds
// for Q + KB - 1 loads. That leaves few pixels for small maps and wide dilations; a SPREAD strip takes neighbouring
// pixels and loads one for every multiply-add.

struct Strip {
  const float* x;       // input at row row0, at the pixel that tap 0 of output pixel 0 reads
  float* out;           // output (forward), or output gradient (weight gradient), at row y0
  float* w;             // taps of row 0 of the kernel: [kernel_row][pitch_w]
  const float* bias;    // L floats, or nullptr for zero
  int64_t pitch_x;      // floats from one input row to the next
  int64_t pitch_out;
  int64_t pitch_w;
  int step;             // floats from one pixel of x to the next
  int tap_step;         // floats from one tap to the next; the same in a dense strip
  int64_t step_out;     // floats from one pixel of out to the next
  int kernel;           // rows of the kernel ...
  int ky0, ky1;         // ... and those of them that are wanted
  int dilation;
  int row0;             // first input row that x points to ...
  int row1;             // ... and the one behind the last
  int y0, y1;           // output rows
  bool accumulate;      // forward: add to out instead of starting from the bias
};

// Wanted rows ky of the kernel that meet a row inside [row0, row1) from output row y.
MMUNI_INLINE int first_row(const Strip& s, int y) {
  const int missing = s.row0 - (y - s.dilation * (s.kernel / 2));
  const int first = missing <= 0 ? 0 : (missing + s.dilation - 1) / s.dilation;
  return first > s.ky0 ? first : s.ky0;
}
MMUNI_INLINE int last_row(const Strip& s, int y) {
  const int room = s.row1 - 1 - (y - s.dilation * (s.kernel / 2));
  const int last = room < 0 ? 0 : room / s.dilation + 1;
  return last < s.ky1 ? last : s.ky1;
}

// Calls f(pixel, tap, value of the input there) for all of a row.
template <int Q, int KB, bool SPREAD, typename F>
MMUNI_INLINE void for_row(const Strip& s, const float* x, F f) {
  if constexpr (SPREAD) {
#pragma GCC unroll 16
    for (int k = 0; k < KB; ++k)
#pragma GCC unroll 16
      for (int o = 0; o < Q; ++o) f(o, k, load(x + o * s.step + k * s.tap_step));
  } else {
#pragma GCC unroll 32
    for (int j = 0; j < Q + KB - 1; ++j) {
      const Vec v = load(x + j * s.step);
#pragma GCC unroll 16
      for (int o = 0; o < Q; ++o)
        if (j - o >= 0 && j - o < KB) f(o, j - o, v);
    }
  }
}

template <int Q, int KB, bool SPREAD>
void forward_strip(const Strip& s) {
  for (int y = s.y0; y < s.y1; ++y) {
    float* const out = s.out + (y - s.y0) * s.pitch_out;
    Vec acc[Q];
    const Vec start = s.bias ? load(s.bias) : Vec{};
#pragma GCC unroll 16
    for (int o = 0; o < Q; ++o) acc[o] = s.accumulate ? load(out + o * s.step_out) : start;
    const int last = last_row(s, y);
    for (int ky = first_row(s, y); ky < last; ++ky) {
      const float* const x = s.x + (y + s.dilation * (ky - s.kernel / 2) - s.row0) * s.pitch_x;
      const float* const w = s.w + ky * s.pitch_w;
      Vec tap[KB];
#pragma GCC unroll 16
      for (int k = 0; k < KB; ++k) tap[k] = load(w + k * L);
      for_row<Q, KB, SPREAD>(s, x, [&](int o, int k, Vec v) __attribute__((always_inline)) { acc[o] += v * tap[k]; });
    }
#pragma GCC unroll 16
    for (int o = 0; o < Q; ++o) store(out + o * s.step_out, acc[o]);
  }
}

template <int Q, int KB, bool SPREAD>
void weight_grad_strip(const Strip& s) {
  // A sum waits for itself: with few taps, several sums a tap keep the multipliers busy.
  constexpr int SETS = MAX_TAPS < 6 ? 1 : KB < 4 ? 4 : KB < 8 ? 2 : 1;
  for (int y = s.y0; y < s.y1; ++y) {
    const float* const out = s.out + (y - s.y0) * s.pitch_out;
    Vec grad[Q];
#pragma GCC unroll 16
    for (int o = 0; o < Q; ++o) grad[o] = load(out + o * s.step_out);
    const int last = last_row(s, y);
    for (int ky = first_row(s, y); ky < last; ++ky) {
      const float* const x = s.x + (y + s.dilation * (ky - s.kernel / 2) - s.row0) * s.pitch_x;
      float* const w = s.w + ky * s.pitch_w;
      Vec acc[SETS][KB] = {};
#pragma GCC unroll 16
      for (int k = 0; k < KB; ++k) acc[0][k] = load(w + k * L);
      for_row<Q, KB, SPREAD>(s, x, [&](int o, int k, Vec v) __attribute__((always_inline)) {
        acc[o % SETS][k] += v * grad[o];
      });
#pragma GCC unroll 16
      for (int k = 0; k < KB; ++k) {
        Vec sum = acc[0][k];
#pragma GCC unroll 4
        for (int set = 1; set < SETS; ++set) sum += acc[set][k];
        store(w + k * L, sum);
      }
    }
  }
}
