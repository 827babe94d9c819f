// What becomes of a product's sums: scales of rows, bias, gate, residual, and their place in
// memory.
#pragma once

#include "linear.h"

namespace meshserve {

__device__ __forceinline__ float element_at(const void* base, int64_t at, Format format) {
  const uint32_t bits = __ldg(static_cast<const uint16_t*>(base) + at);
  return format == Format::bf16 ? Bf16::unpack(bits).x : Fp16::unpack(bits).x;
}

__device__ __forceinline__ float activated(float x, Activation activation) {
  if (activation == Activation::silu) return x / (1.0f + __expf(-x));
  // gelu(x) in the form that uses tanh; tanh(y) = 1 - 2 / (1 + e^2y).
  const float y = 0.7978845608028654f * (x + 0.044715f * x * x * x);
  return x * (1.0f - 1.0f / (1.0f + __expf(2.0f * y)));
}

__device__ __forceinline__ void put(const LinearArgs& args, int64_t at, float value) {
  // Of the residual nothing is read ahead: another kernel may have written it.
  if (args.residual != nullptr) {
    const uint32_t bits = static_cast<const uint16_t*>(args.residual)[at];
    value += args.output_format == Format::bf16 ? Bf16::unpack(bits).x : Fp16::unpack(bits).x;
  }
  const uint32_t packed =
      args.output_format == Format::bf16 ? Bf16::pack(value, 0.0f) : Fp16::pack(value, 0.0f);
  static_cast<uint16_t*>(args.output)[at] = uint16_t(packed);
}

// A lane's sums of a fragment: of outputs low and high for tokens token and token + 1.
template <typename Sum>
__device__ __forceinline__ void store(const LinearArgs& args, int low, int high, int token,
                                      const Sum (&sums)[4]) {
  const float* scales =
      args.row_scales != nullptr ? static_cast<const float*>(args.scales) : nullptr;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (token + i >= args.rows) return;
    float values[2] = {float(sums[i]), float(sums[2 + i])};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int output = half == 0 ? low : high;
      if (output >= args.outputs) continue;
      if (scales != nullptr) values[half] *= args.row_scales[token + i] * __ldg(scales + output);
      if (args.bias != nullptr) {
        values[half] += element_at(args.bias, output, args.output_format);
      }
    }
    if (args.activation != Activation::none) {
      const int64_t row = int64_t(token + i) * (args.outputs / 2);
      if (low < args.outputs)
        put(args, row + low, activated(values[0], args.activation) * values[1]);
      continue;
    }
    const int64_t row = int64_t(token + i) * args.outputs;
    if (low < args.outputs) put(args, row + low, values[0]);
    if (high < args.outputs) put(args, row + high, values[1]);
  }
}

}  // namespace meshserve
