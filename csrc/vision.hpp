// The vision tower: LayerNorm, attention within frames, the MLP, both with their residual, block after block. `Matrix`
// is what a matrix is stored as: IntRows or DenseBank.
//
// Attention never builds the score matrix: an item is 60 queries of one head of one frame, and walks over its keys 256
// at a time with a running maximum (online softmax): 60 KB of scores, whatever the picture. Queries have
// H**-0.5 * log2(e) multiplied in. They, keys, values and unnormalised weights are bf16 where products round their
// inputs (integers, rounded panels), and fp32 where they do not. Sums are fp32, in one stated order: over pairs of
// columns or keys, of each the odd one first, as vdpbf16ps adds. So the instruction sets give the same bits, but that
// vdpbf16ps takes numbers below 2^-126 for zero; and a patch's bits depend on its own frame alone, not on threads or on
// what else is encoded.
//
// Keys lie in panels of 64, [H/2][64 keys][2], values in pairs of keys, [keys/2][H][2]: the operand order of vdpbf16ps.
// In fp32 there are no pairs: [H][64 keys] and [keys][H]. A frame is filled up to whole panels with zeros.
#pragma once

#include <cstdint>
#include <vector>

#include "dense.hpp"
#include "experts.hpp"
#include "memory.hpp"

namespace duomo {

constexpr int64_t kKeyPanel = 64;

// What attention does with an element, bf16 or fp32.
template <class Element>
struct FrameKernels {
    // One head: x + bias (null: none), halves turned by cos and sin (null: not turned), times scale.
    void (*narrow)(const float* x, const float* bias, const float* cos, const float* sin, float scale, int64_t head_dim,
                   Element* out);
    // scores[r * stride + key] = query r . key, for 64 keys of a panel.
    void (*score)(const Element* query, int64_t rows, const Element* panel, int64_t head_dim, float* scores,
                  int64_t stride);
    // One row's next keys: raises `most` to their maximum, writes 2^(score - most), at least 2^-126 (zero from `count`
    // to `padded`, whole panels), updates `total`, returns what earlier sums must be multiplied by.
    float (*soften)(const float* scores, int64_t count, int64_t padded, float* most, float* total, Element* weights);
    // out[r] = out[r] * factor[r] + sum over `keys` of weights[r * stride + key] * value[key]
    void (*gather)(const Element* weights, int64_t stride, const float* factor, int64_t rows, const Element* values,
                   int64_t keys, int64_t head_dim, float* out);
};

struct VisionKernels {
    // out = weight * (x - mean) / sqrt(variance + eps) + bias, one row.
    void (*layernorm)(const float* x, const float* weight, const float* bias, float eps, int64_t count, float* out);
    // x = quick_gelu(x + bias), which is y * sigmoid(1.702 y).
    void (*add_gelu)(const float* bias, int64_t count, float* x);
    // x = gelu(x), the one with erf
    void (*gelu)(int64_t count, float* x);
    // sum += x + bias
    void (*add_residual)(const float* x, const float* bias, int64_t count, float* sum);
    FrameKernels<uint16_t> rounded;
    FrameKernels<float> wide;
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

template <class Matrix>
struct VisionLinear {
    const Matrix* matrix;  // a dense one has no bias of its own
    const float* bias;
};

template <class Matrix>
struct VisionBlock {
    VisionNorm norm1;
    VisionLinear<Matrix> qkv, out;  // qkv's rows are q, k, v
    VisionNorm norm2;
    VisionLinear<Matrix> fc1, fc2;
};

template <class Matrix>
struct VisionStack {
    std::vector<VisionBlock<Matrix>> blocks;
    Heads heads;
};

// What stands at both ends of a plain stack: the embedding of patches, and the last norm.
struct VisionEnds {
    const DenseBank* embed = nullptr;  // [C][X]
    VisionNorm norm{};
};

// One stage of a resampler: linear, gelu, linear, norm. Its matrices have their biases.
struct VisionMerge {
    const DenseBank *fc1, *fc2;
    VisionNorm norm;
};

// A plain resampler: neighbours of one frame, then those of two frames, then the width of the language model.
struct Resampler {
    VisionMerge spatial, temporal;
    const DenseBank* project;
    const float* norm;  // an RMSNorm's
    float norm_eps;
};

// Queries, keys and values of all patches, and attention among those of a frame.
template <class Element>
class FrameAttention {
public:
    // Where each patch lies, and room for everything. Zeroes what fills frames up.
    void lay_out(const Frames&, const Heads&);
    // One patch's query, key or value, all heads of it.
    void place_query(int64_t patch, const float* x, const float* bias, const float* cos, const float* sin);
    void place_key(int64_t patch, const float* x, const float* bias, const float* cos, const float* sin);
    void place_value(int64_t patch, const float* x, const float* bias);
    // Attention of everything placed: out[P][N * H].
    void attend(float* out);

private:
    void attend_rows(int64_t frame, int64_t head, int64_t first, int64_t rows, float* out) const;

    Heads heads_{};
    int64_t num_patches_ = 0, num_slots_ = 0;                 // slots: patches with every frame filled up
    std::vector<int64_t> length_, first_patch_, first_slot_;  // of a frame
    std::vector<int64_t> slot_;                               // of a patch
    std::vector<Element> query_, key_, value_;                // [N][P][H]; [N][slots/64] panels; [N][slots] values
};

// Memory of one pass through the tower: it grows to what the pictures need, and goes with its owner.
struct VisionScratch {
    ActivationBuffer activations;
    Memory<float> normed, wide, attended;
    FrameAttention<uint16_t> rounded_attention;
    FrameAttention<float> wide_attention;
};

// query, key, value and out are fp32 [P][N][H]; attention is full within a frame, over bf16 where `is_rounded`.
void frame_attention(const float* query, const float* key, const float* value, const Frames&, const Heads&,
                     bool is_rounded, float* out);

// hidden[P][C] += out(attend(qkv(norm1(hidden)))); cos and sin are [P][H/2].
template <class Matrix>
void vision_attention(VisionScratch&, float* hidden, const VisionBlock<Matrix>&, const float* cos, const float* sin,
                      const Frames&, const Heads&);

// hidden[P][C] += fc2(quick_gelu(fc1(norm2(hidden))))
template <class Matrix>
void vision_mlp(VisionScratch&, float* hidden, int64_t patches, const VisionBlock<Matrix>&);

// hidden[P][C] through all blocks, in place.
template <class Matrix>
void run_blocks(const VisionStack<Matrix>&, float* hidden, const float* cos, const float* sin, const Frames&);

// Patches [P][X] through the embedding, all blocks and the last norm: out[P][C].
void run_tower(const VisionStack<DenseBank>&, const VisionEnds&, const float* patches, const float* cos,
               const float* sin, const Frames&, float* out);

// blocks[B][X], each the tower's rows of neighbouring patches -> out[tokens][D]: token t is of blocks earlier[t] and
// later[t].
void run_resampler(const Resampler&, const float* blocks, int64_t num_blocks, const int64_t* earlier,
                   const int64_t* later, int64_t tokens, float* out);

}  // namespace duomo
