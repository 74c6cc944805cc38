// Matrices whose weights stay packed while they are multiplied: trellis codes of 2 and 4 bits, rows of 6- and 8-bit
// integers.
//
//     y[t, n] = multiplier[n] * (half 0 + half 1)
//     half    = sum over the blocks b of half a row of  scale[t, b] * sum over k in b of  level[n, k] * q[t, k]
//
// q and scale are the rotated int8 activations of rotate.hpp. The inner sum is an integer and the same in every
// instruction set: |level| <= 63 (127 at 8 bits), |q| <= 127 and a block has at most 128 inputs, so it stays below
// 2.1 million and an int32 has a thousandfold of room. A half is summed in rising order, a multiplication and an
// addition at a time, without contraction: so the floats, too, are the same bits everywhere. There are two because
// column blocks lie one after another: of two threads that share a matrix by halves each reads a single piece of
// memory, where one that takes some of the rows reads a stretch of every column block, at 0.9 of the speed.
//
// Two ways through a matrix. `multiply_block` decodes and multiplies in registers: for one token or a few, where
// reading the codes is the work. `decode_tile` writes 64 rows as bytes into the first- or second-level cache,
// `multiply_panel` reuses them over all tokens. A panel is [K/4][64 rows][4 inputs]: dwords in the operand order of
// vpdpbusd and sdot.
#pragma once

#include <cstddef>
#include <cstdint>

#include "code.hpp"

namespace duomo {

constexpr int kPanelRows = 64;
constexpr int kFewTokens = 4;     // that `multiply_block` takes at once
constexpr int kBlockInputs = 16;  // inputs of a column block of the packed layout
constexpr int kMostInputs = 128;  // that share an activation scale
constexpr int kHalves = 2;        // of a row, each summed by itself

// The first block of half 0, of half 1, and their end: an odd one in the middle belongs to the first half.
constexpr int64_t begin_of_half(int half, int64_t blocks) { return (half * blocks + 1) / 2; }

// One trellis-coded matrix in the layout of FORMAT.md. Pointers are borrowed.
struct TrellisMatrix {
    const TrellisCode* code;
    const uint8_t* codes;
    const uint16_t* row_scale;  // IEEE half
    float unit;                 // multiplier[n] = row_scale[n] * unit
    int64_t rows, columns;
    int chain;   // column blocks a stream runs through
    int block;   // inputs that share an activation scale: 16 to 128
};

// Rows of integers, one after another. 8 bits: int8 in [-127, 127]. 6 bits: levels + 32, four of them in three bytes,
// low bits first, so that a block of activations is whole bytes.
struct IntMatrix {
    const uint8_t* codes;       // [rows][columns * bits / 8]
    const uint16_t* row_scale;  // IEEE half
    int64_t rows, columns;
    int block;
    int bits = 8;

