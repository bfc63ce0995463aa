// The machine behind device.h.
#include <ucontext.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "device.h"
#include "machine.h"
#include "tensor_core.h"

Dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

int processors = 2;
int64_t conflicts = 0;
int64_t copies[17] = {};

namespace {

constexpr int LANES = 32;
constexpr size_t STACK = 128 * 1024;

struct Copy {
  uint32_t to;
  const void* from;
  size_t bytes;
  bool inside;
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[STACK]};
  bool done = false;
  std::vector<std::vector<Copy>> groups;
};

struct Warp {
  void* operands[LANES];
  const char* name = nullptr;
  int arrived = 0;
  uint32_t epoch = 1;  // number of __syncwarp so far
};

// Who touched a byte of shared memory last, and when: in the time of the block and of the warp.
struct Touch {
  int thread = -1;  // SEVERAL for more than one of the warp, EVERYBODY for more than one warp
  int warp = -1;
  uint32_t block_epoch = 0, warp_epoch = 0;
};
enum { SEVERAL = -2, EVERYBODY = -3 };
enum class State : uint8_t { UNWRITTEN, PENDING, READY };
struct Byte {
  State state = State::UNWRITTEN;
  Touch written, read;
};

struct Region {
  const char *begin, *end;
  std::vector<bool> written;
};
std::vector<std::unique_ptr<Thread>> pool;
std::vector<Warp> warps;
std::vector<unsigned char> memory;
std::vector<Byte> bytes;
std::vector<Region> regions;
std::vector<int> runnable;
std::vector<int> at_barrier;
uint32_t block_epoch;
int current, alive;
ucontext_t scheduler;
std::string error;
std::function<void()> body;
std::mt19937 random_number;

void back_to_scheduler() { swapcontext(&pool[current]->context, &scheduler); }

void entry() {
  body();
  pool[current]->done = true;
  --alive;
  back_to_scheduler();
}

// Whether what `touch` says happened before what thread `me`, or its whole warp, does now.
bool before(const Touch& touch, int me) {
  if (touch.warp < 0 && touch.thread != EVERYBODY) return true;
  if (touch.block_epoch < block_epoch) return true;
  if (touch.thread == EVERYBODY) return false;
  const int warp = current / LANES;
  return touch.thread == me || (touch.warp == warp && touch.warp_epoch < warps[warp].epoch);
}

void note(Touch& touch, int me) {
  const int warp = current / LANES;
  const Touch now = {me, warp, block_epoch, warps[warp].epoch};
  const bool earlier = touch.warp >= 0 && touch.block_epoch == block_epoch;
  if (earlier && (touch.thread == EVERYBODY || touch.warp != warp)) {
    touch.thread = EVERYBODY;
  } else if (earlier && touch.warp_epoch == now.warp_epoch && touch.thread != me) {
    touch.thread = SEVERAL;
  } else {
    touch = now;
  }
}

void* touch_shared(uint32_t address, size_t count, bool write, int me) {
  if (address + count > bytes.size() || address % count)
    fail("address %u of %zu bytes: shared memory has %zu, and alignment is needed", address, count, bytes.size());
  for (size_t i = address; i < address + count; ++i) {
    Byte& byte = bytes[i];
    if (byte.state == State::PENDING) fail("byte %zu of shared memory is touched while a copy to it is under way", i);
    if (!write && byte.state == State::UNWRITTEN) fail("byte %zu of shared memory is read, but was never written", i);
    if (!before(byte.written, me)) fail("race: byte %zu of shared memory was written by another thread just now", i);
    if (write && !before(byte.read, me)) fail("race: byte %zu of shared memory may be read by others still", i);
    if (write) {
      byte.state = State::READY;
      byte.written = {me, current / LANES, block_epoch, warps[current / LANES].epoch};
    } else {
      note(byte.read, me);
    }
  }
  return memory.data() + address;
}

Region& region_of(const void* at, size_t count) {
  const char* p = static_cast<const char*>(at);
  if (reinterpret_cast<uintptr_t>(at) % count) fail("global address off its alignment of %zu bytes", count);
  for (Region& region : regions)
    if (p >= region.begin && p + count <= region.end) return region;
  fail("%zu bytes of global memory that are in no tensor", count);
  std::abort();
}

const char* run_block(int threads, int shared) {
  bytes.assign(shared, Byte());
  memory.assign(shared, 0xff);  // NaN in every type
  warps.assign((threads + LANES - 1) / LANES, Warp());
  at_barrier.clear();
  runnable.clear();
  block_epoch = 1;
  alive = threads;
  while (static_cast<int>(pool.size()) < threads) pool.push_back(std::make_unique<Thread>());
  for (int i = 0; i < threads; ++i) {
    Thread& thread = *pool[i];
    thread.done = false;
    thread.groups.assign(1, {});
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = STACK;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, entry, 0);
    runnable.push_back(i);
  }
  while (!runnable.empty()) {
    std::swap(runnable[random_number() % runnable.size()], runnable.back());
    current = runnable.back();
    runnable.pop_back();
    threadIdx.x = current;
    swapcontext(&scheduler, &pool[current]->context);
    if (!error.empty()) return error.c_str();
  }
  if (alive) return (error = "deadlock: threads wait for others that do something else").c_str();
  return "";
}
}  // namespace

