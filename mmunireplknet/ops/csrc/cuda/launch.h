// The kernels as the operators see them. Each returns what went wrong, or an empty string.
#pragma once

#include "job.h"

namespace mmuni {

const char* set_device(int device);  // for what follows, in this thread
const char* forward_half(const Forward& job, void* stream);
const char* forward_bfloat(const Forward& job, void* stream);
const char* forward_single(const Forward& job, bool exact, void* stream);
const char* add_up(const Sums& job, void* stream);
void plan_weight_grad(WeightGrad& job, int size);  // for the current device
const char* weight_grad_half(const WeightGrad& job, void* stream);
const char* weight_grad_bfloat(const WeightGrad& job, void* stream);
const char* weight_grad_single(const WeightGrad& job, bool exact, void* stream);

}  // namespace mmuni
