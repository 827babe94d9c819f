#include "attention_decode.h"

namespace meshserve {

MESHSERVE_EXPORT int32_t meshserve_attention_decode(const AttentionDecodeArgs* args, void* stream) {
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  switch (args->cache_format) {
    case Format::bf16:
      return attend_same_bf16(*args, on);
    case Format::fp16:
      return attend_same_fp16(*args, on);
    case Format::e4m3:
      return attend_e4m3(*args, on);
    case Format::int8:
      return attend_int8(*args, on);
  }
  return cudaErrorInvalidValue;
}

}  // namespace meshserve
