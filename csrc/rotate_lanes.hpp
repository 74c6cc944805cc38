// The one source of rotate.hpp's functions. Each rotate_*.cpp includes it under its own flags; everything is in an
// unnamed namespace, so that no file's code can stand in for another's at link time.
#include "rotate.hpp"

#include <cstring>

#include "lanes.hpp"

namespace {

// A sign as an exclusive or: a cycle where a product takes four.
inline F32x16 flip(F32x16 v, I32x16 sign) { return F32x16(I32x16(v) ^ sign); }

template <int half>
inline F32x16 butterfly(F32x16 v) {
    // Lane i pairs with i ^ half; the higher of the two gets the difference.
    return __builtin_shuffle(v, kIndex ^ half) + flip(v, ((kIndex & half) != 0) & INT32_MIN);
}

template <int vectors>
inline void transform(F32x16* v, float norm) {
    for (int i = 0; i < vectors; ++i) v[i] = butterfly<8>(butterfly<4>(butterfly<2>(butterfly<1>(v[i]))));
    for (int half = 1; half < vectors; half *= 2)
        for (int i = 0; i < vectors; ++i)
            if (!(i & half)) {
                const F32x16 a = v[i], b = v[i + half];
                v[i] = a + b;
                v[i + half] = a - b;
            }
    for (int i = 0; i < vectors; ++i) v[i] = v[i] * norm;
}

inline F32x16 larger(F32x16 a, F32x16 b) { return b > a ? b : a; }

// block ** -0.5 rounded to float, as numpy rounds it.
inline float norm_of(int block) {
    return block == 128 ? 0.08838834764831845f : block == 64 ? 0.125f : block == 32 ? 0.17677669529663687f : 0.25f;
}

// A block of 16 * vectors inputs, all of it in registers.
template <int vectors, bool is_rotated>
inline void rotate_block(const float* x, const float* signs, int8_t* q, float* scale, int32_t* sum) {
    F32x16 v[vectors], size[vectors];
    for (int i = 0; i < vectors; ++i) v[i] = load(x + 16 * i);
    if constexpr (is_rotated) {
        for (int i = 0; i < vectors; ++i) v[i] = v[i] * load(signs + 16 * i);
        transform<vectors>(v, norm_of(16 * vectors));
    }
    for (int i = 0; i < vectors; ++i) size[i] = F32x16(I32x16(v[i]) & INT32_MAX);
    for (int half = vectors / 2; half >= 1; half /= 2)
        for (int i = 0; i < half; ++i) size[i] = larger(size[i], size[i + half]);
    for (int half = 8; half >= 1; half /= 2) size[0] = larger(size[0], __builtin_shuffle(size[0], kIndex ^ half));
    const float peak = size[0][0];
    // Below 1e-30, 127 / peak could overflow: such a block counts as zero.
    const bool is_zero = !(peak > 1e-30f);
    const float inverse = is_zero ? 0.0f : 127.0f / peak;
    *scale = is_zero ? 0.0f : peak / 127.0f;
    I32x16 total = {};
    for (int i = 0; i < vectors; ++i) {
        const I32x16 rounded = __builtin_convertvector(round_even(v[i] * inverse), I32x16);
        const I8x16 narrow = __builtin_convertvector(rounded, I8x16);
        std::memcpy(q + 16 * i, &narrow, sizeof narrow);
        total += rounded;
    }
    for (int half = 8; half >= 1; half /= 2) total += __builtin_shuffle(total, kIndex ^ half);
    *sum = total[0];
}

template <int vectors>
void rotate_blocks(const float* x, const float* signs, int64_t columns, int8_t* q, float* scale, int32_t* sum) {
    for (int64_t first = 0; first < columns; first += 16 * vectors, ++scale, ++sum)
        if (signs)
            rotate_block<vectors, true>(x + first, signs + first, q + first, scale, sum);
        else
            rotate_block<vectors, false>(x + first, nullptr, q + first, scale, sum);
}

void rotate_quantize(const float* x, const float* signs, int64_t columns, int block, int8_t* q, float* scale,
                     int32_t* sum) {
    switch (block) {
        case 128: return rotate_blocks<8>(x, signs, columns, q, scale, sum);
        case 64: return rotate_blocks<4>(x, signs, columns, q, scale, sum);
        case 32: return rotate_blocks<2>(x, signs, columns, q, scale, sum);
        default: return rotate_blocks<1>(x, signs, columns, q, scale, sum);
    }
}

template <int vectors>
void unrotate_blocks(float* x, const float* signs, int64_t columns) {
    for (int64_t first = 0; first < columns; first += 16 * vectors) {
        F32x16 v[vectors];
        for (int i = 0; i < vectors; ++i) v[i] = load(x + first + 16 * i);
        transform<vectors>(v, norm_of(16 * vectors));
        for (int i = 0; i < vectors; ++i) store(x + first + 16 * i, v[i] * load(signs + first + 16 * i));
    }
}

void unrotate(float* x, const float* signs, int64_t columns, int block) {
    switch (block) {
        case 128: return unrotate_blocks<8>(x, signs, columns);
        case 64: return unrotate_blocks<4>(x, signs, columns);
        case 32: return unrotate_blocks<2>(x, signs, columns);
        default: return unrotate_blocks<1>(x, signs, columns);
    }
}

// e^x by 2^n * p(r), |r| <= ln2 / 2: a polynomial of degree 6, relative error below 2e-7. Clamped to normal results.
inline F32x16 exponential(F32x16 x) {
    x = x < -87.0f ? all(-87.0f) : x;
    x = x > 88.0f ? all(88.0f) : x;
    const F32x16 n = round_even(x * 1.44269504f);
    const F32x16 r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    F32x16 p = r * 1.3888889e-3f + 8.3333333e-3f;
    p = p * r + 4.1666667e-2f;
    p = p * r + 1.6666667e-1f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const I32x16 power = (__builtin_convertvector(n, I32x16) + 127) << 23;
    F32x16 scale;
    std::memcpy(&scale, &power, sizeof scale);
    return p * scale;
}

void swiglu(const float* gate, const float* up, int64_t count, float* out) {
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
        const F32x16 g = load(gate + i);
        store(out + i, g / (exponential(-g) + 1.0f) * load(up + i));
    }
    if (i < count) {
        float g[16] = {}, u[16] = {}, o[16];
        std::memcpy(g, gate + i, size_t(count - i) * 4);
        std::memcpy(u, up + i, size_t(count - i) * 4);
        swiglu(g, u, 16, o);
        std::memcpy(out + i, o, size_t(count - i) * 4);
    }
}

