#include "attention.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu.hpp"
#include "memory.hpp"
#include "pool.hpp"
#include "rotate.hpp"

namespace duomo {
namespace {

constexpr int64_t kTokens = 8;  // of an item
constexpr int64_t kKeys = 32;   // widened at a time

float most_of(const float* x, int64_t count) {  // in 16 lanes, so that a loop becomes vectors
    float most[16];
    std::fill_n(most, 16, x[0]);
    int64_t i = 0;
    for (; i + 16 <= count; i += 16)
        for (int lane = 0; lane < 16; ++lane) most[lane] = x[i + lane] > most[lane] ? x[i + lane] : most[lane];
    return std::max(*std::max_element(most, most + 16), *std::max_element(x + std::min(i, count - 1), x + count));
}

struct Query {
    const float* query;
    const CacheSide &key, &value;
    const int64_t* page_row;
    int64_t page_size, num_heads;
    const int64_t* num_keys;
    float* out;

    int64_t slot_of(int64_t key_number) const {
        return page_row[key_number / page_size] * page_size + key_number % page_size;
    }

    void slots(int64_t first, int64_t count, int64_t* into) const {
        for (int64_t i = 0; i < count; ++i) into[i] = slot_of(first + i);
    }

    // Asks for the rows of `count` keys of a group, those that there are. No hardware guesses them: a head of the
    // cache is a few lines out of every slot. Inlined, because GCC takes a call that only asks for one without effect.
    __attribute__((always_inline)) void ask(const CacheSide& side, int64_t group, int64_t first, int64_t count,
                                            int64_t end) const {
        const int64_t bytes = side.head_dim * bytes_of(side.stored);
        for (int64_t u = first; u < std::min(first + count, end); ++u) {
            const int64_t row = slot_of(u) * side.groups + group;
            const char* line = static_cast<const char*>(side.data) + row * bytes;
            for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(line + byte, 0, 2);
            if (side.scale) __builtin_prefetch(side.scale + row, 0, 2);
        }
    }

    // Tokens [0, tokens) of one sequence, the query heads of one group.
    void attend(int64_t tokens, int64_t group) const {
        static thread_local Memory<float> score_memory, block_memory;
        const AttentionKernels& kernels = attention_kernels();
        const int64_t width = key.head_dim, share = num_heads / key.groups, longest = num_keys[tokens - 1];
        const int64_t row_size = (longest + 15) / 16 * 16;
        float *scores = grown(score_memory, tokens * share * row_size), *block = grown(block_memory, kKeys * width);
        const float scale = 1.0f / std::sqrt(float(width));
        int64_t own[kKeys];
        const auto row_of = [&](int64_t t, int64_t head) { return (t * num_heads + group * share + head) * width; };
        // A little of a later block with each head of this one: many at once, and most would be dropped.
        const int64_t each = (kKeys + tokens * share - 1) / (tokens * share);
        ask(key, group, 0, kKeys, longest);
        for (int64_t u = 0; u < longest; u += kKeys) {
            int64_t later = u + kKeys;  // what is asked for next
            slots(u, std::min(kKeys, longest - u), own);
            kernels.widen(key, group, own, std::min(kKeys, longest - u), block);
            for (int64_t t = 0; t < tokens; ++t)
                if (const int64_t count = std::min(kKeys, num_keys[t] - u); count > 0)
                    for (int64_t head = 0; head < share; ++head, later += each) {
                        ask(key, group, later, each, longest);
                        kernels.score(query + row_of(t, head), block, width, count, scale,
                                      scores + (t * share + head) * row_size + u);
                    }
        }
        ask(value, group, 0, kKeys, longest);
        for (int64_t t = 0; t < tokens; ++t)
            for (int64_t head = 0; head < share; ++head) {
                float* row = scores + (t * share + head) * row_size;
                const float most = most_of(row, num_keys[t]);
                const float total = rotate_kernels().exp_sum(row, most, num_keys[t], row);
                for (int64_t u = 0; u < num_keys[t]; ++u) row[u] /= total;
                std::fill_n(out + row_of(t, head), width, 0.0f);
            }
        for (int64_t u = 0; u < longest; u += kKeys) {
            int64_t later = u + kKeys;  // what is asked for next
            slots(u, std::min(kKeys, longest - u), own);
            kernels.widen(value, group, own, std::min(kKeys, longest - u), block);
            for (int64_t t = 0; t < tokens; ++t)
                if (const int64_t count = std::min(kKeys, num_keys[t] - u); count > 0)
                    for (int64_t head = 0; head < share; ++head, later += each) {
                        ask(value, group, later, each, longest);
                        kernels.gather(scores + (t * share + head) * row_size + u, block, width, count,
                                       out + row_of(t, head));
                    }
        }
    }
};

}  // namespace

const AttentionKernels& attention_kernels() {
    switch (current_isa()) {
        case Isa::avx512: return attention_avx512 ? *attention_avx512 : attention_portable;
        case Isa::avx2: return attention_avx2 ? *attention_avx2 : attention_portable;
        default: return attention_portable;
    }
}

void paged_attention(const float* query, const CacheSide& key, const CacheSide& value, const int64_t* pages,
                     int64_t table_width, int64_t page_size, const int64_t* sequence, const int64_t* num_keys,
                     int64_t tokens, int64_t num_heads, float* out) {
    static thread_local std::vector<int64_t> begins;  // of runs of up to kTokens tokens of one sequence
    begins.clear();
    for (int64_t t = 0; t < tokens; ++t)
        if (t == 0 || sequence[t] != sequence[t - 1] || t - begins.back() == kTokens) begins.push_back(t);
    begins.push_back(tokens);
    const int64_t* begin = begins.data();
    const int64_t runs = int64_t(begins.size()) - 1, row = num_heads * key.head_dim;
    parallel(tokens ? runs * key.groups : 0, [&](int64_t item) {
        const int64_t t = begin[item / key.groups];
        const Query own = {query + t * row, key, value, pages + sequence[t] * table_width, page_size, num_heads,
                           num_keys + t, out + t * row};
        own.attend(begin[item / key.groups + 1] - t, item % key.groups);
    });
}

}  // namespace duomo
