// AVX-512 with BF16: vdpbf16ps adds two bf16 products to each of 16 sums, one a cycle on Zen 4.
//
// Both products keep their sums in registers over a whole walk: 6 queries x 64 keys are 24 sums, fed by 4 loads and 6
// broadcasts; 5 queries x 80 values are 25, fed by 5 loads and 5 broadcasts. The softmax between them costs about 15
// cycles for 16 scores, where the products cost 2 * H / 2 = 80; it is that of the lanes, operation by operation.
#if defined(__AVX512BF16__)
#include "vision_lanes.hpp"

#include <immintrin.h>

namespace {

__m512bh load_bf16(const uint16_t* p) { return __m512bh(_mm512_loadu_si512(p)); }

__m512bh broadcast_pair(const uint16_t* p) {
    int32_t pair;
    std::memcpy(&pair, p, sizeof pair);
    return __m512bh(_mm512_set1_epi32(pair));
}

template <int rows>
void score_rows(const uint16_t* query, const uint16_t* panel, int64_t head_dim, float* scores, int64_t stride) {
    __m512 sum[rows][4];
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) sum[r][0] = sum[r][1] = sum[r][2] = sum[r][3] = _mm512_setzero_ps();
    for (int64_t h = 0; h < head_dim; h += 2, panel += 2 * duomo::kKeyPanel) {
        const __m512bh k0 = load_bf16(panel), k1 = load_bf16(panel + 32), k2 = load_bf16(panel + 64),
                       k3 = load_bf16(panel + 96);
#pragma GCC unroll 6
        for (int r = 0; r < rows; ++r) {
            const __m512bh q = broadcast_pair(query + r * head_dim + h);
            sum[r][0] = _mm512_dpbf16_ps(sum[r][0], k0, q);
            sum[r][1] = _mm512_dpbf16_ps(sum[r][1], k1, q);
            sum[r][2] = _mm512_dpbf16_ps(sum[r][2], k2, q);
            sum[r][3] = _mm512_dpbf16_ps(sum[r][3], k3, q);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r)
        for (int part = 0; part < 4; ++part) _mm512_storeu_ps(scores + r * stride + 16 * part, sum[r][part]);
}

void score_fast(const uint16_t* query, int64_t rows, const uint16_t* panel, int64_t head_dim, float* scores,
                int64_t stride) {
    for (; rows >= 6; rows -= 6, query += 6 * head_dim, scores += 6 * stride)
        score_rows<6>(query, panel, head_dim, scores, stride);
    for (; rows >= 2; rows -= 2, query += 2 * head_dim, scores += 2 * stride)
        score_rows<2>(query, panel, head_dim, scores, stride);
    if (rows) score_rows<1>(query, panel, head_dim, scores, stride);
}

// 2^x for x <= 0: the lanes' operations, the last of which vscalefps does at once.
__m512 power_of_two_fast(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-126.0f));
    const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), r = _mm512_sub_ps(x, n);
    const auto step = [&](__m512 p, float next) { return _mm512_add_ps(_mm512_mul_ps(p, r), _mm512_set1_ps(next)); };
    __m512 p = step(_mm512_set1_ps(1.33335581e-3f), 9.61812911e-3f);
    p = step(step(p, 5.55041087e-2f), 2.40226507e-1f);
    return _mm512_scalef_ps(step(step(p, 6.93147181e-1f), 1.0f), n);
}

// Lanes of 16 keys from u on that are real.
__mmask16 seen(int64_t count, int64_t u) {
    return count - u >= 16 ? 0xFFFF : count > u ? __mmask16((1u << (count - u)) - 1) : 0;
}

