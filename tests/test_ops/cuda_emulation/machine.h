// What the tests tell the machine.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulation {

void allow(const void* begin, size_t bytes);  // global memory that a kernel may touch
void forget();                                // all of it
void seed(unsigned value);                    // of the order in which threads go on
extern int64_t conflicts;                     // rows that ldmatrix read from banks of others of their matrix
extern int64_t copies[17];                    // asynchronous copies from maps, by their bytes

}  // namespace emulation
