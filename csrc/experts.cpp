#include "experts.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu.hpp"
#include "pairs.hpp"
#include "pool.hpp"
#include "rotate.hpp"

namespace duomo {
namespace {

// What one bank, or the MLP, needs between its products.
struct Workspace {
    Pairs pairs;
    ActivationBuffer hidden, up_hidden, sorted, middle;
    Memory<float> first, swiglu, second;
};

// Products to be done side by side.
struct Products {
    std::vector<TrellisMatrix> matrices;
    std::vector<Activations> x;
    std::vector<float*> y;

    void clear() {
        matrices.clear();
        x.clear();
        y.clear();
    }
    void add(const TrellisMatrix& matrix, const Activations& rows, float* out) {
        matrices.push_back(matrix);
        x.push_back(rows);
        y.push_back(out);
    }
    // One product per active expert over its own rows of x: y[pairs][bank.rows].
    void add_each(const TrellisBank& bank, const Pairs& pairs, const Activations& all, float* out) {
        const int64_t blocks = bank.columns / bank.block;
        for (size_t i = 0; i < pairs.active.size(); ++i) {
            const int64_t begin = pairs.begin[i], count = pairs.begin[i + 1] - begin;
            add(bank.matrix(pairs.active[i]),
                {all.q + begin * bank.columns, all.scale + begin * blocks, all.sum + begin * blocks, count},
                out + begin * bank.rows);
        }
    }
    void run() const { linear_each(matrices.data(), x.data(), y.data(), int64_t(matrices.size())); }
};

// Sorts a bank's pairs and adds its first products.
void begin_bank(const Routed<TrellisBank>& bank, Workspace& work, Products& products) {
    const TrellisBank& first = *bank.gate_up;
    const int64_t pairs = bank.tokens * bank.chosen;
    work.pairs.sort(bank.expert_ids, bank.tokens, bank.chosen, first.count);
    const Activations x =
        work.hidden.fill(bank.hidden, first.signs_or_null(), bank.tokens, first.columns, first.block);
    const Activations sorted = work.sorted.gather(x, first.columns, first.block, work.pairs.token.data(), pairs);
    products.add_each(first, work.pairs, sorted, grown(work.first, pairs * first.rows));
}

void begin_mlp(const Mlp<TrellisBank>& own, const float* x, int64_t tokens, Workspace& work, Products& products) {
    const TrellisBank &gate = *own.gate, &up = *own.up;
    float* y = grown(work.first, tokens * 2 * gate.rows);
    const Activations rows = work.hidden.fill(x, gate.signs_or_null(), tokens, gate.columns, gate.block);
    products.add(gate.matrix(0), rows, y);
    products.add(up.matrix(0),
                 gate.signs == up.signs
                     ? rows
                     : work.up_hidden.fill(x, up.signs_or_null(), tokens, up.columns, up.block),
                 y + tokens * gate.rows);
}

// silu(gate) * up of `count` rows, rounded for `down`: gate rows are `stride` apart, up rows `gap` after them.
void fill_middle(const TrellisBank& down, int64_t count, int64_t stride, int64_t gap, Workspace& work) {
    const int64_t size = down.columns;
    float* middle = grown(work.swiglu, count * size);
    work.middle.reserve(count, size, down.block);
    parallel_rows(count, [&](int64_t i) {
        const float* gate = work.first.data() + i * stride;
        rotate_kernels().swiglu(gate, gate + gap, size, middle + i * size);
        work.middle.set(i, middle + i * size, down.signs_or_null(), size, down.block);
    });
}

}  // namespace

const RotateKernels& rotate_kernels() {
    switch (current_isa()) {
        case Isa::avx512: return rotate_avx512 ? *rotate_avx512 : rotate_portable;
        case Isa::avx2: return rotate_avx2 ? *rotate_avx2 : rotate_portable;
        default: return rotate_portable;
    }
}

void ActivationBuffer::reserve(int64_t tokens, int64_t columns, int block) {
    const int64_t values = tokens * columns, blocks = values / block;
    grown(q_, values + 64);
    grown(scale_, blocks);
    grown(sum_, blocks);
}

void ActivationBuffer::set_part(int64_t row, int64_t first, int64_t count, const float* x, const float* signs,
                                int64_t columns, int block) {
    const int64_t start = row * columns + first, block_index = row * (columns / block) + first / block;
    rotate_kernels().rotate_quantize(x, signs, count, block, q_.data() + start, scale_.data() + block_index,
                                     sum_.data() + block_index);
}

Activations ActivationBuffer::fill(const float* x, const float* signs, int64_t tokens, int64_t columns, int block) {
    reserve(tokens, columns, block);
    const int64_t group = 8, items = (tokens + group - 1) / group;
    parallel(items, [&](int64_t item) {
        for (int64_t t = item * group; t < std::min(tokens, (item + 1) * group); ++t)
            set(t, x + t * columns, signs, columns, block);
    });
    return view(tokens);
}

Activations ActivationBuffer::gather(const Activations& from, int64_t columns, int block, const int64_t* rows,
                                     int64_t count) {
    reserve(count, columns, block);
    const int64_t blocks = columns / block;
    for (int64_t i = 0; i < count; ++i) {
        std::copy_n(from.q + rows[i] * columns, columns, q_.data() + i * columns);
        std::copy_n(from.scale + rows[i] * blocks, blocks, scale_.data() + i * blocks);
        std::copy_n(from.sum + rows[i] * blocks, blocks, sum_.data() + i * blocks);
    }
    return {q_.data(), scale_.data(), sum_.data(), count};
}

void mixture(const Routed<TrellisBank>* banks, int64_t num_banks, const Mlp<TrellisBank>* own, const float* x,
             int64_t tokens, float* mlp_out) {
    static thread_local std::vector<Workspace> memory;
    static thread_local Products products_memory;
    int64_t most = own ? tokens : 0;
    for (int64_t i = 0; i < num_banks; ++i) most = std::max(most, banks[i].tokens);
    if (most >= kManyTokens) return mixture_of_many(banks, num_banks, own, x, tokens, mlp_out);
    if (int64_t(memory.size()) < num_banks + 1) memory.resize(size_t(num_banks + 1));
    Workspace* work = memory.data();
    Products& products = products_memory;
    products.clear();
    Workspace& mlp_work = work[num_banks];
    if (own) begin_mlp(*own, x, tokens, mlp_work, products);
    for (int64_t i = 0; i < num_banks; ++i) begin_bank(banks[i], work[i], products);
    products.run();

    products.clear();
    if (own) {
        const TrellisBank& down = *own->down;
        fill_middle(down, tokens, down.columns, tokens * down.columns, mlp_work);
        products.add(down.matrix(0), mlp_work.middle.view(tokens), mlp_out);
    }
    for (int64_t i = 0; i < num_banks; ++i) {
        const TrellisBank& down = *banks[i].down;
        const int64_t pairs = banks[i].tokens * banks[i].chosen;
        fill_middle(down, pairs, 2 * down.columns, down.columns, work[i]);
        products.add_each(down, work[i].pairs, work[i].middle.view(pairs), grown(work[i].second, pairs * down.rows));
    }
    products.run();
    for (int64_t i = 0; i < num_banks; ++i)
        work[i].pairs.combine(work[i].second.data(), banks[i].weights, banks[i].tokens, banks[i].chosen,
                              banks[i].down->rows, banks[i].out, banks[i].down->rows);
}

void experts(const TrellisBank& gate_up, const TrellisBank& down, const float* hidden, const int64_t* expert_ids,
             const float* weights, int64_t tokens, int64_t chosen, float* out) {
    const Routed<TrellisBank> bank = {&gate_up, &down, hidden, expert_ids, weights, tokens, chosen, out};
    mixture(&bank, 1, nullptr, nullptr, 0, nullptr);
}

void mlp(const Mlp<TrellisBank>& own, const float* x, int64_t tokens, float* out) { mixture(nullptr, 0, &own, x, tokens, out); }

void linear_shared(const TrellisBank* const* banks, int64_t count, const float* x, int64_t tokens, float* const* y) {
    static thread_local ActivationBuffer buffers[4];
    Activations own[4];
    TrellisMatrix matrices[4];
    for (int64_t i = 0; i < count; ++i) {
        const TrellisBank& bank = *banks[i];
        own[i] = i && bank.signs == banks[i - 1]->signs
                     ? own[i - 1]
                     : buffers[i].fill(x, bank.signs_or_null(), tokens, bank.columns, bank.block);
        matrices[i] = bank.matrix(0);
    }
    linear_each(matrices, own, y, count);
}

void route(const float* x, const float* router, const float* bias, int64_t tokens, int64_t width, int64_t num_experts,
           int64_t chosen, float norm_min, int64_t* expert_ids, float* weights) {
    static thread_local Memory<float> memory;
    float* logits = grown(memory, (tokens + 1) * num_experts);
    float* biased = logits + tokens * num_experts;
    const RotateKernels& kernels = rotate_kernels();
    const int64_t slices = 4, slice = (num_experts + slices - 1) / slices;
    parallel_rows(tokens * slices, [&](int64_t item) {
        const int64_t t = item / slices, first = item % slices * slice;
        for (int64_t e = first; e < std::min(num_experts, first + slice); ++e)
            logits[t * num_experts + e] = kernels.dot(x + t * width, router + e * width, width);
    });
    for (int64_t t = 0; t < tokens; ++t) {
        float* row = logits + t * num_experts;
        const float total = kernels.exp_sum(row, *std::max_element(row, row + num_experts), num_experts, row);
        for (int64_t e = 0; e < num_experts; ++e) row[e] /= total;
        float sum = 0.0f;
        for (int64_t e = 0; e < num_experts; ++e) biased[e] = row[e] + bias[e];
        for (int64_t k = 0; k < chosen; ++k) {
            const int64_t best = std::max_element(biased, biased + num_experts) - biased;
            biased[best] = -HUGE_VALF;
            expert_ids[t * chosen + k] = best;
            weights[t * chosen + k] = row[best];
            sum += row[best];
        }
        for (int64_t k = 0; k < chosen; ++k) weights[t * chosen + k] /= std::max(sum, norm_min);
    }
}

}  // namespace duomo
