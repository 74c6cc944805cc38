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
constexpr int64_t kFewRows = 1536;      // whose sums of four tokens are 24 KB
constexpr int64_t kItemBytes = 2 << 20, kLeastItemBytes = 64 << 10;  // of weights, that one thread takes at a time

// Thread-local scratch that grows and is never given back: no allocation once a thread is warm.
template <class T, int which>
T* scratch(int64_t count) {
    static thread_local std::vector<T> memory;
    if (int64_t(memory.size()) < count) memory.resize(size_t(count));
    return memory.data();
}

// Without a branch, so that a loop over rows becomes vectors: 2^112 moves the exponent's bias, subnormals too.
float half_to_float(uint16_t half) {
    uint32_t bits = uint32_t(half & 0x7FFF) << 13;
    float wide;
    std::memcpy(&wide, &bits, 4);
    wide *= 0x1p112f;
    std::memcpy(&bits, &wide, 4);
    bits |= uint32_t(half & 0x8000) << 16 | ((half & 0x7C00) == 0x7C00 ? 0x7F800000u : 0u);
    std::memcpy(&wide, &bits, 4);
    return wide;
}

void scale_rows(float* y, const uint16_t* row_scale, float unit, int64_t count) {
    for (int64_t n = 0; n < count; ++n) y[n] *= half_to_float(row_scale[n]) * unit;
}

int offset_of(const PackedKernels& kernels, const TrellisMatrix&) { return kernels.trellis_offset; }
int offset_of(const PackedKernels& kernels, const IntMatrix& matrix) {
    return matrix.bits == 8 ? kernels.int8_offset : kSixOffset;
}
float unit_of(const TrellisMatrix& matrix) { return matrix.unit; }
float unit_of(const IntMatrix&) { return 1.0f; }
bool is_int8(const TrellisMatrix&) { return false; }
bool is_int8(const IntMatrix& matrix) { return matrix.bits == 8; }

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

void fill_panel(const PackedKernels& kernels, const IntMatrix& matrix, int64_t row, int64_t first_input, int64_t inputs,
                uint8_t* panel) {
    PackRows* const pack = is_int8(matrix) ? kernels.pack_int8 : kernels.pack_int6;
    pack(matrix.at(row, first_input), matrix.bytes_of(matrix.columns), std::min<int64_t>(kPanelRows, matrix.rows - row),
         inputs, panel);
}

// A filled panel times `count` tokens from `t`: adds scale * dot to sums[count][64].
template <class Matrix>
void multiply_group(const PackedKernels& kernels, const Matrix& matrix, const Activations& x, const uint8_t* panel,
                    int64_t first_input, int64_t inputs, int64_t t, int64_t count, float* sums) {
    const int offset = offset_of(kernels, matrix);
    const int64_t blocks = matrix.columns / matrix.block;
    alignas(64) int32_t acc[kTokenGroup * kPanelRows];
    int32_t start[kTokenGroup];
    float scale[kTokenGroup];
    for (int64_t input = 0; input < inputs; input += matrix.block) {
        const int64_t block = (first_input + input) / matrix.block;
        for (int64_t i = 0; i < count; ++i) {
            start[i] = -offset * x.sum[(t + i) * blocks + block];
            scale[i] = x.scale[(t + i) * blocks + block];
        }
        const uint8_t* own = panel + input * kPanelRows;
        const int8_t* q = x.q + t * matrix.columns + first_input + input;
        if (kernels.multiply_add) {
            kernels.multiply_add(own, matrix.block, q, matrix.columns, start, scale, count, sums);
            continue;
        }
        kernels.multiply_panel(own, is_int8(matrix), matrix.block, q, matrix.columns, start, count, acc);
        for (int64_t i = 0; i < count; ++i)
            kernels.flush(acc + i * kPanelRows, scale[i], kPanelRows, sums + i * kPanelRows, 0);
    }
}

