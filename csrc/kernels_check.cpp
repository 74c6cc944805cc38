// Every instruction set of this machine against the portable kernels, on random codes. Run under ASan and UBSan
// (-DDUOMO_SANITIZE=ON), and under qemu for NEON:
//
//   aarch64-linux-gnu-g++ -std=c++20 -O2 -static -Wno-psabi -ffp-contract=off -march=armv8.2-a+dotprod
//       csrc/kernels_check.cpp csrc/{code,cpu,dense,pairs,pool,packed,experts,many_tokens,vision}.cpp csrc/{dense,packed,rotate,vision}_*.cpp -o check
//   qemu-aarch64 ./check
//
// Python's tests compare with the reference; this one finds reads and writes outside, and knows no Python.
#include <array>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "cpu.hpp"
#include "dense.hpp"
#include "experts.hpp"
#include "pool.hpp"
#include "vision.hpp"

using namespace duomo;

namespace {

uint64_t state = 1;
uint32_t random_bits() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return uint32_t(state >> 33);
}

TrellisCode random_code(int bits, int window, int levels) {
    std::vector<uint8_t> columns;
    std::vector<int8_t> codebook;
    for (int i = 0; i < window; ++i) columns.push_back(uint8_t(random_bits() % uint32_t(levels)));
    for (int i = 0; i < levels; ++i) codebook.push_back(int8_t(int(random_bits() % 127) - 63));
    return make_code(bits, window, columns.data(), levels, codebook.data());
}

struct OwnedBank {
    std::unique_ptr<uint8_t[]> codes;  // exactly as long as the codes: a read past the end is seen by ASan
    std::vector<uint16_t> row_scale;
    TrellisBank bank;
};

OwnedBank random_bank(const TrellisCode& code, int64_t count, int64_t rows, int64_t columns, int chain, int block) {
    OwnedBank own;
    const int64_t bytes = count * rows * columns * code.bits / 8;
    own.codes = std::make_unique<uint8_t[]>(size_t(bytes));
    for (int64_t i = 0; i < bytes; ++i) own.codes[size_t(i)] = uint8_t(random_bits());
    for (int64_t i = 0; i < count * rows; ++i) own.row_scale.push_back(uint16_t(0x2800 + random_bits() % 0x400));
    own.bank = {code, own.codes.get(), own.row_scale.data(), 0.04f, count, rows, columns, chain, block, {}};
    for (int64_t i = 0; i < columns; ++i) own.bank.signs.push_back(random_bits() & 1 ? 1.0f : -1.0f);
    return own;
}

std::vector<float> random_rows(int64_t count) {
    std::vector<float> x;
    for (int64_t i = 0; i < count; ++i) x.push_back(float(int(random_bits() % 2001) - 1000) / 500.0f);
    return x;
}

struct Results {
    std::vector<float> values;
    void add(const std::vector<float>& more) { values.insert(values.end(), more.begin(), more.end()); }
};

// Plain matrices whose memory ends where they end.
struct OwnedDense {
    std::unique_ptr<float[]> weight, bias;
    std::unique_ptr<uint32_t[]> pairs;
    DenseBank bank;
};

OwnedDense random_dense(int64_t count, int64_t rows, int64_t columns, bool has_bias, DenseForm form) {
    const auto own = [](int64_t size) {
        auto x = std::make_unique<float[]>(size_t(size));
        const auto values = random_rows(size);
        std::memcpy(x.get(), values.data(), size_t(size) * sizeof(float));
        return x;
    };
    OwnedDense dense = {own(count * rows * columns), has_bias ? own(rows) : nullptr, nullptr, {}};
    dense.bank = {dense.weight.get(), nullptr, dense.bias.get(), count, rows, columns, form};
    if (form != DenseForm::borrowed) {
        dense.pairs = std::make_unique<uint32_t[]>(size_t(count * DenseBank::num_pairs(rows, columns)));
        pack_panels(dense.weight.get(), count, rows, columns, dense.pairs.get());
        dense.bank.weight = nullptr;
        dense.bank.pairs = dense.pairs.get();
    }
    return dense;
}