template <bool is_whole>
float soften_row(const float* scores, int64_t count, int64_t padded, float* most, float* total, uint16_t* weights) {
    const __m512 none = _mm512_set1_ps(-1e30f);
    __m512 peak[4] = {_mm512_set1_ps(*most), none, none, none};
    for (int64_t u = 0; u < padded; u += 64)
        for (int i = 0; i < 4; ++i) {
            const __m512 s = _mm512_loadu_ps(scores + u + 16 * i);
            peak[i] = is_whole ? _mm512_max_ps(peak[i], s)
                               : _mm512_mask_max_ps(peak[i], seen(count, u + 16 * i), peak[i], s);
        }
    const float raised =
        _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(peak[0], peak[1]), _mm512_max_ps(peak[2], peak[3])));
    const __m512 shift = _mm512_set1_ps(raised);
    __m512 sum[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t u = 0; u < padded; u += 64) {
        __m512 p[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            p[i] = power_of_two_fast(_mm512_sub_ps(_mm512_loadu_ps(scores + u + 16 * i), shift));
            if (!is_whole) p[i] = _mm512_maskz_mov_ps(seen(count, u + 16 * i), p[i]);
            sum[i] = _mm512_add_ps(sum[i], p[i]);
        }
        _mm512_storeu_si512(weights + u, __m512i(_mm512_cvtne2ps_pbh(p[1], p[0])));
        _mm512_storeu_si512(weights + u + 32, __m512i(_mm512_cvtne2ps_pbh(p[3], p[2])));
    }
    const float factor = _mm512_cvtss_f32(power_of_two_fast(_mm512_set1_ps(*most - raised)));
    *most = raised;
    const __m512 all_four = _mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3]));
    *total = *total * factor + sum_lanes(F32x16(all_four));
    return factor;
}

float soften_fast(const float* scores, int64_t count, int64_t padded, float* most, float* total, uint16_t* weights) {
    return (count == padded ? soften_row<true> : soften_row<false>)(scores, count, padded, most, total, weights);
}

template <int rows, int parts>
void gather_rows(const uint16_t* weights, int64_t stride, const float* factor, const uint16_t* values, int64_t keys,
                 int64_t head_dim, float* out) {
    __m512 sum[rows][parts];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
        for (int part = 0; part < parts; ++part)
            sum[r][part] = _mm512_mul_ps(_mm512_loadu_ps(out + r * head_dim + 16 * part), _mm512_set1_ps(factor[r]));
    for (int64_t u = 0; u < keys; u += 2, values += 2 * head_dim) {
        __m512bh v[parts];
#pragma GCC unroll 8
        for (int part = 0; part < parts; ++part) v[part] = load_bf16(values + 32 * part);
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
            const __m512bh w = broadcast_pair(weights + r * stride + u);
#pragma GCC unroll 8
            for (int part = 0; part < parts; ++part) sum[r][part] = _mm512_dpbf16_ps(sum[r][part], v[part], w);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
        for (int part = 0; part < parts; ++part) _mm512_storeu_ps(out + r * head_dim + 16 * part, sum[r][part]);
}

// `block` queries at a time, then one by one; a head of `parts` vectors, or those of it from `values` and `out` on.
template <int block, int parts>
void gather_parts(const uint16_t* weights, int64_t stride, const float* factor, int64_t rows, const uint16_t* values,
                  int64_t keys, int64_t head_dim, float* out) {
    for (; rows >= block; rows -= block, weights += block * stride, factor += block, out += block * head_dim)
        gather_rows<block, parts>(weights, stride, factor, values, keys, head_dim, out);
    for (; rows; --rows, weights += stride, ++factor, out += head_dim)
        gather_rows<1, parts>(weights, stride, factor, values, keys, head_dim, out);
}

void gather_fast(const uint16_t* weights, int64_t stride, const float* factor, int64_t rows, const uint16_t* values,
                 int64_t keys, int64_t head_dim, float* out) {
    int64_t h = 0;
    for (; head_dim % 80 == 0 && h < head_dim; h += 80)
        gather_parts<5, 5>(weights, stride, factor, rows, values + 2 * h, keys, head_dim, out + h);
    for (; head_dim - h >= 64; h += 64)
        gather_parts<6, 4>(weights, stride, factor, rows, values + 2 * h, keys, head_dim, out + h);
    for (; h < head_dim; h += 16)
        gather_parts<6, 1>(weights, stride, factor, rows, values + 2 * h, keys, head_dim, out + h);
}

constexpr duomo::VisionKernels kernels = {layernorm,
                                          add_gelu,
                                          gelu,
                                          add_residual,
                                          {narrow, score_fast, soften_fast, gather_fast},
                                          {narrow, score, soften, gather}};

}  // namespace

const duomo::VisionKernels* const duomo::vision_avx512 = &kernels;
#else
#include "vision.hpp"

const duomo::VisionKernels* const duomo::vision_avx512 = nullptr;
#endif
