// Sixteen lanes to a 256-bit register. Also what AVX-512 machines use for the last half group.
#include "viterbi_lanes.hpp"

#if defined(__AVX2__)
#include <immintrin.h>

namespace {

struct Avx2 {
    static constexpr int lanes = 16;
    using T = __m256i;
    static T load(const uint16_t* p) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p)); }
    static void store(uint16_t* p, T v) { _mm256_store_si256(reinterpret_cast<__m256i*>(p), v); }
    static T set(uint16_t value) { return _mm256_set1_epi16(short(value)); }
    static T adds(T a, T b) { return _mm256_adds_epu16(a, b); }
    static T subs(T a, T b) { return _mm256_subs_epu16(a, b); }
    static T min(T a, T b) { return _mm256_min_epu16(a, b); }
    static T mulhi(T a, T b) { return _mm256_mulhi_epu16(a, b); }
    template <int n>
    static T shift_left(T a) {
        return _mm256_slli_epi16(a, n);
    }
    static T and_(T a, T b) { return _mm256_and_si256(a, b); }
    static T or_(T a, T b) { return _mm256_or_si256(a, b); }
    static T keep_low(T a, T v, T mask) { return or_(a, and_(v, mask)); }
};

}  // namespace

const duomo::viterbi::Encoder duomo::viterbi::avx2_encoder = {"avx2", Avx2::lanes, encode_group<Avx2>};
#else
const duomo::viterbi::Encoder duomo::viterbi::avx2_encoder = {"avx2", 0, nullptr};
#endif
