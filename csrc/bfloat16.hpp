// Rounding to bf16, to nearest even; a NaN stays one.
#pragma once

#include <cstdint>
#include <cstring>

namespace duomo {

inline uint16_t to_bfloat16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (x != x) return 0x7FC0;
    return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

}  // namespace duomo