    int64_t bytes_of(int64_t inputs) const { return inputs * bits / 8; }
    const uint8_t* at(int64_t row, int64_t input) const { return codes + row * bytes_of(columns) + bytes_of(input); }
};

constexpr int kSixOffset = 32;  // of 6-bit panels in every instruction set: the bytes are the levels as stored

// Four 6-bit levels + 32 out of three bytes, the first in the lowest byte. Static: each instruction set has its own.
static inline uint32_t open_six(const uint8_t* three) {
    const uint32_t x = uint32_t(three[0]) | uint32_t(three[1]) << 8 | uint32_t(three[2]) << 16;
    return (x & 0x3F) | (x << 2 & 0x3F00) | (x << 4 & 0x3F0000) | (x << 6 & 0x3F000000);
}

// Rotated int8 activations of T tokens. Rows of q are `columns` long, of scale and sum `columns / block`.
struct Activations {
    const int8_t* q;
    const float* scale;
    const int32_t* sum;  // of q over a block
    int64_t tokens;
};

// The bytes before the first tile of a column block, for each of its 4 groups: one and two bytes back.
struct Start {
    const uint8_t* back1[4];
    const uint8_t* back2[4];
};

// Some rows of one block of inputs, as they are packed: `tiles` steps of 16 * phases rows, `line` pointing at the first
// one's 256 bytes, which are [group][16 rows][4 inputs]; column blocks are `stride` bytes apart.
struct CodeBlock {
    const uint8_t* line;
    int64_t stride;
    const Start* starts;  // [column_blocks]
    int64_t column_blocks, tiles;
};

// Up to kFewTokens tokens, by which each decoded weight is multiplied: what they bring to a block of inputs, and where
// their sums are.
struct FewTokens {
    int64_t count;
    const int8_t* q;
    int64_t q_stride;
    const int32_t* start;  // what their integer sums begin with: -trellis_offset * the block's sum
    const float* scale;
    int32_t* acc;  // [count][rows], scratch
    float* y;
    int64_t y_stride;
};

using PackRows = void(const uint8_t* codes, int64_t stride, int64_t rows, int64_t columns, uint8_t* panel);
using DotRows = void(const uint8_t* codes, int64_t stride, int64_t inputs, const int8_t* q, int32_t start,
                     int32_t* sums);

// What an instruction set must provide. A panel byte is level + offset.
struct PackedKernels {
    int trellis_offset;  // 64 where the multiplier wants unsigned weights, else 0
    int int8_offset;     // 128 or 0
    // y[t][tile][phase][16 rows] += scale[t] * (start[t] + sum over the block of (level + trellis_offset) * q).
    void (*multiply_block)(const TrellisCode&, const CodeBlock&, const FewTokens&);
    int64_t most_by_block;  // tokens up to which blocks go faster than panels
    // One tile's 16 inputs as bytes: panel[group * 256 + 64 * phase], panel rows 16 * phases.
    void (*decode_tile)(const TrellisCode&, const uint8_t* line, const Start&, uint8_t* panel);
    // 64 rows of integers `stride` bytes apart (what is past `rows` counts for nothing), `columns` of them, as a panel.
    PackRows *pack_int8, *pack_int6;
    // acc[t][64] = sum over `inputs` of (panel byte - offset) * q, for tokens whose q rows are `stride` apart; `start`
    // is what a token's accumulators begin with: -offset * its block sum. `is_int8`: bytes of 8-bit integers, which
    // may be negative; all others stay below 128. Null where there is multiply_add.
    void (*multiply_panel)(const uint8_t* panel, int is_int8, int64_t inputs, const int8_t* q, int64_t stride,
                           const int32_t* start, int64_t tokens, int32_t* acc);
    // sums[row] = start + sum over `inputs`, at most kMostInputs, of (level + offset) * q, for 16 rows `stride` bytes
    // apart.
    DotRows *dot_int8, *dot_int6;
    // out[i] += scale * float(acc[i])
    void (*flush)(const int32_t* acc, float scale, int64_t count, float* out);
    // out[i] = (first[i] + second[i]) * (row_scale[i] * unit): the end of a row's two halves. out may be first.
    void (*join)(const float* first, const float* second, const uint16_t* row_scale, float unit, int64_t count,
                 float* out);
    // multiply_panel and flush in one, the accumulators never leaving the registers: sums[t][64] += scale[t] * acc[t].
    // Null where an instruction set has too few of them for that.
    void (*multiply_add)(const uint8_t* panel, int64_t inputs, const int8_t* q, int64_t stride, const int32_t* start,
                         const float* scale, int64_t tokens, float* sums);
};

const PackedKernels& packed_kernels();  // of current_isa()
extern const PackedKernels packed_portable;
extern const PackedKernels* const packed_avx2;    // null where the file was not built for this processor family
extern const PackedKernels* const packed_avx512;
extern const PackedKernels* const packed_neon;

// Where the streams of column block `block` stand before tile `tile`.
Start start_of(const TrellisMatrix&, int64_t column_block, int64_t tile);

// Rows [first, first + count) of y for every token: y[t * y_stride + n - first]. `first` is a multiple of 64, and so
// is `count` unless it reaches the last row. These are the items that a thread takes; scratch is thread_local.
void linear_rows(const TrellisMatrix&, const Activations&, int64_t first, int64_t count, float* y, int64_t y_stride);
void linear_rows(const IntMatrix&, const Activations&, int64_t first, int64_t count, float* y, int64_t y_stride);

// One row's levels times its scale: out[columns], rotated as it is stored.
void open_row(const IntMatrix&, int64_t row, float* out);

// Several products side by side on the pool, y[i] being [x[i].tokens][matrices[i].rows].
void linear_each(const TrellisMatrix* matrices, const Activations* x, float* const* y, int64_t count);

// The whole product y[T][rows], on the pool.
void linear(const TrellisMatrix&, const Activations&, float* y);
void linear(const IntMatrix&, const Activations&, float* y);

}  // namespace duomo
