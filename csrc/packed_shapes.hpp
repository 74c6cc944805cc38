// What a packed kernel is compiled for, and which of its variants a code takes; shared by the instruction sets.
//
// `Variants` is a struct in the anonymous namespace of the file of one set, so what is made of it here stays in that
// file: code under its flags never serves another's.
#pragma once

#include <algorithm>

#include "packed.hpp"

namespace duomo {

template <int phases_, int reach2_, bool is_wide_, bool is_short_>
struct Shape {
    static constexpr int phases = phases_, reach2 = reach2_;
    static constexpr bool is_wide = is_wide_, is_short = is_short_;
    static constexpr bool goes_short(int p) { return is_short && p >= reach2; }
};

// [is_short][reach2]: what reaches further cannot be short.
template <class Variants, int phases, bool is_wide>
constexpr typename Variants::Variant variants_of[2][4] = {
    {Variants::template of<Shape<phases, 0, is_wide, false>>, Variants::template of<Shape<phases, 1, is_wide, false>>,
     Variants::template of<Shape<phases, std::min(2, phases - 1), is_wide, false>>,
     Variants::template of<Shape<phases, std::min(3, phases - 1), is_wide, false>>},
    {Variants::template of<Shape<phases, 0, is_wide, true>>, Variants::template of<Shape<phases, 1, is_wide, true>>}};

template <class Variants>
const typename Variants::Variant& choose(const TrellisCode& code) {
    const int is_short = code.is_short && code.reach2 < 2;
    if (code.bits == 4)
        return (code.is_wide ? variants_of<Variants, 2, true> : variants_of<Variants, 2, false>)[is_short][code.reach2];
    return (code.is_wide ? variants_of<Variants, 4, true> : variants_of<Variants, 4, false>)[is_short][code.reach2];
}

}  // namespace duomo
