// Cuts streams into groups of lanes, gives groups to threads, and chooses the instruction set. The one place that
// allocates; a group's scratch is a few megabytes and is reused by the thread that owns it.
#include "viterbi.hpp"

#include "cpu.hpp"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <thread>
#include <vector>

namespace duomo::viterbi {
namespace {

size_t rounded(size_t bytes) { return (bytes + 63) / 64 * 64; }

struct Free {
    void operator()(void* p) const { std::free(p); }
};
using Aligned = std::unique_ptr<void, Free>;

Aligned allocate(size_t bytes) {
    void* p = std::aligned_alloc(64, rounded(bytes));
    if (!p) throw std::bad_alloc();
    return Aligned(p);
}

bool machine_has(const Encoder& encoder) {
    if (!encoder.encode) return false;
    const Isa best = best_isa();
    if (&encoder == &avx512_encoder) return best == Isa::avx512;
    if (&encoder == &avx2_encoder) return best == Isa::avx512 || best == Isa::avx2;
    return true;
}

const Encoder& choose(const char* isa, int64_t num_streams) {
    const bool any = !*isa, may_avx512 = any || !std::strcmp(isa, "avx512");
    const bool may_avx2 = may_avx512 || !std::strcmp(isa, "avx2");
    // Up to 16 streams fill a 256-bit register, and half a 512-bit one would be wasted.
    if (may_avx512 && num_streams > 16 && machine_has(avx512_encoder)) return avx512_encoder;
    if (may_avx2 && machine_has(avx2_encoder)) return avx2_encoder;
    return portable_encoder;
}

// Streams first..first+count into [steps][lanes], padded by repeating the last: a padded lane is never read back.
void gather(const uint16_t* targets, int64_t first, int64_t count, int64_t steps, int lanes, uint16_t* out) {
    for (int lane = 0; lane < lanes; ++lane) {
        const uint16_t* stream = targets + (first + (lane < count ? lane : count - 1)) * steps;
        for (int64_t step = 0; step < steps; ++step) out[step * lanes + lane] = stream[step];
    }
}

void scatter(const uint8_t* group, int64_t first, int64_t count, int64_t steps, int lanes, uint8_t* symbols) {
    for (int64_t lane = 0; lane < count; ++lane)
        for (int64_t step = 0; step < steps; ++step)
            symbols[(first + lane) * steps + step] = group[step * lanes + lane];
}

}  // namespace

size_t scratch_bytes(const Code& code, int64_t steps, int64_t seam_half, int lanes) {
    const size_t states = size_t(1) << (code.window - code.bits);
    const size_t decided = size_t(steps > 2 * seam_half ? steps : 2 * seam_half);
    const size_t vectors = 2 * states + (size_t(1) << code.index_bits) + decided * states * code.bits / 16;
    return rounded(vectors * lanes * sizeof(uint16_t) + rounded(states));
}

void encode(const Code& code, const uint16_t* targets, int64_t num_streams, int64_t steps, int64_t seam_steps,
            int num_turns, uint8_t* symbols, int num_threads, const char* isa) {
    if (num_streams <= 0 || steps <= 0) return;
    const int64_t seam_half = seam_steps / 2 < steps ? seam_steps / 2 : steps;
    const int widest = choose(isa, num_streams).lanes;
    const int64_t num_groups = (num_streams + widest - 1) / widest;
    std::atomic<int64_t> next_group{0};
    auto work = [&] {
        const Aligned scratch = allocate(scratch_bytes(code, steps, seam_half, widest));
        const Aligned in = allocate(size_t(steps) * widest * sizeof(uint16_t)), out = allocate(size_t(steps) * widest);
        for (int64_t group; (group = next_group++) < num_groups;) {
            const int64_t first = group * widest, left = num_streams - first;
            const int64_t count = left < widest ? left : widest;
            const Encoder& encoder = choose(isa, count);
            gather(targets, first, count, steps, encoder.lanes, static_cast<uint16_t*>(in.get()));
            encoder.encode(code, static_cast<uint16_t*>(in.get()), steps, seam_half, num_turns,
                           static_cast<uint8_t*>(out.get()), scratch.get());
            scatter(static_cast<uint8_t*>(out.get()), first, count, steps, encoder.lanes, symbols);
        }
    };
    const int64_t wanted = num_threads < num_groups ? num_threads : num_groups;
    std::vector<std::thread> others;
    for (int64_t i = 1; i < wanted; ++i) others.emplace_back(work);
    work();
    for (std::thread& other : others) other.join();
}

}  // namespace duomo::viterbi