void fail(const char* format, ...) {
  char text[256];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  if (error.empty()) error = std::string(text) + " (thread " + std::to_string(current) + ")";
  back_to_scheduler();  // never to come back
}

void* shared_read(uint32_t address, size_t count) { return touch_shared(address, count, false, current); }
void* shared_write(uint32_t address, size_t count) { return touch_shared(address, count, true, current); }

void global_read(const void* from, size_t count) {
  Region& region = region_of(from, count);
  if (region.written[static_cast<const char*>(from) - region.begin]) fail("global memory is read after it was written");
}

void global_write(const void* to, size_t count) {
  Region& region = region_of(to, count);
  for (size_t i = static_cast<const char*>(to) - region.begin, end = i + count; i < end; ++i) {
    if (region.written[i]) fail("global memory is written twice");
    region.written[i] = true;
  }
}

// Its effect comes at the last moment, when somebody waits for it; until then nobody may touch the bytes.
void copy_async(uint32_t to, const void* from, size_t count, bool inside) {
  if (inside) global_read(from, count);
  else if (reinterpret_cast<uintptr_t>(from) % count) fail("source of a copy off its alignment");
  touch_shared(to, count, true, current);
  for (size_t i = to; i < to + count; ++i) bytes[i].state = State::PENDING;
  copies[count] += inside;
  pool[current]->groups.back().push_back({to, from, count, inside});
}

void copy_commit() { pool[current]->groups.emplace_back(); }

void copy_wait(int pending) {
  auto& groups = pool[current]->groups;  // the last one is not committed
  while (static_cast<int>(groups.size()) > pending + 1) {
    for (const Copy& copy : groups.front()) {
      for (size_t i = copy.to; i < copy.to + copy.bytes; ++i) bytes[i].state = State::READY;
      void* to = touch_shared(copy.to, copy.bytes, true, current);
      if (copy.inside) std::memcpy(to, copy.from, copy.bytes);
      else std::memset(to, 0, copy.bytes);
    }
    groups.erase(groups.begin());
  }
}

void collective(const char* name, void* operand, const std::function<void(void**)>& together) {
  Warp& warp = warps[current / LANES];
  if (warp.arrived && std::strcmp(warp.name, name)) fail("lanes of a warp are at %s and at %s", warp.name, name);
  warp.name = name;
  warp.operands[current % LANES] = operand;
  if (++warp.arrived < LANES) return back_to_scheduler();
  warp.arrived = 0;
  together(warp.operands);
  for (int lane = 0; lane < LANES; ++lane)
    if (lane != current % LANES) runnable.push_back(current / LANES * LANES + lane);
}

void barrier() {
  at_barrier.push_back(current);
  if (static_cast<int>(at_barrier.size()) < static_cast<int>(blockDim.x)) return back_to_scheduler();
  ++block_epoch;
  for (int thread : at_barrier)
    if (thread != current) runnable.push_back(thread);
  at_barrier.clear();
}

void load_matrices(uint32_t (&r)[4], uint32_t address, bool transposed) {
  struct Operand {
    uint32_t* r;
    uint32_t address;
  } operand = {r, address};
  collective(transposed ? "ldmatrix.trans" : "ldmatrix", &operand, [=](void** operands) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t rows[8][8];
      unsigned banks = 0;
      for (int row = 0; row < 8; ++row) {
        const uint32_t from = static_cast<Operand*>(operands[8 * matrix + row])->address;
        conflicts += banks >> from / 16 % 8 & 1;
        banks |= 1u << from / 16 % 8;
        std::memcpy(rows[row], touch_shared(from, 16, false, SEVERAL), 16);
      }
      for (int lane = 0; lane < LANES; ++lane) {
        uint16_t two[2];
        for (int i = 0; i < 2; ++i) {
          const int row = lane / 4, column = lane % 4 * 2 + i;
          two[i] = transposed ? rows[column][row] : rows[row][column];
        }
        std::memcpy(&static_cast<Operand*>(operands[lane])->r[matrix], two, 4);
      }
    }
  });
}

