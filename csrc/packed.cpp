// Rows, blocks and panels: how a product is cut up. Nothing here knows an instruction set.
#include "packed.hpp"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu.hpp"
#include "pool.hpp"

namespace duomo {
namespace {

constexpr int64_t kTokenGroup = 24;     // tokens whose accumulators share the first-level cache: 6 KB and 6 KB
constexpr int64_t kPanelInputs = 4096;  // of a panel at a time: 256 KB, a quarter of a second-level cache

// Thread-local scratch that grows and is never given back: no allocation once a thread is warm.
template <class T, int which>
T* scratch(int64_t count) {
    static thread_local std::vector<T> memory;
    if (int64_t(memory.size()) < count) memory.resize(size_t(count));
    return memory.data();
}

void scale_rows(float* y, const uint16_t* row_scale, float unit, int64_t count) {
    for (int64_t n = 0; n < count; ++n) y[n] *= half_to_float(row_scale[n]) * unit;
}

int offset_of(const PackedKernels& kernels, const TrellisMatrix&) { return kernels.trellis_offset; }
int offset_of(const PackedKernels& kernels, const Int8Matrix&) { return kernels.int8_offset; }
float unit_of(const TrellisMatrix& matrix) { return matrix.unit; }
float unit_of(const Int8Matrix&) { return 1.0f; }

// Inputs [first_input, first_input + inputs) of the panel that begins at `row`.
void fill_panel(const PackedKernels& kernels, const TrellisMatrix& matrix, int64_t row, int64_t first_input,
                int64_t inputs, uint8_t* panel) {
    const TrellisCode& code = *matrix.code;
    const int64_t tile_rows = 16 * code.phases, stride = matrix.rows / tile_rows * 256;
    const int64_t last = std::min(matrix.rows, row + kPanelRows);
    for (int64_t input = 0; input < inputs; input += kBlockInputs)
        for (int64_t r = row; r < last; r += tile_rows) {
            const int64_t block = (first_input + input) / kBlockInputs, tile = r / tile_rows;
            kernels.decode_tile(code, matrix.codes + block * stride + tile * 256, start_of(matrix, block, tile),
                                panel + input * kPanelRows + 4 * (r - row));
        }
}

void fill_panel(const PackedKernels& kernels, const Int8Matrix& matrix, int64_t row, int64_t first_input,
                int64_t inputs, uint8_t* panel) {
    kernels.pack_int8(matrix.codes + row * matrix.columns + first_input, matrix.columns,
                      std::min<int64_t>(kPanelRows, matrix.rows - row), inputs, panel);
}

// A filled panel times `count` tokens from `t`: adds scale * dot to sums[count][64].
template <class Matrix>
void multiply_group(const PackedKernels& kernels, const Matrix& matrix, const Activations& x, const uint8_t* panel,
                    int64_t first_input, int64_t inputs, int64_t t, int64_t count, float* sums) {
    constexpr bool is_int8 = std::is_same_v<Matrix, Int8Matrix>;
    const int offset = offset_of(kernels, matrix);
    const int64_t blocks = matrix.columns / matrix.block;
    alignas(64) int32_t acc[kTokenGroup * kPanelRows];
    int32_t start[kTokenGroup];
    for (int64_t input = 0; input < inputs; input += matrix.block) {
        const int64_t block = (first_input + input) / matrix.block;
        for (int64_t i = 0; i < count; ++i) start[i] = -offset * x.sum[(t + i) * blocks + block];
        kernels.multiply_panel(panel + input * kPanelRows, is_int8, matrix.block,
                               x.q + t * matrix.columns + first_input + input, matrix.columns, start, count, acc);
        for (int64_t i = 0; i < count; ++i)
            kernels.flush(acc + i * kPanelRows, x.scale[(t + i) * blocks + block], kPanelRows, sums + i * kPanelRows);
    }
}

template <class Matrix>
void multiply_panels(const Matrix& matrix, const Activations& x, int64_t first, int64_t count, float* y,
                     int64_t y_stride) {
    const PackedKernels& kernels = packed_kernels();
    uint8_t* panel = scratch<uint8_t, 0>(std::min(matrix.columns, kPanelInputs) * kPanelRows);
    float* sums = scratch<float, 0>(x.tokens * kPanelRows);
    for (int64_t row = first; row < first + count; row += kPanelRows) {
        std::fill_n(sums, x.tokens * kPanelRows, 0.0f);
        for (int64_t input = 0; input < matrix.columns; input += kPanelInputs) {
            const int64_t inputs = std::min(kPanelInputs, matrix.columns - input);
            fill_panel(kernels, matrix, row, input, inputs, panel);
            for (int64_t t = 0; t < x.tokens; t += kTokenGroup)
                multiply_group(kernels, matrix, x, panel, input, inputs, t, std::min(kTokenGroup, x.tokens - t),
                               sums + t * kPanelRows);
        }
        const int64_t rows = std::min<int64_t>(kPanelRows, first + count - row);
        for (int64_t t = 0; t < x.tokens; ++t) {
            float* out = y + t * y_stride + row - first;
            std::copy_n(sums + t * kPanelRows, rows, out);
            scale_rows(out, matrix.row_scale + row, unit_of(matrix), rows);
        }
    }
}

// One token: decoded and multiplied in registers, a block of inputs at a time.
void multiply_one(const TrellisMatrix& matrix, const Activations& x, int64_t first, int64_t count, float* y) {
    const PackedKernels& kernels = packed_kernels();
    const int64_t tile_rows = 16 * matrix.code->phases, stride = matrix.rows / tile_rows * 256;
    const int64_t tile = first / tile_rows, per_block = matrix.block / kBlockInputs;
    int32_t* acc = scratch<int32_t, 0>(count);
    Start starts[8];
    std::fill_n(y, count, 0.0f);
    for (int64_t b = 0; b < matrix.columns / matrix.block; ++b) {
        std::fill_n(acc, count, -kernels.trellis_offset * x.sum[b]);
        for (int64_t i = 0; i < per_block; ++i) starts[i] = start_of(matrix, b * per_block + i, tile);
        kernels.accumulate(*matrix.code, matrix.codes + b * per_block * stride + tile * 256, stride, starts, per_block,
                           count / tile_rows, x.q + b * matrix.block, acc);
        kernels.flush(acc, x.scale[b], count, y);
    }
    scale_rows(y, matrix.row_scale + first, matrix.unit, count);
}

void multiply_one(const Int8Matrix& matrix, const Activations& x, int64_t first, int64_t count, float* y) {
    const PackedKernels& kernels = packed_kernels();
    const int64_t blocks = matrix.columns / matrix.block;
    std::fill_n(y, count, 0.0f);
    for (int64_t row = 0; row < count; row += 16) {
        const int64_t rows = std::min<int64_t>(16, count - row);
        const PackedKernels& chosen = rows == 16 ? kernels : packed_portable;
        const int8_t* codes = matrix.codes + (first + row) * matrix.columns;
        for (int64_t b = 0; b < blocks; ++b) {
            alignas(64) int32_t sums[16] = {};
            const int8_t* q = x.q + b * matrix.block;
            if (rows == 16)
                chosen.dot_rows(codes + b * matrix.block, matrix.columns, matrix.block, q, sums);
            else
                for (int64_t r = 0; r < rows; ++r)
                    for (int64_t k = 0; k < matrix.block; ++k)
                        sums[r] += codes[r * matrix.columns + b * matrix.block + k] * q[k];
            for (int64_t r = 0; r < rows; ++r) y[row + r] += x.scale[b] * float(sums[r]);
        }
    }
    scale_rows(y, matrix.row_scale + first, 1.0f, count);
}

template <class Matrix>
void multiply_rows(const Matrix& matrix, const Activations& x, int64_t first, int64_t count, float* y,
                   int64_t y_stride) {
    if (x.tokens == 1)
        multiply_one(matrix, x, first, count, y);
    else if (x.tokens > 1)
        multiply_panels(matrix, x, first, count, y, y_stride);
}

// A few items a thread, equally long: enough to even out a busy machine, long enough to stream.
template <class Matrix>
void multiply(const Matrix& matrix, const Activations& x, float* y) {
    const int64_t panels = (matrix.rows + kPanelRows - 1) / kPanelRows;
    const int64_t items = std::min<int64_t>(panels, 4 * num_threads());
    parallel(items, [&](int64_t item) {
        const int64_t first = panels * item / items * kPanelRows;
        const int64_t last = std::min(matrix.rows, panels * (item + 1) / items * kPanelRows);
        multiply_rows(matrix, x, first, last - first, y + first, matrix.rows);
    });
}

}  // namespace

float half_to_float(uint16_t half) {
    const uint32_t sign = uint32_t(half & 0x8000) << 16, rest = half & 0x7FFF;
    uint32_t bits;
    if (rest >= 0x7C00)
        bits = sign | 0x7F800000 | (rest & 0x3FF) << 13;
    else if (rest >= 0x0400)
        bits = sign | ((rest << 13) + 0x38000000);
    else {  // a subnormal half is rest * 2^-24, a normal float
        const float small = float(rest) * 0x1p-24f;
        std::memcpy(&bits, &small, 4);
        bits |= sign;
    }
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

const PackedKernels& packed_kernels() {
    switch (current_isa()) {
        case Isa::avx512: return packed_avx512 ? *packed_avx512 : packed_portable;
        case Isa::avx2: return packed_avx2 ? *packed_avx2 : packed_portable;
        case Isa::neon: return packed_neon ? *packed_neon : packed_portable;
        case Isa::portable: break;
    }
    return packed_portable;
}

Start start_of(const TrellisMatrix& matrix, int64_t column_block, int64_t tile) {
    const int64_t tiles = matrix.rows / (16 * matrix.code->phases);
    // Bytes of a stream lie at place (block of the chain * 4 + group) * tiles + tile, round a circle.
    const int64_t chain_start = column_block / matrix.chain * matrix.chain, circle = matrix.chain * 4 * tiles;
    const auto line = [&](int64_t place) {
        place = (place + 2 * circle) % circle;
        const int64_t group_index = place / tiles;
        return matrix.codes + (((chain_start + group_index / 4) * tiles + place % tiles) * 4 + group_index % 4) * 64;
    };
    Start start;
    for (int group = 0; group < 4; ++group) {
        if (tile >= 2) {  // the common case needs no circle
            const uint8_t* now = matrix.codes + ((column_block * tiles + tile) * 4 + group) * 64;
            start.back1[group] = now - 256;
            start.back2[group] = now - 512;
            continue;
        }
        const int64_t place = ((column_block - chain_start) * 4 + group) * tiles + tile;
        start.back1[group] = line(place - 1);
        start.back2[group] = line(place - 2);
    }
    return start;
}

void linear_rows(const TrellisMatrix& matrix, const Activations& x, int64_t first, int64_t count, float* y,
                 int64_t y_stride) {
    multiply_rows(matrix, x, first, count, y, y_stride);
}

void linear_rows(const Int8Matrix& matrix, const Activations& x, int64_t first, int64_t count, float* y,
                 int64_t y_stride) {
    multiply_rows(matrix, x, first, count, y, y_stride);
}

void linear_each(const TrellisMatrix* matrices, const Activations* x, float* const* y, int64_t count) {
    constexpr int64_t slice = 8 * kPanelRows;
    int64_t items = 0;
    for (int64_t i = 0; i < count; ++i) items += (matrices[i].rows + slice - 1) / slice;
    parallel(items, [&](int64_t item) {
        int64_t i = 0;
        for (; item >= (matrices[i].rows + slice - 1) / slice; ++i) item -= (matrices[i].rows + slice - 1) / slice;
        const int64_t first = item * slice, rows = std::min(slice, matrices[i].rows - first);
        multiply_rows(matrices[i], x[i], first, rows, y[i] + first, matrices[i].rows);
    });
}

void linear(const TrellisMatrix& matrix, const Activations& x, float* y) { multiply(matrix, x, y); }
void linear(const Int8Matrix& matrix, const Activations& x, float* y) { multiply(matrix, x, y); }

}  // namespace duomo
