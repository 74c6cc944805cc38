// What the bind_*.cpp share: arrays that come from Python, addresses of activations, and matrices that keep the
// arrays they point into alive.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <optional>
#include <vector>

#include "dense.hpp"
#include "experts.hpp"

namespace duomo {

template <class T>
using Array = nanobind::ndarray<const T, nanobind::c_contig, nanobind::device::cpu>;
using Address = uintptr_t;  // of fp32 or int64 data, checked by duomo.kernels.cpu

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

struct Trellis {
    Array<uint8_t> codes;
    Array<uint16_t> row_scale;
    TrellisBank bank;
};

struct Integers {
    Array<uint8_t> codes;
    Array<uint16_t> row_scale;
    IntRows bank;
};

// A plain matrix [N, K] or bank [E, N, K], and a bias [N] or none; borrowed, or copied into panels.
struct Dense {
    Array<float> weight;
    std::optional<Array<float>> bias;
    std::vector<uint32_t> pairs;
    DenseBank bank;
};

}  // namespace duomo
