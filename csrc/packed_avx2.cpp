// AVX2, for machines without GFNI.
//
// A linear map of a byte is two 16-entry tables, one a nibble, and `vpshufb` reads 32 entries at once. Of a byte's
// symbols a phase sees those above it, so half of the nibble maps are zero and skipped; a short phase (code.hpp) takes
// two. At 2 bits and L = 12 ten lookups make four phases. The codebook of 64 takes four lookups and three blends. `vpmaddubsw` adds two products in
// 16 bits: levels are at most 127 and activations 127, so 2 * 127 * 127 = 32258 cannot saturate.
#include "packed_lanes.hpp"
#include "packed_shapes.hpp"

#if defined(__AVX2__)
#include <immintrin.h>

#include <algorithm>
#include <cstring>

namespace {

using namespace duomo;

// Into the second-level cache, a column block ahead: by groups, a block is read in steps that no hardware guesses.
void ask_for_line(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

__m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
void store(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
__m256i table(const uint8_t* p) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

struct Nibbles {
    __m256i both, low, high;
};

Nibbles split(const uint8_t* p) {
    const __m256i byte = load(p), low_mask = _mm256_set1_epi8(15);
    return {byte, _mm256_and_si256(byte, low_mask), _mm256_and_si256(_mm256_srli_epi16(byte, 4), low_mask)};
}

// Which nibble maps of phase p are not zero, for windows that reach `reach2` phases two bytes back.
template <int phases>
constexpr bool sees_low(int p) {  // of this byte: the later half of its symbols
    return p >= phases / 2;
}

template <class Shape, int p>
__m256i index_of(const TrellisCode& code, Nibbles now, Nibbles back1, Nibbles back2) {
    constexpr int phases = Shape::phases, reach2 = Shape::reach2;
    if constexpr (Shape::goes_short(p)) {
        constexpr bool is_late = p >= phases / 2;
        const Nibbles mapped = is_late ? now : back1;
        const __m256i other = is_late ? back1.both : now.high, mask = _mm256_set1_epi8(char(code.short_mask[p]));
        return _mm256_xor_si256(_mm256_xor_si256(_mm256_shuffle_epi8(table(code.short_nibble[p][0]), mapped.low),
                                                 _mm256_shuffle_epi8(table(code.short_nibble[p][1]), mapped.high)),
                                _mm256_and_si256(other, mask));
    }
    __m256i index = _mm256_shuffle_epi8(table(code.nibble[p][0][1]), now.high);
    if constexpr (sees_low<phases>(p))
        index = _mm256_xor_si256(index, _mm256_shuffle_epi8(table(code.nibble[p][0][0]), now.low));
    index = _mm256_xor_si256(index, _mm256_shuffle_epi8(table(code.nibble[p][1][0]), back1.low));
    // A window that ends `reach2` phases into the second byte back leaves this many late phases without the early
    // half of the byte before.
    if constexpr (p < reach2 + phases / 2)
        index = _mm256_xor_si256(index, _mm256_shuffle_epi8(table(code.nibble[p][1][1]), back1.high));
    if constexpr (p < reach2) {
        index = _mm256_xor_si256(index, _mm256_shuffle_epi8(table(code.nibble[p][2][0]), back2.low));
        if constexpr (reach2 - p > phases / 2)
            index = _mm256_xor_si256(index, _mm256_shuffle_epi8(table(code.nibble[p][2][1]), back2.high));
    }
    return index;
}

// vpblendvb looks at bit 7 of each byte: a shift of 16-bit lanes brings index bits 4, 5 and 6 there.
template <bool is_wide>
__m256i level_of(const uint8_t* levels, __m256i index) {
    const __m256i bit4 = _mm256_slli_epi16(index, 3), bit5 = _mm256_slli_epi16(index, 2);
    const __m256i nibble = is_wide ? _mm256_and_si256(index, _mm256_set1_epi8(0x3F)) : index;
    const auto half = [&](const uint8_t* level) {
        const __m256i a = _mm256_blendv_epi8(_mm256_shuffle_epi8(table(level), nibble),
                                             _mm256_shuffle_epi8(table(level + 16), nibble), bit4);
        const __m256i b = _mm256_blendv_epi8(_mm256_shuffle_epi8(table(level + 32), nibble),
                                             _mm256_shuffle_epi8(table(level + 48), nibble), bit4);
        return _mm256_blendv_epi8(a, b, bit5);
    };
    if constexpr (!is_wide) return half(levels);
    return _mm256_blendv_epi8(half(levels), half(levels + 64), _mm256_slli_epi16(index, 1));
}

__m256i dot4(__m256i unsigned_w, __m256i x) {
    return _mm256_madd_epi16(_mm256_maddubs_epi16(unsigned_w, x), _mm256_set1_epi16(1));
}

__m256i broadcast4(const int8_t* x) {
    int32_t four;
    std::memcpy(&four, x, 4);
    return _mm256_set1_epi32(four);
}

template <class Shape, int p>
__m256i decode(const TrellisCode& code, Nibbles now, Nibbles back1, Nibbles back2) {
    return level_of<Shape::is_wide>(Shape::goes_short(p) ? code.short_level[p] : code.level,
                                    index_of<Shape, p>(code, now, back1, back2));
}

template <class Shape, int p>
void accumulate_phase(const TrellisCode& code, Nibbles now, Nibbles back1, Nibbles back2, __m256i x, int32_t* acc) {
    const __m256i level = decode<Shape, p>(code, now, back1, back2);
    store(acc + 16 * p, _mm256_add_epi32(load(acc + 16 * p), dot4(level, x)));
}

template <class Shape>
void accumulate_as(const TrellisCode& code, const CodeBlock& block, const int8_t* x, int32_t* acc) {
    for (int64_t part = 0; part < 8 * block.column_blocks; ++part) {  // a group of a column block, and half of its rows
        const int64_t column_block = part / 8, group = part / 2 % 4, half = 32 * (part % 2);
        const Start& start = block.starts[column_block];
        Nibbles back1 = split(start.back1[group] + half), back2 = split(start.back2[group] + half);
        const __m256i x_i8x4 = broadcast4(x + 16 * column_block + 4 * group);
        const uint8_t* in = block.line + column_block * block.stride + 64 * group + half;
        int32_t* out = acc + half / 4;
        for (int64_t tile = 0; tile < block.tiles; ++tile, in += 256, out += 16 * Shape::phases) {
            if (!half) ask_for_line(in + block.stride);
            const Nibbles now = split(in);
            accumulate_phase<Shape, 0>(code, now, back1, back2, x_i8x4, out);
            accumulate_phase<Shape, 1>(code, now, back1, back2, x_i8x4, out);
            if constexpr (Shape::phases == 4) {
                accumulate_phase<Shape, 2>(code, now, back1, back2, x_i8x4, out);
                accumulate_phase<Shape, 3>(code, now, back1, back2, x_i8x4, out);
            }
            back2 = back1;
            back1 = now;
        }
    }
}

template <class Shape>
void decode_tile_as(const TrellisCode& code, const uint8_t* line, const Start& start, uint8_t* panel) {
    for (int part = 0; part < 8; ++part) {
        const int group = part / 2, half = 32 * (part % 2);
        const Nibbles now = split(line + 64 * group + half);
        const Nibbles back1 = split(start.back1[group] + half), back2 = split(start.back2[group] + half);
        uint8_t* out = panel + 256 * group + half;
        store(out, decode<Shape, 0>(code, now, back1, back2));
        store(out + 64, decode<Shape, 1>(code, now, back1, back2));
        if constexpr (Shape::phases == 4) {
            store(out + 128, decode<Shape, 2>(code, now, back1, back2));
            store(out + 192, decode<Shape, 3>(code, now, back1, back2));
        }
    }
}

struct Variants {
    struct Variant {
        decltype(PackedKernels::multiply_block) multiply_block;
        decltype(PackedKernels::decode_tile) decode_tile;
    };
    template <class Shape>
    static constexpr Variant of = {multiply_block_with<accumulate_as<Shape>>, decode_tile_as<Shape>};
};

void multiply_block(const TrellisCode& code, const CodeBlock& block, const FewTokens& few) {
    choose<Variants>(code).multiply_block(code, block, few);
}

void decode_tile(const TrellisCode& code, const uint8_t* line, const Start& start, uint8_t* panel) {
    choose<Variants>(code).decode_tile(code, line, start, panel);
}

// int8 panels stay signed: |w| * (sign(w) x) is the same product, and 2 * 127 * 127 fits 16 bits where 255 * 127 * 2
// would not. Six bits are unsigned as they are stored.
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

// Half a panel (32 rows) by `count` tokens: 4 * count accumulators.
template <int count, bool is_int8>
void multiply_half(const uint8_t* panel, int64_t inputs, const int8_t* q, int64_t stride, const int32_t* start,
                   int32_t* acc) {
    __m256i sum[count][4];
#pragma GCC unroll 4
    for (int t = 0; t < count; ++t)
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) sum[t][i] = _mm256_set1_epi32(start[t]);
    for (int64_t k = 0; k < inputs; k += 4) {
        __m256i x[count];
#pragma GCC unroll 4
        for (int t = 0; t < count; ++t) x[t] = broadcast4(q + t * stride + k);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const __m256i w = load(panel + k * kPanelRows + 32 * i);
#pragma GCC unroll 4
            for (int t = 0; t < count; ++t) {
                const __m256i dot = is_int8 ? dot4(_mm256_abs_epi8(w), _mm256_sign_epi8(x[t], w)) : dot4(w, x[t]);
                sum[t][i] = _mm256_add_epi32(sum[t][i], dot);
            }
        }
    }
#pragma GCC unroll 4
    for (int t = 0; t < count; ++t)
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) store(acc + t * kPanelRows + 8 * i, sum[t][i]);
}

