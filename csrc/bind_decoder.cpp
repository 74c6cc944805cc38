// Python's door to the fused decoder: layers are added one by one, then `run` takes a step's addresses.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <algorithm>

#include "bind.hpp"
#include "decoder.hpp"

namespace nb = nanobind;

namespace {

using namespace duomo;

void make_dense(Dense* self, Array<float> weight, std::optional<Array<float>> bias, int form) {
    const size_t ndim = weight.ndim();
    if (ndim != 2 && ndim != 3) throw nb::value_error("a matrix [N, K], or a bank [E, N, K]");
    if (form < 0 || form > 2) throw nb::value_error("a form is 0, 1 or 2");
    DenseBank bank = {weight.data(), nullptr, bias ? bias->data() : nullptr, ndim == 3 ? int64_t(weight.shape(0)) : 1,
                      int64_t(weight.shape(ndim - 2)), int64_t(weight.shape(ndim - 1)), DenseForm(form)};
    if (bias && (ndim == 3 || int64_t(bias->size()) != bank.rows)) throw nb::value_error("a bias is [N]");
    auto* own = new (self) Dense{weight, bias, {}, bank};
    if (bank.form == DenseForm::borrowed) return;
    own->pairs.resize(size_t(bank.count * DenseBank::num_pairs(bank.rows, bank.columns)));
    pack_panels(bank.weight, bank.count, bank.rows, bank.columns, own->pairs.data());
    own->bank.pairs = own->pairs.data();
    own->bank.weight = nullptr;
    own->weight = {};
}

// x[T][K] times a single matrix into y[T][N].
void dense_linear(const Dense& self, Address x, int64_t tokens, Address y) {
    nb::gil_scoped_release release;
    const DenseProduct product = product_of(self.bank, 0, at<float>(x), nullptr, tokens, at<float>(y));
    multiply_each(&product, 1);
}

// The stack, and the Python objects whose memory it points into. `Stored` is Trellis or Dense.
template <class Stored>
struct Decoder {
    using Bank = decltype(Stored::bank);
    DecoderStack<Bank> stack;
    Ends ends;  // of a plain one, where it has been told them
    std::vector<nb::object> kept;

    const Bank* bank(nb::handle object, int64_t rows, int64_t columns) {
        if (object.is_none()) return nullptr;
        const Bank& own = nb::cast<const Stored&>(object).bank;
        if ((rows && own.rows != rows) || (columns && own.columns != columns))
            throw nb::value_error("a matrix of a layer has another shape");
        kept.push_back(nb::borrow(object));
        return &own;
    }

    const float* array(nb::handle object, int64_t size) {
        const auto own = nb::cast<Array<float>>(object);
        if (int64_t(own.size()) != size) throw nb::value_error("a vector of a layer has another length");
        kept.push_back(nb::cast(own));
        return own.data();
    }

    RoutedBank<Bank> routed(nb::handle object) {
        if (object.is_none()) return {};
        const auto parts = nb::cast<nb::tuple>(object);  // router, bias, gate_up, down
        RoutedBank<Bank> own;
        own.gate_up = bank(parts[2], 0, stack.width);
        own.down = bank(parts[3], stack.width, own.gate_up->rows / 2);
        if (own.gate_up->count != own.down->count || own.gate_up->rows % 2 || stack.chosen > own.gate_up->count)
            throw nb::value_error("gate_up must be [E, 2F, D] and down [E, D, F]");
        own.router = array(parts[0], own.gate_up->count * stack.width);
        own.bias = array(parts[1], own.gate_up->count);
        return own;
    }

