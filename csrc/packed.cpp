// Rows, blocks and panels: how a product is cut up. Nothing here knows an instruction set.
#include "packed_lanes.hpp"

#include <algorithm>
#include <atomic>
#include <type_traits>
#include <vector>

#include "cpu.hpp"
#include "memory.hpp"
#include "pool.hpp"

namespace duomo {
namespace {

constexpr int64_t kTokenGroup = 24;     // tokens whose accumulators share the first-level cache: 6 KB and 6 KB
constexpr int64_t kPanelInputs = 4096;  // of a panel at a time: 256 KB, a quarter of a second-level cache
constexpr int64_t kFewSums = 6144;      // of rows and tokens together: 24 KB
constexpr int64_t kItemBytes = 2 << 20, kLeastItemBytes = 64 << 10;  // of weights, that one thread takes at a time

// This thread's own, by number.
template <class T, int which>
T* scratch(int64_t count) {
    static thread_local Memory<T> memory;
    return grown(memory, count);
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
            kernels.flush(acc + i * kPanelRows, scale[i], kPanelRows, sums + i * kPanelRows);
    }
}

template <class Matrix>
void multiply_panels(const Matrix& matrix, const Activations& x, int64_t first, int64_t count, float* y,
                     int64_t y_stride) {
    if (x.tokens == 0) return;
    const PackedKernels& kernels = packed_kernels();
    const int64_t half_size = x.tokens * kPanelRows, blocks = matrix.columns / matrix.block;
    // A panel of one group's tokens is used once: then a block of it, 8 KB, never leaves the first-level cache.
    const int64_t longest = std::min(begin_of_half(1, blocks) * matrix.block, kPanelInputs);
    const int64_t most = x.tokens <= kTokenGroup ? matrix.block : longest;
    uint8_t* panel = scratch<uint8_t, 0>(most * kPanelRows);
    float* sums = scratch<float, 0>(kHalves * half_size);
    for (int64_t row = first; row < first + count; row += kPanelRows) {
        std::fill_n(sums, kHalves * half_size, 0.0f);
        for (int half = 0; half < kHalves; ++half) {
            const int64_t end = begin_of_half(half + 1, blocks) * matrix.block;
            for (int64_t input = begin_of_half(half, blocks) * matrix.block; input < end; input += most) {
                const int64_t inputs = std::min(most, end - input);
                fill_panel(kernels, matrix, row, input, inputs, panel);
                for (int64_t t = 0; t < x.tokens; t += kTokenGroup)
                    multiply_group(kernels, matrix, x, panel, input, inputs, t, std::min(kTokenGroup, x.tokens - t),
                                   sums + half * half_size + t * kPanelRows);
            }
        }
        const int64_t rows = std::min<int64_t>(kPanelRows, first + count - row);
        for (int64_t t = 0; t < x.tokens; ++t) {
            const float* sum = sums + t * kPanelRows;
            float* out = y + t * y_stride + row - first;
            kernels.join(sum, sum + half_size, matrix.row_scale + row, unit_of(matrix), rows, out);
        }
    }
}

// Level k of a row.
int level_at(const IntMatrix& matrix, const uint8_t* codes, int64_t k) {
    if (is_int8(matrix)) return int8_t(codes[k]);
    return int(open_six(codes + k / 4 * 3) >> 8 * (k % 4) & 63) - kSixOffset;
}

// One row of a block: for rows that are no whole sixteen.
int32_t dot_row(const IntMatrix& matrix, const uint8_t* codes, const int8_t* q) {
    int32_t sum = 0;
    for (int64_t k = 0; k < matrix.block; ++k) sum += level_at(matrix, codes, k) * q[k];
    return sum;
}

void multiply_one(const IntMatrix& matrix, const Activations& x, int64_t first, int64_t count, float* y) {
    const PackedKernels& kernels = packed_kernels();
    DotRows* const dot = is_int8(matrix) ? kernels.dot_int8 : kernels.dot_int6;
    const int offset = offset_of(kernels, matrix);
    const int64_t blocks = matrix.columns / matrix.block, stride = matrix.bytes_of(matrix.columns);
    for (int64_t row = 0; row < count; row += 16) {
        const int64_t rows = std::min<int64_t>(16, count - row);
        alignas(64) int32_t sums[16] = {};
        alignas(64) float out[kHalves][16] = {};
        for (int half = 0; half < kHalves; ++half)
            for (int64_t b = begin_of_half(half, blocks); b < begin_of_half(half + 1, blocks); ++b) {
                const int8_t* q = x.q + b * matrix.block;
                const uint8_t* codes = matrix.at(first + row, b * matrix.block);
                const int32_t start = -offset * x.sum[b];
                if (rows == 16)
                    dot(codes, stride, matrix.block, q, start, sums);
                else
                    for (int64_t r = 0; r < rows; ++r) sums[r] = dot_row(matrix, codes + r * stride, q);
                kernels.flush(sums, x.scale[b], 16, out[half]);
            }
        kernels.join(out[0], out[1], matrix.row_scale + first + row, unit_of(matrix), rows, y + row);
    }
}

// Rows whose sums of so many tokens stay in the first-level cache.
int64_t run_of(int64_t tokens) { return kFewSums / std::min<int64_t>(tokens, kFewTokens) / kPanelRows * kPanelRows; }

// One half's sums of a run of rows for a few tokens, y[T][rows]: decoded and multiplied in registers, a block of inputs
// at a time.
void multiply_half(const TrellisMatrix& matrix, const Activations& x, int half, int64_t first, int64_t rows, float* y,
                   int64_t y_stride) {
    const PackedKernels& kernels = packed_kernels();
    const int64_t tile_rows = 16 * matrix.code->phases, stride = matrix.rows / tile_rows * 256;
    const int64_t tile = first / tile_rows, tiles = rows / tile_rows;
    const int64_t blocks = matrix.columns / matrix.block, per_block = matrix.block / kBlockInputs;
    const int64_t begin = begin_of_half(half, blocks), end = begin_of_half(half + 1, blocks);
    int32_t* acc = scratch<int32_t, 0>(std::min<int64_t>(x.tokens, kFewTokens) * rows);
    Start starts[8];
    for (int64_t t = 0; t < x.tokens; ++t) std::fill_n(y + t * y_stride, rows, 0.0f);
    for (int64_t b = begin; b < end; ++b) {
        for (int64_t i = 0; i < per_block; ++i) starts[i] = start_of(matrix, b * per_block + i, tile);
        const uint8_t* line = matrix.codes + b * per_block * stride + tile * 256;
        const CodeBlock block = {line, stride, starts, per_block, tiles};
        for (int64_t t = 0; t < x.tokens; t += kFewTokens) {
            const int64_t together = std::min<int64_t>(kFewTokens, x.tokens - t);
            int32_t start[kFewTokens];
            float scale[kFewTokens];
            for (int64_t i = 0; i < together; ++i) {
                start[i] = -kernels.trellis_offset * x.sum[(t + i) * blocks + b];
                scale[i] = x.scale[(t + i) * blocks + b];
            }
            const int8_t* q = x.q + t * matrix.columns + b * matrix.block;
            float* out = y + t * y_stride;
            const FewTokens few = {together, q, matrix.columns, start, scale, acc, out, y_stride};
            kernels.multiply_block(*matrix.code, block, few);
        }
    }
}

// Whether a product is taken in registers, half by half.
bool goes_by_halves(int64_t tokens) { return 0 < tokens && tokens <= packed_kernels().most_by_block; }

// Whether threads share it so. With more tokens than one the work is less the reading than the products, and threads
// that take rows have no sums to hand each other.
bool is_cut_by_halves(const TrellisMatrix& matrix, int64_t tokens) { return tokens == 1 && matrix.columns > matrix.block; }
bool is_cut_by_halves(const IntMatrix&, int64_t) { return false; }

void join_halves(const TrellisMatrix& matrix, int64_t first, int64_t rows, const float* second, float* y) {
    packed_kernels().join(y, second, matrix.row_scale + first, matrix.unit, rows, y);
}

void multiply_rows(const TrellisMatrix& matrix, const Activations& x, int64_t first, int64_t count, float* y,
                   int64_t y_stride) {
    if (!goes_by_halves(x.tokens)) return multiply_panels(matrix, x, first, count, y, y_stride);
    const int64_t run = run_of(x.tokens);
    float* second = scratch<float, 1>(x.tokens * std::min(run, count));
    for (int64_t row = 0; row < count; row += run) {
        const int64_t rows = std::min(run, count - row);
        multiply_half(matrix, x, 0, first + row, rows, y + row, y_stride);
        multiply_half(matrix, x, 1, first + row, rows, second, rows);
        for (int64_t t = 0; t < x.tokens; ++t)
            join_halves(matrix, first + row, rows, second + t * rows, y + row + t * y_stride);
    }
}

void multiply_rows(const IntMatrix& matrix, const Activations& x, int64_t first, int64_t count, float* y,
                   int64_t y_stride) {
    if (x.tokens == 1) return multiply_one(matrix, x, first, count, y);
    multiply_panels(matrix, x, first, count, y, y_stride);
}

int64_t bytes_of(const TrellisMatrix& matrix) { return matrix.rows * matrix.columns * matrix.code->bits / 8; }
int64_t bytes_of(const IntMatrix& matrix) { return matrix.rows * matrix.bytes_of(matrix.columns); }

// How many items a matrix becomes, where `total` bytes are read side by side. Few: with each a stream of memory begins
// anew (a token's experts in quarters, to end together, went slower). More threads need more items.
int64_t pieces_of(int64_t num_bytes, int64_t total, int64_t panels) {
    const int64_t threads = num_threads(), each = total / (threads <= 2 ? threads : 3 * threads);
    return std::min(panels, 1 + (num_bytes - 1) / std::clamp<int64_t>(each, kLeastItemBytes, kItemBytes));
}

// A matrix as items: runs of rows, each whole or in two halves.
struct Cut {
    int64_t runs;
    int halves;
    int64_t first_item, first_run, first_sum;  // where its own begin among all items, runs and sums of second halves
};

// Several products, the items of one after those of another.
template <class Matrix>
void multiply_each(const Matrix* matrices, const Activations* x, float* const* y, int64_t count) {
    static thread_local std::vector<Cut> cut_memory;
    static thread_local std::vector<uint8_t> done_memory;
    cut_memory.clear();
    int64_t total = 0, items = 0, runs = 0, sums = 0;
    for (int64_t i = 0; i < count; ++i) total += bytes_of(matrices[i]);
    const auto panels_of = [&](int64_t i) { return (matrices[i].rows + kPanelRows - 1) / kPanelRows; };
    for (int64_t i = 0; i < count; ++i) {
        const int64_t pieces = pieces_of(bytes_of(matrices[i]), total, panels_of(i));
        const int halves = pieces > 1 && is_cut_by_halves(matrices[i], x[i].tokens) ? kHalves : 1;
        const Cut cut = {(pieces + halves - 1) / halves, halves, items, runs, sums};
        cut_memory.push_back(cut);
        items += cut.runs * halves;
        runs += cut.runs;
        if (halves > 1) sums += matrices[i].rows;
    }
    done_memory.assign(size_t(runs), 0);
    // This thread's, also inside the bodies.
    const Cut* const cuts = cut_memory.data();
    uint8_t* const done = done_memory.data();
    float* const second_halves = scratch<float, 2>(sums);
    parallel(items, [&, cuts, done, second_halves](int64_t item) {
        const auto comes_after = [](int64_t value, const Cut& cut) { return value < cut.first_item; };
        const int64_t i = std::upper_bound(cuts, cuts + count, item, comes_after) - cuts - 1;
        const Matrix& matrix = matrices[i];
        const Cut& cut = cuts[i];
        const int64_t run = (item - cut.first_item) / cut.halves, panels = panels_of(i);
        const int64_t first = panels * run / cut.runs * kPanelRows;
        const int64_t rows = std::min(matrix.rows, panels * (run + 1) / cut.runs * kPanelRows) - first;
        float* out = y[i] + first;
        if (cut.halves == 1) return multiply_rows(matrix, x[i], first, rows, out, matrix.rows);
        if constexpr (std::is_same_v<Matrix, TrellisMatrix>) {
            float* second = second_halves + cut.first_sum + first;
            const int half = (item - cut.first_item) % cut.halves;
            for (int64_t row = 0; row < rows; row += run_of(1))
                multiply_half(matrix, x[i], half, first + row, std::min(rows - row, run_of(1)),
                              (half ? second : out) + row, 0);
            // Whoever ends later finds the other's sums.
            if (std::atomic_ref(done[cut.first_run + run]).fetch_add(1, std::memory_order_acq_rel))
                join_halves(matrix, first, rows, second, out);
        }
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

void open_row(const IntMatrix& matrix, int64_t row, float* out) {
    const uint8_t* codes = matrix.at(row, 0);
    const float scale = half_to_float(matrix.row_scale[row]);
    for (int64_t k = 0; k < matrix.columns; ++k) out[k] = float(level_at(matrix, codes, k)) * scale;
}

void linear_each(const TrellisMatrix* matrices, const Activations* x, float* const* y, int64_t count) {
    multiply_each(matrices, x, y, count);
}

void linear(const TrellisMatrix& matrix, const Activations& x, float* y) { multiply_each(&matrix, &x, &y, 1); }
void linear(const IntMatrix& matrix, const Activations& x, float* y) { multiply_each(&matrix, &x, &y, 1); }

}  // namespace duomo
