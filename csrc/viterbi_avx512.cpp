// Thirty-two lanes to a 512-bit register. The metrics of 1024 states are 64 KiB and live in the second-level cache.
#include "viterbi_lanes.hpp"

#if defined(__AVX512BW__)
#include <immintrin.h>

namespace {

struct Avx512 {
    static constexpr int lanes = 32;
    using T = __m512i;
    static T load(const uint16_t* p) { return _mm512_load_si512(p); }
    static void store(uint16_t* p, T v) { _mm512_store_si512(p, v); }
    static T set(uint16_t value) { return _mm512_set1_epi16(short(value)); }
    static T adds(T a, T b) { return _mm512_adds_epu16(a, b); }
    static T subs(T a, T b) { return _mm512_subs_epu16(a, b); }
    static T min(T a, T b) { return _mm512_min_epu16(a, b); }
    static T mulhi(T a, T b) { return _mm512_mulhi_epu16(a, b); }
    template <int n>
    static T shift_left(T a) {
        return _mm512_slli_epi16(a, n);
    }
    static T and_(T a, T b) { return _mm512_and_si512(a, b); }
    static T or_(T a, T b) { return _mm512_or_si512(a, b); }
    static T keep_low(T a, T v, T mask) { return _mm512_ternarylogic_epi32(a, v, mask, 0xF8); }  // a | (v & mask)
};

}  // namespace

const duomo::viterbi::Encoder duomo::viterbi::avx512_encoder = {"avx512", Avx512::lanes, encode_group<Avx512>};
#else
const duomo::viterbi::Encoder duomo::viterbi::avx512_encoder = {"avx512", 0, nullptr};
#endif
