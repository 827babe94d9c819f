// How weights of each format become operands of the tensor cores.
//
// Weights and activations pass through shared memory in chunks of 16 bytes. A segment is 64 bytes
// (4 chunks) of each of 8 rows of weights: lane 4 g + t copies chunk t of row g. A subtile is the
// inputs of two products, 32 of 16 bits or 64 of eight: 64 bytes of a row of activations, of which
// lanes with the same t read the same.
//
// Chunks that lanes read at once lie in different banks because neighbours are turned around, by
// flipping bits of the address that only depend on what is known when compiling and on the lane: a
// lane's place is computed once and flipped (^ constant) for each read.
#pragma once

#include "numbers.h"

namespace meshserve {

inline constexpr int kChunk = 16;
inline constexpr int kSegmentChunks = 4;
inline constexpr int kSegmentBytes = 8 * kSegmentChunks * kChunk;

__host__ __device__ constexpr int turned(int index) { return (index & 1) * 4 + (index & 2); }

__device__ __forceinline__ int weight_slot(int row, int chunk) {
  return (chunk * 8 + (row ^ turned(chunk))) * kChunk;
}

// Of a row of `chunks` chunks of activations; of 4 chunks two rows are what is turned at a time.
template <int chunks>
__device__ __forceinline__ int hidden_slot(int row, int chunk) {
  return (row * chunks + (chunks == 4 ? chunk : chunk ^ turned(row))) * kChunk;
}

template <typename T>
__device__ __forceinline__ T read_shared(const unsigned char* from, int at) {
  return *reinterpret_cast<const T*>(from + at);
}

// Where lane (row, t) finds its 16 bytes of a subtile, and these.
template <int chunks>
struct HiddenInOrder {
  static __device__ __forceinline__ int place(int row, int t) {
    return hidden_slot<chunks>(row, t);
  }
  static __device__ __forceinline__ void read(uint32_t (&b)[2][2], const unsigned char* from,
                                              int place, int subtile) {
    const int flip = chunks == 4 ? 0 : subtile % 2 * kSegmentChunks * kChunk;
    const int beyond = chunks == 4 ? 0 : subtile / 2 * 2 * kSegmentChunks * kChunk;
    const uint4 x = read_shared<uint4>(from, (place ^ flip) + beyond);
    b[0][0] = x.x;
    b[0][1] = x.y;
    b[1][0] = x.z;
    b[1][1] = x.w;
  }
};

struct Signed8 {
  static __device__ __forceinline__ void mma(int32_t (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
    mma_m16n8k32_s8(d, a, b);
  }
};

struct E4m3 {
  static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
    mma_m16n8k32_e4m3(d, a, b);
  }
};

// Weights of the element of the activations, multiplied as they are.
template <typename Element, typename Sum, int element_bytes, int segments>
struct Plain {
  using Unit = Element;
  using Accumulator = Sum;
  static constexpr bool kGrouped = false;
  static constexpr int kSegments = segments;  // of a row of weights in a step
  static constexpr int kSubtiles = 1;         // of a segment
  static constexpr int kStepInputs = segments * 64 / element_bytes;
  static constexpr int kHiddenChunks = segments * kSegmentChunks;  // of a step
  using Hidden = HiddenInOrder<kHiddenChunks>;

  static __device__ __forceinline__ int place(int g, int t) { return weight_slot(g, t); }

  // The operands of two products from segments of rows g and g + 8, `high` bytes apart.
  static __device__ __forceinline__ void weights(uint32_t (&a)[2][4], const unsigned char* segment,
                                                 int place, int high, int /*subtile*/) {
    const uint4 l = read_shared<uint4>(segment, place);
    const uint4 h = read_shared<uint4>(segment, place + high);
    a[0][0] = l.x;
    a[0][1] = h.x;
    a[0][2] = l.y;
    a[0][3] = h.y;
    a[1][0] = l.z;
    a[1][1] = h.z;
    a[1][2] = l.w;
    a[1][3] = h.w;
  }
};

// Levels of eight or four bits in groups (kernels/matrices.py says how they lie) become operands
// that are more than they by an offset, which may differ between the two products of a subtile.
// A further product takes it off: its rows 0 to 7 are the offsets, so that it sums offset * x, and
// its rows 8 to 15 are ones: the sum of x, of which a minimum is a multiple.
template <typename T, int bits>
struct Grouped;

template <typename T>
struct Bytes;

template <>
struct Bytes<Bf16> {
  static constexpr uint32_t kOne = 0x3f803f80u, kOffset = 0xc300c300u;  // -128

  // Levels less 128 of two bytes: seven bits fit a mantissa behind 128; the eighth bit, turned
  // around, is the last one of the exponent of another, 128 or 256, that is taken off.
  static __device__ __forceinline__ uint32_t centred(uint32_t bytes) {
    const uint32_t low = and_or(bytes, 0x007f007fu, 0x43004300u);
    const uint32_t high = (bytes & 0x00800080u) ^ 0x43804380u;
    return fma_bf16x2(high, 0xbf80bf80u, low);
  }
};

template <>
struct Bytes<Fp16> {
  static constexpr uint32_t kOne = 0x3c003c00u, kOffset = 0xd800d800u;  // -128

