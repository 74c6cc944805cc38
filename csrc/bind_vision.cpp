// Python's door to the vision tower. Addresses are checked by duomo.kernels.cpu.vision, shapes of weights here.
#include <nanobind/nanobind.h>

#include "bind.hpp"
#include "vision.hpp"

namespace nb = nanobind;

namespace {

using namespace duomo;

struct Norm {
    Array<float> weight, bias;
    float eps;

    VisionNorm view(int64_t width) const {
        if (int64_t(weight.size()) != width || int64_t(bias.size()) != width)
            throw nb::value_error("a norm has one weight and one bias a column");
        return {weight.data(), bias.data(), eps};
    }
};

VisionLinear view(const Integers& layer, const Array<float>& bias, int64_t rows, int64_t columns) {
    const IntMatrix& matrix = layer.rows.matrix;
    if (matrix.rows != rows || matrix.columns != columns || int64_t(bias.size()) != rows || rows % 16)
        throw nb::value_error("the block's matrices and biases do not fit one another");
    return {&layer.rows, bias.data()};
}

Heads checked(int64_t num_heads, int64_t head_dim) {
    if (num_heads < 1 || head_dim < 16 || head_dim > 128 || head_dim % 16)
        throw nb::value_error("heads must be 16, 32, ... 128 wide");
    return {num_heads, head_dim};
}

Frames view(const Array<int64_t>& lengths) { return {lengths.data(), int64_t(lengths.size())}; }

int64_t sum(const Array<int64_t>& lengths) {
    int64_t patches = 0;
    for (size_t i = 0; i < lengths.size(); ++i) {
        if (lengths.data()[i] < 1) throw nb::value_error("a frame has at least one patch");
        patches += lengths.data()[i];
    }
    return patches;
}

void run_frame_attention(VisionScratch& scratch, Address query, Address key, Address value, Array<int64_t> lengths,
                         int64_t num_heads, int64_t head_dim, Address out) {
    const Heads heads = checked(num_heads, head_dim);
    sum(lengths);
    nb::gil_scoped_release release;
    frame_attention(scratch, at<float>(query), at<float>(key), at<float>(value), view(lengths), heads, at<float>(out));
}

void run_vision_attention(VisionScratch& scratch, Address hidden, const Norm& norm, const Integers& qkv,
                          Array<float> qkv_bias, const Integers& out, Array<float> out_bias, Address cos, Address sin,
                          Array<int64_t> lengths, int64_t num_heads, int64_t head_dim) {
    const Heads heads = checked(num_heads, head_dim);
    const int64_t width = num_heads * head_dim;
    const VisionLinear first = view(qkv, qkv_bias, 3 * width, width), second = view(out, out_bias, width, width);
    const VisionNorm own = norm.view(width);
    sum(lengths);
    nb::gil_scoped_release release;
    vision_attention(scratch, at<float>(hidden), own, first, second, at<float>(cos), at<float>(sin), view(lengths),
                     heads);
}

void run_vision_mlp(VisionScratch& scratch, Address hidden, int64_t patches, const Norm& norm, const Integers& fc1,
                    Array<float> fc1_bias, const Integers& fc2, Array<float> fc2_bias) {
    const int64_t width = fc1.rows.matrix.columns, size = fc1.rows.matrix.rows;
    const VisionLinear first = view(fc1, fc1_bias, size, width), second = view(fc2, fc2_bias, width, size);
    const VisionNorm own = norm.view(width);
    nb::gil_scoped_release release;
    vision_mlp(scratch, at<float>(hidden), patches, own, first, second);
}

}  // namespace

void bind_vision(nb::module_& m) {
    nb::class_<VisionScratch>(m, "VisionScratch", "Memory of one pass through the tower.").def(nb::init<>());
    nb::class_<Norm>(m, "Norm", "A LayerNorm's weight and bias.")
        .def(
            "__init__",
            [](Norm* self, Array<float> weight, Array<float> bias, float eps) { new (self) Norm{weight, bias, eps}; },
            nb::arg("weight"), nb::arg("bias"), nb::arg("eps"));
    m.def("frame_attention", &run_frame_attention);
    m.def("vision_attention", &run_vision_attention);
    m.def("vision_mlp", &run_vision_mlp);
}