template <bool is_int8>
void multiply_all(const uint8_t* panel, int64_t inputs, const int8_t* q, int64_t stride, const int32_t* start,
                  int64_t tokens, int32_t* acc) {
    for (int half = 0; half < 2; ++half) {
        const uint8_t* w = panel + 128 * half;
        int32_t* out = acc + 32 * half;
        int64_t t = 0;
        for (; t + 2 <= tokens; t += 2)
            multiply_half<2, is_int8>(w, inputs, q + t * stride, stride, start + t, out + t * kPanelRows);
        if (t < tokens) multiply_half<1, is_int8>(w, inputs, q + t * stride, stride, start + t, out + t * kPanelRows);
    }
}

void multiply_panel(const uint8_t* panel, int is_int8, int64_t inputs, const int8_t* q, int64_t stride,
                    const int32_t* start, int64_t tokens, int32_t* acc) {
    if (is_int8)
        multiply_all<true>(panel, inputs, q, stride, start, tokens, acc);
    else
        multiply_all<false>(panel, inputs, q, stride, start, tokens, acc);
}

int32_t sum_lanes(__m256i v) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xB1)));
}

void dot_int8(const uint8_t* codes, int64_t stride, int64_t inputs, const int8_t* q, int32_t start, int32_t* sums) {
    for (int row = 0; row < 16; ++row) {
        const int8_t* w = reinterpret_cast<const int8_t*>(codes) + row * stride;
        __m256i sum = _mm256_setzero_si256();
        int64_t k = 0;
        for (; k + 32 <= inputs; k += 32) {
            const __m256i weight = load(w + k);
            sum = _mm256_add_epi32(sum, dot4(_mm256_abs_epi8(weight), _mm256_sign_epi8(load(q + k), weight)));
        }
        int32_t rest = start;
        for (; k < inputs; ++k) rest += w[k] * q[k];
        sums[row] = sum_lanes(sum) + rest;
    }
}

