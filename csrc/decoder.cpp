#include "decoder.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "bfloat16.hpp"
#include "memory.hpp"
#include "pool.hpp"
#include "rotate.hpp"

namespace duomo {
namespace {

struct Workspace {
    Memory<float> key, value, delta;
    Memory<float> first, second;  // normed, then attended; query, then what the shared experts say
    // of one bank: its tokens, where not all of them, and their routing
    struct Routing {
        Memory<float> hidden, weights, out;
        Memory<int64_t> expert_ids;
    } banks[2];
    // of the wanted rows: what `StepTokens` has of all
    struct Wanted {
        Memory<float> hidden, normed, cos, sin;
        Memory<int64_t> sequence, num_keys, bank_rows[2], expert_ids;
    } wanted;
};

constexpr int64_t kLargeStep = 1 << 18;  // floats of a step's hidden states from which memory is given back after it

// One head of one token into its slot, as the cache keeps it.
void store_head(const float* x, int64_t width, Stored stored, void* data, float* scale, int64_t row) {
    switch (stored) {
        case Stored::float32: std::copy_n(x, width, static_cast<float*>(data) + row * width); break;
        case Stored::bfloat16:
            for (int64_t i = 0; i < width; ++i) static_cast<uint16_t*>(data)[row * width + i] = to_bfloat16(x[i]);
            break;
        case Stored::int8: {
            float peak = 0.0f;
            for (int64_t i = 0; i < width; ++i) peak = std::max(peak, std::fabs(x[i]));
            const float unit = std::max(peak, 1e-12f) / 127.0f;
            for (int64_t i = 0; i < width; ++i)
                static_cast<int8_t*>(data)[row * width + i] = int8_t(std::nearbyint(x[i] / unit));
            scale[row] = unit;
        }
    }
}

void add_rows(const float* x, int64_t count, float* out) {
    for (int64_t i = 0; i < count; ++i) out[i] += x[i];
}

// Rows `rows[i]` of x, each of `width`, side by side.
template <class T>
const T* gather(const T* x, int64_t width, const int64_t* rows, int64_t count, Memory<T>& memory) {
    T* out = grown(memory, count * width);
    for (int64_t i = 0; i < count; ++i) std::copy_n(x + rows[i] * width, width, out + i * width);
    return out;
}

// The wanted tokens of a step by themselves. Their keys and values lie where all tokens' do.
StepTokens wanted_of(const StepTokens& step, int64_t pairs, int64_t chosen, Workspace::Wanted& own) {
    const int64_t count = step.num_wanted, *rows = step.wanted;
    StepTokens part = step;
    part.tokens = count;
    part.cos = gather(step.cos, pairs, rows, count, own.cos);
    part.sin = gather(step.sin, pairs, rows, count, own.sin);
    part.sequence = gather(step.sequence, 1, rows, count, own.sequence);
    part.num_keys = gather(step.num_keys, 1, rows, count, own.num_keys);
    const int64_t* const all[2] = {step.text_rows, step.vision_rows};
    const int64_t counts[2] = {step.num_text, step.num_vision};
    int64_t found[2] = {};
    for (int which = 0; which < 2; ++which) {
        int64_t* places = grown(own.bank_rows[which], count);
        for (int64_t i = 0; i < count; ++i)
            if (std::binary_search(all[which], all[which] + counts[which], rows[i])) places[found[which]++] = i;
    }
    part.text_rows = own.bank_rows[0].data(), part.num_text = found[0];
    part.vision_rows = own.bank_rows[1].data(), part.num_vision = found[1];
    part.expert_ids = grown(own.expert_ids, count * chosen);
    part.num_wanted = -1;
    return part;
}

// A step of one layer; the members are what does not change within it.
template <class Bank>
struct Pass {
    const DecoderStack<Bank>& stack;
    const PagedStore& store;
    const StepTokens& step;
    Workspace& work;
    float* hidden;

    void norm(const float* weight, float* out) const {
        for (int64_t t = 0; t < step.tokens; ++t)
            rotate_kernels().rmsnorm(hidden + t * stack.width, weight, stack.eps, stack.width, out + t * stack.width);
    }

    CacheSide side(void* data, float* scale, int64_t layer) const {
        const int64_t rows = store.slots * stack.groups, bytes = bytes_of(store.stored);
        return {static_cast<char*>(data) + layer * rows * stack.head_dim * bytes,
                scale ? scale + layer * rows : nullptr, store.stored, stack.groups, stack.head_dim};
    }

    void append(const CacheSide& own, const float* x) const {
        for (int64_t t = 0; t < step.tokens; ++t)
            for (int64_t g = 0; g < stack.groups; ++g)
                store_head(x + (t * stack.groups + g) * stack.head_dim, stack.head_dim, own.stored,
                           const_cast<void*>(own.data), const_cast<float*>(own.scale),
                           step.slots[t] * stack.groups + g);
    }

