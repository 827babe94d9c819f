// Adding up what warps, or blocks, have found of a sequence, each of a part of its tokens.
#pragma once

#include "attention_decode.h"
#include "reductions.h"

namespace meshserve {

// Below all scores, and finite: the difference of two of it is zero.
constexpr float kLowest = -1e30f;
constexpr int kPartsAtOnce = 8;

__device__ __forceinline__ void add_scaled(float4& sum, const float4& each, float factor) {
  sum.x += each.x * factor;
  sum.y += each.y * factor;
  sum.z += each.z * factor;
  sum.w += each.w * factor;
}

template <typename Q, int kHeadDim>
__device__ __forceinline__ void write_row(const AttentionDecodeArgs& args, const Part& part,
                                          int row, int dimension, const float4& sum, float factor) {
  const int2 place = place_of(part, row, args);
  const int64_t heads = int64_t(args.kv_heads) * args.heads_per_kv;
  uint16_t* output = static_cast<uint16_t*>(args.output);
  *reinterpret_cast<uint2*>(output + (place.x * heads + place.y) * kHeadDim + dimension) = {
      Q::pack(sum.x * factor, sum.y * factor), Q::pack(sum.z * factor, sum.w * factor)};
}

// Adds up the parts that other blocks wrote, in their order, whichever block was the last.
template <typename Q, int kHeadDim, int kRows>
__device__ void combine_parts(const AttentionDecodeArgs& args, const Part& part, float* factors) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t first = int64_t(part.pair) * args.splits * kRows;
#pragma unroll 1
  for (int row = warp; row < part.rows; row += args.warps) {
    float highest = kLowest, weights = 0.0f;
#pragma unroll 1
    for (int i = lane; i < part.parts; i += 32) {
      highest = fmaxf(highest, __ldcg(args.part_sums + first + i * kRows + row).x);
    }
    highest = warp_max(highest);
#pragma unroll 1
    for (int i = lane; i < part.parts; i += 32) {
      const float2 each = __ldcg(args.part_sums + first + i * kRows + row);
      const float factor = exp2_approximate(each.x - highest);
      factors[i * kRows + row] = factor;
      weights += factor * each.y;
    }
    weights = warp_sum(weights);
    __syncwarp();
#pragma unroll 1
    for (int i = lane; i < part.parts; i += 32) factors[i * kRows + row] /= weights;
  }
  __syncthreads();
#pragma unroll 1
  for (int at = threadIdx.x; at < part.rows * kHeadDim / 4; at += blockDim.x) {
    const int row = at / (kHeadDim / 4), dimension = at % (kHeadDim / 4) * 4;
    const float* from = args.parts + (first + row) * kHeadDim + dimension;
    float4 sum{0.0f, 0.0f, 0.0f, 0.0f};
    // Those of a batch are read at once: it is how often one waits that counts.
    for (int i = 0; i < part.parts; i += kPartsAtOnce) {
      float4 each[kPartsAtOnce];
#pragma unroll
      for (int j = 0; j < kPartsAtOnce; ++j) {
        const int64_t offset = int64_t(min(i + j, part.parts - 1)) * kRows * kHeadDim;
        each[j] = __ldcg(reinterpret_cast<const float4*>(from + offset));
      }
#pragma unroll
      for (int j = 0; j < kPartsAtOnce; ++j) {
        if (i + j < part.parts) add_scaled(sum, each[j], factors[(i + j) * kRows + row]);
      }
    }
    write_row<Q, kHeadDim>(args, part, row, dimension, sum, 1.0f);
  }
}

}  // namespace meshserve
