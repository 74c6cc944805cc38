// Sixteen lanes as GCC and Clang spell vectors, for the *_lanes.hpp: the compiler turns them into what a file's flags
// allow. Everything is in an unnamed namespace, so that no file's code can stand in for another's at link time.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

typedef float F32x16 __attribute__((vector_size(64)));
typedef int32_t I32x16 __attribute__((vector_size(64)));
typedef uint32_t U32x16 __attribute__((vector_size(64)));
typedef uint16_t U16x16 __attribute__((vector_size(32)));
typedef int16_t I16x16 __attribute__((vector_size(32)));
typedef int8_t I8x16 __attribute__((vector_size(16)));

constexpr I32x16 kIndex = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

template <class V>
inline V load_as(const void* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
inline F32x16 load(const float* p) { return load_as<F32x16>(p); }
inline void store(float* p, F32x16 v) { std::memcpy(p, &v, sizeof v); }
inline F32x16 all(float x) { return F32x16{} + x; }

// Adding and taking away 1.5 * 2^23 rounds to nearest even where |x| < 2^22: no rounding instruction needed.
inline F32x16 round_even(F32x16 x) { return (x + all(12582912.0f)) - all(12582912.0f); }

}  // namespace
