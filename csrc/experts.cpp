#include "experts.hpp"

#include <algorithm>
#include <cstring>

#include "cpu.hpp"
#include "pool.hpp"
#include "rotate.hpp"

namespace duomo {
namespace {

// Pairs sorted by expert (stably, so by token within one), and where each expert's begin.
struct Order {
    std::vector<int64_t> pair, token, active, begin;  // active experts, and the start of each one's pairs (+ the end)

    void sort(const int64_t* expert_ids, int64_t tokens, int64_t chosen, int64_t num_experts) {
        const int64_t pairs = tokens * chosen;
        std::vector<int64_t>& next = counts_;
        next.assign(size_t(num_experts) + 1, 0);
        for (int64_t i = 0; i < pairs; ++i) ++next[size_t(expert_ids[i]) + 1];
        active.clear();
        begin.clear();
        for (int64_t e = 0; e < num_experts; ++e) {
            if (next[size_t(e) + 1]) {
                active.push_back(e);
                begin.push_back(next[size_t(e)]);
            }
            next[size_t(e) + 1] += next[size_t(e)];
        }
        begin.push_back(pairs);
        pair.resize(size_t(pairs));
        token.resize(size_t(pairs));
        for (int64_t i = 0; i < pairs; ++i) {
            const int64_t place = next[size_t(expert_ids[i])]++;
            pair[size_t(place)] = i;
            token[size_t(place)] = i / chosen;
        }
    }

private:
    std::vector<int64_t> counts_;
};

struct Workspace {
    Order order;
    ActivationBuffer hidden, sorted, middle_q;
    std::vector<float> gate_up, middle, down;
};

float* grown(std::vector<float>& memory, int64_t count) {
    if (int64_t(memory.size()) < count) memory.resize(size_t(count));
    return memory.data();
}

// One product per active expert over its own rows of x: y[pairs][bank.rows].
void grouped(const TrellisBank& bank, const Order& order, const Activations& x, float* y) {
    const int64_t active = int64_t(order.active.size());
    const int64_t panels = (bank.rows + kPanelRows - 1) / kPanelRows, blocks = bank.columns / bank.block;
    const int64_t slices = std::min(panels, (4 * num_threads() + active - 1) / active);
    parallel(active * slices, [&](int64_t item) {
        const int64_t index = item / slices, slice = item % slices;
        const int64_t begin = order.begin[size_t(index)], count = order.begin[size_t(index) + 1] - begin;
        const int64_t first = panels * slice / slices * kPanelRows;
        const int64_t last = std::min(bank.rows, panels * (slice + 1) / slices * kPanelRows);
        const Activations own = {x.q + begin * bank.columns, x.scale + begin * blocks, x.sum + begin * blocks, count};
        linear_rows(bank.matrix(order.active[size_t(index)]), own, first, last - first,
                    y + begin * bank.rows + first, bank.rows);
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

void ActivationBuffer::resize(int64_t tokens, int64_t columns, int block) {
    const size_t values = size_t(tokens * columns), blocks = values / size_t(block);
    if (q_.size() < values + 64) q_.resize(values + 64);
    if (scale_.size() < blocks) scale_.resize(blocks);
    if (sum_.size() < blocks) sum_.resize(blocks);
}

Activations ActivationBuffer::fill(const float* x, const float* signs, int64_t tokens, int64_t columns, int block) {
    resize(tokens, columns, block);
    const RotateKernels& kernels = rotate_kernels();
    const int64_t blocks = columns / block, group = 8, items = (tokens + group - 1) / group;
    parallel(items, [&](int64_t item) {
        for (int64_t t = item * group; t < std::min(tokens, (item + 1) * group); ++t)
            kernels.rotate_quantize(x + t * columns, signs, columns, block, q_.data() + t * columns,
                                    scale_.data() + t * blocks, sum_.data() + t * blocks);
    });
    return {q_.data(), scale_.data(), sum_.data(), tokens};
}

Activations ActivationBuffer::gather(const Activations& from, int64_t columns, int block, const int64_t* rows,
                                     int64_t count) {
    resize(count, columns, block);
    const int64_t blocks = columns / block;
    for (int64_t i = 0; i < count; ++i) {
        std::copy_n(from.q + rows[i] * columns, columns, q_.data() + i * columns);
        std::copy_n(from.scale + rows[i] * blocks, blocks, scale_.data() + i * blocks);
        std::copy_n(from.sum + rows[i] * blocks, blocks, sum_.data() + i * blocks);
    }
    return {q_.data(), scale_.data(), sum_.data(), count};
}

void experts(const TrellisBank& gate_up, const TrellisBank& down, const float* hidden, const int64_t* expert_ids,
             const float* weights, int64_t tokens, int64_t chosen, float* out) {
    static thread_local Workspace work;
    const int64_t pairs = tokens * chosen, width = down.rows, size = down.columns;
    std::fill_n(out, tokens * width, 0.0f);
    if (!pairs) return;
    work.order.sort(expert_ids, tokens, chosen, gate_up.count);
    const Activations x =
        work.hidden.fill(hidden, gate_up.signs_or_null(), tokens, gate_up.columns, gate_up.block);
    const Activations sorted =
        work.sorted.gather(x, gate_up.columns, gate_up.block, work.order.token.data(), pairs);
    float* both = grown(work.gate_up, pairs * 2 * size);
    grouped(gate_up, work.order, sorted, both);

    float* middle = grown(work.middle, pairs * size);
    const RotateKernels& kernels = rotate_kernels();
    parallel(pairs, [&](int64_t i) {
        kernels.swiglu(both + i * 2 * size, both + i * 2 * size + size, size, middle + i * size);
    });
    const Activations middle_q = work.middle_q.fill(middle, down.signs_or_null(), pairs, size, down.block);
    float* outputs = grown(work.down, pairs * width);
    grouped(down, work.order, middle_q, outputs);

    // `place[p]` is where pair p went in the sorted order: reuse of the middle would save nothing, it is K ints a token.
    static thread_local std::vector<int64_t> place;
    place.resize(size_t(pairs));
    for (int64_t i = 0; i < pairs; ++i) place[size_t(work.order.pair[size_t(i)])] = i;
    const int64_t* where = place.data();  // this thread's, also inside the bodies
    parallel(tokens, [&](int64_t t) {
        for (int64_t k = 0; k < chosen; ++k)
            kernels.add_scaled(outputs + where[t * chosen + k] * width, weights[t * chosen + k], width,
                               out + t * width);
    });
}

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

void mlp(const TrellisBank& gate, const TrellisBank& up, const TrellisBank& down, const float* x, int64_t tokens,
         float* out) {
    static thread_local std::vector<float> memory;
    static thread_local ActivationBuffer buffer;
    const int64_t size = gate.rows;
    float* first = grown(memory, 3 * tokens * size);
    float* const both[2] = {first, first + tokens * size};
    float* middle = first + 2 * tokens * size;
    const TrellisBank* const banks[2] = {&gate, &up};
    linear_shared(banks, 2, x, tokens, both);
    const RotateKernels& kernels = rotate_kernels();
    parallel(tokens, [&](int64_t t) {
        kernels.swiglu(both[0] + t * size, both[1] + t * size, size, middle + t * size);
    });
    linear(down.matrix(0), buffer.fill(middle, down.signs_or_null(), tokens, down.columns, down.block), out);
}

void route(const float* x, const float* router, const float* bias, int64_t tokens, int64_t width, int64_t num_experts,
           int64_t chosen, float norm_min, int64_t* expert_ids, float* weights) {
    static thread_local std::vector<float> memory;
    float* logits = grown(memory, tokens * num_experts);
    const RotateKernels& kernels = rotate_kernels();
    const int64_t slices = 4, slice = (num_experts + slices - 1) / slices;
    parallel(tokens * slices, [&](int64_t item) {
        const int64_t t = item / slices, first = item % slices * slice;
        for (int64_t e = first; e < std::min(num_experts, first + slice); ++e)
            logits[t * num_experts + e] = kernels.dot(x + t * width, router + e * width, width);
    });
    for (int64_t t = 0; t < tokens; ++t) {
        float* row = logits + t * num_experts;
        const float total = kernels.exp_sum(row, *std::max_element(row, row + num_experts), num_experts, row);
        for (int64_t e = 0; e < num_experts; ++e) row[e] /= total;
        float sum = 0.0f;
        for (int64_t k = 0; k < chosen; ++k) {
            int64_t best = -1;
            for (int64_t e = 0; e < num_experts; ++e) {
                const bool is_taken = std::find(expert_ids + t * chosen, expert_ids + t * chosen + k, e) !=
                                      expert_ids + t * chosen + k;
                if (!is_taken && (best < 0 || row[e] + bias[e] > row[best] + bias[best])) best = e;
            }
            expert_ids[t * chosen + k] = best;
            weights[t * chosen + k] = row[best];
            sum += row[best];
        }
        for (int64_t k = 0; k < chosen; ++k) weights[t * chosen + k] /= std::max(sum, norm_min);
    }
}

}  // namespace duomo
