// AVX-512 with GFNI, VBMI and VNNI.
//
// 64 bytes of one group hold 16 rows x 4 inputs x 4 phases of 2-bit symbols (2 phases of 4-bit ones). One
// `gf2p8affineqb` maps 64 bytes to 64 hash bytes, `vpermb` looks all 64 up in the codebook register, `vpdpbusd`
// multiplies them by four inputs broadcast to all rows.
//
// A short phase (code.hpp) costs one affine and one `vpternlog`, which masks the byte that needs no matrix and adds it;
// one that reaches two bytes back, a shift and an addition more. Where a code has no short phases, phase p needs p+1
// symbols of this byte and only L/B - p - 5 (2 bits; L/B - p - 3 at 4 bits) of the byte two back, at most a byte's
// worth together, and the first lie in its high bits, the second in its low bits: one `vpternlog` merges the two bytes
// under a mask, and one matrix, the sum of both, maps the merged byte beside that of the byte between. So lcc2-12 takes
// 4 affines, 4 lookups, 4 products and 7 other operations for 256 weights, lcc4-12 half of 4, 4, 4 and 5. On Zen 4
// affines and products share two pipes, lookups one of these and a third, a 512-bit operation holds its pipe for two
// cycles: 9.5 cycles at best, 11.0 measured (14.7 before phases went short, 12.2 while the reaching one did not, 11.7
// while sums were scaled in a pass of their own).
#include "packed_lanes.hpp"
#include "packed_shapes.hpp"

#if defined(__AVX512VBMI__) && defined(__AVX512VNNI__) && defined(__GFNI__)
#include <immintrin.h>

#include <algorithm>
#include <cstring>

