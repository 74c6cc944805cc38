// Eight lanes in the compiler's own vectors: SSE2 on any x86-64, NEON on AArch64, and what the other files are
// compared with. Saturation is spelt out in comparisons, whose result is all ones or all zeros in a lane.
#include <cstring>

#include "viterbi_lanes.hpp"

namespace {

struct Plain {
    static constexpr int lanes = 8;
    typedef uint16_t T __attribute__((vector_size(16)));
    typedef uint32_t Wide __attribute__((vector_size(32)));
    static T load(const uint16_t* p) {
        T v;
        std::memcpy(&v, p, sizeof v);
        return v;
    }
    static void store(uint16_t* p, T v) { std::memcpy(p, &v, sizeof v); }
    static T set(uint16_t value) { return T{} + value; }
    static T adds(T a, T b) {
        const T sum = a + b;
        return sum | T(sum < a);
    }
    static T subs(T a, T b) { return (a - b) & T(a > b); }
    static T min(T a, T b) { return a - subs(a, b); }
    static T mulhi(T a, T b) {
        return __builtin_convertvector(
            (__builtin_convertvector(a, Wide) * __builtin_convertvector(b, Wide)) >> 16, T);
    }
    template <int n>
    static T shift_left(T a) {
        return a << n;
    }
    static T and_(T a, T b) { return a & b; }
    static T or_(T a, T b) { return a | b; }
    static T keep_low(T a, T v, T mask) { return a | (v & mask); }
};

}  // namespace

const duomo::viterbi::Encoder duomo::viterbi::portable_encoder = {"portable", Plain::lanes, encode_group<Plain>};
