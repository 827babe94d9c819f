// Matrix products of few rows with weights and activations of int8.
#include "linear_kernel.h"

namespace meshserve {

int32_t linear_int8(const LinearArgs& args, cudaStream_t stream, LinearNeeds* needs) {
  return linear_of_rows<Plain<Signed8, int32_t, 1, 2>, Plain<Signed8, int32_t, 1, 1>, 1, 4,
                        Shape<2, 4, 2, 4, 4, 1>, Shape<2, 8, 4, 2, 3, 1>>(args, stream, needs);
}

}  // namespace meshserve
