#include "code.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace duomo {
namespace {

// Bit `bit` of the symbol that stands `age` symbols before phase `phase`: which byte back, and which bit of it.
struct Place {
    int byte_age, bit;
};

Place place_of(int bits, int phase, int age, int bit) {
    const int per_byte = 8 / bits, position = phase - age;
    const int byte_age = position >= 0 ? 0 : (-position + per_byte - 1) / per_byte;
    const int inside = position + per_byte * byte_age;
    return {byte_age, 8 - bits * (inside + 1) + bit};
}

// The XOR of the vectors of the set bits.
uint8_t image_of_columns(const uint8_t (&vectors)[8], int bits) {
    uint8_t out = 0;
    for (int bit = 0; bit < 8; ++bit)
        if (bits >> bit & 1) out ^= vectors[bit];
    return out;
}

uint8_t image(const uint8_t (&masks)[8], int byte) {
    uint8_t out = 0;
    for (int bit = 0; bit < 8; ++bit) out |= uint8_t(__builtin_parity(unsigned(masks[bit] & byte)) << bit);
    return out;
}

using Masks = uint8_t[8];  // [bit of the index] -> bits of a byte whose parity it is

uint64_t affine_operand(const Masks& masks) {
    uint64_t matrix = 0;
    for (int bit = 0; bit < 8; ++bit) matrix |= uint64_t(masks[bit]) << (8 * (7 - bit));
    return matrix;
}

void fill_nibbles(const Masks& masks, uint8_t (&nibble)[2][16]) {
    for (int n = 0; n < 16; ++n) {
        nibble[0][n] = image(masks, n);
        nibble[1][n] = image(masks, n << 4);
    }
}

// A basis of GF(2)^m with the given vectors in their places (0: any that fits), as the map from coordinates in it to
// vectors. False where the given ones are not independent.
bool complete_basis(int m, Masks& vectors, uint8_t (&vector_of)[128]) {
    bool is_spanned[128] = {true};
    const auto add = [&](uint8_t v) {
        if (is_spanned[v]) return false;
        bool before[128];
        std::memcpy(before, is_spanned, sizeof before);
        for (int n = 0; n < 128; ++n) is_spanned[n ^ v] |= before[n];
        return true;
    };
    for (const uint8_t v : vectors)
        if (v && !add(v)) return false;
    for (int place = 0; place < m; ++place)
        for (uint8_t v = 1; !vectors[place]; ++v)
            if (add(v)) vectors[place] = v;
    for (int n = 0; n < 1 << m; ++n) vector_of[n] = image_of_columns(vectors, n);
    return true;
}

// Phase p's short way, from the maps of this byte, the one before and the one before that; false where it has none.
bool shorten(TrellisCode& code, int p, const Masks (&masks)[3]) {
    const bool is_late = p >= code.phases / 2;
    const bool is_reaching = std::any_of(masks[2], masks[2] + 8, [](uint8_t mask) { return mask; });
    if (is_late && is_reaching) return false;
    const int m = code.is_wide ? 7 : 6, other = is_late ? 1 : 0;
    const int shift = is_late ? 0 : is_reaching ? reaching_shift(code.bits, p) : 4;
    Masks vectors = {}, own = {};
    for (int bit = 0; bit < 8; ++bit)
        for (const int age : {other, 2}) {
            const uint8_t v = image(masks[age], 1 << bit);
            const int place = age == 2 ? bit : bit - shift;
            if (!v) continue;
            if (place < 0 || place >= m || (vectors[place] && vectors[place] != v)) return false;
            vectors[place] = v;
            code.short_mask[p] |= uint8_t(1 << place);
        }
    uint8_t vector_of[128], coordinates[128];
    if (!complete_basis(m, vectors, vector_of)) return false;
    for (int n = 0; n < 1 << m; ++n) coordinates[vector_of[n]] = uint8_t(n);
    for (int bit = 0; bit < 8; ++bit) {
        const uint8_t index = coordinates[image(masks[1 - other], 1 << bit)];
        for (int to = 0; to < m; ++to) own[to] |= uint8_t((index >> to & 1) << bit);
    }
    code.short_matrix[p] = affine_operand(own);
    fill_nibbles(own, code.short_nibble[p]);
    for (int n = 0; n < 128; ++n) code.short_level[p][n] = code.level[vector_of[n & ((1 << m) - 1)]];
    return true;
}

}  // namespace

TrellisCode make_code(int bits, int window, const uint8_t* columns, int num_levels, const int8_t* codebook) {
    if (bits != 2 && bits != 4) throw std::invalid_argument("a trellis code has 2 or 4 bits a weight");
    if (window < bits || window > 16 || window % bits) throw std::invalid_argument("a window is whole symbols, <= 16 bits");
    if (num_levels < 2 || num_levels > 128 || (num_levels & (num_levels - 1)))
        throw std::invalid_argument("a codebook has a power of two of levels, at most 128");
    TrellisCode code{};
    code.bits = bits;
    code.phases = 8 / bits;
    code.is_wide = num_levels > 64;
    for (int n = 0; n < 128; ++n) {
        const int value = codebook[n & (num_levels - 1)];
        if (value < -63 || value > 63) throw std::invalid_argument("a codebook value lies outside [-63, 63]");
        code.level[n] = uint8_t(value + 64);
    }
    code.is_short = true;
    for (int phase = 0; phase < code.phases; ++phase) {
        Masks masks[3] = {};  // by the age of the byte
        for (int i = 0; i < window; ++i) {
            if (columns[i] >= num_levels) throw std::invalid_argument("a column lies outside the codebook");
            const Place place = place_of(bits, phase, i / bits, i % bits);
            if (place.byte_age == 2 && phase >= code.reach2) code.reach2 = phase + 1;
            for (int bit = 0; bit < 8; ++bit)
                if (columns[i] >> bit & 1) masks[place.byte_age][bit] |= uint8_t(1 << place.bit);
        }
        for (int age = 0; age < 3; ++age) {
            code.matrix[phase][age] = affine_operand(masks[age]);
            fill_nibbles(masks[age], code.nibble[phase][age]);
        }
        code.is_short = code.is_short && shorten(code, phase, masks);
    }
    return code;
}

}  // namespace duomo
