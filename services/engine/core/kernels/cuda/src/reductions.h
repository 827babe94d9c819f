// Sums and maxima over the lanes of a warp and the threads of a block.
#pragma once

#include "ptx.h"

namespace meshserve {

inline constexpr uint32_t kWholeWarp = 0xffffffffu;

// Over each `lanes` lanes that follow one another, by a butterfly: every one gets the result.
template <int lanes = 32>
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kWholeWarp, value, distance);
  }
  return value;
}

template <int lanes = 32>
__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    value = fmaxf(value, __shfl_xor_sync(kWholeWarp, value, distance));
  }
  return value;
}

// Over a block of whole warps; every thread gets the sum. scratch: 32 floats of shared memory.
__device__ __forceinline__ float block_sum(float value, float* scratch) {
  const int lane = threadIdx.x % 32;
  value = warp_sum(value);
  if (lane == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  return warp_sum(lane < int(blockDim.x) / 32 ? scratch[lane] : 0.0f);
}

}  // namespace meshserve
