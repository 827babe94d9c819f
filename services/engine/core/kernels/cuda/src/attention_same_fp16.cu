#include "attention_decode_kernel.h"

namespace meshserve {

int32_t attend_same_fp16(const AttentionDecodeArgs& args, cudaStream_t stream) {
  return attend_few<Fp16, SameCache<Fp16>>(args, stream);
}

}  // namespace meshserve
