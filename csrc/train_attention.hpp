// Attention of whole sequences within themselves, causal or full, forward and backward, in fp32 (AVX-512 only).
//
// Queries stand in lanes: scores are [keys][32 queries], so that a softmax runs down registers, never across them, and
// the scores are a packed side of the next product as they lie. Keys that no query of a block sees are never touched. The
// backward pass computes the scores again from each row's lse. An item is a sequence and a key head, whose query heads
// add to its gradients in their order.
#pragma once

#include <cmath>

#include "train_lanes.hpp"

namespace {

using duomo::SequenceShape;

constexpr int64_t kQueries = 32;

struct SequenceItem {
    int64_t begin, length, group;
};

template <class Body>
void each_sequence(const SequenceShape& s, int threads, Body&& body) {
    parallel_by(threads, s.num_sequences * s.groups, [&](int64_t item) {
        int64_t begin = 0;
        for (int64_t i = 0; i < item / s.groups; ++i) begin += s.lengths[i];
        body(SequenceItem{begin, s.lengths[item / s.groups], item % s.groups});
    });
}

// One block of queries of one head: `scores` is [panels][room][16], of which the first `keys` rows count.
struct Block {
    int64_t first, count, keys, panels, room;
    bool is_causal;
    const int32_t* blocks;  // of the sequence

