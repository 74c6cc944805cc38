// Python's door to the kernels. Objects keep the arrays they point into alive; pointers of activations come as
// integers, checked by duomo.kernels.cpu, so that a call costs a microsecond. The GIL is released while they run.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <stdexcept>
#include <string>

#include "attention.hpp"
#include "bind.hpp"
#include "cpu.hpp"
#include "decoder.hpp"
#include "experts.hpp"
#include "pool.hpp"
#include "reader.hpp"
#include "rotate.hpp"

namespace nb = nanobind;

namespace {

using namespace duomo;

Memory<float> copied(const Array<float>& signs, int64_t columns) {
    if (signs.size() != 0 && int64_t(signs.size()) != columns) throw nb::value_error("one sign a column, or none");
    return {signs.data(), signs.data() + signs.size()};
}

void check_block(int64_t columns, int block) {
    const bool is_known = block == 16 || block == 32 || block == 64 || block == 128;
    if (columns <= 0 || !is_known || columns % block) throw nb::value_error("columns must be whole blocks of 16 to 128");
}

void make_trellis(Trellis* self, int bits, Array<uint8_t> code_columns, Array<int8_t> codebook, float unit,
                  Array<uint8_t> codes, Array<uint16_t> row_scale, int64_t count, int64_t rows, int64_t columns,
                  int chain, int block, Array<float> signs) {
    check_block(columns, block);
    TrellisBank bank{make_code(bits, int(code_columns.size()), code_columns.data(), int(codebook.size()), codebook.data()),
                     codes.data(), row_scale.data(), unit, count, rows, columns, chain, block, copied(signs, columns)};
    if (count < 1 || rows < 1 || rows % (16 * bank.code.phases)) throw nb::value_error("rows must be whole tiles");
    if (int64_t(codes.size()) != count * rows * columns * bits / 8 || int64_t(row_scale.size()) != count * rows)
        throw nb::value_error("codes or scales are not of the size that the shape wants");
    if (chain < 1 || columns / kBlockInputs % chain) throw nb::value_error("chains must divide the column blocks");
    new (self) Trellis{codes, row_scale, std::move(bank)};
}

void make_integers(Integers* self, Array<uint8_t> codes, Array<uint16_t> row_scale, int bits, int block,
                   Array<float> signs) {
    if (bits != 6 && bits != 8) throw nb::value_error("integers have 6 or 8 bits");
    if (codes.ndim() != 2 || row_scale.size() != codes.shape(0))
        throw nb::value_error("codes [N, K * bits / 8] and scales [N]");
    const int64_t rows = int64_t(codes.shape(0)), columns = int64_t(codes.shape(1)) * 8 / bits;
    check_block(columns, block);
    const IntMatrix matrix = {codes.data(), row_scale.data(), rows, columns, block, bits};
    new (self) Integers{codes, row_scale, {matrix, copied(signs, columns)}};
}

void trellis_linear(const Trellis& self, int64_t expert, Address x, int64_t tokens, Address y) {
    if (expert < 0 || expert >= self.bank.count) throw nb::index_error("no such matrix in the bank");
    nb::gil_scoped_release release;
    static thread_local ActivationBuffer buffer;
    const TrellisBank& bank = self.bank;
    linear(bank.matrix(expert), buffer.fill(at<float>(x), bank.signs_or_null(), tokens, bank.columns, bank.block),
           at<float>(y));
}

void integers_linear(const Integers& self, Address x, int64_t tokens, Address y) {
    nb::gil_scoped_release release;
    static thread_local ActivationBuffer buffer;
    const IntMatrix& matrix = self.bank.matrix;
    linear(matrix, buffer.fill(at<float>(x), self.bank.signs_or_null(), tokens, matrix.columns, matrix.block),
           at<float>(y));
}

// Rows of a matrix, turned back: out[count][columns].
void integers_rows(const Integers& self, Address ids, int64_t count, Address out) {
    const IntMatrix& matrix = self.bank.matrix;
    for (int64_t i = 0; i < count; ++i)
        if (at<int64_t>(ids)[i] < 0 || at<int64_t>(ids)[i] >= matrix.rows) throw nb::index_error("no such row");
    nb::gil_scoped_release release;
    for (int64_t i = 0; i < count; ++i) {
        float* row = at<float>(out) + i * matrix.columns;
        open_row(matrix, at<int64_t>(ids)[i], row);
        if (const float* signs = self.bank.signs_or_null())
            rotate_kernels().unrotate(row, signs, matrix.columns, matrix.block);
    }
}

void run_experts(const Trellis& gate_up, const Trellis& down, Address hidden, Address expert_ids, Address weights,
                 int64_t tokens, int64_t chosen, Address out) {
    const TrellisBank &a = gate_up.bank, &b = down.bank;
    if (a.count != b.count || a.rows != 2 * b.columns || a.columns != b.rows)
        throw nb::value_error("gate_up must be [E, 2F, D] and down [E, D, F]");
    for (int64_t i = 0; i < tokens * chosen; ++i)
        if (at<int64_t>(expert_ids)[i] < 0 || at<int64_t>(expert_ids)[i] >= a.count)
            throw nb::index_error("an expert's number is not in the bank");
    nb::gil_scoped_release release;
    experts(a, b, at<float>(hidden), at<int64_t>(expert_ids), at<float>(weights), tokens, chosen, at<float>(out));
}

void check_mlp(const TrellisBank& gate, const TrellisBank& up, const TrellisBank& down) {
    if (gate.rows != up.rows || gate.columns != up.columns || down.columns != gate.rows)
        throw nb::value_error("gate and up must be [F, D] and down [D, F]");
}

void run_mlp(const Trellis& gate, const Trellis& up, const Trellis& down, Address x, int64_t tokens, Address out) {
    check_mlp(gate.bank, up.bank, down.bank);
    nb::gil_scoped_release release;
    mlp({&gate.bank, &up.bank, &down.bank}, at<float>(x), tokens, at<float>(out));
}

// Normed hidden states to rotated queries, rotated keys and values.
void run_qkv(const Trellis& q, const Trellis& k, const Trellis& v, Address x, int64_t tokens, int64_t head_dim,
             Address cos, Address sin, Address query, Address key, Address value) {
    if (q.bank.columns != k.bank.columns || k.bank.columns != v.bank.columns || q.bank.rows % head_dim ||
        k.bank.rows % head_dim)
        throw nb::value_error("q, k and v take the same inputs and give whole heads");
    nb::gil_scoped_release release;
    const TrellisBank* const banks[3] = {&q.bank, &k.bank, &v.bank};
    float* const y[3] = {at<float>(query), at<float>(key), at<float>(value)};
    linear_shared(banks, 3, at<float>(x), tokens, y);
    for (int part = 0; part < 2; ++part)
        rotate_heads(y[part], tokens, banks[part]->rows, head_dim, at<float>(cos), at<float>(sin));
}

void run_route(Address x, Address router, Address bias, int64_t tokens, int64_t width, int64_t num_experts,
               int64_t chosen, float norm_min, Address expert_ids, Address weights) {
    if (chosen < 1 || chosen > num_experts) throw nb::value_error("as many experts are chosen as there are, at most");
    nb::gil_scoped_release release;
    route(at<float>(x), at<float>(router), at<float>(bias), tokens, width, num_experts, chosen, norm_min,
          at<int64_t>(expert_ids), at<float>(weights));
}

// Shapes and page numbers are checked by duomo.kernels.cpu.attention.
void run_paged_attention(Address query, Address key, Address value, Address key_scale, Address value_scale, int stored,
                         Address pages, int64_t table_width, int64_t page_size, Address sequence, Address num_keys,
                         int64_t tokens, int64_t num_heads, int64_t groups, int64_t head_dim, Address out) {
    if (groups < 1 || num_heads % groups || head_dim % 16) throw nb::value_error("heads do not divide");
    nb::gil_scoped_release release;
    const CacheSide keys = {at<void>(key), at<float>(key_scale), Stored(stored), groups, head_dim};
    const CacheSide values = {at<void>(value), at<float>(value_scale), Stored(stored), groups, head_dim};
    paged_attention(at<float>(query), keys, values, at<int64_t>(pages), table_width, page_size, at<int64_t>(sequence),
                    at<int64_t>(num_keys), tokens, num_heads, at<float>(out));
}

void run_rmsnorm(Address x, Address weight, float eps, int64_t tokens, int64_t width, Address out) {
    nb::gil_scoped_release release;
    for (int64_t t = 0; t < tokens; ++t)
        rotate_kernels().rmsnorm(at<float>(x) + t * width, at<float>(weight), eps, width, at<float>(out) + t * width);
}

void run_rotate_quantize(Address x, Array<float> signs, int64_t tokens, int64_t columns, int block, Address q,
                         Address scale, Address sum) {
    check_block(columns, block);
    const Memory<float> own = copied(signs, columns);
    for (int64_t t = 0; t < tokens; ++t)
        rotate_kernels().rotate_quantize(at<float>(x) + t * columns, own.empty() ? nullptr : own.data(), columns, block,
                                         at<int8_t>(q) + t * columns, at<float>(scale) + t * (columns / block),
                                         at<int32_t>(sum) + t * (columns / block));
}

}  // namespace

