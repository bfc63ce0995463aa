// What the kernels of every instruction set offer to depthwise.cpp. Plain data only.
#pragma once

#include <stdint.h>

namespace mmuni {

// Memory for `count` floats, aligned to a cache line, to be given to free(). Throws where there is none.
float* allocate(int64_t count);

enum Type { FLOAT, BFLOAT16, FLOAT16 };

// A tensor (N, C, H, W) of any strides, counted in elements.
struct Map {
  char* data;
  int type;
  int64_t stride_n, stride_c, stride_h, stride_w;
};

struct Size {
  int64_t n, c;
  int h, w;
};

// Stride 1, same padding: `out` has the size of `x`. `flip` turns the kernel by 180 degrees, which makes it the
// gradient for the input.
struct Forward {
  Size size;
  Map x, out;
  const float* weight;  // (C, K, K)
  const float* bias;    // (C) or nullptr
  int kernel, dilation;
  bool flip;
  int bands;  // parts that the rows of a map are cut into
};

// Gradient for the weight. The maps are cut into `bands` and shared out among `chunks`, whose partial sums are added
// in their order: the result depends on neither the number of threads nor their timing.
struct WeightGrad {
  Size size;
  Map x, grad;
  float* out;      // (C, K, K)
  float* partial;  // (blocks, chunks, K, K, lanes)
  int kernel, dilation;
  int bands, chunks;
};

constexpr int MAX_BRANCHES = 12;

struct Branch {
  int kernel, dilation;
  const float* weight;  // (C, K, K)
  const float* gamma;   // (C)
  float* mean;          // (C), of the batch
  float* var;           // (C), of the batch, biased
  float* grad_weight;   // (C, K, K)
  float* grad_gamma;    // (C)
  float eps;
};

// Which of the sums over all pixels backward computes: grad_beta and every grad_gamma of this process. What goes back
// through the normalization needs those of all processes that share the batch.
enum Sums {
  COMPUTED,  // compute them, and go on with them
  ALONE,     // compute them, and nothing else
  GIVEN      // take them as they are
};

// Sum of batch-normalized convolutions of one input, in training mode. Forward fills mean and var and, where it
// is given, y; backward fills the gradients.
struct Block {
  Size size;
  Map x, y;
  Map grad, grad_x;   // grad_x where it is given
  const float* beta;  // (C), the sum over all branches
  float* grad_beta;   // (C), the same for every branch
  Branch branches[MAX_BRANCHES];
  int count;
  Sums sums;
  double pixels;      // N H W of all processes, for backward
};

// Maps (N, pixels, C), contiguous, all of one type; f is GELU or the identity. The coefficients are (N, C).
//   apply: out = f(x) * scale + shift + residual
//   grad:  out = (grad * scale + shift + slope * f(x)) * f'(x)
//   sums:  for each task the sums over its pixels, (2, C): of a and a * a, or with grad of grad * a and grad, where
//          a = f(x) - pivot; f(x) goes to out where that is given
// Absent coefficients are 0, an absent scale is 1. A task is one of the chunks of one image.
struct Pointwise {
  int64_t n, pixels, channels, chunks;
  int type;
  bool gelu;
  const char *x, *grad, *residual;
  char* out;
  const float *scale, *shift, *slope;
  const float* pivot;  // (C)
  float* sums;         // (N, chunks, 2, C)
};

// The kernels of one instruction set; the functions run the tasks [begin, end). A task of the convolutions is one block
// of `lanes` channels of a part of the maps, unless another is named; that of the last three see Pointwise.
struct Kernels {
  const char* name;
  int lanes;
  int64_t (*plan_forward)(Forward&, int64_t threads);  // both return the number of tasks
  int64_t (*plan_weight_grad)(WeightGrad&);
  void (*forward)(const Forward&, int64_t begin, int64_t end);
  void (*weight_grad)(const WeightGrad&, int64_t begin, int64_t end);
  void (*sum_partial)(const WeightGrad&, int64_t begin, int64_t end);   // tasks: blocks of channels
  void (*block_forward)(const Block&, int64_t begin, int64_t end);      // tasks: blocks of channels
  void (*block_backward)(const Block&, int64_t begin, int64_t end);
  void (*apply)(const Pointwise&, int64_t begin, int64_t end);
  void (*grad)(const Pointwise&, int64_t begin, int64_t end);
  void (*sums)(const Pointwise&, int64_t begin, int64_t end);
};

extern const Kernels portable_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
#endif

}  // namespace mmuni
