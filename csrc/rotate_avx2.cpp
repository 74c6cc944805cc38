// 8 floats to a register.
#if defined(__AVX2__)
#include "rotate_lanes.hpp"

namespace {
constexpr duomo::RotateKernels kernels = {rotate_quantize, unrotate, swiglu, rmsnorm, rotate_pairs, dot, exp_sum, add_scaled};
}
const duomo::RotateKernels* const duomo::rotate_avx2 = &kernels;
#else
#include "rotate.hpp"

const duomo::RotateKernels* const duomo::rotate_avx2 = nullptr;
#endif
