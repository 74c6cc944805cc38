// The vision tower's blocks over integers: LayerNorm, attention within frames, the MLP, both with their residual.
//
// Attention never builds the score matrix: an item is 60 queries of one head of one frame, and walks over its keys 256
// at a time with a running maximum (online softmax): 60 KB of scores, whatever the picture. Queries (with
// H**-0.5 * log2(e) multiplied in), keys, values and unnormalised weights are bf16, sums are fp32: two bf16 products
// and a sum are one vdpbf16ps. So the instruction sets agree to bf16's rounding, not bit for bit, as the rest of csrc
// does; within one of them a patch's bits depend on its own frame alone, not on threads or on what else is encoded.
//
// Keys lie in panels of 64, [H/2][64 keys][2], values in pairs of keys, [keys/2][H][2]: the operand order of vdpbf16ps.
// A frame is filled up to whole panels with zeros.
#pragma once

#include <cstdint>
#include <vector>

#include "experts.hpp"

namespace duomo {

constexpr int64_t kKeyPanel = 64;

struct VisionKernels {
    // out = weight * (x - mean) / sqrt(variance + eps) + bias, one row.
    void (*layernorm)(const float* x, const float* weight, const float* bias, float eps, int64_t count, float* out);
    // x = quick_gelu(x + bias), which is y * sigmoid(1.702 y).
    void (*add_gelu)(const float* bias, int64_t count, float* x);
    // sum += x + bias
    void (*add_residual)(const float* x, const float* bias, int64_t count, float* sum);
    // One head as bf16: x + bias (null: none), halves turned by cos and sin (null: not turned), times scale.
    void (*narrow)(const float* x, const float* bias, const float* cos, const float* sin, float scale, int64_t head_dim,
                   uint16_t* out);
    // scores[r * stride + key] = query r . key, for 64 keys of a panel.
    void (*score)(const uint16_t* query, int64_t rows, const uint16_t* panel, int64_t head_dim, float* scores,
                  int64_t stride);
    // One row's next keys: raises `most` to their maximum, writes 2^(score - most) as bf16 (zero from `count` to
    // `padded`, whole panels), updates `total`, returns what earlier sums must be multiplied by.
    float (*soften)(const float* scores, int64_t count, int64_t padded, float* most, float* total, uint16_t* weights);
    // out[r] = out[r] * factor[r] + sum over `keys` of weights[r * stride + key] * value[key]
    void (*gather)(const uint16_t* weights, int64_t stride, const float* factor, int64_t rows, const uint16_t* values,
                   int64_t keys, int64_t head_dim, float* out);
};

const VisionKernels& vision_kernels();  // of current_isa()
extern const VisionKernels vision_portable;
extern const VisionKernels* const vision_avx2;
extern const VisionKernels* const vision_avx512;

struct Frames {
    const int64_t* lengths;  // patches of each frame
    int64_t count;
};

struct Heads {
    int64_t count, head_dim;  // head_dim a multiple of 16, at most 128
};

struct VisionNorm {
    const float *weight, *bias;
    float eps;
};

struct VisionLinear {
    const IntRows* rows;
    const float* bias;
};

// Memory of one pass through the tower: it grows to what the pictures need, and goes with its owner.
class VisionScratch {
public:
    // Where each patch lies, and room for all queries, keys and values as bf16. Zeroes what fills frames up.
    void lay_out(const Frames&, const Heads&);
    // One patch's query, key or value, all heads of it.
    void place_query(int64_t patch, const float* x, const float* bias, const float* cos, const float* sin);
    void place_key(int64_t patch, const float* x, const float* bias, const float* cos, const float* sin);
    void place_value(int64_t patch, const float* x, const float* bias);
    // Attention of everything placed: out[P][N * H].
    void attend(float* out);

    ActivationBuffer activations;
    std::vector<float> normed, wide, attended;

private:
    void attend_rows(int64_t frame, int64_t head, int64_t first, int64_t rows, float* out) const;

    Heads heads_{};
    int64_t num_patches_ = 0, num_slots_ = 0;            // slots: patches with every frame filled up
    std::vector<int64_t> length_, first_patch_, first_slot_;  // of a frame
    std::vector<int64_t> slot_;                          // of a patch
    std::vector<uint16_t> query_, key_, value_;          // [N][P][H]; [N][slots/64] panels; [N][slots/2] pairs
};

// query, key, value and out are fp32 [P][N][H]; attention is full within a frame.
void frame_attention(VisionScratch&, const float* query, const float* key, const float* value, const Frames&,
                     const Heads&, float* out);

// hidden[P][C] += out(attend(qkv(norm(hidden)))); cos and sin are [P][H/2], qkv's rows are q, k, v.
void vision_attention(VisionScratch&, float* hidden, const VisionNorm&, const VisionLinear& qkv,
                      const VisionLinear& out, const float* cos, const float* sin, const Frames&, const Heads&);

// hidden[P][C] += fc2(quick_gelu(fc1(norm(hidden))))
void vision_mlp(VisionScratch&, float* hidden, int64_t patches, const VisionNorm&, const VisionLinear& fc1,
                const VisionLinear& fc2);

}  // namespace duomo
