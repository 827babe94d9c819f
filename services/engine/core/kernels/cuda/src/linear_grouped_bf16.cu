// Matrix products of few rows of bf16 with levels of eight and four bits in groups.
#include "linear_kernel.h"

namespace meshserve {

int32_t linear_grouped_bf16(const LinearArgs& args, cudaStream_t stream, LinearNeeds* needs) {
  using Eight = Grouped<Bf16, 8>;
  using Four = Grouped<Bf16, 4>;
  using Wide = Shape<2, 4, 4, 2, 3, 1>;
  using Widest = Shape<1, 8, 4, 2, 3, 1>;
  return args.bits == 4 ? linear_of_rows<Four, Four, 2, 3, Wide, Widest>(args, stream, needs)
                        : linear_of_rows<Eight, Eight, 1, 3, Wide, Widest>(args, stream, needs);
}

}  // namespace meshserve
