// duomo._native: the one Python module. Each room of csrc binds its own functions.
#include <nanobind/nanobind.h>

void bind_kernels(nanobind::module_& m);
void bind_vision(nanobind::module_& m);
void bind_decoder(nanobind::module_& m);
void bind_train(nanobind::module_& m);
#ifdef DUOMO_HAS_TRELLIS
void bind_trellis(nanobind::module_& m);
#endif

NB_MODULE(_native, m) {
    m.doc() = "duomo's native kernels: plain C++ over raw pointers";
    nanobind::set_leak_warnings(false);  // an engine left open at the interpreter's end is no fault of a user's
    bind_kernels(m);
    bind_vision(m);
    bind_decoder(m);
    bind_train(m);
#ifdef DUOMO_HAS_TRELLIS
    bind_trellis(m);
#endif
}
