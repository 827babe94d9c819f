// Linear layers over packed weights: a step's rows times a matrix in bf16, 8 or 4 bits.
//
// Weights are packed in strips of two tiles of 16 outputs, so that one strip is one stream of
// memory:
//
//   bf16  [inputs / 2][2 tiles][16 outputs][2 inputs] bf16
//   q8    [inputs / 32][2 tiles] groups of 8 x [16 outputs][4 inputs] unsigned bytes, 16 scales
//         and, where weights have minima, 16 of those
//   q4    the same, but byte i of a group's first 256 has the low nibble of what q8 stores as
//         byte i and the high one of byte i + 256
//
// A scale and a minimum, halves, belong to one output and 32 inputs: weight = scale * byte +
// minimum; without minima bytes are centred: weight = scale * (byte - 128). This is how GGUF's
// Q4_0, Q4_1 and Q8_0 store a matrix, so their values are not rounded again.
//
// Each output is one sum in one order, whatever the number of rows and the blocks they are taken
// in.
#pragma once

#include "activations.h"

namespace meshserve {

constexpr int32_t tile_outputs = 16;
constexpr int32_t strip_tiles = 2;
constexpr int32_t strip_outputs = strip_tiles * tile_outputs;

enum class WeightFormat : int32_t { bf16 = 0, q8 = 1, q4 = 2 };

struct LinearWeights {
  WeightFormat format;
  int32_t has_minima;  // q4 always has
  int32_t inputs;      // a multiple of 32
  int32_t outputs;     // the last strip is padded with zeros
  const void* data;    // 64-byte aligned
  const float* bias;   // [strips * 32], or null
};

// What becomes of the sums.
enum class Epilogue : int32_t {
  store = 0,
  add = 1,  // added to the output: a residual stream
  // Even tiles are gates, odd ones values: f(gate) * value, half as many outputs.
  gated_silu = 2,
  gated_gelu = 3,  // in the form that uses tanh, as below
  gelu = 4,        // gelu(sum)
  capped = 5,      // cap * tanh(sum / cap)
};

inline bool gates(Epilogue epilogue) {
  return epilogue == Epilogue::gated_silu || epilogue == Epilogue::gated_gelu;
}

struct LinearArgs {
  const LinearWeights* weights;
  Activations input;  // its format: operands for bf16 weights, int8 for quantised ones
  int32_t rows;
  float* output;
  int64_t output_stride;  // floats
  Epilogue epilogue;
  float cap;
};

inline ActivationFormat activations_for(WeightFormat format) {
  return format == WeightFormat::bf16 ? ActivationFormat::operands : ActivationFormat::int8;
}

}  // namespace meshserve

namespace meshserve::MESHSERVE_ISA {

// Tasks are strips; a range of them is computed together.
int linear_tasks(const LinearArgs& args);
void linear_run(const LinearArgs& args, int first_strip, int last_strip);

// Asks for the first of a range of strips before they are needed.
void prefetch_strips(const LinearWeights& weights, int first_strip, int last_strip);

// Writes the weights of one output, as floats: the row of an embedding that shares a head's matrix.
void unpack_output(const LinearWeights& weights, int32_t output, float* values);

}  // namespace meshserve::MESHSERVE_ISA
