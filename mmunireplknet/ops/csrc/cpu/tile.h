// Tiles, the form in which everything is computed: [row][pixel][L] floats, L channels in the lanes, zero around.

struct Tile {
  float* data;    // pixel 0 of the first row
  int64_t pitch;  // floats from one row to the next
  int row0, row1;
  int width;
  int64_t step = L;  // floats from one pixel to the next; more where the tile lies in a tensor
};

// Where a tile lies in its scratch memory, for maps of a width and the convolutions that read and write it.
struct Shape {
  int width;
  int margin;  // pixels left of pixel 0
  int slack;   // pixels behind the last one
  MMUNI_INLINE int64_t pitch() const { return static_cast<int64_t>(margin + width + slack) * L; }
  MMUNI_INLINE int64_t floats(int64_t rows) const { return rows * pitch(); }
  MMUNI_INLINE Tile at(float* memory, int row0, int row1) const {
    return {memory + margin * L, pitch(), row0, row1, width};
  }
};

MMUNI_INLINE Vec load_as(const char* p, int type) {
  if (type == BFLOAT16) return from_bfloat16(*reinterpret_cast<const VecH*>(p));
  if (type == FLOAT16) return from_float16(*reinterpret_cast<const VecH*>(p));
  return load(reinterpret_cast<const float*>(p));
}
MMUNI_INLINE void store_as(char* p, int type, Vec v) {
  if (type == BFLOAT16) *reinterpret_cast<VecH*>(p) = to_bfloat16(v);
  else if (type == FLOAT16) *reinterpret_cast<VecH*>(p) = to_float16(v);
  else store(reinterpret_cast<float*>(p), v);
}
MMUNI_INLINE int size_of(int type) { return type == FLOAT ? 4 : 2; }

// The same for the first n < L elements, one after the other in memory.
MMUNI_INLINE Vec load_some(const char* p, int type, int n) {
  alignas(64) char buffer[4 * L] = {};
  memcpy(buffer, p, n * size_of(type));
  return load_as(buffer, type);
}
MMUNI_INLINE void store_some(char* p, int type, Vec v, int n) {
  alignas(64) char buffer[4 * L];
  store_as(buffer, type, v);
  memcpy(p, buffer, n * size_of(type));
}

// Goes through the pixels of rows [row0, row1) in blocks of L that may span rows, as the memory of a contiguous
// plane does; `pixel(y, x, i)` is called for each, the i-th of its block, and `block(first, n)` before each block.
template <typename OnBlock, typename OnPixel>
MMUNI_INLINE void for_blocks(int row0, int row1, int width, OnBlock block, OnPixel pixel) {
  int y = row0, x = 0;
  const int64_t end = static_cast<int64_t>(row1 - row0) * width;
  for (int64_t first = 0; first < end; first += L) {
    const int n = end - first < L ? static_cast<int>(end - first) : L;
    block(first, n);
    for (int i = 0; i < n; ++i) {
      pixel(y, x, i);
      if (++x == width) x = 0, ++y;
    }
  }
}

// `channels` of the L channels exist; the other lanes are zero.
template <int TYPE>
void read_planes(const Map& map, const char* base, int channels, const Tile& t) {
  const int64_t size = size_of(TYPE);
  Vec r[L];
  for_blocks(
      t.row0, t.row1, t.width,
      [&](int64_t first, int n) {
        const char* p = base + (t.row0 * map.stride_h + first) * size;
        for (int c = 0; c < L; ++c) {
          const char* q = p + c * map.stride_c * size;
          r[c] = c >= channels ? Vec{} : n == L ? load_as(q, TYPE) : load_some(q, TYPE, n);
        }
        transpose(r);
      },
      [&](int y, int x, int i) { store(t.data + (y - t.row0) * t.pitch + x * L, r[i]); });
}