// 24 bytes are 32 levels, past which nothing is read: 12 to each half of a register. Of three bytes x, y, z the 16-bit
// words are [x y] and [y z], with two levels each: at bits 0 and 6, at bits 4 and 10.
__m256i words_of_24(const uint8_t* p) {
    const auto half = [](const uint8_t* bytes) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)); };
    return _mm256_shuffle_epi8(_mm256_inserti128_si256(_mm256_castsi128_si256(half(p)), half(p + 8), 1),
                               _mm256_setr_epi8(0, 1, 1, 2, 3, 4, 4, 5, 6, 7, 7, 8, 9, 10, 10, 11,  //
                                                4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11, 12, 13, 14, 14, 15));
}

// No level is shifted into place: those of the second words count sixteenfold where they lie, so the inputs of the
// first are taken sixteenfold, once for all rows, and the sum, below 2^24, is divided at the end (24 G weights/s of a
// thread on Zen 4; 16 with levels put together to bytes).
template <int vectors>
void dot_six(const uint8_t* codes, int64_t stride, int64_t inputs, const int8_t* q, int32_t start, int32_t* sums) {
    const __m256i mask = _mm256_set1_epi32(0x03F0003F), times = _mm256_set1_epi32(0x00010010);
    __m256i even[vectors + 1], odd[vectors + 1];
#pragma GCC unroll 4
    for (int i = 0; i < vectors; ++i) {
        const __m256i x = load(q + 32 * i);
        even[i] = _mm256_mullo_epi16(_mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), times);
        odd[i] = _mm256_mullo_epi16(_mm256_srai_epi16(x, 8), times);
    }
    for (int row = 0; row < 16; ++row) {
        const uint8_t* w = codes + row * stride;
        __m256i sum = _mm256_setzero_si256();
#pragma GCC unroll 4
        for (int i = 0; i < vectors; ++i) {
            const __m256i words = words_of_24(w + 24 * i);
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_and_si256(words, mask), even[i]));
            const __m256i later = _mm256_and_si256(_mm256_srli_epi16(words, 6), mask);
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(later, odd[i]));
        }
        int32_t rest = start;
        for (int64_t k = 32 * vectors; k < inputs; ++k) rest += int(open_six(w + k / 4 * 3) >> 8 * (k % 4) & 63) * q[k];
        sums[row] = sum_lanes(sum) / 16 + rest;
    }
}

void dot_int6(const uint8_t* codes, int64_t stride, int64_t inputs, const int8_t* q, int32_t start, int32_t* sums) {
    switch (inputs / 32) {
        case 4: return dot_six<4>(codes, stride, inputs, q, start, sums);
        case 2: return dot_six<2>(codes, stride, inputs, q, start, sums);
        case 1: return dot_six<1>(codes, stride, inputs, q, start, sums);
        default: return dot_six<0>(codes, stride, inputs, q, start, sums);
    }
}

constexpr PackedKernels kernels = {64,        0,         multiply_block, 1,        decode_tile,
                                   pack_int8, pack_int6, multiply_panel,    dot_int8, dot_int6,
                                   flush,     join,      nullptr};

}  // namespace

const duomo::PackedKernels* const duomo::packed_avx2 = &kernels;
#else
const duomo::PackedKernels* const duomo::packed_avx2 = nullptr;
#endif
