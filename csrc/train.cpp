#include "train.hpp"

#include "cpu.hpp"

namespace duomo {

const TrainKernels* train_kernels() { return current_isa() == Isa::avx512 ? train_avx512 : nullptr; }

}  // namespace duomo
