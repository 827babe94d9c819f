// The entries of the matrix products of few rows.
#include "linear.h"

namespace meshserve {

static int32_t by_format(const LinearArgs& args, cudaStream_t stream, LinearNeeds* needs) {
  const bool grouped = args.group_shift != 0;
  switch (args.element) {
    case Format::bf16:
      return (grouped ? linear_grouped_bf16 : linear_bf16)(args, stream, needs);
    case Format::fp16:
      return (grouped ? linear_grouped_fp16 : linear_fp16)(args, stream, needs);
    case Format::e4m3:
      return linear_e4m3(args, stream, needs);
    case Format::int8:
      return linear_int8(args, stream, needs);
  }
  return cudaErrorInvalidValue;
}

MESHSERVE_EXPORT int32_t meshserve_linear(const LinearArgs* args, void* stream) {
  return by_format(*args, static_cast<cudaStream_t>(stream), nullptr);
}

// What meshserve_linear takes for arguments whose pointers are not looked at.
MESHSERVE_EXPORT int32_t meshserve_linear_needs(const LinearArgs* args, LinearNeeds* needs) {
  return by_format(*args, nullptr, needs);
}

}  // namespace meshserve
