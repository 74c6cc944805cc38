// The encoder of one group of lanes, written once over a vector type V and instantiated in each viterbi_<isa>.cpp.
// V has: `lanes`, load, store, set, adds and subs (saturating), min, mulhi, shift_left<n>, and_, or_, keep_low(a, v, m)
// = a | (v & m). No standard containers here: their code could be shared with files built for lesser machines.
#pragma once

#include "viterbi.hpp"

namespace {

using duomo::viterbi::Code;

template <class V, int B>
struct Group {
    static constexpr int branches = 1 << B;
    static constexpr int per_word = 16 / B;  // decisions of consecutive states share a 16-bit lane

    const Code& code;
    int num_states, num_middles;  // a middle is q: what x and b leave of the window
    uint16_t* metrics[2];         // [state][lane]
    uint16_t* decisions;          // [step][state / per_word][lane], the first state of a word highest
    uint16_t* costs;              // [level][lane]
    uint8_t* hash_of_middle;      // [q]

    Group(const Code& c, void* scratch) : code(c), num_states(1 << (c.window - B)), num_middles(num_states >> B) {
        auto* p = static_cast<uint16_t*>(scratch);
        metrics[0] = p, p += size_t(num_states) * V::lanes;
        metrics[1] = p, p += size_t(num_states) * V::lanes;
        costs = p, p += size_t(1 << c.index_bits) * V::lanes;
        hash_of_middle = reinterpret_cast<uint8_t*>(p), p += (num_states / 2 + 31) / 32 * 32;
        decisions = p;
        for (int q = 0; q < num_middles; ++q) {
            uint8_t hash = 0;
            for (int bit = 0; bit < c.window - 2 * B; ++bit)
                if (q >> bit & 1) hash ^= c.columns[B + bit];
            hash_of_middle[q] = hash;
        }
    }

    void fill_costs(typename V::T target) {
        const auto most = V::set(uint16_t(0xFFFF >> B));
        for (int i = 0; i < 1 << code.index_bits; ++i) {
            const auto level = V::set(code.levels[i]);
            const auto error = V::or_(V::subs(target, level), V::subs(level, target));  // one of them is zero
            V::store(costs + i * V::lanes, V::template shift_left<B>(V::min(V::mulhi(error, error), most)));
        }
    }

    // One step: metrics[from] -> metrics[1 - from]. Returns the smallest new metric of each lane, low bits cleared.
    typename V::T advance(int from, typename V::T smallest, uint16_t* word_of_states) {
        const auto clear = V::set(uint16_t(~(branches - 1)));
        const auto low = V::set(branches - 1);
        auto best = V::set(0xFFFF);
        auto packed = V::set(0);
        const uint16_t* old = metrics[from];
        uint16_t* next = metrics[1 - from];
        for (int q = 0; q < num_middles; ++q) {
            typename V::T past[branches], cost[branches];
            for (int x = 0; x < branches; ++x) {
                const auto metric = V::load(old + (size_t(x) * num_middles + q) * V::lanes);
                past[x] = V::or_(V::and_(V::subs(metric, smallest), clear), V::set(uint16_t(x)));
                cost[x] = V::load(costs + (hash_of_middle[q] ^ (x << (code.index_bits - B))) * V::lanes);
            }
#pragma GCC unroll 16
            for (int b = 0; b < branches; ++b) {
                auto metric = V::adds(past[0], cost[b]);
#pragma GCC unroll 16
                for (int x = 1; x < branches; ++x) metric = V::min(metric, V::adds(past[x], cost[x ^ b]));
                const int state = q * branches + b;
                V::store(next + size_t(state) * V::lanes, metric);
                best = V::min(best, metric);
                packed = V::keep_low(V::template shift_left<B>(packed), metric, low);
                if (state % per_word == per_word - 1) V::store(word_of_states + state / per_word * V::lanes, packed);
            }
        }
        return V::and_(best, clear);
    }

