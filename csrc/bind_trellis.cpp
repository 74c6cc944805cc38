// Python's door to the encoder. Arguments are checked here, once; the GIL is released while it runs.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <memory>
#include <string>

#include "viterbi.hpp"

namespace nb = nanobind;

namespace {

template <class T, int rank>
using Array = nb::ndarray<const T, nb::ndim<rank>, nb::c_contig, nb::device::cpu>;
using Symbols = nb::ndarray<nb::numpy, uint8_t, nb::ndim<2>>;

Symbols viterbi_encode(Array<uint16_t, 2> targets, Array<uint8_t, 1> columns, Array<uint16_t, 1> levels, int bits,
                       int seam_steps, int num_turns, int num_threads, const std::string& isa) {
    const int window = int(columns.shape(0));
    int index_bits = 0;
    while (size_t(1) << index_bits < levels.shape(0)) ++index_bits;
    if ((bits != 2 && bits != 4) || window > 16 || window % bits || window < 2 * bits + 2)
        throw nb::value_error("the native encoder needs 2 or 4 bits and a window of 2 * bits + 2 to 16");
    if (size_t(1) << index_bits != levels.shape(0) || index_bits < bits || index_bits > 8)
        throw nb::value_error("the native encoder needs a codebook of 2^m levels, bits <= m <= 8");
    if (seam_steps < 0) throw nb::value_error("seam_steps must not be negative");
    if (num_turns < 1) throw nb::value_error("num_turns must be at least 1");
    for (int bit = 0; bit < bits; ++bit) {
        const int top = 1 << (index_bits - bits + bit);
        if (columns.data()[bit] != top || columns.data()[window - bits + bit] != top)
            throw nb::value_error("columns of the newest and oldest symbol must be the top index bits");
    }
    for (int bit = 0; bit < window; ++bit)
        if (columns.data()[bit] >> index_bits) throw nb::value_error("a column lies outside the codebook");
    const int64_t num_streams = int64_t(targets.shape(0)), steps = int64_t(targets.shape(1));
    auto symbols = std::make_unique<uint8_t[]>(size_t(num_streams * steps));
    const duomo::viterbi::Code code{bits, window, index_bits, columns.data(), levels.data()};
    {
        nb::gil_scoped_release release;
        duomo::viterbi::encode(code, targets.data(), num_streams, steps, seam_steps, num_turns, symbols.get(),
                               num_threads, isa.c_str());
    }
    uint8_t* data = symbols.release();
    nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<uint8_t*>(p); });
    return Symbols(data, {size_t(num_streams), size_t(steps)}, owner);
}

}  // namespace

void bind_trellis(nb::module_& m) {
    m.def("viterbi_encode", &viterbi_encode, nb::arg("targets"), nb::arg("columns"), nb::arg("levels"), nb::arg("bits"),
          nb::arg("seam_steps"), nb::arg("num_turns"), nb::arg("num_threads"), nb::arg("isa"),
          "Fixed-point targets uint16 [S, T] -> symbols uint8 [S, T] of tail-biting streams.");
}