  // A byte behind 1024, less 1152.
  static __device__ __forceinline__ uint32_t centred(uint32_t bytes) {
    return fma_fp16x2(bytes | 0x64006400u, kOne, 0xe480e480u);
  }
};

template <typename T>
struct Grouped<T, 8> {
  using Unit = T;
  using Accumulator = float;
  static constexpr bool kGrouped = true;
  static constexpr int kSegments = 2;
  static constexpr int kSubtiles = 2;
  static constexpr int kStepInputs = 128;
  static constexpr int kHiddenChunks = 16;
  static constexpr bool kCentred = true;  // without minima: operands are what levels stand for
  using Hidden = HiddenInOrder<kHiddenChunks>;

  static __device__ __forceinline__ int place(int g, int t) {
    return weight_slot(g, t / 2) + t % 2 * 8;
  }

  static __device__ __forceinline__ void weights(uint32_t (&a)[2][4], const unsigned char* segment,
                                                 int place, int high, int subtile) {
    const int at = (place ^ (turned(2 * subtile) * kChunk)) + 2 * subtile * 8 * kChunk;
    const uint2 l = read_shared<uint2>(segment, at), h = read_shared<uint2>(segment, at + high);
#pragma unroll
    for (int product = 0; product < 2; ++product) {
      const uint32_t of_low = product == 0 ? l.x : l.y, of_high = product == 0 ? h.x : h.y;
      a[product][0] = Bytes<T>::centred(__byte_perm(of_low, 0, 0x4140));
      a[product][1] = Bytes<T>::centred(__byte_perm(of_high, 0, 0x4140));
      a[product][2] = Bytes<T>::centred(__byte_perm(of_low, 0, 0x4342));
      a[product][3] = Bytes<T>::centred(__byte_perm(of_high, 0, 0x4342));
    }
  }

  // Only asked for where there are minima.
  static __device__ __forceinline__ uint32_t offset(int /*product*/, bool /*centred*/) {
    return Bytes<T>::kOffset;
  }
  static constexpr uint32_t kOne = Bytes<T>::kOne;
};

// Four bits in a mantissa: the low half of a byte behind kLow, the high half behind kHigh after a
// shift by kShift; both less 8, as offsets where levels are centred.
template <typename T>
struct Nibbles;

template <>
struct Nibbles<Bf16> {
  static constexpr int kShift = 1;
  static constexpr uint32_t kHighMask = 0x00780078u;
  static constexpr uint32_t kLow = 0x43004300u, kHigh = 0x41804180u;                // 128, 16
  static constexpr uint32_t kLowCentred = 0x43084308u, kHighCentred = 0x41c041c0u;  // 136, 24
};

template <>
struct Nibbles<Fp16> {
  static constexpr int kShift = 0;
  static constexpr uint32_t kHighMask = 0x00f000f0u;
  static constexpr uint32_t kLow = 0x64006400u, kHigh = 0x54005400u;                // 1024, 64
  static constexpr uint32_t kLowCentred = 0x64086408u, kHighCentred = 0x54805480u;  // 1032, 72
};

template <typename T>
struct Grouped<T, 4> {
  using Unit = T;
  using Accumulator = float;
  using N = Nibbles<T>;
  static constexpr bool kGrouped = true;
  static constexpr int kSegments = 1;
  static constexpr int kSubtiles = 4;
  static constexpr int kStepInputs = 128;
  static constexpr int kHiddenChunks = 16;
  static constexpr bool kCentred = false;

  static __device__ __forceinline__ int place(int g, int t) { return weight_slot(g, 0) + 4 * t; }

  // A lane has bytes 4 t to 4 t + 3 of a chunk: inputs 4 t to 4 t + 3 in their low halves, for
  // the first product, and 16 + 4 t to 16 + 4 t + 3 in their high halves, for the second.
  static __device__ __forceinline__ void weights(uint32_t (&a)[2][4], const unsigned char* segment,
                                                 int place, int high, int subtile) {
    const int at = (place ^ (turned(subtile) * kChunk)) + subtile * 8 * kChunk;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t word = read_shared<uint32_t>(segment, at + half * high);
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        const uint32_t bytes = __byte_perm(word, 0, pair == 0 ? 0x4140 : 0x4342);
        a[0][2 * pair + half] = and_or(bytes, 0x000f000fu, N::kLow);
        a[1][2 * pair + half] = and_or(bytes >> N::kShift, N::kHighMask, N::kHigh);
      }
    }
  }

  struct Hidden {
    static __device__ __forceinline__ int place(int row, int t) {
      return hidden_slot<kHiddenChunks>(row, t / 2) + t % 2 * 8;
    }
    static __device__ __forceinline__ void read(uint32_t (&b)[2][2], const unsigned char* from,
                                                int place, int subtile) {
#pragma unroll
      for (int product = 0; product < 2; ++product) {
        const int flip = (subtile % 2 * kSegmentChunks + 2 * product) * kChunk;
        const uint2 x =
            read_shared<uint2>(from, (place ^ flip) + subtile / 2 * 2 * kSegmentChunks * kChunk);
        b[product][0] = x.x;
        b[product][1] = x.y;
      }
    }
  };

  static __device__ __forceinline__ uint32_t offset(int product, bool centred) {
    if (product == 0) return centred ? N::kLowCentred : N::kLow;
    return centred ? N::kHighCentred : N::kHigh;
  }
  static constexpr uint32_t kOne = Bytes<T>::kOne;
};

}  // namespace meshserve
