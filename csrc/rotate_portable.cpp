// Baseline instructions; on AArch64 that is NEON already.
#include "rotate_lanes.hpp"

const duomo::RotateKernels duomo::rotate_portable = {rotate_quantize, unrotate, swiglu, rmsnorm, rotate_pairs, dot, exp_sum, add_scaled};
