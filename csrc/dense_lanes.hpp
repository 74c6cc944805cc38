// The one source of dense.hpp's kernels, compiled once per instruction set; see rotate_lanes.hpp. The file that includes
// it says how many sums of 16 lanes its registers hold: DUOMO_DENSE_SUMS, 4 or 16.
#include "dense.hpp"

#include <algorithm>
#include <cstring>
#include <vector>

#include "bfloat16.hpp"
#include "lanes.hpp"

namespace {

using duomo::DenseProduct;

constexpr int kSums = DUOMO_DENSE_SUMS;
constexpr int kLanes = 16;
constexpr int kWide = kSums / 4;  // panels of a tile

inline F32x16 load_part(const float* p, int64_t count) {  // zeros beyond
    F32x16 v = {};
    std::memcpy(&v, p, size_t(count) * 4);
    return v;
}

// Lane i of the result is v[i] + v[i ^ half].
template <int half>
inline F32x16 fold(F32x16 v) {
    return v + __builtin_shuffle(v, kIndex ^ half);
}

// The same of two sums at once: lanes whose number has the bit `half` hold b's, the others a's.
template <int half>
inline F32x16 join(F32x16 a, F32x16 b) {
    constexpr I32x16 own = kIndex + ((kIndex & half) != 0 ? I32x16{} + kLanes : I32x16{});
    return __builtin_shuffle(a, b, own) + __builtin_shuffle(a, b, own ^ half);
}

// Lane i of the result is the total of sums[i]; of sums[i % 4] where there are four.
inline F32x16 totals(F32x16* sums) {
    if constexpr (kSums == 16) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) sums[i] = join<8>(sums[i], sums[i + 8]);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) sums[i] = join<4>(sums[i], sums[i + 4]);
    } else {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) sums[i] = fold<4>(fold<8>(sums[i]));
    }
    return join<1>(join<2>(sums[0], sums[2]), join<2>(sums[1], sums[3]));
}

inline const float* token(const DenseProduct& p, int64_t t) { return p.x + (p.place ? p.place[t] : t) * p.columns; }

// kSums / T rows by T tokens.
template <int T>
inline void multiply_tile(const DenseProduct& p, int64_t row, int64_t t) {
    constexpr int R = kSums / T;
    const float* x[T];
    for (int i = 0; i < T; ++i) x[i] = token(p, t + i);
    const float* w = p.weight + row * p.columns;
    F32x16 sums[kSums] = {};
    int64_t k = 0;
    const auto step = [&](auto&& take) __attribute__((always_inline)) {
        F32x16 own[T];
#pragma GCC unroll 4
        for (int i = 0; i < T; ++i) own[i] = take(x[i] + k);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const F32x16 weight = take(w + r * p.columns + k);
#pragma GCC unroll 4
            for (int i = 0; i < T; ++i) sums[i * R + r] += weight * own[i];
        }
    };
    for (; k + kLanes <= p.columns; k += kLanes) step([](const float* at) { return load(at); });
    if (k < p.columns) step([&](const float* at) { return load_part(at, p.columns - k); });
    float out[kLanes];
    const F32x16 all = totals(sums);
    std::memcpy(out, &all, sizeof out);
    if (p.bias)
        for (int i = 0; i < kSums; ++i) out[i] += p.bias[row + i % R];
    for (int i = 0; i < T; ++i) std::memcpy(p.y + (t + i) * p.rows + row, out + i * R, R * sizeof(float));
}

// One row and one token, where a tile has no room: the same additions.
inline void multiply_one(const DenseProduct& p, int64_t row, int64_t t) {
    const float *x = token(p, t), *w = p.weight + row * p.columns;
    F32x16 sum = {};
    int64_t k = 0;
    for (; k + kLanes <= p.columns; k += kLanes) sum += load(w + k) * load(x + k);
    if (k < p.columns) sum += load_part(w + k, p.columns - k) * load_part(x + k, p.columns - k);
    const float total = fold<1>(fold<2>(fold<4>(fold<8>(sum))))[0];
    p.y[t * p.rows + row] = p.bias ? total + p.bias[row] : total;
}

// All rows [first, last) for T tokens; the last tile may go over rows of the one before it again.
template <int T>
inline void multiply_rows(const DenseProduct& p, int64_t first, int64_t last, int64_t t) {
    constexpr int R = kSums / T;
    if (last - first < R) {
        for (int i = 0; i < T; ++i)
            for (int64_t row = first; row < last; ++row) multiply_one(p, row, t + i);
        return;
    }
    for (int64_t row = first; row < last; row += R) multiply_tile<T>(p, std::min(row, last - R), t);
}

