// How patches, frames and heads are cut up. Nothing here knows an instruction set.
#include "vision.hpp"

#include <algorithm>
#include <cmath>

#include "cpu.hpp"
#include "pool.hpp"
#include "rotate.hpp"

namespace duomo {
namespace {

// Patches that go through two matrices together: their widest state, 512 x 5120 floats, stays in the third-level cache,
// and packing a panel of weights anew for each 512 costs 1 % of multiplying it.
constexpr int64_t kChunk = 512;
constexpr int64_t kQueries = 60;  // of an item: whole tiles of 6 and of 5
constexpr int64_t kKeys = 256;    // between two updates of the sums
constexpr float kLog2e = 1.44269504f;
template <class Element>
constexpr int64_t kTogether = 4 / int64_t(sizeof(Element));  // columns or keys that fill a lane

// x[rows][columns] through a matrix: y[rows][matrix.rows], without the bias.
void multiply(VisionScratch& scratch, const float* x, int64_t rows, const IntRows& own, float* y) {
    const IntMatrix& matrix = own.matrix;
    linear(matrix, scratch.activations.fill(x, own.signs_or_null(), rows, matrix.columns, matrix.block), y);
}

void multiply(const float* x, int64_t rows, const DenseBank& matrix, float* y) {
    const DenseProduct product = product_of(matrix, 0, x, nullptr, rows, y);
    multiply_each(&product, 1);
}

void multiply(VisionScratch&, const float* x, int64_t rows, const DenseBank& matrix, float* y) {
    multiply(x, rows, matrix, y);
}

int64_t rows_of(const IntRows& own) { return own.matrix.rows; }
int64_t rows_of(const DenseBank& own) { return own.rows; }
int64_t columns_of(const IntRows& own) { return own.matrix.columns; }
int64_t columns_of(const DenseBank& own) { return own.columns; }
bool rounds(const IntRows&) { return true; }
bool rounds(const DenseBank& own) { return own.form == DenseForm::rounded; }

template <class Element>
const FrameKernels<Element>& frame_kernels() {
    if constexpr (sizeof(Element) == 2) return vision_kernels().rounded;
    else return vision_kernels().wide;
}

void norm_rows(const float* x, int64_t rows, int64_t width, const VisionNorm& norm, float* out) {
    parallel_rows(rows, [&](int64_t t) {
        vision_kernels().layernorm(x + t * width, norm.weight, norm.bias, norm.eps, width, out + t * width);
    });
}

// The chunk's rows of `hidden`, normed and through a matrix.
template <class Matrix>
float* norm_multiply(VisionScratch& scratch, const float* hidden, int64_t rows, const VisionNorm& norm,
                     const VisionLinear<Matrix>& layer) {
    const int64_t width = columns_of(*layer.matrix);
    float* normed = grown(scratch.normed, rows * width);
    float* wide = grown(scratch.wide, rows * rows_of(*layer.matrix));
    norm_rows(hidden, rows, width, norm, normed);
    multiply(scratch, normed, rows, *layer.matrix, wide);
    return wide;
}

// hidden += x W^T + b for a chunk; `normed` is free by now and takes the product.
template <class Matrix>
void add_product(VisionScratch& scratch, const float* x, int64_t rows, const VisionLinear<Matrix>& layer,
                 float* hidden) {
    const int64_t width = rows_of(*layer.matrix);
    float* product = grown(scratch.normed, rows * width);
    multiply(scratch, x, rows, *layer.matrix, product);
    parallel_rows(rows, [&](int64_t t) {
        vision_kernels().add_residual(product + t * width, layer.bias, width, hidden + t * width);
    });
}

template <class Body>
void in_chunks(int64_t patches, Body&& body) {
    for (int64_t first = 0; first < patches; first += kChunk) body(first, std::min(kChunk, patches - first));
}

// A stage of the resampler for a chunk.
void merge(const VisionMerge& own, const float* x, int64_t rows, Memory<float>& memory, float* out) {
    const int64_t size = own.fc1->rows, width = own.fc2->rows;
    float* wide = grown(memory, rows * size);
    multiply(x, rows, *own.fc1, wide);
    parallel_rows(rows, [&](int64_t t) { vision_kernels().gelu(size, wide + t * size); });
    multiply(wide, rows, *own.fc2, out);
    norm_rows(out, rows, width, own.norm, out);
}

int64_t total(const Frames& frames) {
    int64_t patches = 0;
    for (int64_t i = 0; i < frames.count; ++i) patches += frames.lengths[i];
    return patches;
}

template <class Element, class Matrix>
void attend_block(VisionScratch& scratch, FrameAttention<Element>& own, float* hidden, const VisionBlock<Matrix>& block,
                  const float* cos, const float* sin, const Frames& frames, const Heads& heads) {
    own.lay_out(frames, heads);
    const int64_t patches = total(frames), width = heads.count * heads.head_dim, half = heads.head_dim / 2;
    const float* bias = block.qkv.bias;
    in_chunks(patches, [&](int64_t first, int64_t rows) {
        const float* wide = norm_multiply(scratch, hidden + first * width, rows, block.norm1, block.qkv);
        parallel_rows(rows, [&](int64_t t) {
            const float *x = wide + t * 3 * width, *c = cos + (first + t) * half, *s = sin + (first + t) * half;
            own.place_query(first + t, x, bias, c, s);
            own.place_key(first + t, x + width, bias + width, c, s);
            own.place_value(first + t, x + 2 * width, bias + 2 * width);
        });
    });
    float* attended = grown(scratch.attended, patches * width);
    own.attend(attended);
    in_chunks(patches, [&](int64_t first, int64_t rows) {
        add_product(scratch, attended + first * width, rows, block.out, hidden + first * width);
    });
}

template <class Element>
void attend_frames(const float* query, const float* key, const float* value, const Frames& frames, const Heads& heads,
                   float* out) {
    FrameAttention<Element> own;
    own.lay_out(frames, heads);
    const int64_t width = heads.count * heads.head_dim;
    parallel_rows(total(frames), [&](int64_t p) {
        own.place_query(p, query + p * width, nullptr, nullptr, nullptr);
        own.place_key(p, key + p * width, nullptr, nullptr, nullptr);
        own.place_value(p, value + p * width, nullptr);
    });
    own.attend(out);
}

}  // namespace

const VisionKernels& vision_kernels() {
    switch (current_isa()) {
        case Isa::avx512: return vision_avx512 ? *vision_avx512 : vision_portable;
        case Isa::avx2: return vision_avx2 ? *vision_avx2 : vision_portable;
        default: return vision_portable;
    }
}

template <class Element>
void FrameAttention<Element>::lay_out(const Frames& frames, const Heads& heads) {
    heads_ = heads;
    num_patches_ = num_slots_ = 0;
    length_.assign(frames.lengths, frames.lengths + frames.count);
    first_patch_.clear();
    first_slot_.clear();
    slot_.clear();
    for (const int64_t length : length_) {
        first_patch_.push_back(num_patches_);
        first_slot_.push_back(num_slots_);
        for (int64_t i = 0; i < length; ++i) slot_.push_back(num_slots_ + i);
        num_patches_ += length;
        num_slots_ += (length + kKeyPanel - 1) / kKeyPanel * kKeyPanel;
    }
    query_.resize(size_t(heads.count * num_patches_ * heads.head_dim));
    // What lies between a frame's last key and the end of its panel is never written: it must be finite.
    key_.assign(size_t(heads.count * num_slots_ * heads.head_dim), 0);
    value_.assign(size_t(heads.count * num_slots_ * heads.head_dim), 0);
}

template <class Element>
void FrameAttention<Element>::place_query(int64_t patch, const float* x, const float* bias, const float* cos,
                                          const float* sin) {
    const FrameKernels<Element>& kernels = frame_kernels<Element>();
    const int64_t width = heads_.head_dim;
    const float scale = kLog2e / std::sqrt(float(width));
    for (int64_t head = 0; head < heads_.count; ++head)
        kernels.narrow(x + head * width, bias ? bias + head * width : nullptr, cos, sin, scale, width,
                       query_.data() + (head * num_patches_ + patch) * width);
}

template <class Element>
void FrameAttention<Element>::place_key(int64_t patch, const float* x, const float* bias, const float* cos,
                                        const float* sin) {
    const FrameKernels<Element>& kernels = frame_kernels<Element>();
    const int64_t width = heads_.head_dim, slot = slot_[size_t(patch)];
    constexpr int64_t together = kTogether<Element>;
    Element row[128];
    for (int64_t head = 0; head < heads_.count; ++head) {
        kernels.narrow(x + head * width, bias ? bias + head * width : nullptr, cos, sin, 1.0f, width, row);
        Element* panel = key_.data() + (head * num_slots_ + slot / kKeyPanel * kKeyPanel) * width;
        for (int64_t h = 0; h < width; h += together)
            std::copy_n(row + h, together, panel + h * kKeyPanel + slot % kKeyPanel * together);
    }
}

template <class Element>
void FrameAttention<Element>::place_value(int64_t patch, const float* x, const float* bias) {
    const FrameKernels<Element>& kernels = frame_kernels<Element>();
    const int64_t width = heads_.head_dim, slot = slot_[size_t(patch)];
    constexpr int64_t together = kTogether<Element>;
    Element row[128];
    for (int64_t head = 0; head < heads_.count; ++head) {
        kernels.narrow(x + head * width, bias ? bias + head * width : nullptr, nullptr, nullptr, 1.0f, width, row);
        Element* values = value_.data() + (head * num_slots_ + slot / together * together) * width + slot % together;
        for (int64_t h = 0; h < width; ++h) values[together * h] = row[h];
    }
}

template <class Element>
void FrameAttention<Element>::attend_rows(int64_t frame, int64_t head, int64_t first, int64_t rows, float* out) const {
    const FrameKernels<Element>& kernels = frame_kernels<Element>();
    const int64_t width = heads_.head_dim, length = length_[size_t(frame)], patch = first_patch_[size_t(frame)] + first;
    const int64_t base = (head * num_slots_ + first_slot_[size_t(frame)]) * width;
    alignas(64) static thread_local float scores[kQueries * kKeys], sums[kQueries * 128];
    alignas(64) static thread_local Element weights[kQueries * kKeys];
    float most[kQueries], total[kQueries], factor[kQueries];
    std::fill_n(most, rows, -1e30f);  // finite, so that the first factor is no NaN
    std::fill_n(total, rows, 0.0f);
    std::fill_n(sums, rows * width, 0.0f);
    const Element* query = query_.data() + (head * num_patches_ + patch) * width;
    for (int64_t u = 0; u < length; u += kKeys) {
        const int64_t count = std::min(kKeys, length - u), padded = (count + kKeyPanel - 1) / kKeyPanel * kKeyPanel;
        for (int64_t panel = 0; panel < padded; panel += kKeyPanel)
            kernels.score(query, rows, key_.data() + base + (u + panel) * width, width, scores + panel, kKeys);
        for (int64_t r = 0; r < rows; ++r)
            factor[r] = kernels.soften(scores + r * kKeys, count, padded, most + r, total + r, weights + r * kKeys);
        kernels.gather(weights, kKeys, factor, rows, value_.data() + base + u * width, padded, width, sums);
    }
    for (int64_t r = 0; r < rows; ++r) {
        float* row = out + ((patch + r) * heads_.count + head) * width;
        const float inverse = 1.0f / total[r];
        for (int64_t h = 0; h < width; ++h) row[h] = sums[r * width + h] * inverse;
    }
}

template <class Element>
void FrameAttention<Element>::attend(float* out) {
    std::vector<int64_t> first_item;  // of a frame; a head's items stand together, so its keys stay in the cache
    int64_t items = 0;
    for (const int64_t length : length_) {
        first_item.push_back(items);
        items += (length + kQueries - 1) / kQueries * heads_.count;
    }
    parallel(items, [&](int64_t item) {
        const int64_t frame = std::upper_bound(first_item.begin(), first_item.end(), item) - first_item.begin() - 1;
        const int64_t length = length_[size_t(frame)], runs = (length + kQueries - 1) / kQueries;
        const int64_t index = item - first_item[size_t(frame)], first = index % runs * kQueries;
        attend_rows(frame, index / runs, first, std::min(kQueries, length - first), out);
    });
}

template class FrameAttention<uint16_t>;
template class FrameAttention<float>;

void frame_attention(const float* query, const float* key, const float* value, const Frames& frames, const Heads& heads,
                     bool is_rounded, float* out) {
    (is_rounded ? attend_frames<uint16_t> : attend_frames<float>)(query, key, value, frames, heads, out);
}

template <class Matrix>
void vision_attention(VisionScratch& scratch, float* hidden, const VisionBlock<Matrix>& block, const float* cos,
                      const float* sin, const Frames& frames, const Heads& heads) {
    if (rounds(*block.qkv.matrix))
        attend_block(scratch, scratch.rounded_attention, hidden, block, cos, sin, frames, heads);
    else attend_block(scratch, scratch.wide_attention, hidden, block, cos, sin, frames, heads);
}

template <class Matrix>
void vision_mlp(VisionScratch& scratch, float* hidden, int64_t patches, const VisionBlock<Matrix>& block) {
    const int64_t width = columns_of(*block.fc1.matrix), size = rows_of(*block.fc1.matrix);
    in_chunks(patches, [&](int64_t first, int64_t rows) {
        float* wide = norm_multiply(scratch, hidden + first * width, rows, block.norm2, block.fc1);
        parallel_rows(rows, [&](int64_t t) { vision_kernels().add_gelu(block.fc1.bias, size, wide + t * size); });
        add_product(scratch, wide, rows, block.fc2, hidden + first * width);
    });
}

template <class Matrix>
void run_blocks(const VisionStack<Matrix>& stack, float* hidden, const float* cos, const float* sin,
                const Frames& frames) {
    VisionScratch scratch;
    for (const VisionBlock<Matrix>& block : stack.blocks) {
        vision_attention(scratch, hidden, block, cos, sin, frames, stack.heads);
        vision_mlp(scratch, hidden, total(frames), block);
    }
}

void run_tower(const VisionStack<DenseBank>& stack, const VisionEnds& ends, const float* patches, const float* cos,
               const float* sin, const Frames& frames, float* out) {
    multiply(patches, total(frames), *ends.embed, out);
    run_blocks(stack, out, cos, sin, frames);
    norm_rows(out, total(frames), ends.embed->rows, ends.norm, out);
}

void run_resampler(const Resampler& own, const float* blocks, int64_t num_blocks, const int64_t* earlier,
                   const int64_t* later, int64_t tokens, float* out) {
    const int64_t width = own.spatial.fc2->rows;
    Memory<float> wide, merged(size_t(num_blocks * width)), pairs, joined;
    in_chunks(num_blocks, [&](int64_t first, int64_t rows) {
        merge(own.spatial, blocks + first * own.spatial.fc1->columns, rows, wide, merged.data() + first * width);
    });
    in_chunks(tokens, [&](int64_t first, int64_t rows) {
        float *pair = grown(pairs, rows * 2 * width), *middle = grown(joined, rows * own.temporal.fc2->rows);
        float* token = out + first * own.project->rows;
        parallel_rows(rows, [&](int64_t t) {
            std::copy_n(merged.data() + earlier[first + t] * width, width, pair + 2 * t * width);
            std::copy_n(merged.data() + later[first + t] * width, width, pair + (2 * t + 1) * width);
        });
        merge(own.temporal, pair, rows, wide, middle);
        multiply(middle, rows, *own.project, token);
        parallel_rows(rows, [&](int64_t t) {
            float* row = token + t * own.project->rows;
            rotate_kernels().rmsnorm(row, own.norm, own.norm_eps, own.project->rows, row);
        });
    });
}

template void vision_attention(VisionScratch&, float*, const VisionBlock<IntRows>&, const float*, const float*,
                               const Frames&, const Heads&);
template void vision_attention(VisionScratch&, float*, const VisionBlock<DenseBank>&, const float*, const float*,
                               const Frames&, const Heads&);
template void vision_mlp(VisionScratch&, float*, int64_t, const VisionBlock<IntRows>&);
template void vision_mlp(VisionScratch&, float*, int64_t, const VisionBlock<DenseBank>&);
template void run_blocks(const VisionStack<IntRows>&, float*, const float*, const float*, const Frames&);
template void run_blocks(const VisionStack<DenseBank>&, float*, const float*, const float*, const Frames&);

}  // namespace duomo
