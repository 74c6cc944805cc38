#include "pairs.hpp"

#include <algorithm>

#include "pool.hpp"
#include "rotate.hpp"

namespace duomo {

void Pairs::sort(const int64_t* expert_ids, int64_t tokens, int64_t chosen, int64_t num_experts) {
    const int64_t pairs = tokens * chosen;
    next_.assign(size_t(num_experts) + 1, 0);
    for (int64_t i = 0; i < pairs; ++i) ++next_[size_t(expert_ids[i]) + 1];
    active.clear();
    begin.clear();
    for (int64_t e = 0; e < num_experts; ++e) {
        if (next_[size_t(e) + 1]) {
            active.push_back(e);
            begin.push_back(next_[size_t(e)]);
        }
        next_[size_t(e) + 1] += next_[size_t(e)];
    }
    begin.push_back(pairs);
    place.resize(size_t(pairs));
    token.resize(size_t(pairs));
    for (int64_t i = 0; i < pairs; ++i) {
        const int64_t own = next_[size_t(expert_ids[i])]++;
        place[size_t(i)] = own;
        token[size_t(own)] = i / chosen;
    }
}

void Pairs::combine(const float* terms, const float* weights, int64_t tokens, int64_t chosen, int64_t width,
                    float* out, int64_t stride) const {
    parallel_rows(tokens, [&](int64_t t) {
        std::fill_n(out + t * stride, width, 0.0f);
        for (int64_t k = 0; k < chosen; ++k)
            rotate_kernels().add_scaled(terms + place[size_t(t * chosen + k)] * width, weights[t * chosen + k], width,
                                        out + t * stride);
    });
}

}  // namespace duomo
