#include "attention_decode_kernel.h"

namespace meshserve {

int32_t attend_int8(const AttentionDecodeArgs& args, cudaStream_t stream) {
  return attend_by_query<ByteCache<Int8Halves>>(args, stream);
}

}  // namespace meshserve