    int run(const uint16_t* first, int64_t num_first, const uint16_t* second, int64_t num_second) {
        auto smallest = V::set(0);
        int from = 0;
        const size_t step_words = size_t(num_states / per_word) * V::lanes;
        for (int64_t step = 0; step < num_first + num_second; ++step) {
            const bool in_first = step < num_first;
            fill_costs(V::load((in_first ? first + step * V::lanes : second + (step - num_first) * V::lanes)));
            smallest = advance(from, smallest, decisions + size_t(step) * step_words);
            from = 1 - from;
        }
        return from;
    }

    // The state before the last `stop` of `steps` steps, from the states after them; symbols where wanted, the first
    // of them at `shift` and the rest around the circle.
    void trace_back(int* states, int64_t steps, int64_t stop, uint8_t* symbols, int64_t shift = 0) const {
        const size_t step_words = size_t(num_states / per_word) * V::lanes;
        for (int64_t step = steps - 1; step >= steps - stop; --step)
            for (int lane = 0; lane < V::lanes; ++lane) {
                const int state = states[lane];
                const uint16_t word = decisions[step * step_words + size_t(state / per_word) * V::lanes + lane];
                const int oldest = word >> (B * (per_word - 1 - state % per_word)) & (branches - 1);
                if (symbols) symbols[(step - (steps - stop) + shift) % stop * V::lanes + lane] = uint8_t(state & (branches - 1));
                states[lane] = (state >> B) | (oldest << (code.window - 2 * B));
            }
    }

    // The best circle that passes step `start` in the given states.
    void pinned(const uint16_t* targets, int64_t start, int64_t steps, const int* seam, uint8_t* symbols) {
        const size_t count = size_t(num_states) * V::lanes;
        int end[V::lanes];
        for (size_t i = 0; i < count; ++i) metrics[0][i] = 0xFFFF;
        for (int lane = 0; lane < V::lanes; ++lane) {
            metrics[0][size_t(seam[lane]) * V::lanes + lane] = 0;
            end[lane] = seam[lane];
        }
        run(targets + start * V::lanes, steps - start, targets, start);
        trace_back(end, steps, steps, symbols, start);
    }

    void encode(const uint16_t* targets, int64_t steps, int64_t seam_half, int num_turns, uint8_t* symbols) {
        const size_t count = size_t(num_states) * V::lanes;
        for (size_t i = 0; i < count; ++i) metrics[0][i] = 0;
        const int last = run(targets + (steps - seam_half) * V::lanes, seam_half, targets, seam_half);
        int seam[V::lanes];
        for (int lane = 0; lane < V::lanes; ++lane) {
            int best = 0;
            for (int state = 1; state < num_states; ++state)
                if (metrics[last][size_t(state) * V::lanes + lane] >> B <
                    metrics[last][size_t(best) * V::lanes + lane] >> B)
                    best = state;
            seam[lane] = best;
        }
        trace_back(seam, 2 * seam_half, seam_half, nullptr);
        pinned(targets, 0, steps, seam, symbols);
        for (int turn = 1; turn < num_turns; ++turn) {
            const int64_t start = steps * turn / num_turns;
            for (int lane = 0; lane < V::lanes; ++lane) {
                int state = 0;
                for (int64_t age = (code.window / B) - 2; age >= 0; --age)
                    state = state << B | symbols[((start - 1 - age) % steps + steps) % steps * V::lanes + lane];
                seam[lane] = state;
            }
            pinned(targets, start, steps, seam, symbols);
        }
    }
};

template <class V>
void encode_group(const Code& code, const uint16_t* targets, int64_t steps, int64_t seam_half, int num_turns,
                  uint8_t* symbols, void* scratch) {
    if (code.bits == 2)
        Group<V, 2>(code, scratch).encode(targets, steps, seam_half, num_turns, symbols);
    else
        Group<V, 4>(code, scratch).encode(targets, steps, seam_half, num_turns, symbols);
}

}  // namespace