template <int TYPE>
void write_planes(const Map& map, char* base, int channels, const Tile& t) {
  const int64_t size = size_of(TYPE);
  Vec r[L] = {};
  int64_t begin = 0;
  int count = 0;
  const auto flush = [&] {
    if (!count) return;
    transpose(r);
    for (int c = 0; c < channels; ++c) {
      char* q = base + (t.row0 * map.stride_h + begin + c * map.stride_c) * size;
      if (count == L) store_as(q, TYPE, r[c]);
      else store_some(q, TYPE, r[c], count);
    }
  };
  for_blocks(
      t.row0, t.row1, t.width,
      [&](int64_t first, int n) {
        flush();
        begin = first, count = n;
      },
      [&](int y, int x, int i) { r[i] = load(t.data + (y - t.row0) * t.pitch + x * L); });
  flush();
}

template <int TYPE>
void read_rows(const Map& map, const char* base, int channels, const Tile& t) {
  const int64_t size = size_of(TYPE);
  for (int y = t.row0; y < t.row1; ++y) {
    float* out = t.data + (y - t.row0) * t.pitch;
    for (int x = 0; x < t.width; ++x, out += L) {
      const char* p = base + (y * map.stride_h + x * map.stride_w) * size;
      if (map.stride_c == 1) {
        store(out, channels == L ? load_as(p, TYPE) : load_some(p, TYPE, channels));
      } else {
        store(out, Vec{});
        for (int c = 0; c < channels; ++c) out[c] = load_some(p + c * map.stride_c * size, TYPE, 1)[0];
      }
    }
  }
}

template <int TYPE>
void write_rows(const Map& map, char* base, int channels, const Tile& t) {
  const int64_t size = size_of(TYPE);
  for (int y = t.row0; y < t.row1; ++y) {
    const float* in = t.data + (y - t.row0) * t.pitch;
    for (int x = 0; x < t.width; ++x, in += L) {
      char* p = base + (y * map.stride_h + x * map.stride_w) * size;
      if (map.stride_c == 1) {
        if (channels == L) store_as(p, TYPE, load(in));
        else store_some(p, TYPE, load(in), channels);
      } else {
        for (int c = 0; c < channels; ++c) store_some(p + c * map.stride_c * size, TYPE, splat(in[c]), 1);
      }
    }
  }
}

MMUNI_INLINE bool is_planar(const Map& map, const Tile& t) {
  return map.stride_w == 1 && map.stride_h == t.width && map.stride_c != 1;
}

template <int TYPE>
void read_typed(const Map& map, int64_t n, int c0, int channels, const Tile& t) {
  const char* base = map.data + (n * map.stride_n + c0 * map.stride_c) * size_of(TYPE);
  if (is_planar(map, t)) read_planes<TYPE>(map, base, channels, t);
  else read_rows<TYPE>(map, base, channels, t);
}
template <int TYPE>
void write_typed(const Map& map, int64_t n, int c0, int channels, const Tile& t) {
  char* base = map.data + (n * map.stride_n + c0 * map.stride_c) * size_of(TYPE);
  if (is_planar(map, t)) write_planes<TYPE>(map, base, channels, t);
  else write_rows<TYPE>(map, base, channels, t);
}

// Image n, channels [c0, c0 + channels), rows of the tile: from the map into the tile, and back.
void read_tile(const Map& map, int64_t n, int c0, int channels, const Tile& t) {
  if (map.type == FLOAT) read_typed<FLOAT>(map, n, c0, channels, t);
  else if (map.type == BFLOAT16) read_typed<BFLOAT16>(map, n, c0, channels, t);
  else read_typed<FLOAT16>(map, n, c0, channels, t);
}
void write_tile(const Map& map, int64_t n, int c0, int channels, const Tile& t) {
  if (map.type == FLOAT) write_typed<FLOAT>(map, n, c0, channels, t);
  else if (map.type == BFLOAT16) write_typed<BFLOAT16>(map, n, c0, channels, t);
  else write_typed<FLOAT16>(map, n, c0, channels, t);
}
