// What the host's side of a kernel calls of CUDA's runtime, as its reference describes it, for a GPU that is not there:
// - a launch with more than 48 KiB of shared memory is an error unless the kernel's attribute allows as much;
// - the attribute is the kernel's, whichever thread sets it, and the last value counts;
// - an error is kept until cudaGetLastError has returned it;
// - a device that is current stays so until another one is set.
#include <cstddef>

namespace {

constexpr int SUCCESS = 0, INVALID_VALUE = 1, INVALID_DEVICE = 101, NO_KERNEL_IMAGE = 209, MOST = 99 * 1024;

struct Dim3 {
  unsigned x, y, z;
};

int allowed, last_error;
size_t configured;
bool code;  // whether the GPU has some for the kernel
int device, devices, switches;  // the current one, their number, and how often another one was set
void (*meanwhile)();  // what another thread does right after an attribute has been set

int note(int error) {
  if (error) last_error = error;
  return error;
}

int launched(size_t shared) {
  if (!code) return note(NO_KERNEL_IMAGE);
  return note(shared > static_cast<size_t>(allowed) ? INVALID_VALUE : SUCCESS);
}

}  // namespace

extern "C" {

void begin(void (*other)()) { allowed = 48 * 1024, last_error = SUCCESS, meanwhile = other, code = true; }
void has_code(bool it_has) { code = it_has; }
void has_devices(int count, int current) { devices = count, device = current, switches = 0; }
int current_device() { return device; }
int switched() { return switches; }

int cudaGetDevice(int* current) {
  *current = device;
  return note(devices ? SUCCESS : INVALID_DEVICE);
}
int cudaSetDevice(int wanted) {
  if (wanted >= devices) return note(INVALID_DEVICE);
  ++switches, device = wanted;
  return SUCCESS;
}

int cudaFuncSetAttribute(const void*, int, int value) {
  if (!code) return note(NO_KERNEL_IMAGE);
  if (value > MOST) return note(INVALID_VALUE);
  allowed = value;
  if (void (*now)() = meanwhile) meanwhile = nullptr, now();
  return SUCCESS;
}
int cudaGetLastError() {
  const int error = last_error;
  last_error = SUCCESS;
  return error;
}
const char* cudaGetErrorString(int error) {
  if (error == INVALID_DEVICE) return "invalid device ordinal";
  return error == NO_KERNEL_IMAGE ? "no kernel image is available" : "invalid argument";
}

unsigned __cudaPushCallConfiguration(Dim3, Dim3, size_t shared, void*) {
  configured = shared;
  return 0;
}
int __cudaPopCallConfiguration(Dim3*, Dim3*, size_t* shared, void*) {
  *shared = configured;
  return SUCCESS;
}
int __cudaGetKernel(void** kernel, const void* host) {
  *kernel = const_cast<void*>(host);
  return SUCCESS;
}
// By the one name or the other, as nvcc is of CUDA 13 or 12.
int __cudaLaunchKernel(void*, Dim3, Dim3, void**, size_t shared, void*) { return launched(shared); }
int cudaLaunchKernel(const void*, Dim3, Dim3, void**, size_t shared, void*) { return launched(shared); }

void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char*, char*, const char*, int, void*, void*, void*, void*, int*) {}
}
