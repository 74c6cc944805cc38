// Baseline instructions; on AArch64 that is NEON already.
#define DUOMO_DENSE_SUMS 4
#include "dense_lanes.hpp"

const duomo::DenseKernels duomo::dense_portable = {multiply, multiply_panels};