namespace {

// D += A B for A of 16 x depth, with the row and column of element i of a lane's fragment.
template <typename PlaceA, typename PlaceB>
void multiply_fragments(const char* name, Product& mine, int depth, const PlaceA& place_a, const PlaceB& place_b) {
  collective(name, &mine, [&](void** operands) {
    float a[16][16] = {}, b[16][8] = {};
    const int in_a = 16 * depth / LANES, in_b = 8 * depth / LANES;
    for (int lane = 0; lane < LANES; ++lane) {
      const Product& product = *static_cast<Product*>(operands[lane]);
      for (int i = 0; i < in_a; ++i) {
        const auto [row, column] = place_a(lane >> 2, lane % 4, i);
        a[row][column] = product.a[i];
      }
      for (int i = 0; i < in_b; ++i) {
        const auto [row, column] = place_b(lane >> 2, lane % 4, i);
        b[row][column] = product.b[i];
      }
    }
    for (int lane = 0; lane < LANES; ++lane)
      for (int i = 0; i < 4; ++i) {
        const int row = (lane >> 2) + (i < 2 ? 0 : 8), column = lane % 4 * 2 + (i & 1);
        float& d = static_cast<Product*>(operands[lane])->d[i];
        for (int k = 0; k < depth; k += 8) d = add_products(d, a[row] + k, b + k, column);
      }
  });
}

}  // namespace

void multiply_16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], float (*read)(uint16_t)) {
  Product mine = {d, {}, {}};
  for (int i = 0; i < 8; ++i) mine.a[i] = read(static_cast<uint16_t>(a[i / 2] >> i % 2 * 16));
  for (int i = 0; i < 4; ++i) mine.b[i] = read(static_cast<uint16_t>(b[i / 2] >> i % 2 * 16));
  multiply_fragments(
      "mma.m16n8k16", mine, 16,
      [](int group, int in_group, int i) {
        const int row = (0 <= i && i < 2) || (4 <= i && i < 6) ? group : group + 8;
        return std::pair(row, in_group * 2 + (i & 1) + (i < 4 ? 0 : 8));
      },
      [](int group, int in_group, int i) { return std::pair(in_group * 2 + (i & 1) + (i < 2 ? 0 : 8), group); });
}

void multiply_8(float (&d)[4], const uint32_t (&a)[2], uint32_t b, float (*read)(uint16_t)) {
  Product mine = {d, {}, {}};
  for (int i = 0; i < 4; ++i) mine.a[i] = read(static_cast<uint16_t>(a[i / 2] >> i % 2 * 16));
  for (int i = 0; i < 2; ++i) mine.b[i] = read(static_cast<uint16_t>(b >> i * 16));
  multiply_fragments(
      "mma.m16n8k8", mine, 8,
      [](int group, int in_group, int i) { return std::pair(i < 2 ? group : group + 8, in_group * 2 + (i & 1)); },
      [](int group, int in_group, int i) { return std::pair(in_group * 2 + i, group); });
}

void multiply_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Product mine = {d, {}, {}};
  // The lower 13 bits of the operands are not seen.
  for (int i = 0; i < 4; ++i) mine.a[i] = mmuni::float_of(a[i] & ~0x1fffu);
  for (int i = 0; i < 2; ++i) mine.b[i] = mmuni::float_of(b[i] & ~0x1fffu);
  multiply_fragments(
      "mma.m16n8k8", mine, 8,
      [](int group, int in_group, int i) {
        return std::pair(i == 0 || i == 2 ? group : group + 8, i < 2 ? in_group : in_group + 4);
      },
      [](int group, int in_group, int i) { return std::pair(i == 0 ? in_group : in_group + 4, group); });
}

float half_to_float(uint16_t bits) {
  _Float16 value;
  std::memcpy(&value, &bits, 2);
  return value;
}

uint16_t float_to_half(float value) {
  const _Float16 narrow = value;
  uint16_t bits;
  std::memcpy(&bits, &narrow, 2);
  return bits;
}

uint16_t float_to_bfloat(float value) {
  const uint32_t bits = mmuni::bits_of(value);
  if (value != value) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

void allow(const void* begin, size_t count) {
  if (count) regions.push_back({static_cast<const char*>(begin), static_cast<const char*>(begin) + count, {}});
}
void forget() { regions.clear(); }
void seed(unsigned value) { random_number.seed(value); }

const char* run(const std::function<void()>& thread, int64_t blocks, int threads, int shared) {
  error.clear();
  if (threads % LANES || threads > 1024 || shared > 99 * 1024 || blocks < 1) return "no GPU can launch that";
  for (Region& region : regions) region.written.assign(region.end - region.begin, false);
  body = thread;
  blockDim.x = threads;
  gridDim.x = static_cast<unsigned>(blocks);
  for (int64_t block = 0; block < blocks; ++block) {
    blockIdx.x = static_cast<unsigned>(block);
    const char* problem = run_block(threads, shared);
    if (*problem) return problem;
  }
  return "";
}

}  // namespace emulation

void __syncwarp() {
  int unused;
  emulation::collective("__syncwarp", &unused, [](void**) { ++emulation::warps[emulation::current / 32].epoch; });
}

namespace mmuni {

float from_lane(float value, int distance) {
  struct Operand {
    float in, out;
  } operand = {value, 0};
  emulation::collective("shfl", &operand, [=](void** operands) {
    for (int lane = 0; lane < 32; ++lane)
      static_cast<Operand*>(operands[lane])->out = static_cast<Operand*>(operands[lane ^ distance])->in;
  });
  return operand.out;
}

}  // namespace mmuni
