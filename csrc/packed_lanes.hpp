// The ends of packed products: plain loops that become vectors under the flags of each instruction set's file.
//
// Everything is in an unnamed namespace, so that no file's code can stand in for another's at link time.
#pragma once

#include <algorithm>
#include <cstring>

#include "packed.hpp"

namespace {

// Without a branch, so that a loop over rows becomes vectors: 2^112 moves the exponent's bias, subnormals too.
inline float half_to_float(uint16_t half) {
    uint32_t bits = uint32_t(half & 0x7FFF) << 13;
    float wide;
    std::memcpy(&wide, &bits, 4);
    wide *= 0x1p112f;
    std::memcpy(&bits, &wide, 4);
    bits |= uint32_t(half & 0x8000) << 16 | ((half & 0x7C00) == 0x7C00 ? 0x7F800000u : 0u);
    std::memcpy(&wide, &bits, 4);
    return wide;
}

// out[i] += scale * float(acc[i])
inline void flush(const int32_t* acc, float scale, int64_t count, float* out) {
    for (int64_t i = 0; i < count; ++i) out[i] += scale * float(acc[i]);
}

// PackedKernels::join
inline void join(const float* first, const float* second, const uint16_t* row_scale, float unit, int64_t count,
                 float* out) {
    for (int64_t i = 0; i < count; ++i) out[i] = (first[i] + second[i]) * (half_to_float(row_scale[i]) * unit);
}

// PackedKernels::multiply_block where sums stay in memory from column block to column block: `accumulate` adds to
// acc[tile][phase][16 rows] those of 16 * column_blocks inputs x.
template <void (*accumulate)(const duomo::TrellisCode&, const duomo::CodeBlock&, const int8_t* x, int32_t* acc)>
void multiply_block_with(const duomo::TrellisCode& code, const duomo::CodeBlock& block, const duomo::FewTokens& few) {
    const int64_t rows = block.tiles * 16 * code.phases;
    for (int64_t t = 0; t < few.count; ++t) {
        std::fill_n(few.acc, rows, few.start[t]);
        accumulate(code, block, few.q + t * few.q_stride, few.acc);
        flush(few.acc, few.scale[t], rows, few.y + t * few.y_stride);
    }
}

}  // namespace
