// Matrix products of few rows with weights of fp16.
#include "linear_kernel.h"

namespace meshserve {

int32_t linear_fp16(const LinearArgs& args, cudaStream_t stream, LinearNeeds* needs) {
  return linear_of_rows<Plain<Fp16, float, 2, 2>, Plain<Fp16, float, 2, 1>, 1, 4,
                        Shape<2, 4, 2, 4, 4>, Shape<2, 8, 4, 2, 3, 1>>(args, stream, needs);
}

}  // namespace meshserve
