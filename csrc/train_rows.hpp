// What stands between products, row by row, forward and backward (AVX-512 only).
#pragma once

#include <cmath>

#include "train_lanes.hpp"

namespace {

constexpr int64_t kChunk = 32;  // rows of an item

template <class Body>
void each_row(int threads, int64_t rows, Body&& body) {
    parallel_by(threads, (rows + kChunk - 1) / kChunk, [&](int64_t chunk) {
        for (int64_t t = chunk * kChunk; t < std::min(rows, (chunk + 1) * kChunk); ++t) body(t);
    });
}

// Calls body(first column, mask) for every 16 columns.
template <class Body>
inline void each_lane(int64_t width, Body&& body) {
    int64_t i = 0;
    for (; i + 16 <= width; i += 16) body(i, __mmask16(0xFFFF));
    if (i < width) body(i, first_lanes(width - i));
}

inline __m512 get(const float* p, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, p); }
inline void put(float* p, __mmask16 mask, __m512 x) { _mm512_mask_storeu_ps(p, mask, x); }

inline float inverse_root(const float* x, float eps, int64_t width) {
    __m512 sum = _mm512_setzero_ps();
    each_lane(width, [&](int64_t i, __mmask16 m) { sum = _mm512_fmadd_ps(get(x + i, m), get(x + i, m), sum); });
    return 1.0f / std::sqrt(_mm512_reduce_add_ps(sum) / float(width) + eps);
}

void rmsnorm(const float* x, const float* weight, float eps, int64_t tokens, int64_t width, float* y, int threads) {
    each_row(threads, tokens, [&](int64_t t) {
        const float* own = x + t * width;
        const __m512 root = _mm512_set1_ps(inverse_root(own, eps, width));
        each_lane(width, [&](int64_t i, __mmask16 m) {
            put(y + t * width + i, m, _mm512_mul_ps(get(weight + i, m), _mm512_mul_ps(get(own + i, m), root)));
        });
    });
}

// dx = r w dy - x r^3 / width * sum(x w dy); dw = sum over rows of r x dy, by chunks of rows, then chunk by chunk.
void rmsnorm_backward(const float* x, const float* weight, float eps, const float* by_y, int64_t tokens, int64_t width,
                      float* by_x, float* by_weight, int threads) {
    static thread_local std::vector<float> memory;
    const int64_t chunks = (tokens + kChunk - 1) / kChunk;
    float* sums = grown(memory, chunks * width);
    parallel_by(threads, chunks, [&, sums](int64_t chunk) {
        float* own = sums + chunk * width;
        std::fill_n(own, width, 0.0f);
        for (int64_t t = chunk * kChunk; t < std::min(tokens, (chunk + 1) * kChunk); ++t) {
            const float *row = x + t * width, *by = by_y + t * width;
            const float root = inverse_root(row, eps, width);
            __m512 dot = _mm512_setzero_ps();
            each_lane(width, [&](int64_t i, __mmask16 m) {
                const __m512 product = _mm512_mul_ps(get(row + i, m), get(by + i, m));
                dot = _mm512_fmadd_ps(product, get(weight + i, m), dot);
                put(own + i, m, _mm512_fmadd_ps(product, _mm512_set1_ps(root), get(own + i, m)));
            });
            const __m512 share = _mm512_set1_ps(_mm512_reduce_add_ps(dot) * root * root / float(width));
            each_lane(width, [&](int64_t i, __mmask16 m) {
                const __m512 straight = _mm512_mul_ps(get(by + i, m), get(weight + i, m));
                const __m512 both = _mm512_fnmadd_ps(get(row + i, m), share, straight);
                put(by_x + t * width + i, m, _mm512_mul_ps(both, _mm512_set1_ps(root)));
            });
        }
    });
    std::fill_n(by_weight, width, 0.0f);
    for (int64_t c = 0; c < chunks; ++c)
        for (int64_t i = 0; i < width; ++i) by_weight[i] += sums[c * width + i];
}

void rotate(const float* x, const float* cos, const float* sin, float sign, int64_t tokens, int64_t heads, int64_t dim,
            float* y, int threads) {
    const __m512i twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    each_row(threads, tokens, [&](int64_t t) {
        for (int64_t h = 0; h < dim; h += 16) {
            const auto angle = [&](const float* p) {
                return _mm512_permutexvar_ps(twice, _mm512_castps256_ps512(_mm256_loadu_ps(p + (t * dim + h) / 2)));
            };
            const __m512 c = angle(cos), s = _mm512_mul_ps(angle(sin), _mm512_set1_ps(sign));
            for (int64_t n = 0; n < heads; ++n) {
                const int64_t at = (t * heads + n) * dim + h;
                const __m512 own = _mm512_loadu_ps(x + at), swapped = _mm512_permute_ps(own, 0xB1);
                _mm512_storeu_ps(y + at, _mm512_fmaddsub_ps(own, c, _mm512_mul_ps(swapped, s)));
            }
        }
    });
}

