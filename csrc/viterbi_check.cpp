// The encoder on fixed pseudo-random targets: every instruction set of this machine finds the symbols whose digests
// stand below. They are x86-64's, where Python's tests compare them with the numpy specification. Built beside
// kernels_check, and for NEON, which `portable` becomes there, under qemu:
//
//   aarch64-linux-gnu-g++ -std=c++20 -O2 -static -Wno-psabi csrc/viterbi*.cpp csrc/cpu.cpp -o viterbi_check
//   qemu-aarch64 ./viterbi_check
#include <cstdio>
#include <cstring>
#include <vector>

#include "viterbi.hpp"

namespace {

struct Case {
    int bits, window, index_bits;
    int64_t streams, steps, seam_steps;
    int num_turns;
    uint64_t digest;
};

const Case cases[] = {
    {2, 10, 6, 33, 70, 512, 1, 0x7698e514e9df0acd},
    {2, 10, 6, 5, 150, 64, 3, 0x6a87df5443478fe7},
    {2, 12, 6, 40, 96, 512, 2, 0x7074fe1b2d36e3f7},
    {4, 12, 7, 17, 40, 512, 2, 0xfc400b9907be74bd},
};

uint64_t digest_of(const Case& c, const char* isa) {
    uint64_t state = 1;
    auto next = [&] {
        state = state * 6364136223846793005u + 1442695040888963407u;
        return uint32_t(state >> 33);
    };
    const int levels_count = 1 << c.index_bits;
    std::vector<uint8_t> columns;
    for (int i = 0; i < c.window; ++i) columns.push_back(uint8_t(1 + next() % uint32_t(levels_count - 1)));
    for (int bit = 0; bit < c.bits; ++bit)  // newest and oldest symbol: the set partition
        columns[bit] = columns[c.window - c.bits + bit] = uint8_t(1 << (c.index_bits - c.bits + bit));
    std::vector<uint16_t> levels, targets;
    const int fraction = c.bits == 2 ? 8 : 9;
    for (int i = 0; i < levels_count; ++i) levels.push_back(uint16_t((1 + i * 126 / (levels_count - 1)) << fraction));
    for (int64_t i = 0; i < c.streams * c.steps; ++i) {
        uint32_t sum = 0;  // of four uniforms: about normal
        for (int j = 0; j < 4; ++j) sum += next() >> 17;
        targets.push_back(uint16_t(sum));
    }
    std::vector<uint8_t> symbols(targets.size());
    const duomo::viterbi::Code code{c.bits, c.window, c.index_bits, columns.data(), levels.data()};
    duomo::viterbi::encode(code, targets.data(), c.streams, c.steps, c.seam_steps, c.num_turns, symbols.data(), 2, isa);
    uint64_t digest = 14695981039346656037u;  // FNV-1a
    for (uint8_t symbol : symbols) digest = (digest ^ symbol) * 1099511628211u;
    return digest;
}

}  // namespace

int main(int argc, char** argv) {
    const bool print = argc > 1 && !std::strcmp(argv[1], "--print");
    int wrong = 0;
    for (const Case& c : cases)
        for (const char* isa : {"portable", "avx2", "avx512", ""}) {
            const uint64_t digest = digest_of(c, isa);
            if (print) std::printf("%d %d %s 0x%llx\n", c.bits, c.window, isa, static_cast<unsigned long long>(digest));
            if (digest != c.digest) ++wrong;
        }
    std::printf("%zu cases, %d wrong\n", sizeof cases / sizeof cases[0], wrong);
    return wrong && !print;
}
