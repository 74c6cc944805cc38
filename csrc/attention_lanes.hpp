// The one source of attention.hpp's kernels, compiled once per instruction set; see rotate_lanes.hpp.
#include "attention.hpp"

#include <cstring>

#include "lanes.hpp"
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

using duomo::CacheSide;
using duomo::Stored;

inline I32x16 widened(I8x16 level) {
#if defined(__AVX512F__)
    return I32x16(_mm512_cvtepi8_epi32(__m128i(level)));
#else
    // In steps: at once, GCC 12 takes the lanes one by one.
    return __builtin_convertvector(__builtin_convertvector(level, I16x16), I32x16);
#endif
}

void widen(const CacheSide& side, int64_t group, const int64_t* slots, int64_t count, float* out) {
    const int64_t width = side.head_dim;
    for (int64_t i = 0; i < count; ++i, out += width) {
        const int64_t row = slots[i] * side.groups + group;
        switch (side.stored) {
            case Stored::float32:
                for (int64_t h = 0; h < width; h += 16)  // a call of memcpy costs more than a head's few registers
                    store(out + h, load_as<F32x16>(static_cast<const float*>(side.data) + row * width + h));
                break;
            case Stored::bfloat16:
                for (int64_t h = 0; h < width; h += 16) {
                    const auto half = load_as<U16x16>(static_cast<const uint16_t*>(side.data) + row * width + h);
                    const U32x16 bits = __builtin_convertvector(half, U32x16) << 16;
                    std::memcpy(out + h, &bits, sizeof bits);
                }
                break;
            case Stored::int8:
                for (int64_t h = 0; h < width; h += 16) {
                    const auto level = load_as<I8x16>(static_cast<const int8_t*>(side.data) + row * width + h);
                    store(out + h, __builtin_convertvector(widened(level), F32x16) * side.scale[row]);
                }
                break;
        }
    }
}

// The products of one key, still in lanes.
inline F32x16 lanes_of(const float* query, const float* key, int64_t head_dim) {
    F32x16 sum = {}, more = {};
    int64_t h = 0;
    for (; h + 32 <= head_dim; h += 32) {
        sum += load_as<F32x16>(query + h) * load_as<F32x16>(key + h);
        more += load_as<F32x16>(query + h + 16) * load_as<F32x16>(key + h + 16);
    }
    if (h < head_dim) sum += load_as<F32x16>(query + h) * load_as<F32x16>(key + h);
    return sum + more;
}

// Lanes whose number has the bit `half` get b's lane plus the one `half` away, the others a's: the additions of the fold
// in `score`, for two keys at once.
template <int half>
inline F32x16 join(F32x16 a, F32x16 b) {
    constexpr I32x16 own = kIndex + ((kIndex & half) != 0 ? I32x16{} + 16 : I32x16{});
    return __builtin_shuffle(a, b, own) + __builtin_shuffle(a, b, own ^ half);
}

__attribute__((always_inline)) inline void score_keys(const float* query, const float* keys, int64_t head_dim,
                                                      int64_t count, float scale, float* scores) {
    int64_t i = 0;
    for (; i + 16 <= count; i += 16, keys += 16 * head_dim) {
        F32x16 sums[8];
#pragma GCC unroll 8
        for (int k = 0; k < 8; ++k)
            sums[k] = join<8>(lanes_of(query, keys + k * head_dim, head_dim),
                              lanes_of(query, keys + (k + 8) * head_dim, head_dim));
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) sums[k] = join<4>(sums[k], sums[k + 4]);
        store(scores + i, join<1>(join<2>(sums[0], sums[2]), join<2>(sums[1], sums[3])) * scale);
    }
    for (; i < count; ++i, keys += head_dim) {
        F32x16 sum = lanes_of(query, keys, head_dim);
        for (int half = 8; half >= 1; half /= 2) sum = sum + __builtin_shuffle(sum, kIndex ^ half);
        scores[i] = scale * sum[0];
    }
}

// ERNIE's heads have 128 dimensions: with that known, a query stays in registers while its keys pass.
void score(const float* query, const float* keys, int64_t head_dim, int64_t count, float scale, float* scores) {
    if (head_dim == 128) return score_keys(query, keys, 128, count, scale, scores);
    score_keys(query, keys, head_dim, count, scale, scores);
}

// Up to eight registers of the output at a time, so that a value is loaded once and the sums stay in registers.
template <int parts>
inline void gather_part(const float* weights, const float* values, int64_t head_dim, int64_t count, float* out) {
    F32x16 sum[parts];
    for (int part = 0; part < parts; ++part) sum[part] = load_as<F32x16>(out + 16 * part);
    for (int64_t i = 0; i < count; ++i, values += head_dim)
        for (int part = 0; part < parts; ++part) sum[part] += load_as<F32x16>(values + 16 * part) * weights[i];
    for (int part = 0; part < parts; ++part) store(out + 16 * part, sum[part]);
}

void gather(const float* weights, const float* values, int64_t head_dim, int64_t count, float* out) {
    int64_t h = 0;
    for (; h + 128 <= head_dim; h += 128) gather_part<8>(weights, values + h, head_dim, count, out + h);
    for (; h < head_dim; h += 16) gather_part<1>(weights, values + h, head_dim, count, out + h);
}

}  // namespace
