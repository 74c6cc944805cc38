// The whole decoder as one call: norms, attention through the pages of the cache, banks and shared experts, layer by
// layer. It calls what the other headers offer in the order in which `model/decoder.py` does, so its bits are those of
// the layers called one by one. A step in which every sequence computes one token of text may be a single call with
// embedding, head and greedy choice (`run_next`). Nothing is allocated once memory has grown to the largest step; only a
// large step, a prompt's, gives its memory back at its end. `Bank` is what a matrix is stored as: TrellisBank or
// DenseBank.
#pragma once

#include <cstdint>
#include <vector>

#include "attention.hpp"
#include "dense.hpp"
#include "experts.hpp"

namespace duomo {

// A bank of routed experts and its router; `router` is null where a layer has no such bank.
template <class Bank>
struct RoutedBank {
    const float* router = nullptr;  // [E][D]
    const float* bias = nullptr;    // [E]
    const Bank *gate_up = nullptr, *down = nullptr;
};

template <class Bank>
struct DecoderLayer {
    const float *input_norm, *post_norm;  // [D]
    const Bank *q, *k, *v, *o;
    RoutedBank<Bank> text, vision;
    Mlp<Bank> mlp;  // the dense one, or the shared experts; null pointers where there is none
};

template <class Bank>
struct DecoderStack {
    std::vector<DecoderLayer<Bank>> layers;
    const float* norm;  // [D]
    int64_t width, num_heads, groups, head_dim, chosen;
    float eps, norm_min;
};

// Keys and values of all layers: [layers][slots][groups][head_dim] a side; `scale` [layers][slots][groups] for int8.
struct PagedStore {
    void *key, *value;
    float *key_scale, *value_scale;
    Stored stored;
    int64_t slots, page_size;
};

// The new tokens of a step, packed one sequence after another (`model.Batch`).
struct StepTokens {
    int64_t tokens;
    const float *cos, *sin;          // [T][H/2]
    const int64_t* slots;            // [T]
    const int64_t* pages;            // [S][table_width]
    int64_t table_width;
    const int64_t *sequence, *num_keys;  // [T]
    const int64_t *text_rows, *vision_rows;
    int64_t num_text, num_vision;
    int64_t* expert_ids;             // [layers][T][K]: what the routers chose; layers without a bank are left alone
    const int64_t* wanted = nullptr;  // [num_wanted] rows, rising: whose final state is asked for
    int64_t num_wanted = -1;          // below zero: of all
};

// hidden[T][D] through all layers, in place, then the last norm into out, a row for each that is wanted. Of the last
// layer the others compute keys and values alone, which later tokens see; their expert_ids there are left alone.
template <class Bank>
void run_decoder(const DecoderStack<Bank>&, const PagedStore&, const StepTokens&, float* hidden, float* out);

// What stands at both ends of a plain stack.
struct Ends {
    const float* embedding = nullptr;  // [V][D]
    const DenseBank* head = nullptr;   // [V][D]
};

// One text token of each of `sequences`, the last of the `num_keys` that it sees.
struct NextTokens {
    int64_t sequences;
    const int64_t *ids, *positions, *num_keys;  // [S]
    const int64_t* pages;                       // [S][table_width]
    int64_t table_width;
    const float *cos, *sin;                     // [positions][H/2]: of every position there is so far
    float* logits;                              // [S][V]
    int64_t* likeliest;                         // [S]: the first of the largest logits
};

// A whole step of such tokens, from their ids to the likeliest next ones.
void run_next(const DecoderStack<DenseBank>&, const Ends&, const PagedStore&, const NextTokens&);

// Rotates the queries and keys of T tokens in place: rows of whole heads.
void rotate_heads(float* x, int64_t tokens, int64_t row, int64_t head_dim, const float* cos, const float* sin);

}  // namespace duomo
