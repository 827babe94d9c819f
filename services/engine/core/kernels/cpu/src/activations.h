// Rows of activations in the forms that the linear kernels multiply: norms and conversions write
// them, linear.h reads them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace meshserve {

// Inputs of a linear layer that share a scale, in quantised weights and activations alike.
constexpr int32_t group_inputs = 32;

enum class ActivationFormat : int32_t {
  operands = 0,  // bf16 or float, as simd.h's Operand
  int8 = 1,      // groups of 32 signed bytes with a scale each
};

// A group of int8 activations. Weights are unsigned bytes: the sum serves those with a minimum, the
// offset those centred on 128.
struct Int8Group {
  int8_t values[group_inputs];
  float scale;
  float sum;       // scale * the sum of the values
  int32_t offset;  // -128 * the sum of the values
};

struct Activations {
  ActivationFormat format;
  int32_t inputs;  // a multiple of 32
  void* rows;      // 64-byte aligned
  int64_t stride;  // bytes
};

// Bytes of a row in any format on any instruction set.
inline int64_t activation_stride(int32_t inputs) { return (int64_t{inputs} * 4 + 63) / 64 * 64; }

}  // namespace meshserve

namespace meshserve::MESHSERVE_ISA {

inline Int8Group* int8_row(const Activations& of, int64_t row) {
  return reinterpret_cast<Int8Group*>(static_cast<char*>(of.rows) + row * of.stride);
}

// Bytes of a row that are in use.
size_t activation_bytes(const Activations& of);

// Writes row `row` from `inputs` floats.
void store_activations(const Activations& to, int64_t row, const float* values);

// RMSNorm (Zhang and Sennrich, arXiv:1910.07467) of a row, computed in float.
// `out` may be `row`.
void rms_norm(const float* row, const float* weight, float eps, int32_t size, float* out);

}  // namespace meshserve::MESHSERVE_ISA
