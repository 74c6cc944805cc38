// Packing and the tile that all products of training share (AVX-512 only).
//
// Both sides of a product are packed by `unit`: one float, or a pair of bf16 for vdpbf16ps, which so does two steps at
// once. A side becomes strips of 8 lanes (broadcast) or panels of 16 (one register), unit after unit; a tile is a strip by
// up to three panels: 24 sums, three panels and a broadcast fill 28 of the 32 registers.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "pool.hpp"
#include "train.hpp"

namespace {

constexpr int64_t kStrip = 8, kPanel = 16;
constexpr int64_t kUnits = 160;  // of a pass over a tile: three panels of them stay in the first-level cache

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// By at most `threads` of the pool: torch's number of threads is what a run was given.
template <class Body>
inline void parallel_by(int threads, int64_t count, Body&& body) {
    if (threads <= 1 || count <= 1) {
        for (int64_t i = 0; i < count; ++i) body(i);
        return;
    }
    std::atomic<int64_t> next{0};
    duomo::parallel(std::min<int64_t>(threads, count), [&](int64_t) {
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(i);
    });
}

template <class Value>
inline Value* grown(std::vector<Value>& memory, int64_t count) {
    if (int64_t(memory.size()) < count) memory.resize(size_t(count));
    return memory.data();
}

inline __mmask16 first_lanes(int64_t count) { return count >= 16 ? 0xFFFF : __mmask16((1u << std::max<int64_t>(count, 0)) - 1); }

struct Single {
    static constexpr int64_t steps = 1;  // of a unit
    static __m256i eight(const float* p, int64_t left) {
        return _mm256_castps_si256(_mm256_maskz_loadu_ps(__mmask8(first_lanes(std::min<int64_t>(left, 8))), p));
    }
    static __m512i across(const float* first, const float*, __mmask16 mask) {
        return _mm512_castps_si512(_mm512_maskz_loadu_ps(mask, first));
    }
    static __m512 add(__m512 sum, __m512i panel, uint32_t x) {
        return _mm512_fmadd_ps(_mm512_castsi512_ps(panel), _mm512_castsi512_ps(_mm512_set1_epi32(int(x))), sum);
    }
};

struct Rounded {
    static constexpr int64_t steps = 2;
    static __m256i eight(const float* p, int64_t left) {
        return (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(first_lanes(left), p));
    }
    static __m512i across(const float* first, const float* second, __mmask16 mask) {
        const auto wide = [mask](const float* p) {
            return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, p)));
        };
        const __m512i even = wide(first);
        return second ? _mm512_or_si512(even, _mm512_slli_epi32(wide(second), 16)) : even;
    }
    static __m512 add(__m512 sum, __m512i panel, uint32_t x) {
        return _mm512_dpbf16_ps(sum, (__m512bh)panel, (__m512bh)_mm512_set1_epi32(int(x)));
    }
};

template <class T>
inline int64_t units_of(int64_t steps) {
    return (steps + T::steps - 1) / T::steps;
}

inline void transpose(__m256i* v) {
    __m256i a[8], b[8];
    for (int i = 0; i < 4; ++i) {
        a[2 * i] = _mm256_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
        a[2 * i + 1] = _mm256_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; ++j) {
            b[i + 2 * j] = _mm256_unpacklo_epi64(a[i + j], a[i + 2 + j]);
            b[i + 2 * j + 1] = _mm256_unpackhi_epi64(a[i + j], a[i + 2 + j]);
        }
    for (int i = 0; i < 4; ++i) {
        v[i] = _mm256_permute2x128_si256(b[i], b[i + 4], 0x20);
        v[i + 4] = _mm256_permute2x128_si256(b[i], b[i + 4], 0x31);
    }
}

inline const float* row_of(const duomo::Operand& o, int64_t i) {
    return o.data + (o.rows ? o.rows[i] : i) * o.stride;
}

// Lanes [first, first + count) in strips or panels of `Width`, the last filled up with zeros, `room` units each.
template <class T, int Width>
inline void pack_along(const duomo::Operand& o, int64_t first, int64_t count, int64_t steps, uint32_t* out, int64_t room) {
    const int64_t units = units_of<T>(steps);
    for (int64_t lane = 0; lane < round_up(count, Width); lane += 8) {
        const float* rows[8];
        bool is_there[8];
        for (int i = 0; i < 8; ++i) {
            is_there[i] = lane + i < count;
            rows[i] = is_there[i] ? row_of(o, first + lane + i) : o.data;
        }
        uint32_t* to = out + lane / Width * Width * room + lane % Width;
        for (int64_t u = 0; u < units; u += 8) {
            const int64_t step = u * T::steps;
            __m256i v[8];
#pragma GCC unroll 8
            for (int i = 0; i < 8; ++i) v[i] = T::eight(rows[i] + step, is_there[i] ? steps - step : 0);
            transpose(v);
            const int64_t left = std::min<int64_t>(8, units - u);
#pragma GCC unroll 8
            for (int i = 0; i < 8; ++i)
                if (i < left) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + (u + i) * Width), v[i]);
        }
    }
}

