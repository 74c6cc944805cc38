// A mixture over many tokens, such as a prompt's: no product is ever whole in memory.
//
// 512 tokens of the 28B would need 37 MB for an expert bank's first products, 31 MB for its second and 75 MB for the
// dense layer's. So an item of the first pass is an expert with its tokens, or some columns of it: gate and up go into
// the thread's own scratch and from there, as int8, to their place in the middle. The second pass takes down's rows a
// slice at a time, and adds up the slice's terms before the next one. A value is computed from the same integers in
// the same order as in `mixture`, so it has the same bits.
#include <algorithm>

#include "experts.hpp"
#include "memory.hpp"
#include "pairs.hpp"
#include "pool.hpp"
#include "rotate.hpp"

namespace duomo {
namespace {

constexpr int64_t kScratchFloats = 1 << 19;  // of gate and up together that a thread holds: 2 MB
constexpr int64_t kTermFloats = 1 << 20;     // of down's products over all pairs: 4 MB
constexpr int64_t kStep = 128;               // columns of the middle: whole panels, and whole blocks of any rotation
constexpr int64_t kItemsPerThread = 4;       // at least, so that threads end together

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A bank and its tokens, or an MLP as a bank of one whose gate and up are apart.
struct Part {
    const TrellisBank *gate, *up, *down;
    int64_t up_row;        // where up's rows begin in `up`
    const int64_t* token;  // of each pair, sorted by expert; null: every token, in order
    Activations x, up_x;
    std::vector<int64_t> expert, begin;  // experts with pairs, where each one's begin, and the end of all
    ActivationBuffer hidden, up_hidden, middle;
    Pairs pairs;
    float* out;              // where the second pass writes its first pair's products,
    int64_t out_row, stride;  // from which row of down on, and how far apart