    void attention(const DecoderLayer<Bank>& layer, int64_t index) const {
        const int64_t tokens = step.tokens, wide = stack.num_heads * stack.head_dim;
        const int64_t narrow = stack.groups * stack.head_dim;
        float* normed = grown(work.first, tokens * std::max(stack.width, wide));
        norm(layer.input_norm, normed);
        const Bank* const banks[3] = {layer.q, layer.k, layer.v};
        float* const y[3] = {grown(work.second, tokens * std::max(stack.width, wide)), grown(work.key, tokens * narrow),
                             grown(work.value, tokens * narrow)};
        linear_shared(banks, 3, normed, tokens, y);
        remember(index, y[1], y[2]);
        attend(layer, index, y[0]);
    }

    // The same where others than the wanted tokens give keys and values alone; `part` then has hidden states of its own.
    void attention_of_wanted(const DecoderLayer<Bank>& layer, int64_t index, const Pass& part) const {
        const int64_t tokens = step.tokens, narrow = stack.groups * stack.head_dim, count = step.num_wanted;
        const int64_t wide = stack.num_heads * stack.head_dim;
        float* normed = grown(work.first, tokens * std::max(stack.width, wide));
        norm(layer.input_norm, normed);
        const Bank* const banks[2] = {layer.k, layer.v};
        float* const y[2] = {grown(work.key, tokens * narrow), grown(work.value, tokens * narrow)};
        linear_shared(banks, 2, normed, tokens, y);
        remember(index, y[0], y[1]);
        if (!count) return;
        const float* asking = gather(normed, stack.width, step.wanted, count, work.wanted.normed);
        float* query = grown(work.second, count * std::max(stack.width, wide));
        linear_shared(&layer.q, 1, asking, count, &query);
        part.attend(layer, index, query);
    }

    // Keys, rotated here, and values [T][G][H] into the cache.
    void remember(int64_t index, float* key, const float* value) const {
        rotate_heads(key, step.tokens, stack.groups * stack.head_dim, stack.head_dim, step.cos, step.sin);
        append(side(store.key, store.key_scale, index), key);
        append(side(store.value, store.value_scale, index), value);
    }

    // Queries, rotated here, over the cache, and what comes of it onto the hidden states.
    void attend(const DecoderLayer<Bank>& layer, int64_t index, float* query) const {
        const int64_t tokens = step.tokens, wide = stack.num_heads * stack.head_dim;
        rotate_heads(query, tokens, wide, stack.head_dim, step.cos, step.sin);
        float* attended = grown(work.first, tokens * std::max(stack.width, wide));  // what was normed is multiplied
        paged_attention(query, side(store.key, store.key_scale, index), side(store.value, store.value_scale, index),
                        step.pages, step.table_width, store.page_size, step.sequence, step.num_keys, tokens,
                        stack.num_heads, attended);
        float* delta = grown(work.delta, tokens * stack.width);
        linear_shared(&layer.o, 1, attended, tokens, &delta);
        add_rows(delta, tokens * stack.width, hidden);
    }

    // The tokens of one modality: gathered, unless they are all, and routed.
    Routed<Bank> route_bank(const RoutedBank<Bank>& bank, const int64_t* rows, int64_t count, const float* normed,
                            float* out, int64_t* chosen_ids, Workspace::Routing& own) const {
        const int64_t width = stack.width, chosen = stack.chosen, is_part = count < step.tokens;
        const float* x = normed;
        if (is_part) {
            float* gathered = grown(own.hidden, count * width);
            for (int64_t i = 0; i < count; ++i) std::copy_n(normed + rows[i] * width, width, gathered + i * width);
            x = gathered;
        }
        int64_t* ids = is_part ? grown(own.expert_ids, count * chosen) : chosen_ids;
        float* weights = grown(own.weights, count * chosen);
        route(x, bank.router, bank.bias, count, width, bank.gate_up->count, chosen, stack.norm_min, ids, weights);
        if (is_part)
            for (int64_t i = 0; i < count; ++i) std::copy_n(ids + i * chosen, chosen, chosen_ids + rows[i] * chosen);
        return {bank.gate_up, bank.down, x,   ids, weights,
                count,        chosen,    is_part ? grown(own.out, count * width) : out};
    }

