// Products of training: the forward, and both gradients, of one matrix or of a bank of them, in one call.
#pragma once

#include "train_lanes.hpp"

namespace {

using duomo::TrainProduct;

constexpr int64_t kRows = 64, kColumns = 64;  // of an item

// Calls body(product, chunk) for every chunk of every product.
template <class Chunks, class Body>
void each_chunk(int threads, int64_t count, Chunks&& chunks, Body&& body) {
    static thread_local std::vector<int64_t> memory;
    int64_t* ends = grown(memory, count);
    int64_t items = 0;
    for (int64_t i = 0; i < count; ++i) ends[i] = items += chunks(i);
    parallel_by(threads, items, [&, ends](int64_t item) {
        const int64_t i = std::upper_bound(ends, ends + count, item) - ends;
        body(i, item - (i ? ends[i - 1] : 0));
    });
}

template <class T>
void multiply_all(const TrainProduct* products, int64_t count, int threads) {
    static thread_local std::vector<uint32_t> panels_memory;
    static thread_local std::vector<int64_t> begin_memory;
    int64_t* begin = grown(begin_memory, count + 1);
    begin[0] = 0;
    for (int64_t i = 0; i < count; ++i)
        begin[i + 1] = begin[i] + round_up(products[i].columns, kPanel) * units_of<T>(products[i].steps);
    uint32_t* panels = grown(panels_memory, begin[count]);
    each_chunk(
        threads, count,
        [&](int64_t i) { return products[i].rows ? (products[i].columns + kColumns - 1) / kColumns : 0; },
        [&](int64_t i, int64_t chunk) {
            const TrainProduct& p = products[i];
            const int64_t first = chunk * kColumns;
            pack<T, kPanel>(p.b, first, std::min(kColumns, p.columns - first), p.steps,
                            panels + begin[i] + first * units_of<T>(p.steps));
        });
    each_chunk(
        threads, count, [&](int64_t i) { return (products[i].rows + kRows - 1) / kRows; },
        [&](int64_t i, int64_t chunk) {
            static thread_local std::vector<uint32_t> strips_memory;
            const TrainProduct& p = products[i];
            const int64_t first = chunk * kRows, rows = std::min(kRows, p.rows - first), units = units_of<T>(p.steps);
            uint32_t* strips = grown(strips_memory, kRows * units);
            pack<T, kStrip>(p.a, first, rows, p.steps, strips);
            multiply_packed<T>(strips, units, rows, panels + begin[i], units, p.columns, units,
                               {p.out + first * p.out_stride, p.out_stride, kPanel});
        });
}

void multiply(const TrainProduct* products, int64_t count, bool is_rounded, int threads) {
    if (is_rounded) multiply_all<Rounded>(products, count, threads);
    else multiply_all<Single>(products, count, threads);
}

}  // namespace