namespace {

using namespace duomo;

// How far ahead codes are asked for, in the order in which they are read: down a column block's rows, then on in the
// next one, which no hardware guesses. Into the second-level cache: asked into the first, the lines push out the sums.
// More than once: a core asks for as many lines as it has buffers, what is asked beyond is dropped without a word, and
// who asks again finds it arrived or gets it still in time. Codes of 4 bits, which leave time for it, are asked for
// three times. Two threads on Zen 4, from memory, share of a plain reader: 0.84 asked for once, 0.88 twice (2 bits);
// 0.84, 0.90, 0.94 (4 bits). Past the end of what a thread reads it is still worth asking.
constexpr int64_t kAheadBytes[] = {32768, 16384, 4096};

void ask_for_line(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

__m512i load(const void* p) { return _mm512_loadu_si512(p); }

__m512i broadcast4(const int8_t* p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    return _mm512_set1_epi32(four);
}

template <class Shape>
struct Decoder {
    static constexpr int phases = Shape::phases;
    __m512i near_u8[phases], before_u8[phases], merge_u8[phases];
    __m512i levels_low[phases], levels_high[phases];

    explicit Decoder(const TrellisCode& code) {
        for (int p = 0; p < phases; ++p) {
            const uint8_t* const levels = Shape::is_short ? code.short_level[p] : code.level;
            levels_low[p] = load(levels);
            levels_high[p] = load(levels + 64);
            if (Shape::is_short) {
                near_u8[p] = _mm512_set1_epi64(int64_t(code.short_matrix[p]));
                merge_u8[p] = _mm512_set1_epi8(char(code.short_mask[p]));
                continue;
            }
            near_u8[p] = _mm512_set1_epi64(int64_t(code.matrix[p][0] | code.matrix[p][2]));
            before_u8[p] = _mm512_set1_epi64(int64_t(code.matrix[p][1]));
            // The symbols of this byte that phase p sees: its p+1 highest.
            merge_u8[p] = _mm512_set1_epi8(char(0xFF << (8 - (p + 1) * code.bits)));
        }
    }

    template <int p>
    __m512i index_of(__m512i now, __m512i back1, __m512i back2) const {
        if constexpr (Shape::is_short) {
            constexpr bool is_late = p >= phases / 2, is_reaching = p < Shape::reach2;
            constexpr int shift = is_reaching ? reaching_shift(8 / phases, p) : 4;
            const __m512i mapped = _mm512_gf2p8affine_epi64_epi8(is_late ? now : back1, near_u8[p], 0);
            const __m512i other = is_late ? back1 : _mm512_srli_epi16(now, shift);
            if (!is_reaching)
                return _mm512_ternarylogic_epi64(mapped, other, merge_u8[p], 0x78);  // mapped ^ (other & mask)
            const __m512i both = _mm512_ternarylogic_epi64(other, back2, merge_u8[p], 0x28);  // (other ^ back2) & mask
            return _mm512_xor_si512(mapped, both);
        }
        // now where the mask is set, else back2
        const __m512i seen = p < Shape::reach2 ? _mm512_ternarylogic_epi64(merge_u8[p], now, back2, 0xCA) : now;
        return _mm512_xor_si512(_mm512_gf2p8affine_epi64_epi8(seen, near_u8[p], 0),
                                _mm512_gf2p8affine_epi64_epi8(back1, before_u8[p], 0));
    }

    // Levels + 64 of phase p, from a byte and the two before it.
    template <int p>
    __m512i decode(__m512i now, __m512i back1, __m512i back2) const {
        const __m512i index = index_of<p>(now, back1, back2);
        return Shape::is_wide ? _mm512_permutex2var_epi8(levels_low[p], index, levels_high[p])
                              : _mm512_permutexvar_epi8(index, levels_low[p]);
    }
};

// The tiles of one column block: back1 and back2 of its four groups stay in registers all the way down. In a block's
// first column block sums begin as `start`; in its last they go to y, so that no pass over all rows comes between two
// blocks, in which nothing would be read.
template <int tokens, class Shape, bool is_first, bool is_last>
void multiply_column_block(const Decoder<Shape>& decoder, const CodeBlock& block, int64_t i, const FewTokens& few) {
    constexpr int phases = Shape::phases, asks = phases == 4 ? 2 : 3;
    const int64_t run = block.tiles * 256;
    const bool is_whole = run == block.stride;
    int64_t ahead[asks];  // the same rows of later column blocks, unless all rows are read
    for (int a = 0; a < asks; ++a)
        ahead[a] = is_whole ? kAheadBytes[a] : (kAheadBytes[a] + run - 1) / run * block.stride;
    const auto ask = [&](const uint8_t* p) {
        for (int a = 0; a < asks; ++a) ask_for_line(p + ahead[a]);
    };
    const int64_t acc_stride = block.tiles * 16 * phases, q_stride = few.q_stride, y_stride = few.y_stride;
    const uint8_t* line = block.line + i * block.stride;
    const int8_t* q = few.q + kBlockInputs * i;
    int32_t* acc = few.acc;
    float* y = few.y;
    __m512i back1[4], back2[4];
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) {
        back1[g] = load(block.starts[i].back1[g]);
        back2[g] = load(block.starts[i].back2[g]);
        if (!is_whole) {  // then what comes before the rows is not among what is asked for below
            ask(block.starts[i].back1[g]);
            ask(block.starts[i].back2[g]);
        }
    }
    for (int64_t tile = 0; tile < block.tiles; ++tile, line += 256, acc += 16 * phases, y += 16 * phases) {
        __m512i sum[tokens][phases];
#pragma GCC unroll 4
        for (int t = 0; t < tokens; ++t)
#pragma GCC unroll 4
            for (int p = 0; p < phases; ++p)
                sum[t][p] = is_first ? _mm512_set1_epi32(few.start[t]) : load(acc + t * acc_stride + 16 * p);
#pragma GCC unroll 4
        for (int g = 0; g < 4; ++g) {
            ask(line + 64 * g);
            const __m512i now = load(line + 64 * g);
            const auto add = [&](int p, __m512i level) {
#pragma GCC unroll 4
                for (int t = 0; t < tokens; ++t)
                    sum[t][p] = _mm512_dpbusd_epi32(sum[t][p], level, broadcast4(q + t * q_stride + 4 * g));
            };
            add(0, decoder.template decode<0>(now, back1[g], back2[g]));
            add(1, decoder.template decode<1>(now, back1[g], back2[g]));
            if constexpr (Shape::phases == 4) {
                add(2, decoder.template decode<2>(now, back1[g], back2[g]));
                add(3, decoder.template decode<3>(now, back1[g], back2[g]));
            }
            if constexpr (Shape::reach2 > 0) back2[g] = back1[g];
            back1[g] = now;
        }
#pragma GCC unroll 4
        for (int t = 0; t < tokens; ++t)
#pragma GCC unroll 4
            for (int p = 0; p < phases; ++p) {
                if (!is_last) {
                    _mm512_storeu_si512(acc + t * acc_stride + 16 * p, sum[t][p]);
                    continue;
                }
                float* out = y + t * y_stride + 16 * p;
                const __m512 product = _mm512_mul_ps(_mm512_set1_ps(few.scale[t]), _mm512_cvtepi32_ps(sum[t][p]));
                _mm512_storeu_ps(out, _mm512_add_ps(_mm512_loadu_ps(out), product));
            }
    }
}

template <int tokens, class Shape>
void multiply_tokens(const TrellisCode& code, const CodeBlock& block, const FewTokens& few) {
    const Decoder<Shape> decoder(code);
    const int64_t last = block.column_blocks - 1;
    if (last == 0) return multiply_column_block<tokens, Shape, true, true>(decoder, block, 0, few);
    multiply_column_block<tokens, Shape, true, false>(decoder, block, 0, few);
    for (int64_t i = 1; i < last; ++i)
        multiply_column_block<tokens, Shape, false, false>(decoder, block, i, few);
    multiply_column_block<tokens, Shape, false, true>(decoder, block, last, few);
}

// As many tokens together as leave their sums in registers.
template <class Shape>
void multiply_block_as(const TrellisCode& code, const CodeBlock& block, FewTokens few) {
    constexpr int most = 8 / Shape::phases;
    static constexpr decltype(&multiply_tokens<1, Shape>) counts[] = {
        multiply_tokens<1, Shape>, multiply_tokens<2, Shape>, multiply_tokens<std::min(3, most), Shape>,
        multiply_tokens<most, Shape>};
    for (; few.count > 0; few.count -= most) {
        counts[std::min<int64_t>(few.count, most) - 1](code, block, few);
        few.q += most * few.q_stride;
        few.start += most;
        few.scale += most;
        few.y += most * few.y_stride;
    }
}

template <class Shape>
void decode_tile_as(const TrellisCode& code, const uint8_t* line, const Start& start, uint8_t* panel) {
    const Decoder<Shape> decoder(code);
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) {
        const __m512i now = load(line + 64 * g), back1 = load(start.back1[g]), back2 = load(start.back2[g]);
        uint8_t* out = panel + 256 * g;
        ask_for_line(line + kPanelRows / 16 / Shape::phases * 256 + 64 * g);  // of the panel below this one
        _mm512_storeu_si512(out, decoder.template decode<0>(now, back1, back2));
        _mm512_storeu_si512(out + 64, decoder.template decode<1>(now, back1, back2));
        if constexpr (Shape::phases == 4) {
            _mm512_storeu_si512(out + 128, decoder.template decode<2>(now, back1, back2));
            _mm512_storeu_si512(out + 192, decoder.template decode<3>(now, back1, back2));
        }
    }
}

