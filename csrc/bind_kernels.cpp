#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include "cpu.hpp"
namespace nb = nanobind;
void bind_kernels(nb::module_& m) {
    m.def("best_isa", [] { return std::string(duomo::isa_name(duomo::best_isa())); });
}