void multiply(const DenseProduct& p, int64_t first, int64_t last, int64_t begin, int64_t end) {
    int64_t t = begin;
    for (; t + 4 <= end; t += 4) multiply_rows<4>(p, first, last, t);
    if (end - t >= 2) {
        multiply_rows<2>(p, first, last, t);
        t += 2;
    }
    if (t < end) multiply_rows<1>(p, first, last, t);
}

// ---- panels ----

template <int P, int T>
inline void store_panels(const DenseProduct& p, int64_t row, int64_t t, const F32x16* sums) {
    for (int i = 0; i < P; ++i, row += kLanes) {
        const int64_t count = std::min<int64_t>(kLanes, p.rows - row);
        const F32x16 bias = p.bias ? load_part(p.bias + row, count) : F32x16{};
        for (int j = 0; j < T; ++j) {
            const F32x16 all = p.bias ? sums[j * P + i] + bias : sums[j * P + i];
            float* y = p.y + (t + j) * p.rows + row;
            if (count == kLanes) std::memcpy(y, &all, sizeof all);  // of fixed size: a register, no call
            else std::memcpy(y, &all, size_t(count) * 4);
        }
    }
}

// Lanes of bf16 pairs as fp32: the odd columns, and the even ones.
inline F32x16 odd_of(U32x16 pairs) { return F32x16(pairs & 0xFFFF0000u); }
inline F32x16 even_of(U32x16 pairs) { return F32x16(pairs << 16); }

// P panels from row `row` by the T tokens whose rows of x are given.
template <int P, int T>
inline void panel_tile(const DenseProduct& p, int64_t row, const float* const* x, int64_t t) {
    const int64_t num_pairs = (p.columns + 1) / 2, whole = p.columns / 2, stride = num_pairs * kLanes;
    const uint32_t* w = p.pairs + row * num_pairs;
    F32x16 sums[P * T] = {};
    for (int64_t k = 0; k < whole; ++k, w += kLanes) {
        F32x16 odd[P], even[P];
#pragma GCC unroll 4
        for (int i = 0; i < P; ++i) {
            U32x16 pairs;
            std::memcpy(&pairs, w + i * stride, sizeof pairs);
            odd[i] = odd_of(pairs), even[i] = even_of(pairs);
        }
#pragma GCC unroll 4
        for (int j = 0; j < T; ++j) {
            const float x_odd = x[j][2 * k + 1], x_even = x[j][2 * k];
#pragma GCC unroll 4
            for (int i = 0; i < P; ++i) sums[j * P + i] = (sums[j * P + i] + odd[i] * x_odd) + even[i] * x_even;
        }
    }
    if (whole < num_pairs)
        for (int i = 0; i < P; ++i) {
            U32x16 pairs;
            std::memcpy(&pairs, w + i * stride, sizeof pairs);
            for (int j = 0; j < T; ++j) sums[j * P + i] += even_of(pairs) * x[j][p.columns - 1];
        }
    store_panels<P, T>(p, row, t, sums);
}

template <int T>
inline void panel_rows(const DenseProduct& p, int64_t first, int64_t last, const float* const* x, int64_t t) {
    int64_t row = first;
    for (; row + kWide * kLanes <= last; row += kWide * kLanes) panel_tile<kWide, T>(p, row, x, t);
    for (; row < last; row += kLanes) panel_tile<1, T>(p, row, x, t);
}

[[maybe_unused]] void multiply_panels(const DenseProduct& p, int64_t first, int64_t last, int64_t begin, int64_t end) {
    static thread_local std::vector<float> memory;
    const bool is_rounded = p.form == duomo::DenseForm::rounded;
    if (is_rounded && int64_t(memory.size()) < 4 * p.columns) memory.resize(size_t(4 * p.columns));
    for (int64_t t = begin; t < end;) {
        const int count = end - t >= 4 ? 4 : end - t >= 2 ? 2 : 1;
        const float* x[4];
        for (int i = 0; i < count; ++i) {
            x[i] = token(p, t + i);
            if (!is_rounded) continue;
            float* rounded = memory.data() + i * p.columns;
            for (int64_t k = 0; k < p.columns; ++k) {
                const uint32_t bits = uint32_t(duomo::to_bfloat16(x[i][k])) << 16;
                std::memcpy(rounded + k, &bits, 4);
            }
            x[i] = rounded;
        }
        if (count == 4) panel_rows<4>(p, first, last, x, t);
        else if (count == 2) panel_rows<2>(p, first, last, x, t);
        else panel_rows<1>(p, first, last, x, t);
        t += count;
    }
}

}  // namespace
