// The lanes of attention_lanes.hpp under this file's flags.
#if defined(__AVX512F__)
#include "attention_lanes.hpp"

namespace {
constexpr duomo::AttentionKernels kernels = {widen, score, gather};
}
const duomo::AttentionKernels* const duomo::attention_avx512 = &kernels;
#else
#include "attention.hpp"

const duomo::AttentionKernels* const duomo::attention_avx512 = nullptr;
#endif