inline __m512 sigmoid(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f);
    return _mm512_div_ps(one, _mm512_add_ps(one, exp(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

void swiglu(const float* gate, const float* up, int64_t stride, int64_t rows, int64_t width, float* y, int threads) {
    each_row(threads, rows, [&](int64_t t) {
        each_lane(width, [&](int64_t i, __mmask16 m) {
            const __m512 g = get(gate + t * stride + i, m);
            put(y + t * width + i, m, _mm512_mul_ps(_mm512_mul_ps(g, sigmoid(g)), get(up + t * stride + i, m)));
        });
    });
}

void swiglu_backward(const float* gate, const float* up, int64_t stride, const float* by_y, int64_t rows, int64_t width,
                     float* by_gate, float* by_up, int threads) {
    each_row(threads, rows, [&](int64_t t) {
        each_lane(width, [&](int64_t i, __mmask16 m) {
            const int64_t at = t * stride + i;
            const __m512 g = get(gate + at, m), by = get(by_y + t * width + i, m), s = sigmoid(g);
            const __m512 silu = _mm512_mul_ps(g, s);
            put(by_up + at, m, _mm512_mul_ps(by, silu));
            // silu' = s + silu (1 - s)
            const __m512 slope = _mm512_add_ps(s, _mm512_fnmadd_ps(silu, s, silu));
            put(by_gate + at, m, _mm512_mul_ps(_mm512_mul_ps(by, get(up + at, m)), slope));
        });
    });
}

void combine(const float* rows, const int64_t* place, const float* weights, int64_t tokens, int64_t chosen,
             int64_t width, float* out, int threads) {
    each_row(threads, tokens, [&](int64_t t) {
        each_lane(width, [&](int64_t i, __mmask16 m) {
            __m512 sum = _mm512_setzero_ps();
            for (int64_t k = t * chosen; k < (t + 1) * chosen; ++k) {
                const __m512 weight = _mm512_set1_ps(weights ? weights[k] : 1.0f);
                sum = _mm512_fmadd_ps(get(rows + place[k] * width + i, m), weight, sum);
            }
            put(out + t * width + i, m, sum);
        });
    });
}

void combine_backward(const float* rows, const int64_t* place, const float* weights, const float* by_out,
                      int64_t tokens, int64_t chosen, int64_t width, float* by_rows, float* by_weights, int threads) {
    each_row(threads, tokens, [&](int64_t t) {
        for (int64_t k = t * chosen; k < (t + 1) * chosen; ++k) {
            __m512 dot = _mm512_setzero_ps();
            each_lane(width, [&](int64_t i, __mmask16 m) {
                const __m512 by = get(by_out + t * width + i, m);
                dot = _mm512_fmadd_ps(by, get(rows + place[k] * width + i, m), dot);
                put(by_rows + place[k] * width + i, m, _mm512_mul_ps(by, _mm512_set1_ps(weights[k])));
            });
            by_weights[k] = _mm512_reduce_add_ps(dot);
        }
    });
}

void route(const float* logits, const float* bias, float norm_min, int64_t tokens, int64_t experts, int64_t chosen,
           float* p, int64_t* ids, float* weights, int threads) {
    const __m512 lowest = _mm512_set1_ps(-INFINITY);
    each_row(threads, tokens, [&](int64_t t) {
        static thread_local std::vector<float> memory;
        float *biased = grown(memory, experts), *own = p + t * experts;
        __m512 peaks = lowest, sums = _mm512_setzero_ps();
        each_lane(experts, [&](int64_t i, __mmask16 m) {
            peaks = _mm512_mask_max_ps(peaks, m, peaks, get(logits + t * experts + i, m));
        });
        const __m512 peak = _mm512_set1_ps(_mm512_reduce_max_ps(peaks));
        each_lane(experts, [&](int64_t i, __mmask16 m) {
            const __m512 e = exp(_mm512_sub_ps(get(logits + t * experts + i, m), peak));
            sums = _mm512_mask_add_ps(sums, m, sums, e);
            put(own + i, m, e);
        });
        const __m512 sum = _mm512_set1_ps(_mm512_reduce_add_ps(sums));
        each_lane(experts, [&](int64_t i, __mmask16 m) {
            const __m512 share = _mm512_div_ps(get(own + i, m), sum);
            put(own + i, m, share);
            put(biased + i, m, _mm512_add_ps(share, get(bias + i, m)));
        });
        float total = 0;
        for (int64_t k = t * chosen; k < (t + 1) * chosen; ++k) {
            __m512 best = lowest;
            each_lane(experts, [&](int64_t i, __mmask16 m) { best = _mm512_mask_max_ps(best, m, best, get(biased + i, m)); });
            const __m512 most = _mm512_set1_ps(_mm512_reduce_max_ps(best));
            int64_t id = -1;
            each_lane(experts, [&](int64_t i, __mmask16 m) {
                const __mmask16 found = _mm512_mask_cmpeq_ps_mask(m, get(biased + i, m), most);
                if (id < 0 && found) id = i + __builtin_ctz(found);
            });
            ids[k] = std::max<int64_t>(id, 0);  // none is the largest where all are NaN
            biased[ids[k]] = -INFINITY;
            weights[k] = own[ids[k]];
            total += weights[k];
        }
        for (int64_t k = t * chosen; k < (t + 1) * chosen; ++k) weights[k] /= std::max(total, norm_min);
    });
}

// With s the sum, or norm_min where that is larger: dp_k = (dw_k - sum(dw w)) / s, or dw_k / s; dlogits = p (dp - sum(p dp)).
void route_backward(const float* p, const int64_t* ids, const float* weights, const float* by_weights, float norm_min,
                    int64_t tokens, int64_t experts, int64_t chosen, float* by_logits, int threads) {
    each_row(threads, tokens, [&](int64_t t) {
        const float* own = p + t * experts;
        float* by = by_logits + t * experts;
        float total = 0, dot = 0, all = 0;
        for (int64_t k = t * chosen; k < (t + 1) * chosen; ++k) {
            total += own[ids[k]];
            dot += by_weights[k] * weights[k];
        }
        if (total < norm_min) dot = 0;
        // p_k dp_k = w_k (dw_k - dot): the sum cancels
        for (int64_t k = t * chosen; k < (t + 1) * chosen; ++k) all += weights[k] * (by_weights[k] - dot);
        each_lane(experts, [&](int64_t i, __mmask16 m) { put(by + i, m, _mm512_mul_ps(get(own + i, m), _mm512_set1_ps(-all))); });
        for (int64_t k = t * chosen; k < (t + 1) * chosen; ++k) by[ids[k]] += weights[k] * (by_weights[k] - dot);
    });
}

void cross_entropy(const float* logits, const int64_t* labels, int64_t tokens, int64_t words, float* loss, float* lse,
                   int threads) {
    each_row(threads, tokens, [&](int64_t t) {
        const float* own = logits + t * words;
        __m512 peaks = _mm512_set1_ps(-INFINITY), sums = _mm512_setzero_ps();
        each_lane(words, [&](int64_t i, __mmask16 m) { peaks = _mm512_mask_max_ps(peaks, m, peaks, get(own + i, m)); });
        const float peak = _mm512_reduce_max_ps(peaks);
        each_lane(words, [&](int64_t i, __mmask16 m) {
            sums = _mm512_mask_add_ps(sums, m, sums, exp(_mm512_sub_ps(get(own + i, m), _mm512_set1_ps(peak))));
        });
        lse[t] = peak + std::log(_mm512_reduce_add_ps(sums));
        loss[t] = labels[t] < 0 ? 0.0f : lse[t] - own[labels[t]];
    });
}

void cross_entropy_backward(const float* logits, const int64_t* labels, const float* lse, const float* by_loss,
                            int64_t tokens, int64_t words, float* by_logits, int threads) {
    each_row(threads, tokens, [&](int64_t t) {
        const __m512 shift = _mm512_set1_ps(lse[t]), scale = _mm512_set1_ps(labels[t] < 0 ? 0.0f : by_loss[t]);
        each_lane(words, [&](int64_t i, __mmask16 m) {
            put(by_logits + t * words + i, m,
                _mm512_mul_ps(exp(_mm512_sub_ps(get(logits + t * words + i, m), shift)), scale));
        });
        if (labels[t] >= 0) by_logits[t * words + labels[t]] -= by_loss[t];
    });
}

}  // namespace
