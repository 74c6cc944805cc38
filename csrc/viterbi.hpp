// The trellis encoder: for streams of targets, the symbols whose decoded circle lies nearest.
//
// The specification is src/duomo/trellis/viterbi.py, and every file here finds the same symbols, bit for bit.
//
// States. A window of L bits is the oldest symbol x, then the L - 2 bits q..., then the newest symbol b; a state is a
// window without its oldest symbol. State n = (q << B) | b is reached from the 2^B states (x << (L - 2B)) | q, so the
// 2^B states of one q share their 2^B predecessors. The codebook index of a branch is hash(q) ^ top(x) ^ top(b), where
// top() puts a symbol into the highest index bits (the codes' set partition, checked by TrellisCode): of the
// 2^B x 2^B branches of one q only 2^B costs differ, cost[x ^ b], and they stay in registers.
//
// Numbers. Metrics are uint16 with saturating sums; the low B bits of a metric name the predecessor it came from, so
// one minimum finds the survivor and its past. At every step the smallest metric is subtracted. What can overflow:
// a cost is at most 65535 with its low B bits clear, a sum saturates at 65535, and only paths that are worse than the
// best by more than 16383 / 2^(B-2) cost units ever do; at the codes' distortion that is 400 steps' worth at 2 bits
// and 500 at 4, while any state can be reached from the best one within (L - B) / B steps.
//
// Lanes. Streams are independent, so they sit side by side: 32 to a 512-bit register, and no lane ever needs another's.
#pragma once

#include <cstddef>
#include <cstdint>

namespace duomo::viterbi {

struct Code {
    int bits;                // B: 2 or 4
    int window;              // L
    int index_bits;          // the codebook has 2^index_bits levels
    const uint8_t* columns;  // [L] codebook index of each bit of the window, newest first
    const uint16_t* levels;  // [2^index_bits] in the fixed point of the targets
};

// One group of lanes. `targets` and `symbols` are [steps][lanes]; `scratch` has scratch_bytes() and is 64-byte aligned.
using EncodeGroup = void (*)(const Code&, const uint16_t* targets, int64_t steps, int64_t seam_half, int num_turns,
                             uint8_t* symbols, void* scratch);

struct Encoder {
    const char* name;
    int lanes;
    EncodeGroup encode;
};

extern const Encoder portable_encoder;
extern const Encoder avx2_encoder;    // 16 lanes; encode is null where the file was not built for x86-64
extern const Encoder avx512_encoder;  // 32 lanes

size_t scratch_bytes(const Code& code, int64_t steps, int64_t seam_half, int lanes);

// Streams [num_streams][steps], any number of them. `isa` caps the instruction set: "", "portable", "avx2", "avx512".
void encode(const Code& code, const uint16_t* targets, int64_t num_streams, int64_t steps, int64_t seam_steps,
            int num_turns, uint8_t* symbols, int num_threads, const char* isa);

}  // namespace duomo::viterbi
