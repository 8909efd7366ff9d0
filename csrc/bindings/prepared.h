// Calls of `moe` and `linear` for which all has been looked up that stays the same from token to token. In
// Python that takes some 15 us with warm caches, and 80 to 160 where the weights that stream through them
// leave nothing of the interpreter there: 5 to 8 % of one token's time.
//
// Weights hold what was prepared as their attribute `prepared`. A prepared call serves plain tensors like
// those that it was prepared for, where torch has nothing to see of it; it returns None for all else, and
// where the operator raises an error, so that the long way says what is wrong.
#pragma once

#include <pybind11/pybind11.h>

namespace ktcore {

// Adds to the module:
//
//   prepare_moe(generation, isa, packed, hidden_states, biases, activation, code, exact)
//     For as many tokens as `hidden_states` has, of its type, for this activation, whose number is `code`, and
//     this `exact`. `biases`: a tensor or None for each of gate, up and down. None if this torch offers no way
//     to look into its tensors.
//   prepared_moe(experts, hidden_states, topk_ids, topk_weights, activation, exact)
//
//   prepare_linear(generation, isa, packed, x, exact), prepared_linear(weight, x, bias, exact)
//     The same; `bias` is a float32 tensor or None.
//
//   set_generation(number)
//     Nothing holds that was prepared for another generation of choices.
//   set_hindrances(variables)
//     Nothing that was prepared serves where one of these context variables is set.
void def_prepared(pybind11::module_& m);

}  // namespace ktcore
