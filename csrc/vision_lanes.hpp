// The one source of vision.hpp's kernels, compiled once per instruction set; see rotate_lanes.hpp. bf16 is widened to
// fp32 as it is used: a dword holds two of them, the first in its low half.
#include "vision.hpp"

#include <cstring>

#include "lanes.hpp"

namespace {

inline float sum_lanes(F32x16 v) {
    for (int half = 8; half >= 1; half /= 2) v = v + __builtin_shuffle(v, kIndex ^ half);
    return v[0];
}

inline U16x16 to_bf16(F32x16 v) {
    U32x16 bits;
    std::memcpy(&bits, &v, sizeof bits);
    return __builtin_convertvector((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, U16x16);
}

// 2^x by 2^n * p(r), |r| <= 1/2, Taylor's polynomial of degree 5: relative error below 3e-6. Clamped to normal results.
inline F32x16 power_of_two(F32x16 x) {
    x = x < -126.0f ? all(-126.0f) : x;
    x = x > 126.0f ? all(126.0f) : x;
    const F32x16 n = round_even(x), r = x - n;
    F32x16 p = r * 1.33335581e-3f + 9.61812911e-3f;
    p = p * r + 5.55041087e-2f;
    p = p * r + 2.40226507e-1f;
    p = p * r + 6.93147181e-1f;
    p = p * r + 1.0f;
    const I32x16 power = (__builtin_convertvector(n, I32x16) + 127) << 23;
    F32x16 scale;
    std::memcpy(&scale, &power, sizeof scale);
    return p * scale;
}

// Rows are whole vectors: widths are multiples of 16, as those of all rotated weights.
void layernorm(const float* x, const float* weight, const float* bias, float eps, int64_t count, float* out) {
    F32x16 sum = {}, square = {};
    for (int64_t i = 0; i < count; i += 16) sum += load(x + i);
    const float mean = sum_lanes(sum) / float(count);
    for (int64_t i = 0; i < count; i += 16) {
        const F32x16 off = load(x + i) - mean;
        square += off * off;
    }
    const float scale = 1.0f / __builtin_sqrtf(sum_lanes(square) / float(count) + eps);
    for (int64_t i = 0; i < count; i += 16)
        store(out + i, (load(x + i) - mean) * scale * load(weight + i) + load(bias + i));
}

void add_gelu(const float* bias, int64_t count, float* x) {
    constexpr float slope = -1.702f * 1.44269504f;
    for (int64_t i = 0; i < count; i += 16) {
        const F32x16 y = load(x + i) + load(bias + i);
        store(x + i, y / (power_of_two(y * slope) + 1.0f));
    }
}

void add_residual(const float* x, const float* bias, int64_t count, float* sum) {
    for (int64_t i = 0; i < count; i += 16) store(sum + i, load(sum + i) + (load(x + i) + load(bias + i)));
}

void narrow(const float* x, const float* bias, const float* cos, const float* sin, float scale, int64_t head_dim,
            uint16_t* out) {
    alignas(64) float head[128], turned[128];
    for (int64_t i = 0; i < head_dim; ++i) head[i] = bias ? x[i] + bias[i] : x[i];
    const int64_t half = head_dim / 2;
    const float* from = cos ? turned : head;
    if (cos)
        for (int64_t i = 0; i < half; ++i) {
            turned[i] = head[i] * cos[i] - head[i + half] * sin[i];
            turned[i + half] = head[i + half] * cos[i] + head[i] * sin[i];
        }
    for (int64_t i = 0; i < head_dim; i += 16) {
        const U16x16 narrowed = to_bf16(load(from + i) * scale);
        std::memcpy(out + i, &narrowed, sizeof narrowed);
    }
}

[[maybe_unused]] inline void load_pairs(const uint16_t* p, F32x16& first, F32x16& second) {
    U32x16 both;
    std::memcpy(&both, p, sizeof both);
    const U32x16 low = both << 16, high = both & 0xFFFF0000;
    std::memcpy(&first, &low, sizeof first);
    std::memcpy(&second, &high, sizeof second);
}

[[maybe_unused]] inline float widened(uint16_t half) {
    const uint32_t bits = uint32_t(half) << 16;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

[[maybe_unused]] void score(const uint16_t* query, int64_t rows, const uint16_t* panel, int64_t head_dim, float* scores,
                            int64_t stride) {
    for (int64_t r = 0; r < rows; ++r, query += head_dim, scores += stride) {
        F32x16 sum[4] = {};
        for (int64_t h = 0; h < head_dim; h += 2)
            for (int part = 0; part < 4; ++part) {
                F32x16 first, second;
                load_pairs(panel + (h / 2 * duomo::kKeyPanel + 16 * part) * 2, first, second);
                sum[part] += second * widened(query[h + 1]);
                sum[part] += first * widened(query[h]);
            }
        for (int part = 0; part < 4; ++part) store(scores + 16 * part, sum[part]);
    }
}

[[maybe_unused]] float soften(const float* scores, int64_t count, int64_t padded, float* most, float* total,
                              uint16_t* weights) {
    const F32x16 none = all(-1e30f);
    const auto seen = [&](int64_t u) { return kIndex < int32_t(count - u) ? load(scores + u) : none; };
    F32x16 peak = all(*most);
    for (int64_t u = 0; u < count; u += 16) {
        const F32x16 s = seen(u);
        peak = s > peak ? s : peak;
    }
    float raised = peak[0];
    for (int lane = 1; lane < 16; ++lane) raised = peak[lane] > raised ? peak[lane] : raised;
    const float factor = power_of_two(all(*most - raised))[0];
    F32x16 sum = {};
    for (int64_t u = 0; u < padded; u += 16) {
        F32x16 p = power_of_two(seen(u) - raised);
        p = kIndex < int32_t(count - u) ? p : F32x16{};
        sum += p;
        const U16x16 narrowed = to_bf16(p);
        std::memcpy(weights + u, &narrowed, sizeof narrowed);
    }
    *most = raised;
    *total = *total * factor + sum_lanes(sum);
    return factor;
}

[[maybe_unused]] void gather(const uint16_t* weights, int64_t stride, const float* factor, int64_t rows,
                             const uint16_t* values, int64_t keys, int64_t head_dim, float* out) {
    for (int64_t r = 0; r < rows; ++r, weights += stride, out += head_dim)
        for (int64_t h = 0; h < head_dim; h += 16) {
            F32x16 sum = load(out + h) * factor[r];
            for (int64_t u = 0; u < keys; u += 2) {
                F32x16 first, second;
                load_pairs(values + (u / 2 * head_dim + h) * 2, first, second);
                sum += second * widened(weights[u + 1]);
                sum += first * widened(weights[u]);
            }
            store(out + h, sum);
        }
}

}  // namespace
