#include "attention_decode_kernel.h"

namespace meshserve {

int32_t attend_e4m3(const AttentionDecodeArgs& args, cudaStream_t stream) {
  return attend_by_query<ByteCache<E4m3Halves>>(args, stream);
}

}  // namespace meshserve
