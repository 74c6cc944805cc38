// Attention through the pages of a KV cache: fp32, bf16, or int8 with one scale a slot and head.
//
// Softmax in two passes over a row's own keys, in rising order: all scores, their maximum, then the weighted values.
// A row's arithmetic depends on its own keys alone, so its bits are the same whatever the batch, chunk or page layout.
// Keys and values are widened to fp32 32 at a time (16 KB, first-level cache) and reused by all rows of an item: the
// query heads that share a key head, times up to eight tokens of one sequence.
#pragma once

#include <cstdint>

namespace duomo {

enum class Stored { float32 = 0, bfloat16 = 1, int8 = 2 };

constexpr int64_t bytes_of(Stored stored) { return stored == Stored::float32 ? 4 : stored == Stored::bfloat16 ? 2 : 1; }

// One side of a layer's cache: [slots][groups][head_dim]; scale is [slots][groups], for int8 only.
struct CacheSide {
    const void* data;
    const float* scale;
    Stored stored;
    int64_t groups, head_dim;
};

struct AttentionKernels {
    // `count` rows of the slots given, of one group, as fp32 [count][head_dim].
    void (*widen)(const CacheSide&, int64_t group, const int64_t* slots, int64_t count, float* out);
    // scores[i] = scale * (query . keys[i])
    void (*score)(const float* query, const float* keys, int64_t head_dim, int64_t count, float scale, float* scores);
    // out += sum of weights[i] * values[i]
    void (*gather)(const float* weights, const float* values, int64_t head_dim, int64_t count, float* out);
};

const AttentionKernels& attention_kernels();  // of current_isa()
extern const AttentionKernels attention_portable;
extern const AttentionKernels* const attention_avx2;
extern const AttentionKernels* const attention_avx512;

// query and out are [T][N][H] fp32, N a multiple of groups, H of 16. Token t belongs to sequence sequence[t] and sees
// its first num_keys[t] keys; tokens of one sequence stand side by side, num_keys rising. pages is [S][table_width].
void paged_attention(const float* query, const CacheSide& key, const CacheSide& value, const int64_t* pages,
                     int64_t table_width, int64_t page_size, const int64_t* sequence, const int64_t* num_keys,
                     int64_t tokens, int64_t num_heads, float* out);

}  // namespace duomo
