// The one source of vision.hpp's kernels, compiled once per instruction set; see rotate_lanes.hpp. bf16 is widened to
// fp32 as it is used: a dword holds two of them, the first in its low half. Of a pair the second is added first, as
// vdpbf16ps does.
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

// x (1 + erf(x / sqrt 2)) / 2 with erf by Abramowitz and Stegun 7.1.26, 1.5e-7 off at most, and 3e-6 by its power.
void gelu(int64_t count, float* x) {
    for (int64_t i = 0; i < count; i += 16) {
        const F32x16 y = load(x + i), z = (y < 0.0f ? -y : y) * 7.07106781e-1f;
        const F32x16 t = 1.0f / (z * 3.275911e-1f + 1.0f);
        F32x16 p = t * 1.061405429f - 1.453152027f;
        p = p * t + 1.421413741f;
        p = p * t - 2.84496736e-1f;
        p = p * t + 2.54829592e-1f;
        const F32x16 beyond = p * t * power_of_two(z * z * -1.44269504f);  // 1 - erf(z)
        store(x + i, y * (y < 0.0f ? beyond : 2.0f - beyond) * 0.5f);
    }
}

void add_residual(const float* x, const float* bias, int64_t count, float* sum) {
    for (int64_t i = 0; i < count; i += 16) store(sum + i, load(sum + i) + (load(x + i) + load(bias + i)));
}

inline void store_as(uint16_t* p, F32x16 v) {
    const U16x16 narrowed = to_bf16(v);
    std::memcpy(p, &narrowed, sizeof narrowed);
}
inline void store_as(float* p, F32x16 v) { store(p, v); }

template <class Element>
void narrow(const float* x, const float* bias, const float* cos, const float* sin, float scale, int64_t head_dim,
            Element* out) {
    alignas(64) float head[128], turned[128];
    for (int64_t i = 0; i < head_dim; ++i) head[i] = bias ? x[i] + bias[i] : x[i];
    const int64_t half = head_dim / 2;
    const float* from = cos ? turned : head;
    if (cos)
        for (int64_t i = 0; i < half; ++i) {
            turned[i] = head[i] * cos[i] - head[i + half] * sin[i];
            turned[i + half] = head[i + half] * cos[i] + head[i] * sin[i];
        }
    for (int64_t i = 0; i < head_dim; i += 16) store_as(out + i, load(from + i) * scale);
}

inline void load_pairs(const uint16_t* p, F32x16& first, F32x16& second) {
    U32x16 both;
    std::memcpy(&both, p, sizeof both);
    const U32x16 low = both << 16, high = both & 0xFFFF0000;
    std::memcpy(&first, &low, sizeof first);
    std::memcpy(&second, &high, sizeof second);
}

inline float widened(uint16_t half) {
    const uint32_t bits = uint32_t(half) << 16;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

// sum += the 16 lanes at p, times the scalars at w: two of each lane in bf16, one in fp32.
inline void add_products(F32x16& sum, const uint16_t* p, const uint16_t* w) {
    F32x16 first, second;
    load_pairs(p, first, second);
    sum += second * widened(w[1]);
    sum += first * widened(w[0]);
}
inline void add_products(F32x16& sum, const float* p, const float* w) { sum += load(p) * *w; }

template <class Element>
constexpr int64_t kTogether = 4 / int64_t(sizeof(Element));

template <class Element>
void score(const Element* query, int64_t rows, const Element* panel, int64_t head_dim, float* scores, int64_t stride) {
    constexpr int64_t together = kTogether<Element>;
    for (int64_t r = 0; r < rows; ++r, query += head_dim, scores += stride) {
        F32x16 sum[4] = {};
        for (int64_t h = 0; h < head_dim; h += together)
            for (int part = 0; part < 4; ++part)
                add_products(sum[part], panel + h * duomo::kKeyPanel + 16 * part * together, query + h);
        for (int part = 0; part < 4; ++part) store(scores + 16 * part, sum[part]);
    }
}

// Four totals hide the latency of addition. `padded` keys are whole panels of four vectors.
template <class Element>
float soften(const float* scores, int64_t count, int64_t padded, float* most, float* total, Element* weights) {
    const F32x16 none = all(-1e30f);
    const auto is_seen = [&](int64_t u) { return kIndex < int32_t(count - u); };
    F32x16 peak = all(*most);
    for (int64_t u = 0; u < count; u += 16) {
        const F32x16 s = is_seen(u) ? load(scores + u) : none;
        peak = s > peak ? s : peak;
    }
    float raised = peak[0];
    for (int lane = 1; lane < 16; ++lane) raised = peak[lane] > raised ? peak[lane] : raised;
    const float factor = power_of_two(all(*most - raised))[0];
    F32x16 sum[4] = {};
    for (int64_t u = 0; u < padded; u += 64)
        for (int part = 0; part < 4; ++part) {
            const int64_t at = u + 16 * part;
            F32x16 p = power_of_two(load(scores + at) - raised);
            p = is_seen(at) ? p : F32x16{};
            sum[part] += p;
            store_as(weights + at, p);
        }
    *most = raised;
    *total = *total * factor + sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
    return factor;
}

// `parts` vectors of a head, whose sums stay in registers over all keys.
template <int parts, class Element>
inline void gather_part(const Element* weights, float factor, const Element* values, int64_t keys, int64_t head_dim,
                        float* out) {
    constexpr int64_t together = kTogether<Element>;
    F32x16 sum[parts];
    for (int part = 0; part < parts; ++part) sum[part] = load(out + 16 * part) * factor;
    for (int64_t u = 0; u < keys; u += together)
        for (int part = 0; part < parts; ++part)
            add_products(sum[part], values + u * head_dim + 16 * part * together, weights + u);
    for (int part = 0; part < parts; ++part) store(out + 16 * part, sum[part]);
}

template <class Element>
void gather(const Element* weights, int64_t stride, const float* factor, int64_t rows, const Element* values,
            int64_t keys, int64_t head_dim, float* out) {
    constexpr int64_t together = kTogether<Element>;
    for (int64_t r = 0; r < rows; ++r, weights += stride, out += head_dim) {
        int64_t h = 0;
        for (; head_dim - h >= 64; h += 64)
            gather_part<4>(weights, factor[r], values + h * together, keys, head_dim, out + h);
        for (; head_dim - h >= 32; h += 32)
            gather_part<2>(weights, factor[r], values + h * together, keys, head_dim, out + h);
        for (; h < head_dim; h += 16)
            gather_part<1>(weights, factor[r], values + h * together, keys, head_dim, out + h);
    }
}

[[maybe_unused]] constexpr duomo::VisionKernels kernels_of_lanes = {
    layernorm, add_gelu, gelu, add_residual, {narrow, score, soften, gather}, {narrow, score, soften, gather}};

}  // namespace
