// How a product of few rows is divided among blocks, warps and steps, and where what they work on
// lies in shared memory.
#pragma once

#include "linear.h"
#include "linear_weights.h"

namespace meshserve {

// How a block of `across * along` warps divides a tile: `across` of them share the activations,
// each with 16 * tiles outputs; `along` of them split the inputs of a step.
template <int tiles_, int columns_, int across_, int along_, int stages_, int resident_ = 2>
struct Shape {
  static constexpr int tiles = tiles_;      // of 16 outputs, of a warp
  static constexpr int columns = columns_;  // of 8 tokens
  static constexpr int across = across_;
  static constexpr int along = along_;
  static constexpr int stages = stages_;
  static constexpr int resident = resident_;  // blocks that registers are to suffice for
  static constexpr int threads = across * along * 32;
  static constexpr int outputs = tiles * across * 16;  // of a tile of a block
};

// What a block works on: part `item % splits` of the inputs of tile `item / splits`, in steps of
// all its warps.
struct Work {
  int item;
  int tile;
  int step;
  int end;
};

template <typename W, typename S>
struct LinearTiles {
  using Sum = typename W::Accumulator;
  static constexpr int kStepBytes = W::kSegments * 64;  // of a row of weights, of a warp
  static constexpr int kWeightBytes = S::tiles * 2 * W::kSegments * kSegmentBytes;  // of a warp
  static constexpr int kHiddenStep = W::kHiddenChunks * kChunk;  // of a row of activations
  static constexpr int kBlockStep = W::kStepInputs * S::along;
  static constexpr int kFragments = S::tiles * S::columns;
  // Whether there are registers for the scales of two steps.
  static constexpr bool kScalesAhead = S::columns < 8;

  const LinearArgs& args;
  const int lane = threadIdx.x % 32;
  const int g = lane / 4;
  const int t = lane % 4;
  const int warp = threadIdx.x / 32;
  const int across = warp % S::across;
  const int along = warp / S::across;
  const int items;
  const int stage_bytes;
  unsigned char* const shared = dynamic_shared();

  // Rounded up, so that whole rows of banks are turned around.
  static __host__ __device__ int hidden_bytes_of(int rows) {
    return (rows * kHiddenStep + 127) / 128 * 128;
  }
  static __host__ __device__ int stage_bytes_of(int rows) {
    return S::along * (S::across * kWeightBytes + hidden_bytes_of(rows));
  }
  static __host__ __device__ int shared_bytes(int rows) {
    return S::stages * stage_bytes_of(rows) +
           (S::along - 1) * S::across * kFragments * 32 * int(sizeof(float4));
  }
  static __host__ __device__ int tiles_of(const LinearArgs& a) {
    return (a.outputs + S::outputs - 1) / S::outputs;
  }
  static __host__ __device__ int steps_of(const LinearArgs& a) {
    return (a.inputs + kBlockStep - 1) / kBlockStep;
  }

  __device__ __forceinline__ explicit LinearTiles(const LinearArgs& a)
      : args(a), items(tiles_of(a) * a.splits), stage_bytes(stage_bytes_of(a.rows)) {}

  __device__ __forceinline__ unsigned char* weights_of(int stage) const {
    return shared + stage * stage_bytes + warp * kWeightBytes;
  }
  __device__ __forceinline__ unsigned char* hidden_of(int stage) const {
    return shared + stage * stage_bytes + S::across * S::along * kWeightBytes +
           along * hidden_bytes_of(args.rows);
  }

  __device__ __forceinline__ Work first() const {
    Work work{int(blockIdx.x), 0, 0, 0};
    enter(work);
    return work;
  }
  __device__ __forceinline__ void enter(Work& work) const {
    const uint32_t splits = args.splits, steps = steps_of(args);
    if (splits == 1) {
      work.tile = work.item;
      work.step = 0;
      work.end = steps;
      return;
    }
    work.tile = work.item / splits;
    const uint32_t split = work.item % splits;
    work.step = steps * split / splits;
    work.end = steps * (split + 1) / splits;
  }
  __device__ __forceinline__ bool is_over(const Work& work) const { return work.item >= items; }
  // Whether what follows is another tile, or another part of one.
  __device__ __forceinline__ bool advance(Work& work) const {
    if (++work.step < work.end) return false;
    work.item += gridDim.x;
    if (!is_over(work)) enter(work);
    return true;
  }

  // The output that row `half * 8 + g` of fragment `tile` of this warp stands for. Where outputs
  // are gated, the rows of the second half are those of the second half of the outputs.
  __device__ __forceinline__ int output_of(const Work& work, int tile, int half) const {
    const int whole = (work.tile * S::across + across) * S::tiles + tile;
    if (args.activation == Activation::none) return whole * 16 + half * 8 + g;
    const int gate = whole * 8 + g;
    return gate < args.outputs / 2 ? half * (args.outputs / 2) + gate : args.outputs;
  }
  __device__ __forceinline__ int input_of(const Work& work) const {
    return work.step * kBlockStep + along * W::kStepInputs;
  }
};

}  // namespace meshserve