struct Variants {
    struct Variant {
        decltype(&multiply_block_as<Shape<4, 0, false, false>>) multiply_block;
        decltype(PackedKernels::decode_tile) decode_tile;
    };
    template <class Shape>
    static constexpr Variant of = {multiply_block_as<Shape>, decode_tile_as<Shape>};
};

void multiply_block(const TrellisCode& code, const CodeBlock& block, const FewTokens& few) {
    choose<Variants>(code).multiply_block(code, block, few);
}

void decode_tile(const TrellisCode& code, const uint8_t* line, const Start& start, uint8_t* panel) {
    choose<Variants>(code).decode_tile(code, line, start, panel);
}

// Transposes 16 x 16 dwords: rows of memory in, columns out.
void transpose16(__m512i (&r)[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xDD);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xDD);
    }
    for (int i = 0; i < 8; ++i) {
        const int low = i < 4 ? i : i;  // t[0..3] hold columns 0-3 and 8-11, t[4..7] columns 4-7 and 12-15
        r[low] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[low + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xDD);
    }
}

// 64 levels of a row from input `k` on, unsigned as vpdpbusd wants its weights. Past `inputs` no byte is read, and what
// stands there counts for nothing. To eight bits a flip of the sign bit adds 128.
struct Eight {
    static __m512i at(const uint8_t* row, int64_t k, int64_t inputs) {
        const __mmask64 mask = inputs - k < 64 ? (__mmask64(1) << (inputs - k)) - 1 : ~__mmask64(0);
        return _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, row + k), _mm512_set1_epi8(char(0x80)));
    }
};

