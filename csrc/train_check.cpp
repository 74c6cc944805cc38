// Training's kernels over arrays of exactly their sizes, for ASan and UBSan; products against plain sums, too.
// Python's tests compare everything with the reference. Where there are no such kernels, nothing is run.
#include <cmath>
#include <cstdio>
#include <vector>

#include "pool.hpp"
#include "train.hpp"

using namespace duomo;

namespace {

using Floats = std::vector<float>;

Floats random_floats(int64_t count) {
    static uint64_t state = 1;
    Floats found(static_cast<size_t>(count));
    for (float& x : found) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        x = float(int32_t(state >> 33) - (1 << 30)) / float(1 << 30);
    }
    return found;
}

float value(const Operand& o, int64_t lane, int64_t step) {
    const int64_t row = o.is_across ? step : lane, column = o.is_across ? lane : step;
    return o.data[(o.rows ? o.rows[row] : row) * o.stride + column];
}

// The largest difference from plain sums, of all four ways that the two sides may lie.
double check_products(const TrainKernels& kernels, int64_t rows, int64_t columns, int64_t steps, bool is_rounded) {
    double worst = 0;
    for (int way = 0; way < 4; ++way) {
        const bool a_across = way & 1, b_across = way & 2;
        const Floats a = random_floats(rows * steps), b = random_floats(columns * steps);
        Floats out(static_cast<size_t>(rows * columns));
        const TrainProduct p = {{a.data(), a_across ? rows : steps, nullptr, a_across},
                                {b.data(), b_across ? columns : steps, nullptr, b_across},
                                rows, columns, steps, out.data(), columns};
        kernels.multiply(&p, 1, is_rounded, 2);
        for (int64_t m = 0; m < rows; ++m)
            for (int64_t n = 0; n < columns; ++n) {
                double sum = 0;
                for (int64_t k = 0; k < steps; ++k) sum += double(value(p.a, m, k)) * double(value(p.b, n, k));
                worst = std::fmax(worst, std::fabs(sum - double(out[size_t(m * columns + n)])));
            }
    }
    return worst;
}

void run_attention(const TrainKernels& kernels, std::vector<int64_t> lengths, int64_t heads, int64_t groups, int64_t dim,
                   bool is_causal) {
    int64_t tokens = 0;
    for (const int64_t length : lengths) tokens += length;
    std::vector<int32_t> blocks;
    for (int64_t t = 0; t < tokens; ++t) blocks.push_back(int32_t(t / 5 % 4));
    const SequenceShape shape = {lengths.data(), int64_t(lengths.size()), heads, groups, dim, is_causal, blocks.data()};
    const Floats query = random_floats(tokens * heads * dim), key = random_floats(tokens * groups * dim);
    Floats out = query, by_query = query, by_key = key, by_value = key, lse(size_t(tokens * heads));
    kernels.attention(shape, query.data(), key.data(), key.data(), out.data(), lse.data(), 2);
    kernels.attention_backward(shape, query.data(), key.data(), key.data(), out.data(), lse.data(), query.data(),
                               by_query.data(), by_key.data(), by_value.data(), 2);
}

void run_rows(const TrainKernels& kernels, int64_t tokens, int64_t width) {
    const Floats x = random_floats(tokens * width), weight = random_floats(width), cost = random_floats(tokens);
    Floats y = x, by_x = x, by_weight = weight, lse = cost, loss = cost;
    kernels.rmsnorm(x.data(), weight.data(), 1e-5f, tokens, width, y.data(), 2);
    kernels.rmsnorm_backward(x.data(), weight.data(), 1e-5f, y.data(), tokens, width, by_x.data(), by_weight.data(), 2);
    kernels.swiglu(x.data(), y.data(), width, tokens, width, by_x.data(), 2);
    kernels.swiglu_backward(x.data(), x.data(), width, x.data(), tokens, width, y.data(), by_x.data(), 2);
    std::vector<int64_t> place;
    for (int64_t t = 0; t < tokens; ++t) place.push_back(tokens - 1 - t);
    kernels.combine(x.data(), place.data(), cost.data(), tokens, 1, width, y.data(), 2);
    kernels.combine_backward(x.data(), place.data(), cost.data(), x.data(), tokens, 1, width, y.data(), lse.data(), 2);
    std::vector<int64_t> ids(size_t(2 * tokens));
    Floats weights = random_floats(2 * tokens);
    kernels.route(x.data(), weight.data(), 1e-12f, tokens, width, 2, y.data(), ids.data(), weights.data(), 2);
    kernels.route_backward(y.data(), ids.data(), weights.data(), weights.data(), 1e-12f, tokens, width, 2, by_x.data(), 2);
    const std::vector<int64_t> labels(size_t(tokens), width - 1);
    kernels.cross_entropy(x.data(), labels.data(), tokens, width, loss.data(), lse.data(), 2);
    kernels.cross_entropy_backward(x.data(), labels.data(), lse.data(), cost.data(), tokens, width, y.data(), 2);
    const Floats heads = random_floats(tokens * 3 * 16), angles = random_floats(tokens * 8);
    Floats turned = heads;
    kernels.rotate(heads.data(), angles.data(), angles.data(), 1.0f, tokens, 3, 16, turned.data(), 2);
}

}  // namespace

int main() {
    const TrainKernels* kernels = train_kernels();
    if (!kernels) return 0;
    set_num_threads(2);
    double plain = 0, rounded = 0;
    for (const int64_t size : {0, 1, 7, 16, 33, 67}) {
        for (const int64_t steps : {0, 1, 31, 331}) {
            plain = std::fmax(plain, check_products(*kernels, size, 71 - size, steps, false));
            rounded = std::fmax(rounded, check_products(*kernels, size, 71 - size, steps, true));
        }
        run_rows(*kernels, size, 71 - size);
    }
    for (const bool is_causal : {true, false}) {
        run_attention(*kernels, {1, 37, 64}, 4, 2, 16, is_causal);
        run_attention(*kernels, {33}, 2, 2, 48, is_causal);
    }
    std::printf("training: products are %.1e from plain sums, rounded ones %.1e\n", plain, rounded);
    return !(plain < 1e-4 && rounded < 0.5);
}
