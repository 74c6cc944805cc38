// NEON with the dot-product extension (ARMv8.2): nibble tables by `tbl`, the codebook by `tbl4`, products by `sdot`.
//
// `sdot` takes signed weights, so levels stay signed and no offset has to be taken out again.
#include "packed_lanes.hpp"

#if defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>

#include <cstring>

namespace {

using namespace duomo;

struct Nibbles {
    uint8x16_t low, high;
};

Nibbles split(const uint8_t* p) {
    const uint8x16_t byte = vld1q_u8(p);
    return {vandq_u8(byte, vdupq_n_u8(15)), vshrq_n_u8(byte, 4)};
}

uint8x16_t apply(const uint8_t (&tables)[2][16], Nibbles n) {
    return veorq_u8(vqtbl1q_u8(vld1q_u8(tables[0]), n.low), vqtbl1q_u8(vld1q_u8(tables[1]), n.high));
}

// tbl4 gives zero for an index past its 64 bytes, so two of them, the second on index - 64, cover 128 levels.
int8x16_t level_of(const TrellisCode& code, uint8x16_t index) {
    const uint8x16x4_t low = vld1q_u8_x4(code.level), high = vld1q_u8_x4(code.level + 64);
    const uint8x16_t level =
        vorrq_u8(vqtbl4q_u8(low, index), vqtbl4q_u8(high, vsubq_u8(index, vdupq_n_u8(64))));
    return vsubq_s8(vreinterpretq_s8_u8(level), vdupq_n_s8(64));
}

int8x16_t decode(const TrellisCode& code, int phase, Nibbles now, Nibbles back1, Nibbles back2) {
    uint8x16_t index = veorq_u8(apply(code.nibble[phase][0], now), apply(code.nibble[phase][1], back1));
    if (phase < code.reach2) index = veorq_u8(index, apply(code.nibble[phase][2], back2));
    return level_of(code, index);
}

int8x16_t broadcast4(const int8_t* x) {
    int32_t four;
    std::memcpy(&four, x, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(four));
}

void accumulate(const TrellisCode& code, const CodeBlock& block, const int8_t* x, int32_t* acc) {
    for (int64_t part = 0; part < 16 * block.column_blocks; ++part) {  // a group of a column block, four of its rows
        const int64_t column_block = part / 16, group = part / 4 % 4, offset = 16 * (part % 4);
        const Start& start = block.starts[column_block];
        Nibbles back1 = split(start.back1[group] + offset), back2 = split(start.back2[group] + offset);
        const int8x16_t x_i8x4 = broadcast4(x + 16 * column_block + 4 * group);
        for (int64_t tile = 0; tile < block.tiles; ++tile) {
            const uint8_t* line = block.line + column_block * block.stride + 256 * tile + 64 * group;
            const Nibbles now = split(line + offset);
            for (int phase = 0; phase < code.phases; ++phase) {
                int32_t* out = acc + (tile * code.phases + phase) * 16 + offset / 4;
                vst1q_s32(out, vdotq_s32(vld1q_s32(out), decode(code, phase, now, back1, back2), x_i8x4));
            }
            back2 = back1;
            back1 = now;
        }
    }
}

void decode_tile(const TrellisCode& code, const uint8_t* line, const Start& start, uint8_t* panel) {
    for (int part = 0; part < 16; ++part) {
        const int group = part / 4, offset = 16 * (part % 4);
        const Nibbles now = split(line + 64 * group + offset);
        const Nibbles back1 = split(start.back1[group] + offset), back2 = split(start.back2[group] + offset);
        for (int phase = 0; phase < code.phases; ++phase)
            vst1q_s8(reinterpret_cast<int8_t*>(panel) + 256 * group + 64 * phase + offset,
                     decode(code, phase, now, back1, back2));
    }
}

void pack_int8(const uint8_t* codes, int64_t stride, int64_t rows, int64_t columns, uint8_t* panel) {
    for (int64_t k = 0; k < columns; k += 4)
        for (int64_t row = 0; row < kPanelRows; ++row) {
            int32_t four = 0;
            if (row < rows) std::memcpy(&four, codes + row * stride + k, 4);
            std::memcpy(panel + k * kPanelRows + 4 * row, &four, 4);
        }
}

void pack_int6(const uint8_t* codes, int64_t stride, int64_t rows, int64_t columns, uint8_t* panel) {
    for (int64_t k = 0; k < columns; k += 4)
        for (int64_t row = 0; row < kPanelRows; ++row) {
            const uint32_t four = row < rows ? open_six(codes + row * stride + k / 4 * 3) : 0;
            std::memcpy(panel + k * kPanelRows + 4 * row, &four, 4);
        }
}

void multiply_panel(const uint8_t* panel, int, int64_t inputs, const int8_t* q, int64_t stride, const int32_t* start,
                    int64_t tokens, int32_t* acc) {
    for (int64_t t = 0; t < tokens; ++t)
        for (int part = 0; part < 4; ++part) {
            int32x4_t sum[4];
            for (auto& s : sum) s = vdupq_n_s32(start[t]);
            for (int64_t k = 0; k < inputs; k += 4) {
                const int8x16_t x = broadcast4(q + t * stride + k);
                const int8_t* w = reinterpret_cast<const int8_t*>(panel) + k * kPanelRows + 64 * part;
                for (int i = 0; i < 4; ++i) sum[i] = vdotq_s32(sum[i], vld1q_s8(w + 16 * i), x);
            }
            for (int i = 0; i < 4; ++i) vst1q_s32(acc + t * kPanelRows + 16 * part + 4 * i, sum[i]);
        }
}

void dot_int8(const uint8_t* codes, int64_t stride, int64_t inputs, const int8_t* q, int32_t start, int32_t* sums) {
    for (int row = 0; row < 16; ++row) {
        const int8_t* w = reinterpret_cast<const int8_t*>(codes) + row * stride;
        int32x4_t sum = vdupq_n_s32(0);
        int64_t k = 0;
        for (; k + 16 <= inputs; k += 16) sum = vdotq_s32(sum, vld1q_s8(w + k), vld1q_s8(q + k));
        int32_t total = start + vaddvq_s32(sum);
        for (; k < inputs; ++k) total += w[k] * q[k];
        sums[row] = total;
    }
}

// `ld3` parts 48 bytes into the first, second and third of each three, `ld4` the 64 inputs as their levels lie in them.
void dot_int6(const uint8_t* codes, int64_t stride, int64_t inputs, const int8_t* q, int32_t start, int32_t* sums) {
    const uint8x16_t low6 = vdupq_n_u8(63);
    for (int row = 0; row < 16; ++row) {
        const uint8_t* w = codes + row * stride;
        int32x4_t sum = vdupq_n_s32(0);
        int64_t k = 0;
        for (; k + 64 <= inputs; k += 64) {
            const uint8x16x3_t b = vld3q_u8(w + k / 4 * 3);
            const int8x16x4_t x = vld4q_s8(q + k);
            const uint8x16_t level[4] = {
                vandq_u8(b.val[0], low6),
                vandq_u8(vorrq_u8(vshrq_n_u8(b.val[0], 6), vshlq_n_u8(b.val[1], 2)), low6),
                vandq_u8(vorrq_u8(vshrq_n_u8(b.val[1], 4), vshlq_n_u8(b.val[2], 4)), low6), vshrq_n_u8(b.val[2], 2)};
            for (int i = 0; i < 4; ++i) sum = vdotq_s32(sum, vreinterpretq_s8_u8(level[i]), x.val[i]);
        }
        int32_t total = start + vaddvq_s32(sum);
        for (; k < inputs; k += 4) {
            const uint32_t four = open_six(w + k / 4 * 3);
            for (int i = 0; i < 4; ++i) total += int(four >> 8 * i & 63) * q[k + i];
        }
        sums[row] = total;
    }
}

constexpr PackedKernels kernels = {0,         0,         multiply_block_with<accumulate>, 1,        decode_tile,
                                   pack_int8, pack_int6, multiply_panel,             dot_int8, dot_int6,
                                   flush,     join,      nullptr};

}  // namespace

const duomo::PackedKernels* const duomo::packed_neon = &kernels;
#else
const duomo::PackedKernels* const duomo::packed_neon = nullptr;
#endif
