// The (token, expert) pairs of a bank, sorted by expert, and a token's terms brought together again.
#pragma once

#include <cstdint>
#include <vector>

namespace duomo {

// Sorted stably, so by token within an expert. Memory grows and is kept.
struct Pairs {
    std::vector<int64_t> token;   // [pairs] in sorted order
    std::vector<int64_t> place;   // where pair t * K + k went in the sorted order
    std::vector<int64_t> active;  // experts that have pairs
    std::vector<int64_t> begin;   // where each one's begin, and the end of all

    void sort(const int64_t* expert_ids, int64_t tokens, int64_t chosen, int64_t num_experts);

    // out[t] = sum over k of weights[t][k] * the pair's row of terms[pairs][width], in the order of its choice.
    // Rows of out are `stride` apart.
    void combine(const float* terms, const float* weights, int64_t tokens, int64_t chosen, int64_t width, float* out,
                 int64_t stride) const;

private:
    std::vector<int64_t> next_;
};

}  // namespace duomo