template <class Matrix>
void multiply_panels(const Matrix& matrix, const Activations& x, int64_t first, int64_t count, float* y,
                     int64_t y_stride) {
    const PackedKernels& kernels = packed_kernels();
    uint8_t* panel = scratch<uint8_t, 0>(std::min(matrix.columns, kPanelInputs) * kPanelRows);
    float* sums = scratch<float, 0>(x.tokens * kPanelRows);
    // A panel of one group's tokens is used once: then a block of it, 8 KB, never leaves the first-level cache.
    const int64_t most = x.tokens <= kTokenGroup ? matrix.block : kPanelInputs;
    for (int64_t row = first; row < first + count; row += kPanelRows) {
        std::fill_n(sums, x.tokens * kPanelRows, 0.0f);
        for (int64_t input = 0; input < matrix.columns; input += most) {
            const int64_t inputs = std::min(most, matrix.columns - input);
            fill_panel(kernels, matrix, row, input, inputs, panel);
            for (int64_t t = 0; t < x.tokens; t += kTokenGroup)
                multiply_group(kernels, matrix, x, panel, input, inputs, t, std::min(kTokenGroup, x.tokens - t),
                               sums + t * kPanelRows);
        }
        const int64_t rows = std::min<int64_t>(kPanelRows, first + count - row);
        float multiplier[kPanelRows];
        std::fill_n(multiplier, rows, 1.0f);
        scale_rows(multiplier, matrix.row_scale + row, unit_of(matrix), rows);
        for (int64_t t = 0; t < x.tokens; ++t) {
            float* out = y + t * y_stride + row - first;
            for (int64_t n = 0; n < rows; ++n) out[n] = sums[t * kPanelRows + n] * multiplier[n];
        }
    }
}

// One row of a block: for rows that are no whole sixteen.
int32_t dot_row(const IntMatrix& matrix, const uint8_t* codes, const int8_t* q) {
    int32_t sum = 0;
    for (int64_t k = 0; k < matrix.block; ++k) {
        const uint32_t four = is_int8(matrix) ? 0 : open_six(codes + k / 4 * 3);
        sum += (is_int8(matrix) ? int8_t(codes[k]) : int(four >> 8 * (k % 4) & 63) - kSixOffset) * q[k];
    }
    return sum;
}

// One token: decoded and multiplied in registers, a block of inputs at a time.
void multiply_one(const TrellisMatrix& matrix, const Activations& x, int64_t first, int64_t count, float* y) {
    const PackedKernels& kernels = packed_kernels();
    const int64_t tile_rows = 16 * matrix.code->phases, stride = matrix.rows / tile_rows * 256;
    const int64_t tile = first / tile_rows, per_block = matrix.block / kBlockInputs;
    int32_t* acc = scratch<int32_t, 0>(count);
    Start starts[8];
    const int64_t blocks = matrix.columns / matrix.block;
    std::fill_n(y, count, 0.0f);
    std::fill_n(acc, count, -kernels.trellis_offset * x.sum[0]);
    for (int64_t b = 0; b < blocks; ++b) {
        for (int64_t i = 0; i < per_block; ++i) starts[i] = start_of(matrix, b * per_block + i, tile);
        kernels.accumulate(*matrix.code, matrix.codes + b * per_block * stride + tile * 256, stride, starts, per_block,
                           count / tile_rows, x.q + b * matrix.block, acc);
        kernels.flush(acc, x.scale[b], count, y, b + 1 < blocks ? -kernels.trellis_offset * x.sum[b + 1] : 0);
    }
    scale_rows(y, matrix.row_scale + first, matrix.unit, count);
}

