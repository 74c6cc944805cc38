#include "dense.hpp"

#include <algorithm>
#include <vector>

#include "bfloat16.hpp"
#include "cpu.hpp"
#include "memory.hpp"
#include "pairs.hpp"
#include "pool.hpp"
#include "rotate.hpp"

namespace duomo {
namespace {

// An item of the pool: rows of a matrix that stay in the first-level cache with the tokens they meet. Rounding a token's
// row is worth an eighth of its products with 64 rows, so many tokens that are rounded meet more rows in one item.
constexpr int64_t kItemRows = 64, kItemTokens = 32, kRoundedRows = 512;

int64_t item_rows(const DenseProduct& p) {
    return p.form == DenseForm::rounded && p.tokens >= kItemTokens ? kRoundedRows : kItemRows;
}

// Tokens of an item: where there are few items, as many pieces as end together on all threads.
int64_t item_tokens(const DenseProduct& p) {
    const int64_t threads = num_threads(), across = (p.rows + item_rows(p) - 1) / item_rows(p);
    const int64_t items = across * ((p.tokens + kItemTokens - 1) / kItemTokens);
    if (p.tokens <= 4 || items >= 4 * threads) return kItemTokens;
    const int64_t even = (items + threads - 1) / threads * threads, pieces = (even + across - 1) / across;
    return (p.tokens + 4 * pieces - 1) / (4 * pieces) * 4;  // whole tiles of four
}

struct Workspace {
    Pairs pairs;
    Memory<float> first, middle, second;
};

using Products = std::vector<DenseProduct>;

// One product per active expert over its own pairs: their tokens' rows of x, or rows of x in sorted order.
void add_each(Products& products, const DenseBank& bank, const Pairs& pairs, const float* x, bool is_sorted, float* y) {
    for (size_t i = 0; i < pairs.active.size(); ++i) {
        const int64_t begin = pairs.begin[i], count = pairs.begin[i + 1] - begin;
        products.push_back(product_of(bank, pairs.active[i], is_sorted ? x + begin * bank.columns : x,
                                      is_sorted ? nullptr : pairs.token.data() + begin, count, y + begin * bank.rows));
    }
}

DenseProduct product(const DenseBank& bank, const float* x, int64_t tokens, float* y) {
    return product_of(bank, 0, x, nullptr, tokens, y);
}

// silu(gate) * up of `count` rows: gate rows are `stride` apart, up rows `gap` after them.
float* fill_middle(Workspace& work, int64_t count, int64_t size, int64_t stride, int64_t gap) {
    float* middle = grown(work.middle, count * size);
    parallel_rows(count, [&](int64_t i) {
        const float* gate = work.first.data() + i * stride;
        rotate_kernels().swiglu(gate, gate + gap, size, middle + i * size);
    });
    return middle;
}

}  // namespace

const DenseKernels& dense_kernels() {
    switch (current_isa()) {
        case Isa::avx512: return dense_avx512 ? *dense_avx512 : dense_portable;
        case Isa::avx2: return dense_avx2 ? *dense_avx2 : dense_portable;
        default: return dense_portable;
    }
}

void pack_panels(const float* weight, int64_t count, int64_t rows, int64_t columns, uint32_t* pairs) {
    for (int64_t e = 0; e < count; ++e)
        for (int64_t first = 0; first < rows; first += kPanelLanes)
            for (int64_t k = 0; k < columns; k += 2)
                for (int64_t lane = 0; lane < kPanelLanes; ++lane) {
                    const float* w = weight + (e * rows + first + lane) * columns + k;
                    const bool is_row = first + lane < rows;
                    const uint32_t even = is_row ? to_bfloat16(w[0]) : 0;
                    const uint32_t odd = is_row && k + 1 < columns ? to_bfloat16(w[1]) : 0;
                    *pairs++ = odd << 16 | even;
                }
}

void multiply_each(const DenseProduct* products, int64_t count) {
    struct Cut {
        int64_t begin, across, tokens;  // the first item of a product, items across its rows, tokens of each
    };
    static thread_local std::vector<Cut> memory;
    memory.clear();
    int64_t items = 0;
    for (int64_t i = 0; i < count; ++i) {
        const DenseProduct& own = products[i];
        const int64_t across = (own.rows + item_rows(own) - 1) / item_rows(own), tokens = item_tokens(own);
        memory.push_back({items, across, tokens});
        items += across * ((own.tokens + tokens - 1) / tokens);
    }
    const std::vector<Cut>& cuts = memory;
    const DenseKernels& kernels = dense_kernels();
    parallel(items, [&](int64_t item) {
        const auto after = [](int64_t wanted, const Cut& cut) { return wanted < cut.begin; };
        const int64_t i = std::upper_bound(cuts.begin(), cuts.end(), item, after) - cuts.begin() - 1;
        const DenseProduct& own = products[i];
        const Cut& cut = cuts[size_t(i)];
        const int64_t row = (item - cut.begin) % cut.across * item_rows(own);
        const int64_t token = (item - cut.begin) / cut.across * cut.tokens;
        const auto multiply = own.form == DenseForm::borrowed ? kernels.multiply : kernels.multiply_panels;
        multiply(own, row, std::min(own.rows, row + item_rows(own)), token, std::min(own.tokens, token + cut.tokens));
    });
}

void linear_shared(const DenseBank* const* banks, int64_t count, const float* x, int64_t tokens, float* const* y) {
    static thread_local Products products;
    products.clear();
    for (int64_t i = 0; i < count; ++i) products.push_back(product(*banks[i], x, tokens, y[i]));
    multiply_each(products.data(), count);
}

void mixture(const Routed<DenseBank>* banks, int64_t num_banks, const Mlp<DenseBank>* own, const float* x,
             int64_t tokens, float* mlp_out) {
    static thread_local std::vector<Workspace> memory;
    static thread_local Products products_memory;
    if (int64_t(memory.size()) < num_banks + 1) memory.resize(size_t(num_banks + 1));
    Workspace *work = memory.data(), &mlp_work = work[num_banks];
    Products& products = products_memory;
    products.clear();
    if (own) {
        const int64_t size = tokens * own->gate->rows;
        float* first = grown(mlp_work.first, 2 * size);
        products.push_back(product(*own->gate, x, tokens, first));
        products.push_back(product(*own->up, x, tokens, first + size));
    }
    for (int64_t i = 0; i < num_banks; ++i) {
        const Routed<DenseBank>& bank = banks[i];
        work[i].pairs.sort(bank.expert_ids, bank.tokens, bank.chosen, bank.gate_up->count);
        add_each(products, *bank.gate_up, work[i].pairs, bank.hidden, false,
                 grown(work[i].first, bank.tokens * bank.chosen * bank.gate_up->rows));
    }
    multiply_each(products.data(), int64_t(products.size()));

    products.clear();
    if (own) {
        const int64_t size = own->down->columns;
        products.push_back(product(*own->down, fill_middle(mlp_work, tokens, size, size, tokens * size), tokens, mlp_out));
    }
    for (int64_t i = 0; i < num_banks; ++i) {
        const DenseBank& down = *banks[i].down;
        const int64_t pairs = banks[i].tokens * banks[i].chosen, size = down.columns;
        add_each(products, down, work[i].pairs, fill_middle(work[i], pairs, size, 2 * size, size), true,
                 grown(work[i].second, pairs * down.rows));
    }
    multiply_each(products.data(), int64_t(products.size()));
    for (int64_t i = 0; i < num_banks; ++i)
        work[i].pairs.combine(work[i].second.data(), banks[i].weights, banks[i].tokens, banks[i].chosen,
                              banks[i].down->rows, banks[i].out, banks[i].down->rows);
}

}  // namespace duomo
