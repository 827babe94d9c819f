#include "attention_decode_kernel.h"

namespace meshserve {

int32_t attend_same_bf16(const AttentionDecodeArgs& args, cudaStream_t stream) {
  return attend_few<Bf16, SameCache<Bf16>>(args, stream);
}

}  // namespace meshserve
