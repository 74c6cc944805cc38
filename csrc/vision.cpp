// How patches, frames and heads are cut up. Nothing here knows an instruction set.
#include "vision.hpp"

#include <algorithm>
#include <cmath>

#include "cpu.hpp"
#include "pool.hpp"

namespace duomo {
namespace {

// Patches that go through two matrices together: their widest state, 512 x 5120 floats, stays in the third-level cache,
// and packing a panel of weights anew for each 512 costs 1 % of multiplying it.
constexpr int64_t kChunk = 512;
constexpr int64_t kQueries = 60;  // of an item: whole tiles of 6 and of 5
constexpr int64_t kKeys = 256;    // between two updates of the sums
constexpr float kLog2e = 1.44269504f;

float* grown(std::vector<float>& memory, int64_t count) {
    if (int64_t(memory.size()) < count) memory.resize(size_t(count));
    return memory.data();
}

// x[rows][columns] through a matrix: y[rows][matrix.rows], without the bias.
void multiply(VisionScratch& scratch, const float* x, int64_t rows, const VisionLinear& layer, float* y) {
    const IntMatrix& matrix = layer.rows->matrix;
    linear(matrix, scratch.activations.fill(x, layer.rows->signs_or_null(), rows, matrix.columns, matrix.block), y);
}

// The chunk's rows of `hidden`, normed and through a matrix.
float* norm_multiply(VisionScratch& scratch, const float* hidden, int64_t rows, const VisionNorm& norm,
                     const VisionLinear& layer) {
    const int64_t width = layer.rows->matrix.columns;
    float* normed = grown(scratch.normed, std::min(kChunk, rows) * width);
    float* wide = grown(scratch.wide, std::min(kChunk, rows) * layer.rows->matrix.rows);
    parallel(rows, [&](int64_t t) {
        vision_kernels().layernorm(hidden + t * width, norm.weight, norm.bias, norm.eps, width, normed + t * width);
    });
    multiply(scratch, normed, rows, layer, wide);
    return wide;
}

// hidden += x W^T + b for a chunk; `normed` is free by now and takes the product.
void add_product(VisionScratch& scratch, const float* x, int64_t rows, const VisionLinear& layer, float* hidden) {
    const int64_t width = layer.rows->matrix.rows;
    float* product = grown(scratch.normed, rows * width);
    multiply(scratch, x, rows, layer, product);
    parallel(rows, [&](int64_t t) {
        vision_kernels().add_residual(product + t * width, layer.bias, width, hidden + t * width);
    });
}

template <class Body>
void in_chunks(int64_t patches, Body&& body) {
    for (int64_t first = 0; first < patches; first += kChunk) body(first, std::min(kChunk, patches - first));
}

}  // namespace

const VisionKernels& vision_kernels() {
    switch (current_isa()) {
        case Isa::avx512: return vision_avx512 ? *vision_avx512 : vision_portable;
        case Isa::avx2: return vision_avx2 ? *vision_avx2 : vision_portable;
        default: return vision_portable;
    }
}

void VisionScratch::lay_out(const Frames& frames, const Heads& heads) {
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

void VisionScratch::place_query(int64_t patch, const float* x, const float* bias, const float* cos, const float* sin) {
    const int64_t width = heads_.head_dim;
    const float scale = kLog2e / std::sqrt(float(width));
    for (int64_t head = 0; head < heads_.count; ++head)
        vision_kernels().narrow(x + head * width, bias ? bias + head * width : nullptr, cos, sin, scale, width,
                                query_.data() + (head * num_patches_ + patch) * width);
}

void VisionScratch::place_key(int64_t patch, const float* x, const float* bias, const float* cos, const float* sin) {
    const int64_t width = heads_.head_dim, slot = slot_[size_t(patch)];
    uint16_t row[128];
    for (int64_t head = 0; head < heads_.count; ++head) {
        vision_kernels().narrow(x + head * width, bias ? bias + head * width : nullptr, cos, sin, 1.0f, width, row);
        uint16_t* panel = key_.data() + (head * num_slots_ + slot / kKeyPanel * kKeyPanel) * width;
        for (int64_t pair = 0; pair < width / 2; ++pair)
            std::copy_n(row + 2 * pair, 2, panel + (pair * kKeyPanel + slot % kKeyPanel) * 2);
    }
}

void VisionScratch::place_value(int64_t patch, const float* x, const float* bias) {
    const int64_t width = heads_.head_dim, slot = slot_[size_t(patch)];
    uint16_t row[128];
    for (int64_t head = 0; head < heads_.count; ++head) {
        vision_kernels().narrow(x + head * width, bias ? bias + head * width : nullptr, nullptr, nullptr, 1.0f, width,
                                row);
        uint16_t* pairs = value_.data() + (head * num_slots_ + slot / 2 * 2) * width + slot % 2;
        for (int64_t h = 0; h < width; ++h) pairs[2 * h] = row[h];
    }
}

void VisionScratch::attend_rows(int64_t frame, int64_t head, int64_t first, int64_t rows, float* out) const {
    const VisionKernels& kernels = vision_kernels();
    const int64_t width = heads_.head_dim, length = length_[size_t(frame)], patch = first_patch_[size_t(frame)] + first;
    const int64_t base = (head * num_slots_ + first_slot_[size_t(frame)]) * width;
    alignas(64) static thread_local float scores[kQueries * kKeys], sums[kQueries * 128];
    alignas(64) static thread_local uint16_t weights[kQueries * kKeys];
    float most[kQueries], total[kQueries], factor[kQueries];
    std::fill_n(most, rows, -1e30f);  // finite, so that the first factor is a zero and no NaN
    std::fill_n(total, rows, 0.0f);
    std::fill_n(sums, rows * width, 0.0f);
    const uint16_t* query = query_.data() + (head * num_patches_ + patch) * width;
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

void VisionScratch::attend(float* out) {
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

void frame_attention(VisionScratch& scratch, const float* query, const float* key, const float* value,
                     const Frames& frames, const Heads& heads, float* out) {
    scratch.lay_out(frames, heads);
    int64_t patches = 0;
    for (int64_t i = 0; i < frames.count; ++i) patches += frames.lengths[i];
    const int64_t width = heads.count * heads.head_dim;
    parallel(patches, [&](int64_t p) {
        scratch.place_query(p, query + p * width, nullptr, nullptr, nullptr);
        scratch.place_key(p, key + p * width, nullptr, nullptr, nullptr);
        scratch.place_value(p, value + p * width, nullptr);
    });
    scratch.attend(out);
}

void vision_attention(VisionScratch& scratch, float* hidden, const VisionNorm& norm, const VisionLinear& qkv,
                      const VisionLinear& out, const float* cos, const float* sin, const Frames& frames,
                      const Heads& heads) {
    scratch.lay_out(frames, heads);
    int64_t patches = 0;
    for (int64_t i = 0; i < frames.count; ++i) patches += frames.lengths[i];
    const int64_t width = heads.count * heads.head_dim, half = heads.head_dim / 2;
    in_chunks(patches, [&](int64_t first, int64_t rows) {
        const float* wide = norm_multiply(scratch, hidden + first * width, rows, norm, qkv);
        parallel(rows, [&](int64_t t) {
            const float *x = wide + t * 3 * width, *c = cos + (first + t) * half, *s = sin + (first + t) * half;
            scratch.place_query(first + t, x, qkv.bias, c, s);
            scratch.place_key(first + t, x + width, qkv.bias + width, c, s);
            scratch.place_value(first + t, x + 2 * width, qkv.bias + 2 * width);
        });
    });
    float* attended = grown(scratch.attended, patches * width);
    scratch.attend(attended);
    in_chunks(patches, [&](int64_t first, int64_t rows) {
        add_product(scratch, attended + first * width, rows, out, hidden + first * width);
    });
}

void vision_mlp(VisionScratch& scratch, float* hidden, int64_t patches, const VisionNorm& norm, const VisionLinear& fc1,
                const VisionLinear& fc2) {
    const int64_t width = fc1.rows->matrix.columns, size = fc1.rows->matrix.rows;
    in_chunks(patches, [&](int64_t first, int64_t rows) {
        float* wide = norm_multiply(scratch, hidden + first * width, rows, norm, fc1);
        parallel(rows, [&](int64_t t) { vision_kernels().add_gelu(fc1.bias, size, wide + t * size); });
        add_product(scratch, wide, rows, fc2, hidden + first * width);
    });
}

}  // namespace duomo
