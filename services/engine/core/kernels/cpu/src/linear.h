// Linear layers over packed weights: a step's rows times a matrix in bf16, 8 or 4 bits.
//
// Weights are packed in tiles of 16 outputs, each holding all inputs:
//
//   bf16  [inputs / 2][16 outputs][2 inputs] bf16
//   q8    [inputs / 4][16 outputs][4 inputs] unsigned bytes
//   q4    per group of 32 inputs 256 bytes; as q8, but byte i of the first half of a group's 512
//   has
//         the low nibble of byte i and byte i of the second half the high one
//
// Quantised weights have a scale, and perhaps a minimum, for each output and group of 32 inputs,
// [inputs / 32][16 outputs] halves a tile: weight = scale * byte + minimum; without minima bytes
// are centred: weight = scale * (byte - 128). This is how GGUF's Q4_0, Q4_1 and Q8_0 (and Q4_K and
// Q5_K but for the precision of a scale) store a matrix, so their values are not rounded again.
//
// Each output is one sum in one order, whatever the number of rows and the blocks they are taken
// in.
#pragma once

#include "activations.h"

namespace meshserve {

constexpr int32_t tile_outputs = 16;

enum class WeightFormat : int32_t { bf16 = 0, q8 = 1, q4 = 2 };

struct LinearWeights {
  WeightFormat format;
  int32_t inputs;          // a multiple of 32
  int32_t outputs;         // as many as are stored; tiles are padded with zeros
  const void* data;        // 64-byte aligned
  const uint16_t* scales;  // null for bf16
  const uint16_t* minima;  // null where there are none
  const float* bias;       // [tiles * 16], or null
};

// What becomes of the sums.
enum class Epilogue : int32_t {
  store = 0,
  add = 1,  // added to the output: a residual stream
  gated_silu =
      2,  // even tiles are gates, odd ones values: silu(gate) * value, half as many outputs
};

struct LinearArgs {
  const LinearWeights* weights;
  Activations input;  // its format: operands for bf16 weights, int8 for quantised ones
  int32_t rows;
  float* output;
  int64_t output_stride;  // floats
  Epilogue epilogue;
};

inline ActivationFormat activations_for(WeightFormat format) {
  return format == WeightFormat::bf16 ? ActivationFormat::operands : ActivationFormat::int8;
}

}  // namespace meshserve

namespace meshserve::MESHSERVE_ISA {

// Tasks are pairs of tiles; a range of them is computed together.
int linear_tasks(const LinearArgs& args);
void linear_run(const LinearArgs& args, int first_task, int last_task);

// Writes the weights of one output, as floats: the row of an embedding that shares a head's matrix.
void unpack_output(const LinearWeights& weights, int32_t output, float* values);

}  // namespace meshserve::MESHSERVE_ISA
