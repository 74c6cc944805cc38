#include "code.hpp"

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

uint8_t image(const uint8_t (&masks)[8], int byte) {
    uint8_t out = 0;
    for (int bit = 0; bit < 8; ++bit) out |= uint8_t(__builtin_parity(unsigned(masks[bit] & byte)) << bit);
    return out;
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
    for (int phase = 0; phase < code.phases; ++phase) {
        uint8_t masks[3][8] = {};  // [age of the byte][bit of the index] -> bits of the byte whose parity it is
        for (int i = 0; i < window; ++i) {
            if (columns[i] >= num_levels) throw std::invalid_argument("a column lies outside the codebook");
            const Place place = place_of(bits, phase, i / bits, i % bits);
            if (place.byte_age == 2 && phase >= code.reach2) code.reach2 = phase + 1;
            for (int bit = 0; bit < 8; ++bit)
                if (columns[i] >> bit & 1) masks[place.byte_age][bit] |= uint8_t(1 << place.bit);
        }
        for (int age = 0; age < 3; ++age) {
            for (int bit = 0; bit < 8; ++bit) code.matrix[phase][age] |= uint64_t(masks[age][bit]) << (8 * (7 - bit));
            for (int n = 0; n < 16; ++n) {
                code.nibble[phase][age][0][n] = image(masks[age], n);
                code.nibble[phase][age][1][n] = image(masks[age], n << 4);
            }
        }
    }
    for (int n = 0; n < 128; ++n) {
        const int value = codebook[n & (num_levels - 1)];
        if (value < -63 || value > 63) throw std::invalid_argument("a codebook value lies outside [-63, 63]");
        code.level[n] = uint8_t(value + 64);
    }
    return code;
}

}  // namespace duomo
