// What the tests tell the machine.
#pragma once

#include <cstddef>

namespace emulation {

void allow(const void* begin, size_t bytes);  // global memory that a kernel may touch
void forget();                                // all of it
void seed(unsigned value);                    // of the order in which threads go on

}  // namespace emulation