    Mlp<Bank> mlp(nb::handle object) {
        if (object.is_none()) return {};
        const auto parts = nb::cast<nb::tuple>(object);  // gate, up, down
        Mlp<Bank> own;
        own.gate = bank(parts[0], 0, stack.width);
        own.up = bank(parts[1], own.gate->rows, stack.width);
        own.down = bank(parts[2], stack.width, own.gate->rows);
        return own;
    }
};

template <class Stored>
void make_decoder(Decoder<Stored>* self, nb::object norm, int64_t width, int64_t num_heads, int64_t groups,
                  int64_t head_dim, int64_t chosen, float eps, float norm_min) {
    if (groups < 1 || num_heads % groups || head_dim % 16) throw nb::value_error("heads do not divide");
    auto* own = new (self) Decoder<Stored>{};
    own->stack = {{}, nullptr, width, num_heads, groups, head_dim, chosen, eps, norm_min};
    own->stack.norm = own->array(norm, width);
}

template <class Stored>
void add_layer(Decoder<Stored>& self, nb::tuple norms, nb::tuple attention, nb::object text, nb::object vision,
               nb::object mlp) {
    const auto& stack = self.stack;
    const int64_t wide = stack.num_heads * stack.head_dim, narrow = stack.groups * stack.head_dim;
    DecoderLayer<typename Decoder<Stored>::Bank> layer{};
    layer.input_norm = self.array(norms[0], stack.width);
    layer.post_norm = self.array(norms[1], stack.width);
    layer.q = self.bank(attention[0], wide, stack.width);
    layer.k = self.bank(attention[1], narrow, stack.width);
    layer.v = self.bank(attention[2], narrow, stack.width);
    layer.o = self.bank(attention[3], stack.width, wide);
    layer.text = self.routed(text);
    layer.vision = self.routed(vision);
    layer.mlp = self.mlp(mlp);
    if (!layer.text.router && !layer.mlp.gate) throw nb::value_error("a layer needs a bank or an MLP");
    self.stack.layers.push_back(layer);
}

bool are_within(const int64_t* x, int64_t count, int64_t low, int64_t high) {
    return std::all_of(x, x + count, [=](int64_t value) { return low <= value && value < high; });
}

// Every row, slot, sequence, length and page lies inside what it points into.
bool fits(const StepTokens& step, const PagedStore& store, int64_t sequences) {
    return are_within(step.slots, step.tokens, 0, store.slots) && are_within(step.sequence, step.tokens, 0, sequences) &&
           are_within(step.num_keys, step.tokens, 1, step.table_width * store.page_size + 1) &&
           are_within(step.pages, sequences * step.table_width, 0, store.slots / store.page_size) &&
           are_within(step.text_rows, step.num_text, 0, step.tokens) &&
           are_within(step.vision_rows, step.num_vision, 0, step.tokens) &&
           are_within(step.wanted, std::max<int64_t>(step.num_wanted, 0), 0, step.tokens);
}

PagedStore paged_store(nb::tuple store) {
    const auto address = [&](int item) { return nb::cast<Address>(store[item]); };
    const auto number = [&](int item) { return nb::cast<int64_t>(store[item]); };
    return {at<void>(address(0)),  at<void>(address(1)),          at<float>(address(2)),
            at<float>(address(3)), duomo::Stored(int(number(4))), number(5),
            number(6)};
}

// Shapes are checked by duomo.kernels.cpu.decoder. False, and nothing done, where a number lies outside.
template <class Kind>
bool run(const Decoder<Kind>& self, Address hidden, Address out, int64_t tokens, nb::tuple angles, nb::tuple store,
         nb::tuple table, nb::tuple rows, Address expert_ids, nb::tuple wanted) {
    const auto address = [](nb::handle item) { return nb::cast<Address>(item); };
    const auto number = [](nb::handle item) { return nb::cast<int64_t>(item); };
    const PagedStore paged = paged_store(store);
    const StepTokens step = {tokens,
                             at<float>(address(angles[0])),
                             at<float>(address(angles[1])),
                             at<int64_t>(address(table[0])),
                             at<int64_t>(address(table[1])),
                             number(table[3]),
                             at<int64_t>(address(table[4])),
                             at<int64_t>(address(table[5])),
                             at<int64_t>(address(rows[0])),
                             at<int64_t>(address(rows[1])),
                             number(rows[2]),
                             number(rows[3]),
                             at<int64_t>(expert_ids),
                             at<int64_t>(address(wanted[0])),
                             number(wanted[1])};
    if (!fits(step, paged, number(table[2]))) return false;
    nb::gil_scoped_release release;
    run_decoder(self.stack, paged, step, at<float>(hidden), at<float>(out));
    return true;
}

void set_ends(Decoder<Dense>& self, Array<float> embedding, nb::handle head) {
    const Dense& own = nb::cast<const Dense&>(head);
    if (own.bank.rows * self.stack.width != int64_t(embedding.size()) || own.bank.columns != self.stack.width)
        throw nb::value_error("embedding and head are [V, D]");
    self.kept.push_back(nb::cast(embedding));
    self.kept.push_back(nb::borrow(head));
    self.ends = {embedding.data(), &own.bank};
}

// As `run`. `angles` are cos, sin and how many positions they have; `table` the pages of each sequence and its width.
bool next(const Decoder<Dense>& self, int64_t sequences, Address ids, Address positions, Address num_keys,
          nb::tuple angles, nb::tuple store, nb::tuple table, Address logits, Address likeliest) {
    const PagedStore paged = paged_store(store);
    const NextTokens tokens = {sequences,
                               at<int64_t>(ids),
                               at<int64_t>(positions),
                               at<int64_t>(num_keys),
                               at<int64_t>(nb::cast<Address>(table[0])),
                               nb::cast<int64_t>(table[1]),
                               at<float>(nb::cast<Address>(angles[0])),
                               at<float>(nb::cast<Address>(angles[1])),
                               at<float>(logits),
                               at<int64_t>(likeliest)};
    if (!self.ends.head || !are_within(tokens.ids, sequences, 0, self.ends.head->rows) ||
        !are_within(tokens.positions, sequences, 0, nb::cast<int64_t>(angles[2])) ||
        !are_within(tokens.num_keys, sequences, 1, tokens.table_width * paged.page_size + 1) ||
        !are_within(tokens.pages, sequences * tokens.table_width, 0, paged.slots / paged.page_size))
        return false;
    nb::gil_scoped_release release;
    run_next(self.stack, self.ends, paged, tokens);
    return true;
}

template <class Stored>
nb::class_<Decoder<Stored>> bind_one(nb::module_& m, const char* name, const char* text) {
    return nb::class_<Decoder<Stored>>(m, name, text)
        .def("__init__", &make_decoder<Stored>, nb::arg("norm"), nb::arg("width"), nb::arg("num_heads"),
             nb::arg("groups"), nb::arg("head_dim"), nb::arg("chosen"), nb::arg("eps"), nb::arg("norm_min"))
        .def("add_layer", &add_layer<Stored>, nb::arg("norms"), nb::arg("attention"), nb::arg("text").none(),
             nb::arg("vision").none(), nb::arg("mlp").none())
        .def("run", &run<Stored>);
}

}  // namespace

void bind_decoder(nb::module_& m) {
    nb::class_<Dense>(m, "Dense", "A plain matrix, or a bank of them.")
        .def("__init__", &make_dense, nb::arg("weight"), nb::arg("bias").none(), nb::arg("form"))
        .def("linear", &dense_linear, nb::arg("x"), nb::arg("tokens"), nb::arg("y"));
    bind_one<Trellis>(m, "Decoder", "All layers of a packed decoder as one call.");
    bind_one<Dense>(m, "DenseDecoder", "All layers of a plain decoder as one call.")
        .def("set_ends", &set_ends, nb::arg("embedding"), nb::arg("head"))
        .def("next", &next);
}