    Block(const SequenceShape& s, const SequenceItem& item, int64_t first)
        : first(first), count(std::min(kQueries, item.length - first)), keys(s.is_causal ? first + count : item.length),
          panels((count + 15) / 16), room(item.length), is_causal(s.is_causal),
          blocks(s.blocks ? s.blocks + item.begin : nullptr) {}
    float* panel(float* scores, int64_t j) const { return scores + j * room * kPanel; }
    // The queries of a panel that see key u, and are there at all.
    __mmask16 seen(int64_t j, int64_t u) const {
        const int64_t hidden = is_causal ? std::max<int64_t>(u - first - 16 * j, 0) : 0;
        if (hidden >= 16) return 0;
        const __mmask16 there = first_lanes(count - 16 * j), known = __mmask16(there & (0xFFFF << hidden));
        if (!blocks || !blocks[u]) return known;
        const __m512i own = _mm512_maskz_loadu_epi32(there, blocks + first + 16 * j);
        return _mm512_mask_cmpeq_epi32_mask(known, own, _mm512_set1_epi32(blocks[u]));
    }
};

inline uint32_t* bits(float* p) { return reinterpret_cast<uint32_t*>(p); }
inline const uint32_t* bits(const float* p) { return reinterpret_cast<const uint32_t*>(p); }

// scores[key][query] = side(key) . rows(query), of packed strips of keys and `packed` queries.
inline void score(const Block& block, int64_t dim, const uint32_t* strips, const duomo::Operand& rows, uint32_t* packed,
                  float* scores) {
    pack_along<Single, kPanel>(rows, block.first, block.count, dim, packed, dim);
    multiply_packed<Single>(strips, dim, block.keys, packed, dim, block.panels * kPanel, dim,
                            {scores, kPanel, block.room * kPanel});
}

// out(query)[h] = scale(query) * sum over keys of side[h][key] * scores[key][query].
inline void gather(const Block& block, int64_t dim, const uint32_t* strips, const float* scores, const float* scale,
                   float* turned, float* out, int64_t stride) {
    multiply_packed<Single>(strips, block.room, dim, bits(scores), block.room, block.panels * kPanel, block.keys,
                            {turned, kPanel, dim * kPanel});
    float* rows = turned + kQueries * dim;
    for (int64_t j = 0; j < block.panels; ++j) {
        pack_along<Single, kPanel>({turned + j * dim * kPanel, kPanel, nullptr, false}, 0, dim, kPanel, bits(rows), kPanel);
        for (int64_t q = 0; q < std::min<int64_t>(16, block.count - 16 * j); ++q)
            for (int64_t h = 0; h < dim; h += kPanel) {
                const __m512 x = _mm512_loadu_ps(rows + (h + q) * kPanel);
                _mm512_storeu_ps(out + (block.first + 16 * j + q) * stride + h,
                                 _mm512_mul_ps(x, _mm512_set1_ps(scale[16 * j + q])));
            }
    }
}

void attention(const SequenceShape& s, const float* query, const float* key, const float* value, float* out, float* lse,
            int threads) {
    const int64_t dim = s.dim, share = s.heads / s.groups, stride = s.heads * dim, key_stride = s.groups * dim;
    const float unit = 1.44269504f / std::sqrt(float(dim));
    each_sequence(s, threads, [&](const SequenceItem& item) {
        static thread_local std::vector<float> memory;
        const int64_t length = item.length, padded = round_up(length, 16);
        float* keys = grown(memory, 2 * padded * dim + kQueries * (padded + 3 * dim));
        float *values = keys + padded * dim, *scores = values + padded * dim, *packed = scores + kQueries * padded,
              *turned = packed + kQueries * dim;
        const int64_t base = item.begin * key_stride + item.group * dim;
        pack_along<Single, kStrip>({key + base, key_stride, nullptr, false}, 0, length, dim, bits(keys), dim);
        pack_across<Single, kStrip>({value + base, key_stride, nullptr, true}, 0, dim, length, bits(values));
        for (int64_t head = item.group * share; head < (item.group + 1) * share; ++head)
            for (int64_t first = 0; first < length; first += kQueries) {
                const Block block(s, item, first);
                const int64_t start = item.begin * stride + head * dim;
                score(block, dim, bits(keys), {query + start, stride, nullptr, false}, bits(packed), scores);
                float inverse[kQueries];
                for (int64_t j = 0; j < block.panels; ++j) {
                    float* p = block.panel(scores, j);
                    __m512 peak = _mm512_set1_ps(-1e30f), sum = _mm512_setzero_ps();
                    for (int64_t u = 0; u < block.keys; ++u)
                        peak = _mm512_mask_max_ps(peak, block.seen(j, u), peak, _mm512_loadu_ps(p + u * kPanel));
                    peak = _mm512_mul_ps(peak, _mm512_set1_ps(unit));
                    for (int64_t u = 0; u < block.keys; ++u) {
                        const __m512 x = _mm512_fmsub_ps(_mm512_loadu_ps(p + u * kPanel), _mm512_set1_ps(unit), peak);
                        const __m512 e = _mm512_maskz_mov_ps(block.seen(j, u), exp2(x));
                        sum = _mm512_add_ps(sum, e);
                        _mm512_storeu_ps(p + u * kPanel, e);
                    }
                    float peaks[16], sums[16];
                    _mm512_storeu_ps(peaks, peak);
                    _mm512_storeu_ps(sums, sum);
                    for (int64_t q = 0; q < std::min<int64_t>(16, block.count - 16 * j); ++q) {
                        inverse[16 * j + q] = 1.0f / sums[q];
                        lse[(item.begin + first + 16 * j + q) * s.heads + head] = peaks[q] + std::log2(sums[q]);
                    }
                }
                gather(block, dim, bits(values), scores, inverse, turned, out + start, stride);
            }
    });
}

// sums[key] += sum over queries of scores[key][query] * rows(query).
inline void scatter(const Block& block, int64_t dim, float* scores, const duomo::Operand& rows, uint32_t* strips,
                    uint32_t* packed, float* sums, int64_t stride) {
    for (int64_t j = 0; j < block.panels; ++j)
        pack_along<Single, kStrip>({block.panel(scores, j), kPanel, nullptr, false}, 0, block.keys, kPanel,
                                   strips + j * kPanel * kStrip, kQueries);
    const duomo::Operand own = {rows.data + block.first * rows.stride, rows.stride, nullptr, true};
    pack_across<Single, kPanel>(own, 0, dim, block.count, packed);
    multiply_packed<Single>(strips, kQueries, block.keys, packed, block.count, dim, block.count,
                            {sums, stride, kPanel}, true);
}

void attention_backward(const SequenceShape& s, const float* query, const float* key, const float* value, const float* out,
                     const float* lse, const float* by_out, float* by_query, float* by_key, float* by_value, int threads) {
    const int64_t dim = s.dim, share = s.heads / s.groups, stride = s.heads * dim, key_stride = s.groups * dim;
    const float root = 1.0f / std::sqrt(float(dim)), unit = 1.44269504f * root;
    each_sequence(s, threads, [&](const SequenceItem& item) {
        static thread_local std::vector<float> memory;
        const int64_t length = item.length, padded = round_up(length, 16);
        float* keys = grown(memory, 3 * padded * dim + kQueries * (3 * padded + 3 * dim));
        float *values = keys + padded * dim, *across = values + padded * dim, *scores = across + padded * dim,
              *by_scores = scores + kQueries * padded, *strips = by_scores + kQueries * padded,
              *packed = strips + kQueries * padded, *turned = packed + kQueries * dim;
        const int64_t base = item.begin * key_stride + item.group * dim;
        pack_along<Single, kStrip>({key + base, key_stride, nullptr, false}, 0, length, dim, bits(keys), dim);
        pack_along<Single, kStrip>({value + base, key_stride, nullptr, false}, 0, length, dim, bits(values), dim);
        pack_across<Single, kStrip>({key + base, key_stride, nullptr, true}, 0, dim, length, bits(across));
        for (int64_t t = 0; t < length; ++t) {
            std::fill_n(by_key + base + t * key_stride, dim, 0.0f);
            std::fill_n(by_value + base + t * key_stride, dim, 0.0f);
        }
        for (int64_t head = item.group * share; head < (item.group + 1) * share; ++head)
            for (int64_t first = 0; first < length; first += kQueries) {
                const Block block(s, item, first);
                const int64_t start = item.begin * stride + head * dim;
                const duomo::Operand queries = {query + start, stride, nullptr, false};
                const duomo::Operand by_outs = {by_out + start, stride, nullptr, false};
                score(block, dim, bits(keys), queries, bits(packed), scores);
                score(block, dim, bits(values), by_outs, bits(packed), by_scores);
                float dots[kQueries] = {}, sums[kQueries] = {}, roots[kQueries];
                for (int64_t q = 0; q < block.count; ++q) {
                    const int64_t row = start + (first + q) * stride;
                    __m512 dot = _mm512_setzero_ps();
                    for (int64_t h = 0; h < dim; h += kPanel)
                        dot = _mm512_fmadd_ps(_mm512_loadu_ps(out + row + h), _mm512_loadu_ps(by_out + row + h), dot);
                    dots[q] = _mm512_reduce_add_ps(dot);
                    sums[q] = lse[(item.begin + first + q) * s.heads + head];
                }
                std::fill_n(roots, kQueries, root);
                for (int64_t j = 0; j < block.panels; ++j) {
                    float *p = block.panel(scores, j), *by = block.panel(by_scores, j);
                    const __m512 sum = _mm512_loadu_ps(sums + 16 * j), dot = _mm512_loadu_ps(dots + 16 * j);
                    for (int64_t u = 0; u < block.keys; ++u) {
                        const __m512 x = _mm512_fmsub_ps(_mm512_loadu_ps(p + u * kPanel), _mm512_set1_ps(unit), sum);
                        const __m512 e = _mm512_maskz_mov_ps(block.seen(j, u), exp2(x));
                        _mm512_storeu_ps(p + u * kPanel, e);
                        const __m512 own = _mm512_mul_ps(e, _mm512_sub_ps(_mm512_loadu_ps(by + u * kPanel), dot));
                        _mm512_storeu_ps(by + u * kPanel, own);
                    }
                }
                gather(block, dim, bits(across), by_scores, roots, turned, by_query + start, stride);
                scatter(block, dim, scores, by_outs, bits(strips), bits(packed), by_value + base, key_stride);
                scatter(block, dim, by_scores, queries, bits(strips), bits(packed), by_key + base, key_stride);
            }
        for (int64_t t = 0; t < length; ++t)
            for (int64_t h = 0; h < dim; ++h) by_key[base + t * key_stride + h] *= root;
    });
}

}  // namespace