void add_scaled(const float* x, float weight, int64_t count, float* out) {
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) store(out + i, load(out + i) + load(x + i) * weight);
    for (; i < count; ++i) out[i] += x[i] * weight;
}

inline float sum_lanes(F32x16 v) {
    float sum = 0.0f;
    for (int half = 8; half >= 1; half /= 2) v = v + __builtin_shuffle(v, kIndex ^ half);
    sum = v[0];
    return sum;
}

// Four partial sums hide the latency of addition; the rest is added one by one.
float dot(const float* a, const float* b, int64_t count) {
    F32x16 sum[4] = {};
    int64_t i = 0;
    for (; i + 64 <= count; i += 64)
        for (int part = 0; part < 4; ++part) sum[part] += load(a + i + 16 * part) * load(b + i + 16 * part);
    for (; i + 16 <= count; i += 16) sum[0] += load(a + i) * load(b + i);
    float rest = 0.0f;
    for (; i < count; ++i) rest += a[i] * b[i];
    return sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3])) + rest;
}

void rmsnorm(const float* x, const float* weight, float eps, int64_t count, float* out) {
    const float scale = 1.0f / __builtin_sqrtf(dot(x, x, count) / float(count) + eps);
    for (int64_t i = 0; i < count; ++i) out[i] = weight[i] * (x[i] * scale);
}

void rotate_pairs(float* x, const float* cos, const float* sin, int64_t count) {
    for (int64_t i = 0; i < count / 2; ++i) {
        const float even = x[2 * i], odd = x[2 * i + 1];
        x[2 * i] = even * cos[i] - odd * sin[i];
        x[2 * i + 1] = odd * cos[i] + even * sin[i];
    }
}

float exp_sum(const float* x, float shift, int64_t count, float* out) {
    F32x16 sum = {};
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
        const F32x16 e = exponential(load(x + i) - shift);
        store(out + i, e);
        sum += e;
    }
    if (i < count) {
        float in[16], e[16];
        for (int lane = 0; lane < 16; ++lane) in[lane] = i + lane < count ? x[i + lane] : shift - 200.0f;
        store(e, exponential(load(in) - shift));
        for (int lane = 0; lane < 16; ++lane) e[lane] = i + lane < count ? e[lane] : 0.0f;
        sum += load(e);
        std::memcpy(out + i, e, size_t(count - i) * 4);
    }
    return sum_lanes(sum);
}

}  // namespace