void bind_kernels(nb::module_& m) {
    m.def("best_isa", [] { return std::string(isa_name(best_isa())); });
    m.def("current_isa", [] { return std::string(isa_name(current_isa())); });
    m.def("set_isa", &set_isa, nb::arg("cap"));
    m.def("num_threads", &num_threads);
    m.def("set_num_threads", &set_num_threads, nb::arg("count"));
    m.def("rotate_quantize", &run_rotate_quantize);
    m.def("experts", &run_experts);
    m.def("mlp", &run_mlp);
    m.def("qkv", &run_qkv);
    m.def("route", &run_route);
    m.def("rmsnorm", &run_rmsnorm);
    m.def("paged_attention", &run_paged_attention);
    m.def("read_all", [](Array<uint8_t> data) {
        nb::gil_scoped_release release;
        return read_all(data.data(), int64_t(data.size()));
    });
    nb::class_<Trellis>(m, "Trellis", "A trellis-coded matrix, or a bank of them.")
        .def("__init__", &make_trellis, nb::arg("bits"), nb::arg("code_columns"), nb::arg("codebook"), nb::arg("unit"),
             nb::arg("codes"), nb::arg("row_scale"), nb::arg("count"), nb::arg("rows"), nb::arg("columns"),
             nb::arg("chain"), nb::arg("block"), nb::arg("signs"))
        .def("linear", &trellis_linear, nb::arg("expert"), nb::arg("x"), nb::arg("tokens"), nb::arg("y"));
    nb::class_<Integers>(m, "Integers", "A matrix of 8- or 6-bit integers with one scale a row.")
        .def("__init__", &make_integers, nb::arg("codes"), nb::arg("row_scale"), nb::arg("bits"), nb::arg("block"),
             nb::arg("signs"))
        .def("linear", &integers_linear, nb::arg("x"), nb::arg("tokens"), nb::arg("y"))
        .def("rows", &integers_rows, nb::arg("ids"), nb::arg("count"), nb::arg("out"));
}