void multiply_one(const IntMatrix& matrix, const Activations& x, int64_t first, int64_t count, float* y) {
    const PackedKernels& kernels = packed_kernels();
    DotRows* const dot = is_int8(matrix) ? kernels.dot_int8 : kernels.dot_int6;
    const int offset = offset_of(kernels, matrix);
    const int64_t blocks = matrix.columns / matrix.block, stride = matrix.bytes_of(matrix.columns);
    for (int64_t row = 0; row < count; row += 16) {
        const int64_t rows = std::min<int64_t>(16, count - row);
        alignas(64) int32_t sums[16] = {};
        alignas(64) float out[16] = {};
        for (int64_t b = 0; b < blocks; ++b) {
            const int8_t* q = x.q + b * matrix.block;
            const uint8_t* codes = matrix.at(first + row, b * matrix.block);
            const int32_t start = -offset * x.sum[b];
            if (rows == 16)
                dot(codes, stride, matrix.block, q, start, sums);
            else
                for (int64_t r = 0; r < rows; ++r) sums[r] = dot_row(matrix, codes + r * stride, q);
            kernels.flush(sums, x.scale[b], 16, out, 0);
        }
        std::copy_n(out, rows, y + row);
    }
    scale_rows(y, matrix.row_scale + first, 1.0f, count);
}

// A few tokens likewise, up to kFewTokens together, in runs of rows whose sums of so many stay in the first-level cache.
void multiply_few(const TrellisMatrix& matrix, const Activations& x, int64_t first, int64_t count, float* y,
                  int64_t y_stride) {
    const PackedKernels& kernels = packed_kernels();
    const int64_t tile_rows = 16 * matrix.code->phases, stride = matrix.rows / tile_rows * 256;
    const int64_t blocks = matrix.columns / matrix.block, per_block = matrix.block / kBlockInputs;
    int32_t* acc = scratch<int32_t, 0>(x.tokens * kFewRows);
    Start starts[8];
    for (int64_t row = 0; row < count; row += kFewRows) {
        const int64_t rows = std::min(kFewRows, count - row), tile = (first + row) / tile_rows;
        const auto start = [&](int64_t t, int64_t b) { return -kernels.trellis_offset * x.sum[t * blocks + b]; };
        for (int64_t t = 0; t < x.tokens; ++t) {
            std::fill_n(y + t * y_stride + row, rows, 0.0f);
            std::fill_n(acc + t * rows, rows, start(t, 0));
        }
        for (int64_t b = 0; b < blocks; ++b) {
            for (int64_t i = 0; i < per_block; ++i) starts[i] = start_of(matrix, b * per_block + i, tile);
            const uint8_t* line = matrix.codes + b * per_block * stride + tile * 256;
            for (int64_t t = 0; t < x.tokens; t += kFewTokens) {
                const int64_t together = std::min<int64_t>(kFewTokens, x.tokens - t);
                kernels.accumulate_few(*matrix.code, line, stride, starts, per_block, rows / tile_rows,
                                       x.q + t * matrix.columns + b * matrix.block, matrix.columns, together,
                                       acc + t * rows, rows);
                for (int64_t i = t; i < t + together; ++i)
                    kernels.flush(acc + i * rows, x.scale[i * blocks + b], rows, y + i * y_stride + row,
                                  b + 1 < blocks ? start(i, b + 1) : 0);
            }
        }
        for (int64_t t = 0; t < x.tokens; ++t)
            scale_rows(y + t * y_stride + row, matrix.row_scale + first + row, matrix.unit, rows);
    }
}

template <class Matrix>
void multiply_rows(const Matrix& matrix, const Activations& x, int64_t first, int64_t count, float* y,
                   int64_t y_stride) {
    if (x.tokens == 1)
        return multiply_one(matrix, x, first, count, y);
    if constexpr (std::is_same_v<Matrix, TrellisMatrix>)
        if (x.tokens <= 2 * kFewTokens && packed_kernels().accumulate_few)
            return multiply_few(matrix, x, first, count, y, y_stride);
    if (x.tokens > 1) multiply_panels(matrix, x, first, count, y, y_stride);
}

int64_t bytes_of(const TrellisMatrix& matrix) { return matrix.rows * matrix.columns * matrix.code->bits / 8; }
int64_t bytes_of(const IntMatrix& matrix) { return matrix.rows * matrix.bytes_of(matrix.columns); }

