// How the paged cache keeps elements, and how they become fragments for the tensor cores.
//
// A unit is 32 bytes of a token's vector. Elements of eight bits become fp16, in which both formats
// are exact, and are multiplied in an order of their own: what counts is that queries and keys, or
// the rows of a sum, agree about it.
#pragma once

#include "numbers.h"

namespace meshserve {

// Elements as the queries have them.
template <typename T>
struct SameCache {
  using Compute = T;
  static constexpr int kBytes = 2;
  static constexpr int kFragments = 1;  // of 16 elements to a unit
  static constexpr bool kScaled = false;
  static constexpr float kFactor = 1.0f;  // what an element of a fragment lacks

  // What a lane holds of 16 elements of a query: two, and two more.
  static __device__ __forceinline__ uint2 queries(const uint16_t* of_16, int in_group) {
    const uint32_t* pairs = reinterpret_cast<const uint32_t*>(of_16);
    return {pairs[in_group], pairs[in_group + 4]};
  }

  // ldmatrix of 16 tokens by a unit gives the keys of a product as they are.
  static __device__ __forceinline__ void keys(const uint32_t (&raw)[4], uint32_t (&a)[1][4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[0][i] = raw[i];
  }
  // Transposed, of a unit by 16 tokens, the values.
  static __device__ __forceinline__ void values(const uint32_t (&raw)[4], uint32_t (&a)[1][4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[0][i] = raw[i];
  }
  // Which of 16 dimensions the sums of a lane are of: in the upper rows, and in the lower.
  static __device__ __forceinline__ int dimension(int group, bool lower) {
    return group + (lower ? 8 : 0);
  }
};

// Elements of eight bits. Halves turns those of a word into two pairs of fp16: the even and the
// odd.
template <typename Halves>
struct ByteCache {
  using Compute = Fp16;
  static constexpr int kBytes = 1;
  static constexpr int kFragments = 2;
  static constexpr bool kScaled = Halves::kScaled;
  static constexpr float kFactor = Halves::kFactor;

  static __device__ __forceinline__ uint2 queries(const uint16_t* of_16, int in_group) {
    const uint2 four = reinterpret_cast<const uint2*>(of_16)[in_group];
    return {__byte_perm(four.x, four.y, 0x5410), __byte_perm(four.x, four.y, 0x7632)};
  }

  static __device__ __forceinline__ void keys(const uint32_t (&raw)[4], uint32_t (&a)[2][4]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      Halves::split(raw[2 * i], a[i][0], a[i][2]);
      Halves::split(raw[2 * i + 1], a[i][1], a[i][3]);
    }
  }
  static __device__ __forceinline__ void values(const uint32_t (&raw)[4], uint32_t (&a)[2][4]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      Halves::split(raw[i], a[i][0], a[i][1]);
      Halves::split(raw[i + 2], a[i][2], a[i][3]);
    }
  }
  static __device__ __forceinline__ int dimension(int group, bool lower) {
    return 2 * group + (lower ? 1 : 0);
  }
};

// Sign, exponent and mantissa where fp16 has them: that is 2^-8 of the number, subnormal ones too.
struct E4m3Halves {
  static constexpr bool kScaled = false;
  static constexpr float kFactor = 256.0f;

  static __device__ __forceinline__ uint32_t widen(uint32_t upper_bytes) {
    return (upper_bytes & 0x80008000u) | (upper_bytes >> 1 & 0x3f803f80u);
  }
  static __device__ __forceinline__ void split(uint32_t word, uint32_t& even, uint32_t& odd) {
    even = widen(word << 8);
    odd = widen(word);
  }
};

// As the lowest bits of 1024 + 128 + x, from which 1152 is taken.
struct Int8Halves {
  static constexpr bool kScaled = true;
  static constexpr float kFactor = 1.0f;

  static __device__ __forceinline__ void split(uint32_t word, uint32_t& even, uint32_t& odd) {
    constexpr uint32_t kOnes = 0x3c003c00u, kMinus1152 = 0xe480e480u;
    const uint32_t biased = word ^ 0x80808080u;
    even = fma_fp16x2(__byte_perm(biased, 0x64646464u, 0x4240), kOnes, kMinus1152);
    odd = fma_fp16x2(__byte_perm(biased, 0x64646464u, 0x4341), kOnes, kMinus1152);
  }
};

}  // namespace meshserve