void run_dense(DenseForm form, Results& results) {
    for (int64_t rows : {1, 7, 16, 77, 130})
        for (int64_t columns : {5, 16, 75, 192})
            for (int64_t tokens : {0, 1, 2, 3, 7, 41}) {
                const OwnedDense own = random_dense(1, rows, columns, tokens & 1, form);
                const auto x = random_rows(tokens * columns);
                std::vector<float> y(size_t(tokens * rows));
                const DenseBank* bank = &own.bank;
                float* out = y.data();
                linear_shared(&bank, 1, x.data(), tokens, &out);
                results.add(y);
            }
    const OwnedDense gate_up = random_dense(3, 40, 48, false, form), down = random_dense(3, 48, 20, false, form);
    const OwnedDense gate = random_dense(1, 24, 48, true, form), up = random_dense(1, 24, 48, true, form),
                     last = random_dense(1, 48, 24, true, form);
    const Mlp<DenseBank> mlp = {&gate.bank, &up.bank, &last.bank};
    for (int64_t tokens : {0, 1, 9}) {
        std::vector<int64_t> ids;
        for (int64_t i = 0; i < tokens * 2; ++i) ids.push_back((i / 2 + i % 2) % 3);
        const auto hidden = random_rows(tokens * 48), weights = random_rows(tokens * 2);
        std::vector<float> out(size_t(tokens * 48)), shared(out.size());
        const Routed<DenseBank> bank = {&gate_up.bank, &down.bank, hidden.data(), ids.data(), weights.data(), tokens, 2,
                                        out.data()};
        mixture(&bank, 1, &mlp, hidden.data(), tokens, shared.data());
        results.add(out);
        results.add(shared);
    }
}

void run_products(Results& results) {
    for (DenseForm form : {DenseForm::borrowed, DenseForm::panels, DenseForm::rounded}) run_dense(form, results);
    for (int bits : {2, 4})
        for (int window = bits == 2 ? 6 : 8; window <= 16; window += bits)
            for (int levels : {64, 128})
                for (int chain : {1, 2})
                    for (int64_t tokens : {0, 1, 7, 29}) {
                        const OwnedBank own = random_bank(random_code(bits, window, levels), 1, 192, 64, chain, 32);
                        const auto x = random_rows(tokens * 64);
                        ActivationBuffer buffer;
                        std::vector<float> y(size_t(tokens * 192));
                        linear(own.bank.matrix(0), buffer.fill(x.data(), own.bank.signs.data(), tokens, 64, 32),
                               y.data());
                        results.add(y);
                    }
    for (int64_t rows : {1024, 7040}) {  // which two threads share by halves, and in runs
        const OwnedBank own = random_bank(random_code(2, 12, 64), 1, rows, 384, 1, 128);
        const auto x = random_rows(384);
        ActivationBuffer buffer;
        std::vector<float> y(static_cast<size_t>(rows));
        linear(own.bank.matrix(0), buffer.fill(x.data(), own.bank.signs.data(), 1, 384, 128), y.data());
        results.add(y);
    }
    for (int64_t rows : {1, 16, 77})
        for (int64_t tokens : {0, 1, 7, 29}) {
            for (const auto& [bits, columns, block] : {std::array{8, 48, 16}, {8, 192, 64}, {8, 256, 128}, {6, 48, 16},
                                                       {6, 96, 32}, {6, 192, 64}, {6, 384, 128}}) {
                const size_t bytes = size_t(rows * columns * bits / 8);
                std::unique_ptr<uint8_t[]> codes(new uint8_t[bytes]);
                for (size_t i = 0; i < bytes; ++i) codes[i] = uint8_t(random_bits() % 255 - 127);  // never -128
                const std::vector<uint16_t> scale(size_t(rows), 0x2C00);
                const auto x = random_rows(tokens * columns);
                ActivationBuffer buffer;
                std::vector<float> y(size_t(tokens * rows));
                linear(IntMatrix{codes.get(), scale.data(), rows, columns, block, bits},
                       buffer.fill(x.data(), nullptr, tokens, columns, block), y.data());
                results.add(y);
            }
        }
    const TrellisCode code = random_code(2, 12, 64);
    const OwnedBank gate_up = random_bank(code, 3, 128, 64, 1, 64), down = random_bank(code, 3, 64, 64, 1, 64);
    for (int64_t tokens : {0, 1, 7}) {
        std::vector<int64_t> ids;
        for (int64_t t = 0; t < tokens; ++t) {
            ids.push_back(t % 3);
            ids.push_back((t + 1) % 3);
        }
        const auto hidden = random_rows(tokens * 64), weights = random_rows(tokens * 2);
        std::vector<float> out(size_t(tokens * 64));
        experts(gate_up.bank, down.bank, hidden.data(), ids.data(), weights.data(), tokens, 2, out.data());
        results.add(out);
    }
}

