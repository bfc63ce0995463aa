// Minimal filtering F(2, 3) along the rows: fewer multiplications for kernels with many rows.
//
// Two neighbouring rows of the output, y and y + 1, meet three neighbouring rows g0, g1, g2 of the kernel in four rows
// d0, ..., d3 of the input. Instead of 6 products of rows there are 4 (S. Winograd, Arithmetic Complexity of
// Computations, 1980; A. Lavin and S. Gray, arXiv:1509.09308):
//   m0 = (d0 - d2) g0,  m1 = (d1 + d2) (g0 + g1 + g2) / 2,  m2 = (d1 - d2) (g1 - g0 - g2) / 2,  m3 = (d1 - d3) (-g2),
//   out[y] = m0 + m1 + m2,  out[y + 1] = m1 - m2 + m3.
// Over all triples of rows of the kernel each m is a convolution with a third of the rows. Its input is formed from two
// rows where it is loaded: adding costs less than tiles of sums, which would go through the second-level cache. The one
// or two rows of the kernel that are left over, and the last row of a map of odd height, go the plain way.

struct Term {
  int near, far;  // which of d0, ..., d3
  uint32_t flip;  // their sum, or with the sign bit their difference
  int odd;        // whether the product goes to y or to y + 1 ...
  float second;   // ... or, where this is not 0, to y and multiplied by this to y + 1
};
constexpr int TERMS = 4;
constexpr uint32_t MINUS = 0x80000000;
constexpr Term TERM[TERMS] = {{0, 2, MINUS, 0, 0}, {1, 2, 0, 0, 1}, {1, 2, MINUS, 0, -1}, {1, 3, MINUS, 1, 0}};
constexpr int ROWS_BESIDE = 2;  // rows of zeros that the terms read above and below the input

// A kernel, and whether it is applied by minimal filtering. The transformed kernel lies behind the kernel itself:
// [term][triple][column][L].
struct Filter {
  int kernel, dilation;
  bool minimal;

  Filter(int height, int width, int kernel, int dilation);
  MMUNI_INLINE int reach() const { return dilation * (kernel / 2); }
  MMUNI_INLINE int triples() const { return kernel / 3; }
  MMUNI_INLINE int rows_beside() const { return minimal ? ROWS_BESIDE : 0; }
  MMUNI_INLINE int64_t row() const { return static_cast<int64_t>(kernel) * L; }
  MMUNI_INLINE int64_t floats() const { return row() * (kernel + (minimal ? TERMS * triples() : 0)); }
  MMUNI_INLINE float* term(float* weight, int i) const { return weight + (kernel + i * triples()) * row(); }

  MMUNI_INLINE Rows plain(int ky0) const { return {ky0, kernel, 1, dilation, reach()}; }
  // Of pairs of rows of the output that begin with row y0; pitches in floats.
  MMUNI_INLINE Rows paired(const Term& t, int y0, int64_t pitch, int64_t pitch_out) const {
    const int64_t second = t.second ? pitch_out : 0;
    return {0, triples(), 2, 3, reach() - t.near - y0, (t.far - t.near) * pitch, t.flip, second, t.second};
  }
};

// How often a row of the kernel meets one of the rows [row0, row1) of the input, for `count` rows of the output from y0.
int64_t meetings(const Rows& rows, int row0, int row1, int y0, int count) {
  Strip s = {};
  s.rows = rows, s.row0 = row0, s.row1 = row1;
  int64_t sum = 0;
  for (int y = y0; y < y0 + count; ++y) sum += max(0, last_row<DENSE>(s, y) - first_row<DENSE>(s, y));
  return sum;
}

// Whether there are paired strips for a map of this width.
bool has_paired(int width, int kernel) {
  const Columns columns(width, kernel, 1);
  const int groups = static_cast<int>(divide_up(columns.taps, MAX_TAPS));
  for (int g = 0; g < groups; ++g)
    if (!is_paired((g + 1) * columns.taps / groups - g * columns.taps / groups)) return false;
  return columns.pixels(0) >= MIN_PAIRED_PIXELS;
}

