// The two inner loops of the depthwise convolution, on tiles: [row][pixel][L] floats, channels in the lanes.
//
// A strip is Q pixels wide and runs down the tile. KB neighbouring taps of a kernel row are held in registers. In a dense
// strip the pixels are as far apart as the taps, so that a pixel, once loaded, meets all of them: Q * KB multiply-adds
// for Q + KB - 1 loads. That leaves few pixels for small maps and wide dilations; a SPREAD strip takes neighbouring
// pixels and loads one for every multiply-add. A PAIRED strip is a dense one of neighbouring pixels that takes the sum or
// the difference of two rows where the others take a row of the input, see minimal.h.

enum Mode { DENSE, SPREAD, PAIRED };

// Which rows meet: row y of the output and row ky of the kernel meet row stride * y + dilation * ky - above of the input.
struct Rows {
  int ky0, ky1;        // rows of the kernel that are wanted
  int stride;          // 2 in a paired strip
  int dilation;        // 3 in a paired strip
  int above;
  // Of paired strips: the input is x[0] + x[far], or x[0] - x[far] with the sign bit in `flip`. Where `second` is not 0,
  // a row of the output is two, so many floats apart: the first, and the second times `sign`.
  int64_t far = 0;
  uint32_t flip = 0;
  int64_t second = 0;
  float sign = 0;
};

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
  Rows rows;
  int row0;             // first input row that x points to ...
  int row1;             // ... and the one behind the last
  int y0, y1;           // output rows
  bool accumulate;      // forward: add to out instead of starting from the bias
};

// Wanted rows ky of the kernel that meet a row inside [row0, row1) from output row y, and the input there. The compiler
// knows the distances in paired strips: with a third of the rows for each y, working them out would show.
template <Mode MODE>
MMUNI_INLINE int top_row(const Strip& s, int y) {
  return (MODE == PAIRED ? 2 : s.rows.stride) * y - s.rows.above;
}
template <Mode MODE>
MMUNI_INLINE int row_distance(const Strip& s) {
  return MODE == PAIRED ? 3 : s.rows.dilation;
}
template <Mode MODE>
MMUNI_INLINE int first_row(const Strip& s, int y) {
  const int missing = s.row0 - top_row<MODE>(s, y), distance = row_distance<MODE>(s);
  const int first = missing <= 0 ? 0 : (missing + distance - 1) / distance;
  return first > s.rows.ky0 ? first : s.rows.ky0;
}
template <Mode MODE>
MMUNI_INLINE int last_row(const Strip& s, int y) {
  const int room = s.row1 - 1 - top_row<MODE>(s, y);
  const int last = room < 0 ? 0 : room / row_distance<MODE>(s) + 1;
  return last < s.rows.ky1 ? last : s.rows.ky1;
}
template <Mode MODE>
MMUNI_INLINE const float* input_row(const Strip& s, int y, int ky) {
  return s.x + (top_row<MODE>(s, y) + row_distance<MODE>(s) * ky - s.row0) * s.pitch_x;
}

// Calls f(pixel, tap, value of the input there) for all of a row.
template <int Q, int KB, Mode MODE, typename F>
MMUNI_INLINE void for_row(const Strip& s, const float* x, F f) {
  if constexpr (MODE == SPREAD) {
#pragma GCC unroll 16
    for (int k = 0; k < KB; ++k)
#pragma GCC unroll 16
      for (int o = 0; o < Q; ++o) f(o, k, load(x + o * s.step + k * s.tap_step));
  } else {
    const int step = MODE == PAIRED ? L : s.step;
    const float* const far = x + s.rows.far;
#pragma GCC unroll 32
    for (int j = 0; j < Q + KB - 1; ++j) {
      Vec v = load(x + j * step);
      if constexpr (MODE == PAIRED) v += as_float(as_bits(load(far + j * step)) ^ s.rows.flip);
#pragma GCC unroll 16
      for (int o = 0; o < Q; ++o)
        if (j - o >= 0 && j - o < KB) f(o, j - o, v);
    }
  }
}

template <int Q, int KB, Mode MODE>
void forward_strip(const Strip& s) {
  const int64_t step_out = MODE == PAIRED ? L : s.step_out;
  for (int y = s.y0; y < s.y1; ++y) {
    float* const out = s.out + (y - s.y0) * s.pitch_out;
    Vec acc[Q];
    const Vec start = s.bias ? load(s.bias) : Vec{};
#pragma GCC unroll 16
    for (int o = 0; o < Q; ++o) acc[o] = s.accumulate ? load(out + o * step_out) : start;
    const int last = last_row<MODE>(s, y);
    for (int ky = first_row<MODE>(s, y); ky < last; ++ky) {
      const float* const x = input_row<MODE>(s, y, ky);
      const float* const w = s.w + ky * s.pitch_w;
      Vec tap[KB];
#pragma GCC unroll 16
      for (int k = 0; k < KB; ++k) tap[k] = load(w + k * L);
      for_row<Q, KB, MODE>(s, x, [&](int o, int k, Vec v) __attribute__((always_inline)) { acc[o] += v * tap[k]; });
    }
    if (MODE == PAIRED && s.rows.second) {
#pragma GCC unroll 16
      for (int o = 0; o < Q; ++o) {
        float* const p = out + o * step_out;
        store(p, load(p) + acc[o]);
        store(p + s.rows.second, load(p + s.rows.second) + s.rows.sign * acc[o]);
      }
      continue;
    }
#pragma GCC unroll 16
    for (int o = 0; o < Q; ++o) store(out + o * step_out, acc[o]);
  }
}

template <int Q, int KB, Mode MODE>
void weight_grad_strip(const Strip& s) {
  const int64_t step_out = MODE == PAIRED ? L : s.step_out;
  // A sum waits for itself: with few taps, several sums a tap keep the multipliers busy.
  constexpr int SETS = MAX_TAPS < 6 ? 1 : KB < 4 ? 4 : KB < 8 ? 2 : 1;
  for (int y = s.y0; y < s.y1; ++y) {
    const float* const out = s.out + (y - s.y0) * s.pitch_out;
    Vec grad[Q];
#pragma GCC unroll 16
    for (int o = 0; o < Q; ++o) grad[o] = load(out + o * step_out);
    if (MODE == PAIRED && s.rows.second) {
#pragma GCC unroll 16
      for (int o = 0; o < Q; ++o) grad[o] += s.rows.sign * load(out + o * step_out + s.rows.second);
    }
    const int last = last_row<MODE>(s, y);
    for (int ky = first_row<MODE>(s, y); ky < last; ++ky) {
      const float* const x = input_row<MODE>(s, y, ky);
      float* const w = s.w + ky * s.pitch_w;
      Vec acc[SETS][KB] = {};
#pragma GCC unroll 16
      for (int k = 0; k < KB; ++k) acc[0][k] = load(w + k * L);
      for_row<Q, KB, MODE>(s, x, [&](int o, int k, Vec v) __attribute__((always_inline)) {
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
