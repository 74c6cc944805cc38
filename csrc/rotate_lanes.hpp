// The one source of rotate.hpp's functions. Each rotate_*.cpp includes it under its own flags; everything is in an
// unnamed namespace, so that no file's code can stand in for another's at link time.
#include "rotate.hpp"

#include <cstring>

#include "lanes.hpp"

namespace {

template <int half>
inline F32x16 butterfly(F32x16 v) {
    // Lane i pairs with i ^ half; the higher of the two gets the difference.
    const F32x16 sign = __builtin_convertvector((kIndex & half) == 0, F32x16) * -2.0f - 1.0f;
    return __builtin_shuffle(v, kIndex ^ half) + v * sign;
}

inline void transform(F32x16* v, int vectors, float norm) {
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

// block ** -0.5 rounded to float, as numpy rounds it.
inline float norm_of(int block) {
    return block == 128 ? 0.08838834764831845f : block == 64 ? 0.125f : block == 32 ? 0.17677669529663687f : 0.25f;
}

void rotate_quantize(const float* x, const float* signs, int64_t columns, int block, int8_t* q, float* scale,
                     int32_t* sum) {
    const int vectors = block / 16;
    for (int64_t first = 0, b = 0; first < columns; first += block, ++b) {
        F32x16 v[8];
        for (int i = 0; i < vectors; ++i) v[i] = load(x + first + 16 * i);
        if (signs) {
            for (int i = 0; i < vectors; ++i) v[i] = v[i] * load(signs + first + 16 * i);
            transform(v, vectors, norm_of(block));
        }
        F32x16 most = all(0.0f);
        for (int i = 0; i < vectors; ++i) {
            const F32x16 size = v[i] < 0.0f ? -v[i] : v[i];
            most = size > most ? size : most;
        }
        for (int half = 8; half >= 1; half /= 2) {
            const F32x16 other = __builtin_shuffle(most, kIndex ^ half);
            most = other > most ? other : most;
        }
        const float peak = most[0];
        // Below 1e-30, 127 / peak could overflow: such a block counts as zero.
        const bool is_zero = !(peak > 1e-30f);
        const float inverse = is_zero ? 0.0f : 127.0f / peak;
        scale[b] = is_zero ? 0.0f : peak / 127.0f;
        I32x16 total = {};
        for (int i = 0; i < vectors; ++i) {
            const I32x16 rounded = __builtin_convertvector(round_even(v[i] * inverse), I32x16);
            const I8x16 narrow = __builtin_convertvector(rounded, I8x16);
            std::memcpy(q + first + 16 * i, &narrow, sizeof narrow);
            total += rounded;
        }
        for (int half = 8; half >= 1; half /= 2) total += __builtin_shuffle(total, kIndex ^ half);
        sum[b] = total[0];
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
