// Vectors of floats whose width is that of the instruction set this file is compiled for.
//
// Included by kernels_*.cpp only, inside an anonymous namespace and after the target has been set, so that no
// function of one instruction set is ever linked into another's code. No standard C++ header may be included here
// for the same reason: their inline functions have one copy in the whole library.

// MMUNI_LANES, MMUNI_MAX_TAPS and MMUNI_MAX_PIXELS are set by the including file. The last two follow from the number
// of registers: Q pixels, KB taps and one value stand in them at once.

#define MMUNI_INLINE inline __attribute__((always_inline))

constexpr int L = MMUNI_LANES;
constexpr int MAX_TAPS = MMUNI_MAX_TAPS;
constexpr int MAX_PIXELS = MMUNI_MAX_PIXELS;

typedef float Vec __attribute__((vector_size(4 * L), may_alias));
typedef float VecU __attribute__((vector_size(4 * L), aligned(4), may_alias));  // at any address
typedef int32_t VecI __attribute__((vector_size(4 * L), may_alias));
typedef uint32_t VecW __attribute__((vector_size(4 * L), may_alias));
typedef uint16_t VecH __attribute__((vector_size(2 * L), aligned(2), may_alias));

MMUNI_INLINE Vec load(const float* p) { return *reinterpret_cast<const VecU*>(p); }
MMUNI_INLINE void store(float* p, Vec v) { *reinterpret_cast<VecU*>(p) = v; }
MMUNI_INLINE Vec splat(float v) { return Vec{} + v; }

#if defined(__clang__)
#define MMUNI_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define MMUNI_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, VecI{__VA_ARGS__})
#endif

// Interleaved lanes of a and b: (a0 b0 a1 b1 ...), the lower and the upper half.
#if MMUNI_LANES == 16
MMUNI_INLINE Vec zip_lo(Vec a, Vec b) {
  return MMUNI_SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
MMUNI_INLINE Vec zip_hi(Vec a, Vec b) {
  return MMUNI_SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
#elif MMUNI_LANES == 8
MMUNI_INLINE Vec zip_lo(Vec a, Vec b) { return MMUNI_SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
MMUNI_INLINE Vec zip_hi(Vec a, Vec b) { return MMUNI_SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15); }
#else
MMUNI_INLINE Vec zip_lo(Vec a, Vec b) { return MMUNI_SHUFFLE(a, b, 0, 4, 1, 5); }
MMUNI_INLINE Vec zip_hi(Vec a, Vec b) { return MMUNI_SHUFFLE(a, b, 2, 6, 3, 7); }
#endif

// Transpose the L x L matrix r in place: log2(L) rounds of a perfect shuffle of its rows.
MMUNI_INLINE void transpose(Vec (&r)[L]) {
#pragma GCC unroll 4
  for (int round = 1; round < L; round *= 2) {
    Vec t[L];
#pragma GCC unroll 8
    for (int i = 0; i < L / 2; ++i) {
      t[2 * i] = zip_lo(r[i], r[i + L / 2]);
      t[2 * i + 1] = zip_hi(r[i], r[i + L / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) r[i] = t[i];
  }
}

MMUNI_INLINE Vec as_float(VecW bits) { return reinterpret_cast<const Vec&>(bits); }
MMUNI_INLINE VecW as_bits(Vec v) { return reinterpret_cast<const VecW&>(v); }
MMUNI_INLINE VecW select(VecI mask, VecW yes, VecW no) {
  const VecW m = reinterpret_cast<const VecW&>(mask);
  return (yes & m) | (no & ~m);
}

// Sixteen-bit numbers and back, rounding to the nearest even one as torch does.
MMUNI_INLINE Vec from_bfloat16(VecH h) { return as_float(__builtin_convertvector(h, VecW) << 16); }

MMUNI_INLINE VecH to_bfloat16(Vec v) {
  const VecW bits = as_bits(v);
  const VecW rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return __builtin_convertvector(select(v != v, VecW{} + 0x7fc0, rounded), VecH);
}

MMUNI_INLINE Vec from_float16(VecH h) {
  const VecW bits = __builtin_convertvector(h, VecW);
  const VecW magnitude = (bits & 0x7fff) << 13;
  // The exponent is off by 112; the product repairs it for subnormal numbers too.
  const VecW finite = as_bits(as_float(magnitude) * splat(0x1p112f));
  const VecW special = magnitude | 0x7f800000;  // infinity and NaN
  return as_float(select(magnitude >= (VecW{} + 0x0f800000), special, finite) | ((bits & 0x8000) << 16));
}

MMUNI_INLINE VecH to_float16(Vec v) {
  const VecW bits = as_bits(v), sign = bits & 0x80000000, magnitude = bits ^ sign;
  // Adding a power of two whose last place is that of the half rounds the mantissa by the hardware.
  const VecW floor = VecW{} + 0x38800000;  // 2^-14, the smallest normal half
  const VecW exponent = select(magnitude < floor, floor, magnitude) & 0x7f800000;
  const Vec magic = as_float(exponent + (13u << 23));
  const VecW rounded = as_bits(as_float(magnitude) + magic) - as_bits(magic);  // in units of the last place
  const VecW half = ((exponent - floor) >> 13) + rounded;
  const VecW finite = select(half > (VecW{} + 0x7c00), VecW{} + 0x7c00, half);
  const VecW large = select(magnitude > (VecW{} + 0x7f800000), VecW{} + 0x7e00, VecW{} + 0x7c00);
  const VecW value = select(magnitude >= (VecW{} + 0x47800000), large, finite);  // 2^16 and above
  return __builtin_convertvector(value | (sign >> 16), VecH);
}
