// The plain version: what the bits mean, with no instruction set at all. Compilers vectorize the inner loops.
#include "packed_lanes.hpp"

namespace {

using namespace duomo;

inline uint8_t apply(const uint8_t (&table)[2][16], uint8_t byte) { return table[0][byte & 15] ^ table[1][byte >> 4]; }

// Levels + 64 of 64 bytes at one phase.
void decode_line(const TrellisCode& code, int phase, const uint8_t* now, const uint8_t* back1, const uint8_t* back2,
                 uint8_t* out) {
    for (int i = 0; i < 64; ++i) {
        const uint8_t index = apply(code.nibble[phase][0], now[i]) ^ apply(code.nibble[phase][1], back1[i]) ^
                              apply(code.nibble[phase][2], back2[i]);
        out[i] = code.level[index & 127];
    }
}

void add_dots(const uint8_t* levels, const int8_t* x, int32_t* acc) {
    for (int row = 0; row < 16; ++row)
        acc[row] += levels[4 * row] * x[0] + levels[4 * row + 1] * x[1] + levels[4 * row + 2] * x[2] +
                    levels[4 * row + 3] * x[3];
}

void accumulate(const TrellisCode& code, const CodeBlock& block, const int8_t* x, int32_t* acc) {
    for (int64_t part = 0; part < 4 * block.column_blocks; ++part) {  // a group of a column block
        const int64_t column_block = part / 4, group = part % 4;
        const Start& start = block.starts[column_block];
        const uint8_t *back1 = start.back1[group], *back2 = start.back2[group];
        for (int64_t tile = 0; tile < block.tiles; ++tile) {
            const uint8_t* now = block.line + column_block * block.stride + 256 * tile + 64 * group;
            for (int phase = 0; phase < code.phases; ++phase) {
                uint8_t levels[64];
                decode_line(code, phase, now, back1, back2, levels);
                add_dots(levels, x + 4 * part, acc + (tile * code.phases + phase) * 16);
            }
            back2 = back1;
            back1 = now;
        }
    }
}

void decode_tile(const TrellisCode& code, const uint8_t* line, const Start& start, uint8_t* panel) {
    for (int group = 0; group < 4; ++group)
        for (int phase = 0; phase < code.phases; ++phase)
            decode_line(code, phase, line + 64 * group, start.back1[group], start.back2[group],
                        panel + 256 * group + 64 * phase);
}

template <int bits>
uint32_t four_levels(const uint8_t* row, int64_t k) {
    uint32_t four;
    std::memcpy(&four, row + k, 4);
    return four;
}

template <>
uint32_t four_levels<6>(const uint8_t* row, int64_t k) {
    return open_six(row + k / 4 * 3);
}

template <int bits>
void pack_rows(const uint8_t* codes, int64_t stride, int64_t rows, int64_t columns, uint8_t* panel) {
    for (int64_t k = 0; k < columns; k += 4)
        for (int64_t row = 0; row < kPanelRows; ++row) {
            const uint32_t four = row < rows ? four_levels<bits>(codes + row * stride, k) : 0;
            std::memcpy(panel + k * kPanelRows + 4 * row, &four, 4);
        }
}

template <class Byte>
void multiply(const uint8_t* panel, int64_t inputs, const int8_t* q, int32_t* acc) {
    for (int64_t k = 0; k < inputs; k += 4)
        for (int row = 0; row < kPanelRows; ++row) {
            const uint8_t* w = panel + k * kPanelRows + 4 * row;
            acc[row] += Byte(w[0]) * q[k] + Byte(w[1]) * q[k + 1] + Byte(w[2]) * q[k + 2] + Byte(w[3]) * q[k + 3];
        }
}

void multiply_panel(const uint8_t* panel, int is_int8, int64_t inputs, const int8_t* q, int64_t stride,
                    const int32_t* start, int64_t tokens, int32_t* acc) {
    for (int64_t t = 0; t < tokens; ++t) {
        for (int row = 0; row < kPanelRows; ++row) acc[t * kPanelRows + row] = start[t];
        if (is_int8)
            multiply<int8_t>(panel, inputs, q + t * stride, acc + t * kPanelRows);
        else
            multiply<uint8_t>(panel, inputs, q + t * stride, acc + t * kPanelRows);
    }
}

template <class Level>
int32_t dot(const Level* levels, const int8_t* q, int64_t inputs) {
    int32_t sum = 0;
    for (int64_t k = 0; k < inputs; ++k) sum += levels[k] * q[k];
    return sum;
}

void dot_int8(const uint8_t* codes, int64_t stride, int64_t inputs, const int8_t* q, int32_t start, int32_t* sums) {
    for (int row = 0; row < 16; ++row)
        sums[row] = start + dot(reinterpret_cast<const int8_t*>(codes) + row * stride, q, inputs);
}

// Eight levels + 32 of six bytes: halves, quarters and eighths of a word moved apart.
void open_eight(const uint8_t* six, uint8_t* levels) {
    uint32_t low;
    uint16_t high;
    std::memcpy(&low, six, 4);
    std::memcpy(&high, six + 4, 2);
    uint64_t x = low | uint64_t(high) << 32;
    x = (x & 0xFFFFFF) | (x & 0xFFFFFF000000) << 8;
    x = (x & 0x00000FFF00000FFF) | (x & 0x00FFF00000FFF000) << 4;
    x = (x & 0x003F003F003F003F) | (x & 0x0FC00FC00FC00FC0) << 2;
    std::memcpy(levels, &x, 8);
}

void dot_int6(const uint8_t* codes, int64_t stride, int64_t inputs, const int8_t* q, int32_t start, int32_t* sums) {
    for (int row = 0; row < 16; ++row) {
        uint8_t levels[kMostInputs];
        for (int64_t k = 0; k < inputs; k += 8) open_eight(codes + row * stride + k / 8 * 6, levels + k);
        sums[row] = start + dot(levels, q, inputs);
    }
}

}  // namespace

const duomo::PackedKernels duomo::packed_portable = {
    64,           0,              multiply_block_with<accumulate>, 1,        decode_tile, pack_rows<8>,
    pack_rows<6>, multiply_panel, dot_int8,                   dot_int6, flush,       join,
    nullptr};
