// Activations on their way into a packed product, and the nonlinearity between two of them.
//
// Rotation: signs, then a Hadamard transform of each block (`trellis/hadamard.py` is the specification). The butterfly
// runs half = 1, 2, 4, ... as there, one addition a result, so the floats are the same bits as numpy's and torch's.
// Quantization: scale = max / 127 over the block, q = x * (127 / max) rounded to nearest even. |q| <= 127.
// The lanes are GCC vectors of 16 floats, compiled once per instruction set: same operations, same order, same bits.
#pragma once

#include <cstdint>

namespace duomo {

struct RotateKernels {
    // One row of `columns` inputs (a multiple of `block`, itself 16 to 128). `signs` may be null: no rotation.
    void (*rotate_quantize)(const float* x, const float* signs, int64_t columns, int block, int8_t* q, float* scale,
                            int32_t* sum);
    // The way back of such a row, in place: signs times its transform, a block at a time.
    void (*unrotate)(float* x, const float* signs, int64_t columns, int block);
    // out[i] = silu(gate[i]) * up[i], i < count; any count.
    void (*swiglu)(const float* gate, const float* up, int64_t count, float* out);
    // out = weight * (x / sqrt(mean(x^2) + eps)), one row.
    void (*rmsnorm)(const float* x, const float* weight, float eps, int64_t count, float* out);
    // Rotates adjacent pairs of one head in place: cos and sin are [count / 2].
    void (*rotate_pairs)(float* x, const float* cos, const float* sin, int64_t count);
    float (*dot)(const float* a, const float* b, int64_t count);
    // out[i] = e^(x[i] - shift); returns their sum.
    float (*exp_sum)(const float* x, float shift, int64_t count, float* out);
    // out[i] += weight * x[i]
    void (*add_scaled)(const float* x, float weight, int64_t count, float* out);
};

const RotateKernels& rotate_kernels();  // of current_isa()
extern const RotateKernels rotate_portable;
extern const RotateKernels* const rotate_avx2;
extern const RotateKernels* const rotate_avx512;

}  // namespace duomo