// How many items a matrix becomes, where `total` bytes are read side by side. Few: at every end of a run of rows the
// hardware has already fetched lines of a neighbour's (4 bits, one thread from memory: 30 GB/s of whole column blocks,
// 27 of halves, 24 of quarters). More threads need more items, to end together.
int64_t pieces_of(int64_t num_bytes, int64_t total, int64_t panels) {
    const int64_t threads = num_threads(), each = total / (threads <= 2 ? threads : 3 * threads);
    return std::min(panels, 1 + (num_bytes - 1) / std::clamp<int64_t>(each, kLeastItemBytes, kItemBytes));
}

// Several products, the pieces of one after those of another.
template <class Matrix>
void multiply_each(const Matrix* matrices, const Activations* x, float* const* y, int64_t count) {
    static thread_local std::vector<int64_t> memory;  // where each matrix's items begin, and the end
    memory.assign(size_t(count) + 1, 0);
    int64_t total = 0;
    for (int64_t i = 0; i < count; ++i) total += bytes_of(matrices[i]);
    const auto panels_of = [&](int64_t i) { return (matrices[i].rows + kPanelRows - 1) / kPanelRows; };
    for (int64_t i = 0; i < count; ++i)
        memory[size_t(i) + 1] = memory[size_t(i)] + pieces_of(bytes_of(matrices[i]), total, panels_of(i));
    const int64_t* begin = memory.data();  // this thread's, also inside the bodies
    parallel(begin[count], [&](int64_t item) {
        const int64_t i = std::upper_bound(begin, begin + count, item) - begin - 1;
        const int64_t pieces = begin[i + 1] - begin[i], piece = item - begin[i], panels = panels_of(i);
        const int64_t first = panels * piece / pieces * kPanelRows;
        const int64_t last = std::min(matrices[i].rows, panels * (piece + 1) / pieces * kPanelRows);
        multiply_rows(matrices[i], x[i], first, last - first, y[i] + first, matrices[i].rows);
    });
}

}  // namespace

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
    const uint8_t* now = matrix.codes + (column_block * tiles + tile) * 256;
    Start start;
    if (tile >= 2) {  // the common case needs no circle
        for (int group = 0; group < 4; ++group) {
            start.back1[group] = now + 64 * group - 256;
            start.back2[group] = now + 64 * group - 512;
        }
        return start;
    }
    const int64_t in_chain = column_block % matrix.chain;
    if (tiles >= 2) {  // before a group's first tile come the last ones of the group before, round the chain
        const uint8_t *block = now - tile * 256, *end = block + tiles * 256;
        const uint8_t* before = end + ((in_chain ? 0 : matrix.chain) - 1) * tiles * 256;
        for (int group = 0; group < 4; ++group) {
            const uint8_t* last = group ? end + 64 * (group - 1) : before + 64 * 3;
            start.back1[group] = tile ? block + 64 * group : last - 256;
            start.back2[group] = tile ? last - 256 : last - 512;
        }
        return start;
    }
    // One tile a group: the group before and the one before that.
    const uint8_t* chain = now - in_chain * 256;
    for (int group = 0; group < 4; ++group) {
        const int64_t place = in_chain * 4 + group, circle = matrix.chain * 4;
        start.back1[group] = chain + (place + circle - 1) % circle * 64;
        start.back2[group] = chain + (place + circle - 2) % circle * 64;
    }
    return start;
}

void linear_rows(const TrellisMatrix& matrix, const Activations& x, int64_t first, int64_t count, float* y,
                 int64_t y_stride) {
    multiply_rows(matrix, x, first, count, y, y_stride);
}

void linear_rows(const IntMatrix& matrix, const Activations& x, int64_t first, int64_t count, float* y,
                 int64_t y_stride) {
    multiply_rows(matrix, x, first, count, y, y_stride);
}

void linear_each(const TrellisMatrix* matrices, const Activations* x, float* const* y, int64_t count) {
    multiply_each(matrices, x, y, count);
}

void linear(const TrellisMatrix& matrix, const Activations& x, float* y) { multiply_each(&matrix, &x, &y, 1); }
void linear(const IntMatrix& matrix, const Activations& x, float* y) { multiply_each(&matrix, &x, &y, 1); }

}  // namespace duomo