// 48 bytes become six to a quadword (vpermb), of which vpmultishiftqb takes the eight fields at 0, 6, ... 42. The last
// 48 of more bytes are loaded with the 16 before them, not under a mask: of two loads one then lies in a single line.
struct Six {
    template <int first>
    static __m512i open(__m512i bytes) {
        const __m512i sixes = _mm512_set_epi64(0x2F2E2D2C2B2A, 0x292827262524, 0x232221201F1E, 0x1D1C1B1A1918,
                                               0x171615141312, 0x11100F0E0D0C, 0x0B0A09080706, 0x050403020100);
        const __m512i from = _mm512_add_epi8(sixes, _mm512_set1_epi8(first));
        const __m512i fields = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x2A241E18120C0600),
                                                            _mm512_permutexvar_epi8(from, bytes));
        return _mm512_and_si512(fields, _mm512_set1_epi8(63));
    }
    static __m512i at(const uint8_t* row, int64_t k, int64_t inputs) {
        const int64_t left = (inputs - k) / 4 * 3;
        const uint8_t* p = row + k / 4 * 3;
        if (left >= 64) return open<0>(load(p));
        if (k && left == 48) return open<16>(load(p - 16));
        const __mmask64 mask = (__mmask64(1) << std::min<int64_t>(left, 48)) - 1;
        return open<0>(_mm512_maskz_loadu_epi8(mask, p));
    }
};

template <class Form>
void pack_rows(const uint8_t* codes, int64_t stride, int64_t rows, int64_t columns, uint8_t* panel) {
    for (int64_t k = 0; k < columns; k += 64) {
        const int64_t dwords = std::min<int64_t>((columns - k) / 4, 16);
        for (int64_t first = 0; first < kPanelRows; first += 16) {
            __m512i row[16];
            for (int64_t i = 0; i < 16; ++i)
                row[i] = first + i < rows ? Form::at(codes + (first + i) * stride, k, columns) : _mm512_setzero_si512();
            transpose16(row);
            uint8_t* out = panel + k * kPanelRows + 4 * first;
            for (int64_t i = 0; i < dwords; ++i) _mm512_storeu_si512(out + 4 * i * kPanelRows, row[i]);
        }
    }
}

// 64 rows x `count` tokens: 4 * count accumulators stay in registers, 4 loads and `count` broadcasts feed 4 * count
// products. With 6 tokens that is 24 accumulators and 12 cycles of vpdpbusd against 5 of loads.
template <int count>
void add_tokens(const uint8_t* panel, int64_t inputs, const int8_t* q, int64_t stride, const int32_t* start,
                const float* scale, float* sums) {
    __m512i sum[count][4];
#pragma GCC unroll 8
    for (int t = 0; t < count; ++t)
        sum[t][0] = sum[t][1] = sum[t][2] = sum[t][3] = _mm512_set1_epi32(start[t]);
    for (int64_t k = 0; k < inputs; k += 4) {
        const uint8_t* w = panel + k * kPanelRows;
        const __m512i w0 = load(w), w1 = load(w + 64), w2 = load(w + 128), w3 = load(w + 192);
#pragma GCC unroll 8
        for (int t = 0; t < count; ++t) {
            const __m512i x = broadcast4(q + t * stride + k);
            sum[t][0] = _mm512_dpbusd_epi32(sum[t][0], w0, x);
            sum[t][1] = _mm512_dpbusd_epi32(sum[t][1], w1, x);
            sum[t][2] = _mm512_dpbusd_epi32(sum[t][2], w2, x);
            sum[t][3] = _mm512_dpbusd_epi32(sum[t][3], w3, x);
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < count; ++t)
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            // GCC 12 otherwise keeps a copy of every accumulator through the loop, half of them in memory.
            asm("" : "+v"(sum[t][i]));
            float* out = sums + t * kPanelRows + 16 * i;
            const __m512 product = _mm512_mul_ps(_mm512_set1_ps(scale[t]), _mm512_cvtepi32_ps(sum[t][i]));
            _mm512_storeu_ps(out, _mm512_add_ps(_mm512_loadu_ps(out), product));
        }
}

