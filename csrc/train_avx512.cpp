#if defined(__AVX512F__)
#include "train_attention.hpp"
#include "train_products.hpp"
#include "train_rows.hpp"

namespace {
constexpr duomo::TrainKernels kernels = {
    multiply,        attention, attention_backward, rmsnorm, rmsnorm_backward, rotate,        swiglu,
    swiglu_backward, combine,   combine_backward,   route,   route_backward,   cross_entropy, cross_entropy_backward,
};
}
const duomo::TrainKernels* const duomo::train_avx512 = &kernels;
#else
#include "train.hpp"

const duomo::TrainKernels* const duomo::train_avx512 = nullptr;
#endif
