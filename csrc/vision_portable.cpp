// Baseline instructions; on AArch64 that is NEON already.
#include "vision_lanes.hpp"

const duomo::VisionKernels duomo::vision_portable = {layernorm, add_gelu, add_residual, narrow, score, soften, gather};
