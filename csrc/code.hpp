// A trellis code as the kernels see it: matrices over GF(2), and the codebook as bytes.
//
// The algebra. A weight's codebook index is the XOR of the columns of the set bits of its window: a linear map over
// GF(2). The window at phase p of a byte (which holds 8/B symbols, the earlier in the higher bits) covers part of that
// byte and of the one or two bytes before it in the same stream, so
//
//     index(p) = M[p][0] * byte  ^  M[p][1] * byte[-1]  ^  M[p][2] * byte[-2]
//
// with 8x8 bit matrices, which is what `gf2p8affineqb` multiplies by, and what two 16-entry tables (one a nibble)
// multiply by where there is no GFNI. B = 2 or 4 and windows of at most 16 bits never reach a fourth byte.
// Nothing is fed back: any row of any block can be decoded knowing only the bytes before it.
//
// The short way. The order of the codebook is free: an index in another basis finds the same value in a codebook
// reordered to match. Choose for a phase the basis in which the few bits it takes from one of its two bytes are unit
// vectors where they stand, and that byte needs no matrix:
//
//     index'(p) = S[p] * byte[a]  ^  (other & mask[p])        looked up in short_level[p]
//
// Late phases see all of this byte and little of the one before: a = 0, other = byte[-1]. Early ones see of this byte
// only its high nibble: a = -1, other = byte >> 4. Where the window reaches two bytes back, what both ends see of their
// bytes is little: other = byte >> shift ^ byte[-2], the earliest symbols of the one over the latest of the other. It
// takes independent columns, but the same ones where bits meet, and few enough bits; the shipped codes of windows up to
// 12 have all of it, since their newest and oldest columns are the same.
#pragma once

#include <cstdint>

namespace duomo {

struct TrellisCode {
    int bits;                 // B, new bits a weight
    int phases;               // symbols of a byte, 8 / B
    int reach2;               // phases 0 .. reach2-1 have a non-zero M[p][2]
    uint64_t matrix[4][3];    // [phase][age of the byte], in the operand order of gf2p8affineqb
    uint8_t nibble[4][3][2][16];  // the same maps as tables: [phase][age][low, high nibble]
    bool is_wide;             // more than 64 levels
    bool is_short;            // every phase can go the short way, each in a basis of its own
    uint64_t short_matrix[4];
    uint8_t short_mask[4];
    uint8_t short_nibble[4][2][16];  // S as tables
    uint8_t short_level[4][128];
    // Codebook value + 64 of each index, 1..127: unsigned, and vpmaddubsw cannot saturate. Fewer levels are repeated.
    uint8_t level[128];
};

// How far a reaching phase's symbols of this byte are shifted down.
constexpr int reaching_shift(int bits, int phase) { return 8 - bits * (phase + 1); }

// Columns: `window` integers below `num_levels`, newest bit first; codebook in [-63, 63]. Throws on anything else.
TrellisCode make_code(int bits, int window, const uint8_t* columns, int num_levels, const int8_t* codebook);

}  // namespace duomo