// The same across. Strips come in twos: room for a multiple of 16 lanes.
template <class T, int Width>
inline void pack_across(const duomo::Operand& o, int64_t first, int64_t count, int64_t steps, uint32_t* out) {
    const int64_t units = units_of<T>(steps);
    for (int64_t u = 0; u < units; ++u) {
        const int64_t step = u * T::steps;
        const float* even = row_of(o, step) + first;
        const float* odd = T::steps == 2 && step + 1 < steps ? row_of(o, step + 1) + first : nullptr;
        uint32_t* to = out + u * Width;
        for (int64_t lane = 0; lane < count; lane += 16, to += 16 * units) {
            const __m512i v = T::across(even + lane, odd ? odd + lane : nullptr, first_lanes(count - lane));
            if (Width == 16) {
                _mm512_storeu_si512(to, v);
            } else {
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_castsi512_si256(v));
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 8 * units), _mm512_extracti64x4_epi64(v, 1));
            }
        }
    }
}

template <class T, int Width>
inline void pack(const duomo::Operand& o, int64_t first, int64_t count, int64_t steps, uint32_t* out) {
    if (o.is_across) pack_across<T, Width>(o, first, count, steps, out);
    else pack_along<T, Width>(o, first, count, steps, out, units_of<T>(steps));
}

// Where a tile's sums go: element (m, n) at data[m * row + n / 16 * panel + n % 16].
struct Target {
    float* data;
    int64_t row, panel;
};

template <class T, int P>
inline void tile(const uint32_t* a, const uint32_t* b, int64_t b_panel, int64_t units, float* c, const Target& to,
                 int64_t rows, __mmask16 last, bool adds) {
    __m512 sums[kStrip * P];
#pragma GCC unroll 32
    for (int i = 0; i < kStrip * P; ++i) sums[i] = _mm512_setzero_ps();
    for (int64_t u = 0; u < units; ++u) {
        __m512i panels[P];
#pragma GCC unroll 4
        for (int j = 0; j < P; ++j) panels[j] = _mm512_loadu_si512(b + j * b_panel + u * kPanel);
#pragma GCC unroll 8
        for (int i = 0; i < kStrip; ++i) {
#pragma GCC unroll 4
            for (int j = 0; j < P; ++j) sums[i * P + j] = T::add(sums[i * P + j], panels[j], a[u * kStrip + i]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kStrip; ++i) {
        if (i >= rows) continue;
#pragma GCC unroll 4
        for (int j = 0; j < P; ++j) {
            float* p = c + i * to.row + j * to.panel;
            const __mmask16 mask = j == P - 1 ? last : 0xFFFF;
            if (adds) sums[i * P + j] = _mm512_add_ps(sums[i * P + j], _mm512_maskz_loadu_ps(mask, p));
            _mm512_mask_storeu_ps(p, mask, sums[i * P + j]);
        }
    }
}

// One packed side of `a_units` a strip by another of `b_units` a panel, over their first `units`.
template <class T>
inline void multiply_packed(const uint32_t* a, int64_t a_units, int64_t rows, const uint32_t* b, int64_t b_units,
                            int64_t columns, int64_t units, const Target& to, bool adds = false) {
    const int64_t panels = (columns + kPanel - 1) / kPanel, blocks = (panels + 2) / 3;
    const int64_t passes = std::max<int64_t>(1, (units + kUnits - 1) / kUnits);
    for (int64_t pass = 0; pass < passes; ++pass) {
        const int64_t begin = units * pass / passes, count = units * (pass + 1) / passes - begin;
        for (int64_t block = 0; block < blocks; ++block) {
            const int64_t panel = panels * block / blocks, wide = panels * (block + 1) / blocks - panel;
            const __mmask16 last = first_lanes(columns - (panel + wide - 1) * kPanel);
            const uint32_t* own = b + (panel * b_units + begin) * kPanel;
            for (int64_t row = 0; row < rows; row += kStrip) {
                const uint32_t* strip = a + row * a_units + begin * kStrip;
                float* c = to.data + row * to.row + panel * to.panel;
                const bool more = adds || pass > 0;
                const int64_t left = std::min(rows - row, kStrip);
                if (wide == 3) tile<T, 3>(strip, own, b_units * kPanel, count, c, to, left, last, more);
                else if (wide == 2) tile<T, 2>(strip, own, b_units * kPanel, count, c, to, left, last, more);
                else tile<T, 1>(strip, own, b_units * kPanel, count, c, to, left, last, more);
            }
        }
    }
}

// 2^x and e^x: a polynomial on [-1/2, 1/2], scaled. Below -126 (as with masked scores) 0 comes out.
inline __m512 exp2(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-160.0f), x);  // in this order a NaN stays one
    const __m512 whole = _mm512_roundscale_ps(x, 8);
    const __m512 f = _mm512_sub_ps(x, whole);
    __m512 p = _mm512_set1_ps(1.535336188e-4f);
    for (const float c : {1.339887440e-3f, 9.618437357e-3f, 5.550332548e-2f, 2.402264791e-1f, 6.931472028e-1f, 1.0f})
        p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(c));
    return _mm512_scalef_ps(p, whole);
}
inline __m512 exp(__m512 x) {
    return exp2(_mm512_mul_ps(_mm512_min_ps(_mm512_set1_ps(88.0f), x), _mm512_set1_ps(1.44269504f)));
}

}  // namespace
