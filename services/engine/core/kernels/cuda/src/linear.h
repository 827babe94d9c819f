// Matrix products of few rows: output[m, n] = sum over k of hidden[m, k] * weight[n, k].
//
// A step that decodes 1 to 64 tokens reads each weight once and multiplies it by few numbers, so it
// takes what the memory takes. The numbers, on an H100: 3 TB/s are 13.4 bytes a clock for each of
// 132 multiprocessors; at a latency of 0.8 us some 20 KB must be on their way to each of them at
// all times. 13.4 bytes are 27 weights of four bits, of 512 lanes x instructions that could be
// issued meanwhile (128 a clock): with about 2 a weight, shared-memory reads and scales included,
// the schedulers are half busy.
//
// So: weights come by cp.async, 16 bytes a thread, `stages - 1` steps ahead, in the order a thread
// needs them: no barrier of the block stands in the loop where a warp has the activations to
// itself. They are the A operand of mma.m16n8k16 (16 outputs), tokens its columns: 1 to 8 of them
// cost one instruction. The order of the inputs within a product is free as long as both operands
// agree, so a lane takes 16 bytes of a row of weights as they lie in memory for two products, and
// the same 16 bytes of inputs of its token. The warps of a block split the inputs, and add up in
// the order of their numbers; where a matrix has fewer tiles of outputs than there are
// multiprocessors, blocks split them too, and the one that comes last adds up all parts in their
// order: the same sums at every run. Blocks stay and take tile after tile (grid-stride), fetching
// the next one's weights while they finish one. Weights are constant: the first stages are under
// way before the kernel waits for the one before it.
//
// A product of 16 bits is exact in float32; levels of 4 and 8 bits become 16-bit floats without
// rounding (Kim et al., arXiv:2211.10017, place them in a mantissa by bitwise operations), and
// scales multiply the float32 sums of a group: nothing is rounded but the result.
#pragma once

#include "launch.h"
#include "numbers.h"

namespace meshserve {

enum class Activation : int32_t { none = 0, silu = 1, gelu_tanh = 2 };

// What the library's function is called with: linear.py has the same structure.
struct LinearArgs {
  const void* hidden;       // [rows, inputs] of the element, rows hidden_stride bytes apart
  const void* weight;       // [outputs, inputs], rows weight_stride bytes apart; multiples of 16
  const void* scales;       // of groups: fp16 [outputs, groups]; of rows: float [outputs]
  const void* minima;       // fp16 [outputs, groups] or null: levels are centred
  const float* row_scales;  // [rows] where activations are of eight bits, else null
  const void* bias;         // [outputs] of the output's type, or null
  const void* residual;     // as output, or null: what the product is added to
  void* output;             // [rows, outputs], [rows, outputs / 2] where it is gated
  float* partials;          // where splits > 1: meshserve_linear_partials floats
  int32_t* arrived;         // where splits > 1: zeros, one for 16 outputs; left as zeros
  int64_t hidden_stride;
  int64_t weight_stride;
  int32_t rows;
  int32_t outputs;
  int32_t inputs;
  int32_t group_shift;  // of inputs that share a scale: 5 to 7 for 32 to 128; 0 without groups
  int32_t splits;       // over how many blocks the inputs of a tile are split
  int32_t multiprocessors;
  int32_t multiprocessor_bytes;  // of shared memory
  Activation activation;         // none, or of the first half of outputs, which gates the second
  Format element;                // of activations
  Format output_format;          // bf16 or fp16
  int32_t bits;                  // of weights: those of the element, or 8 or 4 in groups
};

// What a kernel takes of these arguments, for whoever provides it.
struct LinearNeeds {
  int32_t block_bytes = 0;  // of shared memory
  int32_t block_outputs = 0;
  int32_t steps = 0;     // that the inputs can be split into
  int32_t partials = 0;  // floats
};

// Start the kernel for some weights, or say what it needs: where `needs` is not null.
int32_t linear_bf16(const LinearArgs& args, cudaStream_t stream, LinearNeeds* needs);
int32_t linear_fp16(const LinearArgs& args, cudaStream_t stream, LinearNeeds* needs);
int32_t linear_e4m3(const LinearArgs& args, cudaStream_t stream, LinearNeeds* needs);
int32_t linear_int8(const LinearArgs& args, cudaStream_t stream, LinearNeeds* needs);
int32_t linear_grouped_bf16(const LinearArgs& args, cudaStream_t stream, LinearNeeds* needs);
int32_t linear_grouped_fp16(const LinearArgs& args, cudaStream_t stream, LinearNeeds* needs);

}  // namespace meshserve
