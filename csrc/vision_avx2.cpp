// The lanes of vision_lanes.hpp under this file's flags.
#if defined(__AVX2__)
#include "vision_lanes.hpp"

namespace {
constexpr duomo::VisionKernels kernels = {layernorm, add_gelu, add_residual, narrow, score, soften, gather};
}
const duomo::VisionKernels* const duomo::vision_avx2 = &kernels;
#else
#include "vision.hpp"

const duomo::VisionKernels* const duomo::vision_avx2 = nullptr;
#endif