// A block of the tower, whose widths are 48 and 96.
template <class Matrix>
void run_block(const VisionBlock<Matrix>& block, Results& results) {
    const std::vector<int64_t> lengths = {1, 61};
    const auto cos = random_rows(62 * 24), sin = random_rows(62 * 24);
    auto hidden = random_rows(62 * 48);
    run_blocks(VisionStack<Matrix>{{block}, {1, 48}}, hidden.data(), cos.data(), sin.data(), {lengths.data(), 2});
    results.add(hidden);
}

// The tower's attention, and blocks of it over integers and plain matrices.
void run_vision(Results& results) {
    const std::vector<int64_t> lengths = {1, 61, 300};
    for (int64_t head_dim : {16, 48, 80, 128}) {
        const auto query = random_rows(362 * 2 * head_dim), key = random_rows(362 * 2 * head_dim),
                   value = random_rows(362 * 2 * head_dim);
        std::vector<float> out(query.size());
        for (bool is_rounded : {false, true}) {
            frame_attention(query.data(), key.data(), value.data(), {lengths.data(), 3}, {2, head_dim}, is_rounded,
                            out.data());
            results.add(out);
        }
    }
    const auto bias = random_rows(144);
    const VisionNorm norm = {bias.data(), bias.data(), 1e-6f};
    std::vector<uint8_t> codes(144 * 48);
    for (auto& code : codes) code = uint8_t(random_bits() % 255 - 127);
    const std::vector<uint16_t> scale(144, 0x1400);
    const auto int_rows = [&](int64_t rows, int64_t columns, int block) {
        return IntRows{{codes.data(), scale.data(), rows, columns, block}, {}};
    };
    const IntRows qkv = int_rows(144, 48, 16), out = int_rows(48, 48, 16), fc1 = int_rows(96, 48, 16),
                   fc2 = int_rows(48, 96, 32);
    run_block<IntRows>({norm, {&qkv, bias.data()}, {&out, bias.data()}, norm, {&fc1, bias.data()}, {&fc2, bias.data()}},
                        results);
    for (DenseForm form : {DenseForm::borrowed, DenseForm::panels, DenseForm::rounded}) {
        const auto dense = [&](int64_t rows, int64_t columns) { return random_dense(1, rows, columns, false, form); };
        const OwnedDense plain[4] = {dense(144, 48), dense(48, 48), dense(96, 48), dense(48, 96)};
        const auto linear = [&](int i) { return VisionLinear<DenseBank>{&plain[i].bank, bias.data()}; };
        run_block<DenseBank>({norm, linear(0), linear(1), norm, linear(2), linear(3)}, results);
    }
}

Results run_all(const char* isa) {
    set_isa(isa);
    state = 1;
    Results results;
    run_products(results);
    run_vision(results);
    return results;
}

}  // namespace

int main() {
    set_num_threads(2);
    const Results expected = run_all("portable");
    int failures = 0;
    for (const char* isa : {"avx2", "avx512", "neon"}) {
        const Results got = run_all(isa);
        if (std::string(isa_name(current_isa())) != isa) continue;
        const bool same = got.values.size() == expected.values.size() &&
                          !std::memcmp(got.values.data(), expected.values.data(), got.values.size() * sizeof(float));
        std::printf("%s: %zu values %s the portable ones\n", isa, got.values.size(), same ? "equal" : "DIFFER FROM");
        failures += !same;
    }
    return failures;
}
