// Baseline instructions; on AArch64 that is NEON already.
#include "attention_lanes.hpp"

const duomo::AttentionKernels duomo::attention_portable = {widen, score, gather};
