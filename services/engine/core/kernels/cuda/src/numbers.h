// The element types of tensors: eight or sixteen bits in memory, float32 in arithmetic.
#pragma once

#include <cstdint>
#include <type_traits>

#include "ptx.h"

namespace meshserve {

// As kernels/cuda/library.py numbers them.
enum class Format : int32_t { bf16 = 0, fp16 = 1, e4m3 = 2, int8 = 3 };

struct Bf16 {
  static __device__ __forceinline__ float2 unpack(uint32_t pair) {
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
  }
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    return pack_bf16(low, high);
  }
  static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
    mma_m16n8k16_bf16(d, a, b);
  }
};

struct Fp16 {
  static __device__ __forceinline__ float2 unpack(uint32_t pair) { return unpack_fp16(pair); }
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    return pack_fp16(low, high);
  }
  static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
    mma_m16n8k16_fp16(d, a, b);
  }
};

// A pair of one type as a pair of another.
template <typename From, typename To>
__device__ __forceinline__ uint32_t convert(uint32_t pair) {
  if constexpr (std::is_same_v<From, To>) return pair;
  const float2 wide = From::unpack(pair);
  return To::pack(wide.x, wide.y);
}

// Sixteen bytes are eight elements of two bytes.
template <typename T>
__device__ __forceinline__ void unpack_8(const uint4& packed, float (&values)[8]) {
  const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = T::unpack(words[i]);
    values[2 * i] = pair.x;
    values[2 * i + 1] = pair.y;
  }
}

template <typename T>
__device__ __forceinline__ uint4 pack_8(const float (&values)[8]) {
  return {T::pack(values[0], values[1]), T::pack(values[2], values[3]),
          T::pack(values[4], values[5]), T::pack(values[6], values[7])};
}

}  // namespace meshserve
