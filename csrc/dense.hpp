// Products with plain fp32 matrices, and the doors of experts.hpp over them: y[t, n] = x[t] . w[n] + bias[n].
//
// A dot product runs in 16 lanes, each adding w * x in rising order, one multiplication and one addition at a time; then
// the lanes are added in halves: i with i + 8, + 4, + 2, + 1. So a token's bits depend on its own row alone: not on the
// tokens beside it, not on chunks or threads, not on the instruction set. Matrices lie as torch keeps them; the
// speed is in tiles of registers: rows of the matrix by up to four tokens, so that a weight once loaded serves them all.
#pragma once

#include <cstdint>

#include "experts.hpp"

namespace duomo {

// E matrices [rows][columns] one after another; a single matrix is a bank of one. Pointers are borrowed.
struct DenseBank {
    const float* weight;
    const float* bias;  // [rows], of a single matrix; or null
    int64_t count, rows, columns;
};

// y[tokens][rows] = x w^T + bias. Row t of x is place[t], or t where `place` is null.
struct DenseProduct {
    const float *weight, *bias, *x;
    const int64_t* place;
    float* y;
    int64_t rows, columns, tokens;
};

struct DenseKernels {
    // Rows [first, last) of the matrix for tokens [begin, end).
    void (*multiply)(const DenseProduct&, int64_t first, int64_t last, int64_t begin, int64_t end);
};

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
