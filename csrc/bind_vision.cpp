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

int64_t rows_of(const IntRows& own) { return own.matrix.rows; }
int64_t rows_of(const DenseBank& own) { return own.rows; }
int64_t columns_of(const IntRows& own) { return own.matrix.columns; }
int64_t columns_of(const DenseBank& own) { return own.columns; }
bool is_one(const IntRows&) { return true; }
bool is_one(const DenseBank& own) { return own.count == 1 && !own.bias; }

// A block's weights, and the Python objects whose memory they point into. `Stored` is Integers or Dense.
template <class Stored>
struct Block {
    using Matrix = decltype(Stored::bank);
    VisionBlock<Matrix> own;
    std::vector<nb::object> kept;

    // `rows` 0: any number of them.
    VisionLinear<Matrix> linear(nb::handle object, nb::handle bias, int64_t rows, int64_t columns) {
        const Matrix& matrix = nb::cast<const Stored&>(object).bank;
        const auto added = nb::cast<Array<float>>(bias);
        if (!is_one(matrix) || (rows && rows_of(matrix) != rows) || columns_of(matrix) != columns ||
            int64_t(added.size()) != rows_of(matrix) || rows_of(matrix) % 16)
            throw nb::value_error("the block's matrices and biases do not fit one another");
        kept.push_back(nb::borrow(object));
        kept.push_back(nb::cast(added));
        return {&matrix, added.data()};
    }

    VisionNorm norm(nb::handle object, int64_t width) {
        kept.push_back(nb::borrow(object));
        return nb::cast<const Norm&>(object).view(width);
    }
};

