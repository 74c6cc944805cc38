// What a training step multiplies, forward and backward, over plain fp32 tensors. There is one instruction set: where
// AVX-512 with BF16 is missing, torch computes (`kernels/reference`), which is the specification of all of this.
//
// Every sum runs in one order that the shapes alone decide, so a step repeats to the bit, by any number of threads.
// Here, and only here, fp32 sums are fused multiply-adds; exponentials are a polynomial, to about 2 units of the last place.
#pragma once

#include <cstdint>

namespace duomo {

// One side of a product, seen as [lanes][steps]. Along: lane l, step s is data[row(l) * stride + s]; across:
// data[row(s) * stride + l]. row(i) is rows[i], or i where there are none.
struct Operand {
    const float* data;
    int64_t stride;
    const int64_t* rows;
    bool is_across;
};

// out[m * out_stride + n] = sum over steps of a(m, s) * b(n, s). No steps: zeros.
struct TrainProduct {
    Operand a, b;
    int64_t rows, columns, steps;
    float* out;
    int64_t out_stride;
};

// Whole sequences side by side: query and out are [T][heads][dim], key and value [T][groups][dim]; dim in 16s.
struct SequenceShape {
    const int64_t* lengths;
    int64_t num_sequences, heads, groups, dim;
    bool is_causal;  // or every token sees its whole sequence
    // [T] or null: where it is not 0, a key is seen by tokens of its own number alone.
    const int32_t* blocks;
};

struct TrainKernels {
    // All products at once; with `is_rounded` both sides are rounded to bf16, and sums are fp32 still.
    void (*multiply)(const TrainProduct*, int64_t count, bool is_rounded, int threads);
    // lse is [T][heads]: log2 of the sum of a row's exponentials, whose scores are in units of log2(e).
    void (*attention)(const SequenceShape&, const float* query, const float* key, const float* value, float* out,
                      float* lse, int threads);
    void (*attention_backward)(const SequenceShape&, const float* query, const float* key, const float* value,
                               const float* out, const float* lse, const float* by_out, float* by_query, float* by_key,
                               float* by_value, int threads);
    // y = weight * x / sqrt(mean(x^2) + eps) of rows [T][width]; backward adds nothing up: by_weight is written.
    void (*rmsnorm)(const float* x, const float* weight, float eps, int64_t tokens, int64_t width, float* y, int threads);
    void (*rmsnorm_backward)(const float* x, const float* weight, float eps, const float* by_y, int64_t tokens,
                             int64_t width, float* by_x, float* by_weight, int threads);
    // Adjacent pairs of [T][heads][dim] turned by angles [T][dim / 2], `sign` times; dim in 16s.
    void (*rotate)(const float* x, const float* cos, const float* sin, float sign, int64_t tokens, int64_t heads,
                   int64_t dim, float* y, int threads);
    // y[i] = silu(gate[i]) * up[i]; rows of gate and up are `stride` apart, those of y `width`.
    void (*swiglu)(const float* gate, const float* up, int64_t stride, int64_t rows, int64_t width, float* y, int threads);
    void (*swiglu_backward)(const float* gate, const float* up, int64_t stride, const float* by_y, int64_t rows,
                            int64_t width, float* by_gate, float* by_up, int threads);
    // out[t] = sum over k of weights[t][k] * rows[place[t][k]], in the order of k; without weights, of the rows.
    void (*combine)(const float* rows, const int64_t* place, const float* weights, int64_t tokens, int64_t chosen,
                    int64_t width, float* out, int threads);
    void (*combine_backward)(const float* rows, const int64_t* place, const float* weights, const float* by_out,
                             int64_t tokens, int64_t chosen, int64_t width, float* by_rows, float* by_weights, int threads);
    // Of logits [T][experts]: p = their softmax; ids, the `chosen` largest of p + bias, in their order, and of several
    // alike the first; weights, p of those over the larger of their sum and norm_min.
    void (*route)(const float* logits, const float* bias, float norm_min, int64_t tokens, int64_t experts, int64_t chosen,
                  float* p, int64_t* ids, float* weights, int threads);
    // The choice has no gradient. by_logits is written.
    void (*route_backward)(const float* p, const int64_t* ids, const float* weights, const float* by_weights,
                           float norm_min, int64_t tokens, int64_t experts, int64_t chosen, float* by_logits, int threads);
    // loss[t] = lse[t] - logits[t][label]; a negative label: 0, and no gradient.
    void (*cross_entropy)(const float* logits, const int64_t* labels, int64_t tokens, int64_t words, float* loss,
                          float* lse, int threads);
    void (*cross_entropy_backward)(const float* logits, const int64_t* labels, const float* lse, const float* by_loss,
                                   int64_t tokens, int64_t words, float* by_logits, int threads);
};

const TrainKernels* train_kernels();  // of current_isa(); null where there are none
extern const TrainKernels* const train_avx512;

}  // namespace duomo
