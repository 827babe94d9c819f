// Matrix products of few rows with weights and activations of e4m3.
#include "linear_kernel.h"

namespace meshserve {

int32_t linear_e4m3(const LinearArgs& args, cudaStream_t stream, LinearNeeds* needs) {
  return linear_of_rows<Plain<E4m3, float, 1, 2>, Plain<E4m3, float, 1, 1>, 1, 4,
                        Shape<2, 4, 2, 4, 4, 1>, Shape<2, 8, 4, 2, 3, 1>>(args, stream, needs);
}

}  // namespace meshserve
