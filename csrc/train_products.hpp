// Products of training: the forward, and both gradients, of one matrix or of a bank of them, in one call.
#pragma once

#include "train_lanes.hpp"

namespace {

using duomo::Operand;
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

// The steps of a side go in passes, each packed by itself: lanes of a whole side may lie a power of two apart, where
// they would put one another out of the caches (with 4,096 steps half of the speed).
template <class T>
int64_t passes_of(const TrainProduct& p) {
    return std::max<int64_t>(1, (units_of<T>(p.steps) + kUnits - 1) / kUnits);
}

struct Pass {
    int64_t first, steps;
};

template <class T>
Pass pass_of(const TrainProduct& p, int64_t pass) {
    const int64_t units = units_of<T>(p.steps), passes = passes_of<T>(p);
    const int64_t first = units * pass / passes * T::steps, last = units * (pass + 1) / passes * T::steps;
    return {first, std::min(last, p.steps) - first};
}

// The side from step `first` on.
Operand from(const Operand& o, int64_t first) {
    if (!o.is_across) return {o.data + first, o.stride, o.rows, false};
    if (o.rows) return {o.data, o.stride, o.rows + first, true};
    return {o.data + first * o.stride, o.stride, nullptr, true};
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
            const int64_t first = chunk * kColumns, padded = round_up(p.columns, kPanel);
            for (int64_t pass = 0; pass < passes_of<T>(p); ++pass) {
                const Pass own = pass_of<T>(p, pass);
                uint32_t* to = panels + begin[i] + padded * units_of<T>(own.first) + first * units_of<T>(own.steps);
                pack<T, kPanel>(from(p.b, own.first), first, std::min(kColumns, p.columns - first), own.steps, to);
            }
        });
    each_chunk(
        threads, count, [&](int64_t i) { return (products[i].rows + kRows - 1) / kRows; },
        [&](int64_t i, int64_t chunk) {
            static thread_local std::vector<uint32_t> strips_memory;
            const TrainProduct& p = products[i];
            const int64_t first = chunk * kRows, rows = std::min(kRows, p.rows - first);
            uint32_t* strips = grown(strips_memory, kRows * kUnits);
            for (int64_t pass = 0; pass < passes_of<T>(p); ++pass) {
                const Pass own = pass_of<T>(p, pass);
                const int64_t units = units_of<T>(own.steps);
                const uint32_t* side = panels + begin[i] + round_up(p.columns, kPanel) * units_of<T>(own.first);
                pack<T, kStrip>(from(p.a, own.first), first, rows, own.steps, strips);
                multiply_packed<T>(strips, units, rows, side, units, p.columns, units,
                                   {p.out + first * p.out_stride, p.out_stride, kPanel}, pass > 0);
            }
        });
}

void multiply(const TrainProduct* products, int64_t count, bool is_rounded, int threads) {
    if (is_rounded) multiply_all<Rounded>(products, count, threads);
    else multiply_all<Single>(products, count, threads);
}

}  // namespace
