// Fills the table of one instruction set.
#include "kernels.h"

#include "attention_calls.h"

namespace meshserve::MESHSERVE_ISA {

extern const Kernels kernels;

const Kernels kernels = {
    .size = sizeof(Kernels),
    .isa = MESHSERVE_ISA_NAME,
    .make_team = make_team,
    .free_team = free_team,
    .run_rotary_kv = run_rotary_kv,
    .run_attention = run_attention,
};

}  // namespace meshserve::MESHSERVE_ISA
