// 16 registers of 8 floats: four sums fill half of them.
#if defined(__AVX2__)
#define DUOMO_DENSE_SUMS 4
#include "dense_lanes.hpp"

namespace {
constexpr duomo::DenseKernels kernels = {multiply, multiply_panels};
}
const duomo::DenseKernels* const duomo::dense_avx2 = &kernels;
#else
#include "dense.hpp"

const duomo::DenseKernels* const duomo::dense_avx2 = nullptr;
#endif
