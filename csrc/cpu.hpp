// Which instruction sets this machine has, and which one the kernels use. Asked of the processor once, at load.
#pragma once

#include <string>

namespace duomo {

// In rising order, so that a cap is a minimum. `neon` stands beside the x86-64 sets: no machine has both.
enum class Isa { portable, avx2, avx512, neon };

// The best set both the machine and this build have. avx512 means F, BW, DQ, VL, VBMI, VNNI, BF16 and GFNI together
// (Zen 4 on, Ice Lake servers but for BF16: those take avx2); avx2 includes FMA.
Isa best_isa();

// The set in use. `set_isa` lowers it to a cap by name and never raises it above the machine's; "" takes the best.
Isa current_isa();
void set_isa(const std::string& cap);

const char* isa_name(Isa isa);

}  // namespace duomo
