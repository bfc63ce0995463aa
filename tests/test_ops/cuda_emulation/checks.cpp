// Kernels that are wrong, each in one way, and the matrix instructions alone: tests of the machine itself.
#include <cstring>

#include "device.h"
#include "machine.h"

using namespace mmuni;

namespace {

struct Job {
  const char* mistake;
  uint32_t* data;  // 64 numbers
};

void wrong(Job job) {
  const auto is = [&](const char* name) { return !std::strcmp(job.mistake, name); };
  const uint32_t i = threadIdx.x, next = (i + 1) % 64;
  if (is("unwritten")) load_shared<uint32_t>(i * 4);
  if (is("outside shared memory")) store_shared<uint32_t>(1024, 0);
  if (is("outside the tensors")) load_global(job.data + 64);
  if (is("unaligned")) copy_async<16>(i * 16, job.data + 1, true);
  if (is("twice")) store_global(job.data, i);
  if (is("divergent")) i < 16 ? __syncwarp() : static_cast<void>(from_lane(0, 1));
  if (is("deadlock") && i < 32) __syncthreads();
  if (is("copy not awaited")) {
    copy_async<4>(i * 4, job.data + i, true);
    copy_commit();
    load_shared<uint32_t>(i * 4);
  }
  if (is("copy of others")) {
    copy_async<4>(i * 4, job.data + i, true);
    copy_commit();
    copy_wait<0>();
    load_shared<uint32_t>(next * 4);
  }
  if (is("no barrier")) {
    store_shared(i * 4, i);
    load_shared<uint32_t>(next * 4);
  }
  if (is("barrier of the warp alone")) {
    store_shared(i * 4, i);
    __syncwarp();
    load_shared<uint32_t>(next * 4);
  }
  if (is("written over too early")) {
    store_shared(i * 4, i);
    __syncthreads();
    load_shared<uint32_t>(next * 4);
    store_shared(i * 4, i);
  }
  if (is("")) {
    copy_async<4>(i * 4, job.data + i, true);
    copy_commit();
    copy_wait<0>();
    __syncthreads();
    const uint32_t value = load_shared<uint32_t>(next * 4);
    __syncthreads();
    store_shared(i * 4, value);
    __syncwarp();
    load_shared<uint32_t>((i ^ 1) * 4);
  }
}

struct Product {
  int type;  // 0 and 1 for 16 and 8 deep in half precision, 2 for TF32
  const uint32_t *a, *b;
  float* d;
};

void multiply_alone(Product job) {
  const uint32_t *a = job.a + threadIdx.x * 4, *b = job.b + threadIdx.x * 2;
  float d[4] = {};
  if (job.type == 0) multiply<Half>(d, a[0], a[1], a[2], a[3], b[0], b[1]);
  if (job.type == 1) multiply_half<Half>(d, a[0], a[1], b[0]);
  if (job.type == 2) multiply<float>(d, a[0], a[1], a[2], a[3], b[0], b[1]);
  std::memcpy(job.d + threadIdx.x * 4, d, 16);
}

struct Matrices {
  const uint16_t* rows;  // 32 rows of 8
  uint32_t* r;
  bool transposed;
};

void load_alone(Matrices job) {
  for (int i = 0; i < 8; ++i) store_shared(threadIdx.x * 16 + i * 2, job.rows[threadIdx.x * 8 + i]);
  __syncthreads();
  uint32_t r[4];
  job.transposed ? load_matrices_transposed(r, threadIdx.x * 16) : load_matrices(r, threadIdx.x * 16);
  std::memcpy(job.r + threadIdx.x * 4, r, 16);
}

}  // namespace

extern "C" {

const char* make_mistake(const char* mistake, uint32_t* data, unsigned seed) {
  emulation::forget();
  emulation::allow(data, 64 * 4);
  emulation::seed(seed);
  return launch(wrong, {mistake, data}, 1, 64, 1024, nullptr);
}

const char* product(int type, const uint32_t* a, const uint32_t* b, float* d) {
  return launch(multiply_alone, {type, a, b, d}, 1, 32, 0, nullptr);
}

const char* matrices(const uint16_t* rows, uint32_t* r, bool transposed) {
  return launch(load_alone, {rows, r, transposed}, 1, 32, 512, nullptr);
}
}