    int64_t experts() const { return int64_t(expert.size()); }
    int64_t tokens(int64_t i) const { return begin[size_t(i) + 1] - begin[size_t(i)]; }
    int64_t width() const { return down->columns; }
};

struct Item {
    Part* part;
    int64_t expert;        // its place among the part's
    int64_t first, count;  // columns of the middle; or rows of down
};

// Cuts [first, first + count) at multiples of `step` into `pieces` items.
void add_pieces(std::vector<Item>& items, Part& part, int64_t expert, int64_t first, int64_t count, int64_t step,
                int64_t pieces) {
    const int64_t steps = ceil_div(count, step), most = std::clamp<int64_t>(pieces, 1, steps);
    for (int64_t p = 0; p < most; ++p) {
        const int64_t from = steps * p / most * step, to = std::min(count, steps * (p + 1) / most * step);
        items.push_back({&part, expert, first + from, to - from});
    }
}

void begin_bank(const Routed<TrellisBank>& bank, Part& part) {
    const TrellisBank& first = *bank.gate_up;
    part.gate = part.up = &first;
    part.down = bank.down;
    part.up_row = bank.down->columns;
    part.pairs.sort(bank.expert_ids, bank.tokens, bank.chosen, first.count);
    part.token = part.pairs.token.data();
    part.expert = part.pairs.active;
    part.begin = part.pairs.begin;
    part.x = part.up_x =
        part.hidden.fill(bank.hidden, first.signs_or_null(), bank.tokens, first.columns, first.block);
    part.middle.reserve(bank.tokens * bank.chosen, part.width(), bank.down->block);
}

void begin_mlp(const Mlp<TrellisBank>& own, const float* x, int64_t tokens, Part& part) {
    const TrellisBank &gate = *own.gate, &up = *own.up;
    part.gate = &gate;
    part.up = &up;
    part.down = own.down;
    part.up_row = 0;
    part.token = nullptr;
    part.expert.assign(1, 0);
    part.begin.assign({0, tokens});
    part.x = part.hidden.fill(x, gate.signs_or_null(), tokens, gate.columns, gate.block);
    part.up_x = gate.signs == up.signs
                    ? part.x
                    : part.up_hidden.fill(x, up.signs_or_null(), tokens, up.columns, up.block);
    part.middle.reserve(tokens, part.width(), own.down->block);
}

// The first pass of one item: some columns of silu(gate x) * up x, rounded into the middle.
void fill_middle(const Item& item) {
    static thread_local Memory<float> memory;
    static thread_local ActivationBuffer gathered;
    Part& part = *item.part;
    const TrellisBank& down = *part.down;
    const int64_t begin = part.begin[size_t(item.expert)], tokens = part.tokens(item.expert), count = item.count;
    const TrellisMatrix gate = part.gate->matrix(part.expert[size_t(item.expert)]);
    const TrellisMatrix up = part.up->matrix(part.expert[size_t(item.expert)]);
    const bool is_bank = part.token;
    const Activations x =
        is_bank ? gathered.gather(part.x, gate.columns, gate.block, part.token + begin, tokens) : part.x;
    float* both = grown(memory, (2 * tokens + 1) * count);
    if (is_bank && count == part.width()) {  // up's rows may begin within a panel
        linear_rows(gate, x, 0, 2 * count, both, 2 * count);
    } else {
        linear_rows(gate, x, item.first, count, both, 2 * count);
        linear_rows(up, is_bank ? x : part.up_x, part.up_row + item.first, count, both + count, 2 * count);
    }
    const float* signs = down.signs_or_null();
    float* product = both + 2 * tokens * count;
    for (int64_t t = 0; t < tokens; ++t) {
        const float* row = both + 2 * t * count;
        rotate_kernels().swiglu(row, row + count, count, product);
        part.middle.set_part(begin + t, item.first, count, product, signs ? signs + item.first : nullptr, down.columns,
                             down.block);
    }
}

// The second pass of one item: some rows of down.
void multiply_middle(const Item& item) {
    const Part& part = *item.part;
    const int64_t begin = part.begin[size_t(item.expert)];
    const Activations x = part.middle.view(begin, part.tokens(item.expert), part.width(), part.down->block);
    linear_rows(part.down->matrix(part.expert[size_t(item.expert)]), x, item.first, item.count,
                part.out + begin * part.stride + item.first - part.out_row, part.stride);
}

struct Kept {
    Part parts[3];  // two banks and the MLP
    std::vector<Item> items;
    Memory<float> terms;
};
thread_local Kept kept;

}  // namespace

void give_back_many() { kept = {}; }

void mixture_of_many(const Routed<TrellisBank>* banks, int64_t num_banks, const Mlp<TrellisBank>* own, const float* x,
                     int64_t tokens, float* mlp_out) {
    Part* const parts = kept.parts;
    std::vector<Item>& items = kept.items;
    Part& mlp = parts[2];
    Part* const used[3] = {own ? &mlp : nullptr, num_banks > 0 ? &parts[0] : nullptr, num_banks > 1 ? &parts[1] : nullptr};
    int64_t experts = 0, pairs = 0;
    for (int64_t i = 0; i < num_banks; ++i) {
        begin_bank(banks[i], parts[i]);
        experts += parts[i].experts();
        pairs += parts[i].begin.back();
    }
    if (own) begin_mlp(*own, x, tokens, mlp);

    const int64_t wanted = kItemsPerThread * num_threads(), pieces = ceil_div(wanted, std::max<int64_t>(experts, 1));
    items.clear();
    for (Part* part : used)
        for (int64_t i = 0; part && i < part->experts(); ++i) {
            const int64_t least = ceil_div(2 * part->tokens(i) * part->width(), kScratchFloats);
            const bool is_whole = part->width() % kStep;  // too odd a width to cut
            add_pieces(items, *part, i, 0, part->width(), kStep,
                       is_whole ? 1 : std::max(least, part == &mlp ? wanted : pieces));
        }
    const Item* first = items.data();  // this thread's, also inside the bodies
    parallel(int64_t(items.size()), [=](int64_t i) { fill_middle(first[i]); });

    items.clear();
    if (own) {
        mlp.out = mlp_out;
        mlp.out_row = 0;
        mlp.stride = own->down->rows;
        add_pieces(items, mlp, 0, 0, own->down->rows, kPanelRows, wanted);
    }
    const int64_t width = num_banks ? banks[0].down->rows : 0;
    const int64_t most = pairs ? std::max(kTermFloats / pairs / kPanelRows, int64_t(1)) * kPanelRows : 0;
    float* terms = grown(kept.terms, pairs * std::min(most, width));
    int64_t row = 0;
    do {
        const int64_t rows = std::min(most, width - row);
        for (int64_t b = 0; b < num_banks; ++b) {
            parts[b].out = b ? terms + parts[0].begin.back() * rows : terms;
            parts[b].out_row = row;
            parts[b].stride = rows;
            for (int64_t i = 0; i < parts[b].experts(); ++i) add_pieces(items, parts[b], i, row, rows, kPanelRows, pieces);
        }
        const Item* second = items.data();
        parallel(int64_t(items.size()), [=](int64_t i) { multiply_middle(second[i]); });
        for (int64_t b = 0; b < num_banks; ++b)
            parts[b].pairs.combine(parts[b].out, banks[b].weights, banks[b].tokens, banks[b].chosen, rows,
                                   banks[b].out + row, width);
        items.clear();
        row += rows;
    } while (row < width);
}

}  // namespace duomo