void multiply_add(const uint8_t* panel, int64_t inputs, const int8_t* q, int64_t stride, const int32_t* start,
                  const float* scale, int64_t tokens, float* sums) {
    static constexpr decltype(&add_tokens<1>) counts[] = {add_tokens<1>, add_tokens<2>, add_tokens<3>,
                                                          add_tokens<4>, add_tokens<5>, add_tokens<6>};
    for (; tokens > 0; tokens -= 6, q += 6 * stride, start += 6, scale += 6, sums += 6 * kPanelRows)
        counts[std::min<int64_t>(tokens, 6) - 1](panel, inputs, q, stride, start, scale, sums);
}

// Sixteen sums of sixteen lanes each: transpose and add, 45 operations for 16 rows.
__m512i sum_lanes(__m512i (&r)[16]) {
    for (int i = 0; i < 8; ++i)
        r[i] = _mm512_add_epi32(_mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]),
                                _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]));
    for (int i = 0; i < 4; ++i)
        r[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(r[2 * i], r[2 * i + 1]),
                                _mm512_unpackhi_epi64(r[2 * i], r[2 * i + 1]));
    for (int i = 0; i < 2; ++i)
        r[i] = _mm512_add_epi32(_mm512_shuffle_i32x4(r[2 * i], r[2 * i + 1], 0x88),
                                _mm512_shuffle_i32x4(r[2 * i], r[2 * i + 1], 0xDD));
    return _mm512_add_epi32(_mm512_shuffle_i32x4(r[0], r[1], 0x88), _mm512_shuffle_i32x4(r[0], r[1], 0xDD));
}

template <class Form, int bits>
void dot_block(const uint8_t* codes, int64_t stride, int64_t inputs, const int8_t* q, int32_t start, int32_t* sums) {
    __m512i sum[16];
    for (auto& s : sum) s = _mm512_setzero_si512();
#pragma GCC unroll 2
    for (int64_t k = 0; k < inputs; k += 64) {
        const __mmask64 mask = inputs - k < 64 ? (__mmask64(1) << (inputs - k)) - 1 : ~__mmask64(0);
        const __m512i x = _mm512_maskz_loadu_epi8(mask, q + k);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
            // Sixteen rows are too many streams for the hardware.
            ask_for_line(codes + (i + 16) * stride + k * bits / 8);
            sum[i] = _mm512_dpbusd_epi32(sum[i], Form::at(codes + i * stride, k, inputs), x);
        }
    }
    _mm512_storeu_si512(sums, _mm512_add_epi32(sum_lanes(sum), _mm512_set1_epi32(start)));
}

template <class Form, int bits>
void dot_rows(const uint8_t* codes, int64_t stride, int64_t inputs, const int8_t* q, int32_t start, int32_t* sums) {
    if (inputs == kMostInputs)  // the usual block, unrolled
        return dot_block<Form, bits>(codes, stride, kMostInputs, q, start, sums);
    dot_block<Form, bits>(codes, stride, inputs, q, start, sums);
}

constexpr PackedKernels kernels = {64,
                                   128,
                                   multiply_block,
                                   2 * kFewTokens,
                                   decode_tile,
                                   pack_rows<Eight>,
                                   pack_rows<Six>,
                                   nullptr,
                                   dot_rows<Eight, 8>,
                                   dot_rows<Six, 6>,
                                   flush,
                                   join,
                                   multiply_add};

}  // namespace

const duomo::PackedKernels* const duomo::packed_avx512 = &kernels;
#else
const duomo::PackedKernels* const duomo::packed_avx512 = nullptr;
#endif
