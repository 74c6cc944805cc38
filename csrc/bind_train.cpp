// Python's door to the kernels of training. Addresses and shapes are checked by duomo.kernels.cpu.train.
#include <nanobind/nanobind.h>

#include <vector>

#include "bind.hpp"
#include "train.hpp"

namespace nb = nanobind;

namespace {

using namespace duomo;

const TrainKernels& own() {
    const TrainKernels* found = train_kernels();
    if (!found) throw nb::value_error("training has native kernels for AVX-512 with BF16 only");
    return *found;
}

// A bank of matrices [E][N][K] by rows sorted by matrix: those of matrix e are [ends[e - 1], ends[e]). `rows`, where not
// null, says which row of x each is.
struct Bank {
    const int64_t* ends;
    int64_t experts, outputs, inputs;
    const int64_t* rows;

    template <class Make>
    void multiply(bool is_rounded, int threads, Make&& make) const {
        std::vector<TrainProduct> products;
        for (int64_t e = 0; e < experts; ++e) {
            const int64_t begin = e ? ends[e - 1] : 0;
            products.push_back(make(e, begin, ends[e] - begin));
        }
        own().multiply(products.data(), experts, is_rounded, threads);
    }
    Operand x_of(const float* x, int64_t begin, bool is_across) const {
        return {rows ? x : x + begin * inputs, inputs, rows ? rows + begin : nullptr, is_across};
    }
};

void product(Address ends, int64_t experts, int64_t outputs, int64_t inputs, Address rows, Address x, Address weight,
             Address y, bool is_rounded, int threads) {
    nb::gil_scoped_release release;
    const Bank bank{at<int64_t>(ends), experts, outputs, inputs, at<int64_t>(rows)};
    bank.multiply(is_rounded, threads, [&](int64_t e, int64_t begin, int64_t count) {
        const Operand w = {at<float>(weight) + e * outputs * inputs, inputs, nullptr, false};
        return TrainProduct{bank.x_of(at<float>(x), begin, false), w, count, outputs, inputs,
                            at<float>(y) + begin * outputs, outputs};
    });
}

void product_by_input(Address ends, int64_t experts, int64_t outputs, int64_t inputs, Address weight, Address by_y,
                      Address by_x, bool is_rounded, int threads) {
    nb::gil_scoped_release release;
    const Bank bank{at<int64_t>(ends), experts, outputs, inputs, nullptr};
    bank.multiply(is_rounded, threads, [&](int64_t e, int64_t begin, int64_t count) {
        const Operand by = {at<float>(by_y) + begin * outputs, outputs, nullptr, false};
        const Operand w = {at<float>(weight) + e * outputs * inputs, inputs, nullptr, true};
        return TrainProduct{by, w, count, inputs, outputs, at<float>(by_x) + begin * inputs, inputs};
    });
}

void product_by_weight(Address ends, int64_t experts, int64_t outputs, int64_t inputs, Address rows, Address x,
                       Address by_y, Address by_weight, bool is_rounded, int threads) {
    nb::gil_scoped_release release;
    const Bank bank{at<int64_t>(ends), experts, outputs, inputs, at<int64_t>(rows)};
    bank.multiply(is_rounded, threads, [&](int64_t e, int64_t begin, int64_t count) {
        const Operand by = {at<float>(by_y) + begin * outputs, outputs, nullptr, true};
        return TrainProduct{by, bank.x_of(at<float>(x), begin, true), outputs, inputs, count,
                            at<float>(by_weight) + e * outputs * inputs, inputs};
    });
}

SequenceShape shape(const Array<int64_t>& lengths, int64_t heads, int64_t groups, int64_t dim, bool is_causal,
                    Address blocks) {
    if (groups < 1 || heads % groups || dim % 16) throw nb::value_error("heads do not divide");
    return {lengths.data(), int64_t(lengths.size()), heads, groups, dim, is_causal,
            blocks ? at<int32_t>(blocks) : nullptr};
}

void attention(Array<int64_t> lengths, int64_t heads, int64_t groups, int64_t dim, bool is_causal, Address blocks,
               Address query, Address key, Address value, Address out, Address lse, int threads) {
    const SequenceShape own_shape = shape(lengths, heads, groups, dim, is_causal, blocks);
    nb::gil_scoped_release release;
    own().attention(own_shape, at<float>(query), at<float>(key), at<float>(value), at<float>(out), at<float>(lse),
                    threads);
}

void attention_backward(Array<int64_t> lengths, int64_t heads, int64_t groups, int64_t dim, bool is_causal,
                        Address blocks, Address query, Address key, Address value, Address out, Address lse,
                        Address by_out, Address by_query, Address by_key, Address by_value, int threads) {
    const SequenceShape own_shape = shape(lengths, heads, groups, dim, is_causal, blocks);
    nb::gil_scoped_release release;
    own().attention_backward(own_shape, at<float>(query), at<float>(key), at<float>(value), at<float>(out),
                             at<float>(lse), at<float>(by_out), at<float>(by_query), at<float>(by_key),
                             at<float>(by_value), threads);
}

void rmsnorm(Address x, Address weight, float eps, int64_t tokens, int64_t width, Address y, int threads) {
    nb::gil_scoped_release release;
    own().rmsnorm(at<float>(x), at<float>(weight), eps, tokens, width, at<float>(y), threads);
}

void rmsnorm_backward(Address x, Address weight, float eps, Address by_y, int64_t tokens, int64_t width, Address by_x,
                      Address by_weight, int threads) {
    nb::gil_scoped_release release;
    own().rmsnorm_backward(at<float>(x), at<float>(weight), eps, at<float>(by_y), tokens, width, at<float>(by_x),
                           at<float>(by_weight), threads);
}

void rotate(Address x, Address cos, Address sin, float sign, int64_t tokens, int64_t heads, int64_t dim, Address y,
            int threads) {
    if (dim % 16) throw nb::value_error("heads are whole multiples of 16 wide");
    nb::gil_scoped_release release;
    own().rotate(at<float>(x), at<float>(cos), at<float>(sin), sign, tokens, heads, dim, at<float>(y), threads);
}

void swiglu(Address gate, Address up, int64_t stride, int64_t rows, int64_t width, Address y, int threads) {
    nb::gil_scoped_release release;
    own().swiglu(at<float>(gate), at<float>(up), stride, rows, width, at<float>(y), threads);
}

void swiglu_backward(Address gate, Address up, int64_t stride, Address by_y, int64_t rows, int64_t width,
                     Address by_gate, Address by_up, int threads) {
    nb::gil_scoped_release release;
    own().swiglu_backward(at<float>(gate), at<float>(up), stride, at<float>(by_y), rows, width, at<float>(by_gate),
                          at<float>(by_up), threads);
}

void combine(Address rows, Address place, Address weights, int64_t tokens, int64_t chosen, int64_t width, Address out,
             int threads) {
    nb::gil_scoped_release release;
    own().combine(at<float>(rows), at<int64_t>(place), at<float>(weights), tokens, chosen, width, at<float>(out), threads);
}

void combine_backward(Address rows, Address place, Address weights, Address by_out, int64_t tokens, int64_t chosen,
                      int64_t width, Address by_rows, Address by_weights, int threads) {
    nb::gil_scoped_release release;
    own().combine_backward(at<float>(rows), at<int64_t>(place), at<float>(weights), at<float>(by_out), tokens, chosen,
                           width, at<float>(by_rows), at<float>(by_weights), threads);
}

void train_route(Address logits, Address bias, float norm_min, int64_t tokens, int64_t experts, int64_t chosen, Address p,
           Address ids, Address weights, int threads) {
    if (chosen > experts) throw nb::value_error("more experts chosen than there are");
    nb::gil_scoped_release release;
    own().route(at<float>(logits), at<float>(bias), norm_min, tokens, experts, chosen, at<float>(p), at<int64_t>(ids),
                at<float>(weights), threads);
}

void route_backward(Address p, Address ids, Address weights, Address by_weights, float norm_min, int64_t tokens,
                    int64_t experts, int64_t chosen, Address by_logits, int threads) {
    nb::gil_scoped_release release;
    own().route_backward(at<float>(p), at<int64_t>(ids), at<float>(weights), at<float>(by_weights), norm_min, tokens,
                         experts, chosen, at<float>(by_logits), threads);
}

void cross_entropy(Address logits, Address labels, int64_t tokens, int64_t words, Address loss, Address lse, int threads) {
    nb::gil_scoped_release release;
    own().cross_entropy(at<float>(logits), at<int64_t>(labels), tokens, words, at<float>(loss), at<float>(lse), threads);
}

void cross_entropy_backward(Address logits, Address labels, Address lse, Address by_loss, int64_t tokens, int64_t words,
                            Address by_logits, int threads) {
    nb::gil_scoped_release release;
    own().cross_entropy_backward(at<float>(logits), at<int64_t>(labels), at<float>(lse), at<float>(by_loss), tokens,
                                 words, at<float>(by_logits), threads);
}

}  // namespace

void bind_train(nb::module_& m) {
    nb::module_ train = m.def_submodule("train", "Training's kernels: forward and backward over plain fp32 tensors.");
    train.def("is_there", [] { return train_kernels() != nullptr; });
    train.def("product", &product);
    train.def("product_by_input", &product_by_input);
    train.def("product_by_weight", &product_by_weight);
    train.def("attention", &attention);
    train.def("attention_backward", &attention_backward);
    train.def("rmsnorm", &rmsnorm);
    train.def("rmsnorm_backward", &rmsnorm_backward);
    train.def("rotate", &rotate);
    train.def("swiglu", &swiglu);
    train.def("swiglu_backward", &swiglu_backward);
    train.def("combine", &combine);
    train.def("combine_backward", &combine_backward);
    train.def("route", &train_route);
    train.def("route_backward", &route_backward);
    train.def("cross_entropy", &cross_entropy);
    train.def("cross_entropy_backward", &cross_entropy_backward);
}
