// Products with plain matrices, and the doors of experts.hpp over them: y[t, n] = x[t] . w[n] + bias[n].
//
// Borrowed fp32 matrices lie as torch keeps them, so that what is written into them is seen. A dot product runs in 16
// lanes, each adding w * x in rising order, one multiplication and one addition at a time; then the lanes are added in
// halves: i with i + 8, + 4, + 2, + 1.
//
// Weights that do not change any more and are bf16 by value are copied into panels, half the bytes: 16 rows side by
// side, [rows / 16][columns / 2][16][2], the last ones filled up with zeros. A lane is a row then, so nothing is added
// across lanes: a sum runs over pairs of columns in rising order, of each pair the odd one first, one multiplication and
// one addition at a time. That is what vdpbf16ps does where x, too, is bf16 (`rounded`); so it may be used there, and
// gives the same bits but that it takes numbers below 2^-126 for zero.
//
// Either way a token's bits depend on its own row alone: not on the tokens beside it, not on chunks or threads, not on
// the instruction set. The speed is in tiles of registers: rows of the matrix by up to four tokens, so that a weight
// once loaded serves them all.
#pragma once

#include <cstdint>

#include "experts.hpp"

namespace duomo {

constexpr int64_t kPanelLanes = 16;  // rows of a panel of bf16 pairs

// How a matrix is kept: borrowed fp32; bf16 panels under fp32 activations; bf16 panels under rounded ones.
enum class DenseForm { borrowed = 0, panels = 1, rounded = 2 };

// E matrices [rows][columns] one after another; a single matrix is a bank of one. Pointers are borrowed.
struct DenseBank {
    const float* weight;    // where borrowed
    const uint32_t* pairs;  // where in panels
    const float* bias;      // [rows], of a single matrix; or null
    int64_t count, rows, columns;
    DenseForm form;

    static int64_t num_pairs(int64_t rows, int64_t columns) {
        return (rows + kPanelLanes - 1) / kPanelLanes * kPanelLanes * ((columns + 1) / 2);
    }
};

// y[tokens][rows] = x w^T + bias. Row t of x is place[t], or t where `place` is null.
struct DenseProduct {
    const float* weight;
    const uint32_t* pairs;
    const float *bias, *x;
    const int64_t* place;
    float* y;
    int64_t rows, columns, tokens;
    DenseForm form;
};

// Matrix `expert` of a bank, for `tokens` rows of x.
inline DenseProduct product_of(const DenseBank& bank, int64_t expert, const float* x, const int64_t* place,
                               int64_t tokens, float* y) {
    return {bank.weight ? bank.weight + expert * bank.rows * bank.columns : nullptr,
            bank.pairs ? bank.pairs + expert * DenseBank::num_pairs(bank.rows, bank.columns) : nullptr,
            bank.bias, x, place, y, bank.rows, bank.columns, tokens, bank.form};
}

struct DenseKernels {
    // Rows [first, last) of a borrowed matrix for tokens [begin, end).
    void (*multiply)(const DenseProduct&, int64_t first, int64_t last, int64_t begin, int64_t end);
    // The same of panels; `first` is the first row of one. `x` are the tokens' rows, rounded where that is asked for.
    void (*multiply_panels)(const DenseProduct&, int64_t first, int64_t last, int64_t begin, int64_t end);
};

// Copies `count` matrices into panels. Weights are rounded to bf16, which changes nothing where they are bf16 already.
void pack_panels(const float* weight, int64_t count, int64_t rows, int64_t columns, uint32_t* pairs);

const DenseKernels& dense_kernels();  // of current_isa()
extern const DenseKernels dense_portable;
extern const DenseKernels* const dense_avx2;
extern const DenseKernels* const dense_avx512;

// Several products side by side on the pool.
void multiply_each(const DenseProduct* products, int64_t count);

// What experts.hpp offers over packed banks.
void linear_shared(const DenseBank* const* banks, int64_t count, const float* x, int64_t tokens, float* const* y);
void mixture(const Routed<DenseBank>* banks, int64_t num_banks, const Mlp<DenseBank>* mlp, const float* x,
             int64_t tokens, float* mlp_out);

}  // namespace duomo