// The rows that meet are counted, since on small maps many are left out in either form. A quarter less of them is what
// pays for going over the output five times: it takes maps of some 12 rows.
Filter::Filter(int height, int width, int kernel, int dilation) : kernel(kernel), dilation(dilation), minimal(false) {
  if (dilation > 1 || !has_paired(width, kernel)) return;
  const int odd = height % 2, even = height - odd;
  const int64_t direct = meetings(plain(0), 0, height, 0, height);
  int64_t fewer = meetings(plain(3 * triples()), 0, height, 0, even) + meetings(plain(0), 0, height, even, odd);
  for (const Term& t : TERM) fewer += meetings(paired(t, 0, 1, 1), t.near - t.far, height, 0, even / 2);
  minimal = 4 * fewer <= 3 * direct;
}

// Calls f for every column of every triple of rows of the kernel: where it is, floats to the next row, where the first of
// the transformed ones is, floats to the next of these.
template <typename F>
MMUNI_INLINE void for_triples(const Filter& filter, float* weight, F f) {
  if (!filter.minimal) return;
  const int64_t row = filter.row(), columns = filter.triples() * row;
  for (int64_t i = 0; i < columns; i += L)
    f(weight + 3 * (i / row) * row + i % row, row, filter.term(weight, 0) + i, columns);
}
void transform_weight(const Filter& filter, float* weight) {
  for_triples(filter, weight, [](const float* g, int64_t row, float* m, int64_t term) {
    const Vec g0 = load(g), g1 = load(g + row), g2 = load(g + 2 * row);
    store(m, g0);
    store(m + term, (g1 + (g0 + g2)) * 0.5f);
    store(m + 2 * term, (g1 - (g0 + g2)) * 0.5f);
    store(m + 3 * term, -g2);
  });
}
// The transpose: adds the gradient for the transformed kernel to that for the kernel.
void transform_weight_grad(const Filter& filter, float* weight) {
  for_triples(filter, weight, [](float* g, int64_t row, const float* m, int64_t term) {
    const Vec m1 = load(m + term), m2 = load(m + 2 * term);
    store(g, load(g) + (load(m) + (m1 - m2) * 0.5f));
    store(g + row, load(g + row) + (m1 + m2) * 0.5f);
    store(g + 2 * row, load(g + 2 * row) + ((m1 - m2) * 0.5f - load(m + 3 * term)));
  });
}

// Both directions, as for_strips. Rows of zeros must lie above and below x.
void for_terms(const Table& table, const Filter& filter, const Tile& x, float* w, const float* bias, const Tile& out,
               bool accumulate) {
  const int kernel = filter.kernel, height = out.row1 - out.row0, pairs = height / 2;
  const Tile even = {out.data, out.pitch, out.row0, out.row0 + 2 * pairs, out.width, out.step};
  const Tile last = {out.data + 2 * pairs * out.pitch, out.pitch, even.row1, out.row1, out.width, out.step};
  for_strips(table, x, w, bias, kernel, 1, filter.plain(3 * filter.triples()), even, accumulate);
  for_strips(table, x, w, bias, kernel, 1, filter.plain(0), last, accumulate);
  for (int i = 0; i < TERMS; ++i) {
    const Term& t = TERM[i];
    const int beside = t.far - t.near;
    const Tile in = {x.data - beside * x.pitch, x.pitch, x.row0 - beside, x.row1, x.width, x.step};
    const Tile to = {out.data + t.odd * out.pitch, 2 * out.pitch, 0, pairs, out.width, out.step};
    const Rows rows = filter.paired(t, out.row0, x.pitch, out.pitch);
    for_strips(table, in, filter.term(w, i), nullptr, kernel, 1, rows, to, true);
  }
}

// out = conv(x, w) + bias, or out += conv(x, w). Writes up to Shape::slack pixels behind each row.
void convolve(const Filter& filter, const Tile& x, float* w, const float* bias, const Tile& out, bool accumulate) {
  if (filter.minimal) for_terms(tables.forward, filter, x, w, bias, out, accumulate);
  else for_strips(tables.forward, x, w, bias, filter.kernel, filter.dilation, filter.plain(0), out, accumulate);
}

// w += the gradient for the kernel, up to transform_weight_grad. The pixels behind each row of `grad` must be zero.
void correlate(const Filter& filter, const Tile& x, const Tile& grad, float* w) {
  if (filter.minimal) for_terms(tables.weight_grad, filter, x, w, nullptr, grad, false);
  else for_strips(tables.weight_grad, x, w, nullptr, filter.kernel, filter.dilation, filter.plain(0), grad, false);
}