// norms are two; matrices and biases those of qkv, out, fc1, fc2.
template <class Stored>
void make_block(Block<Stored>* self, nb::tuple norms, nb::tuple matrices, nb::tuple biases) {
    auto* block = new (self) Block<Stored>{};
    const int64_t width = columns_of(nb::cast<const Stored&>(matrices[0]).bank);
    block->own.norm1 = block->norm(norms[0], width);
    block->own.qkv = block->linear(matrices[0], biases[0], 3 * width, width);
    block->own.out = block->linear(matrices[1], biases[1], width, width);
    block->own.norm2 = block->norm(norms[1], width);
    block->own.fc1 = block->linear(matrices[2], biases[2], 0, width);
    block->own.fc2 = block->linear(matrices[3], biases[3], width, rows_of(*block->own.fc1.matrix));
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

void run_frame_attention(Address query, Address key, Address value, Array<int64_t> lengths, int64_t num_heads,
                         int64_t head_dim, bool is_rounded, Address out) {
    const Heads heads = checked(num_heads, head_dim);
    sum(lengths);
    nb::gil_scoped_release release;
    frame_attention(at<float>(query), at<float>(key), at<float>(value), view(lengths), heads, is_rounded,
                    at<float>(out));
}

template <class Stored>
Heads heads_of(const Block<Stored>& block, int64_t num_heads) {
    const int64_t width = columns_of(*block.own.qkv.matrix);
    if (num_heads < 1 || width % num_heads) throw nb::value_error("heads do not divide the width");
    return checked(num_heads, width / num_heads);
}

template <class Stored>
void run_attention(const Block<Stored>& self, Address hidden, Address cos, Address sin, Array<int64_t> lengths,
                   int64_t num_heads) {
    const Heads heads = heads_of(self, num_heads);
    sum(lengths);
    nb::gil_scoped_release release;
    VisionScratch scratch;
    vision_attention(scratch, at<float>(hidden), self.own, at<float>(cos), at<float>(sin), view(lengths), heads);
}

template <class Stored>
void run_mlp(const Block<Stored>& self, Address hidden, int64_t patches) {
    nb::gil_scoped_release release;
    VisionScratch scratch;
    vision_mlp(scratch, at<float>(hidden), patches, self.own);
}

// All blocks, and the ends of a plain tower.
template <class Stored>
struct Tower {
    VisionStack<decltype(Stored::bank)> stack;
    VisionEnds ends;
    std::vector<nb::object> kept;
};

template <class Stored>
void make_tower(Tower<Stored>* self, nb::list blocks, int64_t num_heads) {
    auto* tower = new (self) Tower<Stored>{};
    for (nb::handle object : blocks) {
        const auto& block = nb::cast<const Block<Stored>&>(object);
        tower->stack.heads = heads_of(block, num_heads);
        if (!tower->stack.blocks.empty() &&
            columns_of(*block.own.qkv.matrix) != columns_of(*tower->stack.blocks[0].qkv.matrix))
            throw nb::value_error("the blocks are not of one width");
        tower->stack.blocks.push_back(block.own);
        tower->kept.push_back(nb::borrow(object));
    }
}

template <class Stored>
void run_blocks(const Tower<Stored>& self, Address hidden, Address cos, Address sin, Array<int64_t> lengths) {
    sum(lengths);
    nb::gil_scoped_release release;
    run_blocks(self.stack, at<float>(hidden), at<float>(cos), at<float>(sin), view(lengths));
}

void set_ends(Tower<Dense>& self, nb::handle embed, nb::handle norm) {
    const DenseBank& own = nb::cast<const Dense&>(embed).bank;
    if (!is_one(own) || self.stack.blocks.empty() || own.rows != self.stack.heads.count * self.stack.heads.head_dim)
        throw nb::value_error("the embedding does not fit the blocks");
    self.ends = {&own, nb::cast<const Norm&>(norm).view(own.rows)};
    self.kept.push_back(nb::borrow(embed));
    self.kept.push_back(nb::borrow(norm));
}

void run_whole(const Tower<Dense>& self, Address patches, Address cos, Address sin, Array<int64_t> lengths,
               Address out) {
    if (!self.ends.embed) throw nb::value_error("the tower has no ends");
    sum(lengths);
    nb::gil_scoped_release release;
    run_tower(self.stack, self.ends, at<float>(patches), at<float>(cos), at<float>(sin), view(lengths), at<float>(out));
}

// A plain resampler, and the Python objects it points into.
struct PlainResampler {
    Resampler own;
    std::vector<nb::object> kept;

    const DenseBank* bank(nb::handle object, int64_t columns) {
        const DenseBank& bank = nb::cast<const Dense&>(object).bank;
        if (bank.count != 1 || bank.columns != columns)
            throw nb::value_error("the resampler's matrices do not fit one another");
        kept.push_back(nb::borrow(object));
        return &bank;
    }

    // `parts` are fc1, fc2 and the norm.
    VisionMerge merge(nb::tuple parts, int64_t columns) {
        const DenseBank* fc1 = bank(parts[0], columns);
        const DenseBank* fc2 = bank(parts[1], fc1->rows);
        if (fc1->rows % 16 || fc2->rows % 16) throw nb::value_error("a resampler's rows are whole vectors");
        kept.push_back(nb::borrow(parts[2]));
        return {fc1, fc2, nb::cast<const Norm&>(parts[2]).view(fc2->rows)};
    }
};

void make_resampler(PlainResampler* self, nb::tuple spatial, nb::tuple temporal, nb::handle project, Array<float> norm,
                    float eps) {
    auto* made = new (self) PlainResampler{};
    made->own.spatial = made->merge(spatial, columns_of(nb::cast<const Dense&>(spatial[0]).bank));
    made->own.temporal = made->merge(temporal, 2 * made->own.spatial.fc2->rows);
    made->own.project = made->bank(project, made->own.temporal.fc2->rows);
    if (int64_t(norm.size()) != made->own.project->rows) throw nb::value_error("a norm has one weight a column");
    made->own.norm = norm.data();
    made->own.norm_eps = eps;
    made->kept.push_back(nb::cast(norm));
}

void resample(const PlainResampler& self, Address blocks, int64_t num_blocks, Array<int64_t> earlier,
              Array<int64_t> later, Address out) {
    if (earlier.size() != later.size()) throw nb::value_error("a token is of two blocks");
    for (const auto& index : {earlier, later})
        for (size_t i = 0; i < index.size(); ++i)
            if (index.data()[i] < 0 || index.data()[i] >= num_blocks) throw nb::value_error("there is no such block");
    nb::gil_scoped_release release;
    run_resampler(self.own, at<float>(blocks), num_blocks, earlier.data(), later.data(), int64_t(earlier.size()),
                  at<float>(out));
}

template <class Stored>
nb::class_<Tower<Stored>> bind_one(nb::module_& m, const char* block, const char* tower) {
    nb::class_<Block<Stored>>(m, block, "A block's weights.")
        .def("__init__", &make_block<Stored>, nb::arg("norms"), nb::arg("matrices"), nb::arg("biases"))
        .def("attention", &run_attention<Stored>)
        .def("mlp", &run_mlp<Stored>);
    return nb::class_<Tower<Stored>>(m, tower, "All blocks of a tower as one call.")
        .def("__init__", &make_tower<Stored>, nb::arg("blocks"), nb::arg("num_heads"))
        .def("run_blocks", &::run_blocks<Stored>);
}

}  // namespace

void bind_vision(nb::module_& m) {
    nb::class_<Norm>(m, "Norm", "A LayerNorm's weight and bias.")
        .def(
            "__init__",
            [](Norm* self, Array<float> weight, Array<float> bias, float eps) { new (self) Norm{weight, bias, eps}; },
            nb::arg("weight"), nb::arg("bias"), nb::arg("eps"));
    m.def("frame_attention", &run_frame_attention);
    bind_one<Integers>(m, "VisionBlock", "Tower");
    bind_one<Dense>(m, "DenseVisionBlock", "DenseTower")
        .def("set_ends", &set_ends, nb::arg("embed"), nb::arg("norm"))
        .def("run", &run_whole);
    nb::class_<PlainResampler>(m, "DenseResampler", "A plain resampler as one call.")
        .def("__init__", &make_resampler, nb::arg("spatial"), nb::arg("temporal"), nb::arg("project"), nb::arg("norm"),
             nb::arg("eps"))
        .def("run", &resample);
}
