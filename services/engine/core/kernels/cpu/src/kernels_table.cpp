// Fills the table of one instruction set.
#include "kernels.h"

namespace meshserve::MESHSERVE_ISA {

extern const Kernels kernels;

const Kernels kernels = {
    .size = sizeof(Kernels),
    .isa = MESHSERVE_ISA_NAME,
};

}  // namespace meshserve::MESHSERVE_ISA
