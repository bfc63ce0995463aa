// How tensor cores add.
#pragma once

#include <cmath>

namespace emulation {

inline double cut(double value, double unit) { return std::trunc(value / unit) * unit; }

// Tensor cores do not round to the nearest: they cut off the terms of a sum below a bit or two beyond those of the
// largest, and then the sum (Fasi, Higham, Mikaitis and Pranesh, Numerical behavior of NVIDIA tensor cores, 2021).
inline float add_products(float d, const float* a, const float (*b)[8], int column) {
  double terms[9] = {d}, largest = std::fabs(d), sum = 0;
  for (int k = 0; k < 8; ++k) {
    terms[k + 1] = static_cast<double>(a[k]) * b[k][column];
    largest = std::fmax(largest, std::fabs(terms[k + 1]));
    sum += terms[k + 1];
  }
  if (!std::isfinite(sum += d) || largest == 0) return static_cast<float>(sum);
  const double unit = std::ldexp(1, std::ilogb(largest) - 24);
  sum = 0;
  for (double term : terms) sum += cut(term, unit);
  return sum ? static_cast<float>(cut(sum, std::ldexp(1, std::ilogb(sum) - 23))) : 0.f;
}

}  // namespace emulation