    void feed_forward(const DecoderLayer<Bank>& layer, int64_t index) const {
        const int64_t tokens = step.tokens, width = stack.width;
        float* normed = grown(work.first, tokens * width);
        norm(layer.post_norm, normed);
        float* delta = grown(work.delta, tokens * width);
        float* shared = grown(work.second, tokens * width);
        const Mlp<Bank>* mlp = layer.mlp.gate ? &layer.mlp : nullptr;
        if (!layer.text.router) {
            mixture(static_cast<const Routed<Bank>*>(nullptr), 0, mlp, normed, tokens, delta);
            return add_rows(delta, tokens * width, hidden);
        }
        int64_t* ids = step.expert_ids + index * tokens * stack.chosen;
        const int64_t* const rows[2] = {step.text_rows, step.vision_rows};
        const int64_t counts[2] = {layer.vision.router ? step.num_text : tokens,
                                   layer.vision.router ? step.num_vision : 0};
        Routed<Bank> routed[2];
        const int64_t* used[2] = {};
        int64_t num_banks = 0;
        for (int which = 0; which < 2; ++which)
            if (counts[which]) {
                used[num_banks] = rows[which];
                routed[num_banks++] = route_bank(which ? layer.vision : layer.text, rows[which], counts[which], normed,
                                                 delta, ids, work.banks[which]);
            }
        mixture(routed, num_banks, mlp, normed, tokens, shared);
        for (int64_t i = 0; i < num_banks; ++i)
            if (routed[i].out != delta)
                for (int64_t row = 0; row < routed[i].tokens; ++row)
                    std::copy_n(routed[i].out + row * width, width, delta + used[i][row] * width);
        if (mlp) add_rows(shared, tokens * width, delta);
        add_rows(delta, tokens * width, hidden);
    }
};

// First of the largest, in two passes that the compiler turns into vectors.
int64_t largest(const float* x, int64_t count) {
    float most = x[0];
    for (int64_t i = 1; i < count; ++i) most = std::max(most, x[i]);
    return std::find(x, x + count, most) - x;
}

}  // namespace

void rotate_heads(float* x, int64_t tokens, int64_t row, int64_t head_dim, const float* cos, const float* sin) {
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t i = 0; i < row; i += head_dim)
            rotate_kernels().rotate_pairs(x + t * row + i, cos + t * head_dim / 2, sin + t * head_dim / 2, head_dim);
}

template <class Bank>
void run_decoder(const DecoderStack<Bank>& stack, const PagedStore& store, const StepTokens& step, float* hidden,
                 float* out) {
    static thread_local Workspace work;
    const Pass<Bank> pass{stack, store, step, work, hidden};
    if (!step.tokens) return;
    const int64_t count = int64_t(stack.layers.size()), last = count - 1;
    const int64_t num_whole = step.num_wanted < 0 ? count : last;
    for (int64_t i = 0; i < num_whole; ++i) {
        pass.attention(stack.layers[size_t(i)], i);
        pass.feed_forward(stack.layers[size_t(i)], i);
    }
    if (step.num_wanted < 0) {
        pass.norm(stack.norm, out);
    } else {
        const StepTokens few = wanted_of(step, stack.head_dim / 2, stack.chosen, work.wanted);
        gather(hidden, stack.width, step.wanted, step.num_wanted, work.wanted.hidden);
        const Pass<Bank> part{stack, store, few, work, work.wanted.hidden.data()};
        const auto& layer = stack.layers[size_t(last)];
        pass.attention_of_wanted(layer, last, part);
        if (few.tokens) part.feed_forward(layer, 0);  // whose expert_ids are of this layer alone
        if (layer.text.router)
            for (int64_t i = 0; i < few.tokens; ++i)
                std::copy_n(few.expert_ids + i * stack.chosen, stack.chosen,
                            step.expert_ids + (last * step.tokens + step.wanted[i]) * stack.chosen);
        part.norm(stack.norm, out);
    }
    if (step.tokens * stack.width < kLargeStep) return;
    work = {};  // a prompt's 40 MB are not for the tokens that come one by one after it
    give_back_many();
}

void run_next(const DecoderStack<DenseBank>& stack, const Ends& ends, const PagedStore& store, const NextTokens& next) {
    static thread_local struct {
        Memory<float> hidden, out, cos, sin;
        Memory<int64_t> slots, rows, expert_ids;
    } own;
    const int64_t count = next.sequences, width = stack.width, pairs = stack.head_dim / 2;
    float* hidden = grown(own.hidden, count * width);
    float *cos = grown(own.cos, count * pairs), *sin = grown(own.sin, count * pairs);
    int64_t *slots = grown(own.slots, count), *rows = grown(own.rows, count);
    for (int64_t s = 0; s < count; ++s) {
        const int64_t place = next.num_keys[s] - 1;
        std::copy_n(ends.embedding + next.ids[s] * width, width, hidden + s * width);
        std::copy_n(next.cos + next.positions[s] * pairs, pairs, cos + s * pairs);
        std::copy_n(next.sin + next.positions[s] * pairs, pairs, sin + s * pairs);
        slots[s] = next.pages[s * next.table_width + place / store.page_size] * store.page_size + place % store.page_size;
        rows[s] = s;
    }
    int64_t* expert_ids = grown(own.expert_ids, int64_t(stack.layers.size()) * count * stack.chosen);
    const StepTokens step = {count, cos,  sin,     slots, next.pages, next.table_width, rows,
                             next.num_keys, rows, nullptr, count, 0,          expert_ids};
    float* out = grown(own.out, count * width);
    run_decoder(stack, store, step, hidden, out);
    const int64_t vocabulary = ends.head->rows;
    const DenseProduct product = product_of(*ends.head, 0, out, nullptr, count, next.logits);
    multiply_each(&product, 1);
    for (int64_t s = 0; s < count; ++s) next.likeliest[s] = largest(next.logits + s * vocabulary, vocabulary);
}

template void run_decoder(const DecoderStack<TrellisBank>&, const PagedStore&, const StepTokens&, float*, float*);
template void run_decoder(const DecoderStack<DenseBank>&, const PagedStore&, const StepTokens&, float*, float*);

}  // namespace duomo
