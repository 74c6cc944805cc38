// A bank of packed experts over tokens: out[t] = sum over k of weights[t, k] * down_e(silu(gate_e x) * up_e x).
//
// The (token, expert) pairs are sorted by expert, and an expert's tile is decoded once for all its tokens. Between the
// two products everything stays fp32. A token's terms are added in the order of its choice, so its result depends on
// nothing that runs beside it.
#pragma once

#include <cstdint>
#include <vector>

#include "memory.hpp"
#include "packed.hpp"

namespace duomo {

// E matrices of one shape, code and rotation; a single matrix is a bank of one. Pointers are borrowed.
struct TrellisBank {
    TrellisCode code;
    const uint8_t* codes;        // [E][rows * columns * bits / 8]
    const uint16_t* row_scale;   // [E][rows]
    float unit;
    int64_t count, rows, columns;
    int chain, block;
    Memory<float> signs;    // [columns], or empty: the inputs are not rotated

    TrellisMatrix matrix(int64_t expert) const {
        return {&code, codes + expert * (rows * columns * code.bits / 8), row_scale + expert * rows, unit, rows,
                columns, chain, block};
    }
    const float* signs_or_null() const { return signs.empty() ? nullptr : signs.data(); }
};

struct IntRows {
    IntMatrix matrix;
    Memory<float> signs;
    const float* signs_or_null() const { return signs.empty() ? nullptr : signs.data(); }
};

// Owns the int8 form of T rows of activations. Memory grows and is kept.
class ActivationBuffer {
public:
    // Rotates and quantizes x[T][columns], on the pool.
    Activations fill(const float* x, const float* signs, int64_t tokens, int64_t columns, int block);
    // The same a row at a time, by whichever thread has it: `reserve`, then `set` every row, then `view`.
    void reserve(int64_t tokens, int64_t columns, int block);
    void set(int64_t row, const float* x, const float* signs, int64_t columns, int block) {
        set_part(row, 0, columns, x, signs, columns, block);
    }
    // Of a row only the columns [first, first + count), whole blocks; x begins at the first of them.
    void set_part(int64_t row, int64_t first, int64_t count, const float* x, const float* signs, int64_t columns,
                  int block);
    Activations view(int64_t tokens) const { return {q_.data(), scale_.data(), sum_.data(), tokens}; }
    // The rows [first, first + count) alone.
    Activations view(int64_t first, int64_t count, int64_t columns, int block) const {
        const int64_t blocks = columns / block;
        return {q_.data() + first * columns, scale_.data() + first * blocks, sum_.data() + first * blocks, count};
    }
    // Rows `rows[i]` of another buffer's activations, in that order.
    Activations gather(const Activations& from, int64_t columns, int block, const int64_t* rows, int64_t count);

private:
    Memory<int8_t> q_;
    Memory<float> scale_;
    Memory<int32_t> sum_;
};

// down(silu(gate x) * up x): one MLP of single matrices. A bank is packed (above) or plain (dense.hpp).
template <class Bank>
struct Mlp {
    const Bank *gate = nullptr, *up = nullptr, *down = nullptr;
};

// A bank over the tokens that go to it: what `experts` below takes, as one of several.
template <class Bank>
struct Routed {
    const Bank *gate_up, *down;
    const float* hidden;        // [T][D]
    const int64_t* expert_ids;  // [T][K]
    const float* weights;       // [T][K]
    int64_t tokens, chosen;
    float* out;  // [T][D]
};

// Banks and an MLP at once: all first products side by side on the pool, then all second ones. `mlp` may be null.
void mixture(const Routed<TrellisBank>* banks, int64_t num_banks, const Mlp<TrellisBank>* mlp, const float* x,
             int64_t tokens, float* mlp_out);

constexpr int64_t kManyTokens = 32;  // from which `mixture` goes this way: products take memory by the token

// The same without ever holding a product whole (many_tokens.cpp).
void mixture_of_many(const Routed<TrellisBank>* banks, int64_t num_banks, const Mlp<TrellisBank>* mlp, const float* x,
                     int64_t tokens, float* mlp_out);
void give_back_many();  // what this thread holds for it from one layer to the next

// out[T][D] = one MLP.
void mlp(const Mlp<TrellisBank>& own, const float* x, int64_t tokens, float* out);

// Products of the same x[T][K] with several matrices, rotated once for neighbours that share their signs.
void linear_shared(const TrellisBank* const* banks, int64_t count, const float* x, int64_t tokens, float* const* y);

// The K experts of each token and their weights: softmax of x router^T in fp32, the largest of probability + bias,
// weights from the unbiased probabilities, divided by their sum (at least norm_min).
void route(const float* x, const float* router, const float* bias, int64_t tokens, int64_t width, int64_t num_experts,
           int64_t chosen, float norm_min, int64_t* expert_ids, float* weights);

// hidden [T][D] and out [T][D] fp32; expert_ids [T][K] in [0, E); weights [T][K].
void experts(const TrellisBank& gate_up, const TrellisBank& down, const float* hidden, const int64_t* expert_ids,
             const float* weights, int64_t tokens, int64_t chosen, float* out);

}  // namespace duomo
