// A kernel, and how the shipped `launch` starts it by the runtime of runtime.cpp.
#include "device.cuh"

struct Job {
  int value;
};
__global__ void kernel(const Job) {}

extern "C" const char* use(int device) { return mmuni::use_device(device); }
extern "C" const char* start(int shared) { return mmuni::launch(kernel, Job{1}, 1, 32, shared, nullptr); }
