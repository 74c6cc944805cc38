#include "cpu.hpp"

#include <atomic>
#include <stdexcept>

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace duomo {
namespace {

std::atomic<Isa> current{best_isa()};

Isa named(const std::string& name) {
    for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512, Isa::neon})
        if (name == isa_name(isa)) return isa;
    throw std::invalid_argument("no instruction set " + name + "; there are portable, avx2, avx512 and neon");
}

}  // namespace

Isa best_isa() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni") &&
                        __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("gfni");
    return avx2 && avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::portable;
#elif defined(__aarch64__) && defined(__linux__)
    return getauxval(AT_HWCAP) & HWCAP_ASIMDDP ? Isa::neon : Isa::portable;
#else
    return Isa::portable;
#endif
}

Isa current_isa() { return current.load(std::memory_order_relaxed); }

void set_isa(const std::string& cap) {
    const Isa best = best_isa();
    Isa wanted = cap.empty() ? best : named(cap);
    const bool other_family = (wanted == Isa::neon) != (best == Isa::neon) && wanted != Isa::portable;
    if (other_family || wanted > best) wanted = best;
    current.store(wanted, std::memory_order_relaxed);
}

const char* isa_name(Isa isa) {
    switch (isa) {
        case Isa::portable: return "portable";
        case Isa::avx2: return "avx2";
        case Isa::avx512: return "avx512";
        case Isa::neon: return "neon";
    }
    return "";
}

}  // namespace duomo
