// Baseline instructions; on AArch64 that is NEON already.
#include "vision_lanes.hpp"

const duomo::VisionKernels duomo::vision_portable = kernels_of_lanes;
