// 32 registers of 16 floats: sixteen sums fill half of them.
#if defined(__AVX512F__)
#define DUOMO_DENSE_SUMS 16
#include "dense_lanes.hpp"

namespace {
constexpr duomo::DenseKernels kernels = {multiply};
}
const duomo::DenseKernels* const duomo::dense_avx512 = &kernels;
#else
#include "dense.hpp"

const duomo::DenseKernels* const duomo::dense_avx512 = nullptr;
#endif
