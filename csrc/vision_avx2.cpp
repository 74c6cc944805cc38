// The lanes of vision_lanes.hpp under this file's flags.
#if defined(__AVX2__)
#include "vision_lanes.hpp"

const duomo::VisionKernels* const duomo::vision_avx2 = &kernels_of_lanes;
#else
#include "vision.hpp"

const duomo::VisionKernels* const duomo::vision_avx2 = nullptr;
#endif
