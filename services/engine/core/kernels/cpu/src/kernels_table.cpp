// Fills the table of one instruction set.
#include "attention_calls.h"
#include "encoder.h"
#include "kernels.h"
#include "program.h"
#include "sampling.h"

namespace meshserve::MESHSERVE_ISA {

extern const Kernels kernels;

const Kernels kernels = {
    .size = sizeof(Kernels),
    .isa = MESHSERVE_ISA_NAME,
    .make_team = make_team,
    .free_team = free_team,
    .run_rotary_kv = run_rotary_kv,
    .run_attention = run_attention,
    .make_program = make_program,
    .run_program = run_program,
    .free_program = free_program,
    .sampling_scratch_bytes = sampling_scratch_bytes,
    .run_sampling = run_sampling,
    .make_encoder = make_encoder,
    .run_encoder = run_encoder,
    .free_encoder = free_encoder,
};

}  // namespace meshserve::MESHSERVE_ISA
