// Tiles of the cache on their way through shared memory, and what is multiplied with them.
#pragma once

#include "attention_cache.h"
#include "attention_decode.h"

namespace meshserve {

// A warp's tile: so many tokens that keys and values are 4 KiB each, or 16 of them at least.
template <typename Cache, int kHeadDim>
struct Tile {
  static constexpr int kRowBytes = kHeadDim * Cache::kBytes;
  static constexpr int kTokens = kRowBytes >= 256 ? 16 : 4096 / kRowBytes;
  static constexpr int kBytes = kTokens * kRowBytes;
  static constexpr int kStageBytes = 2 * kBytes + (Cache::kScaled ? 2 * kTokens * 4 : 0);
  static constexpr int kUnits = kRowBytes / 32;
  static constexpr int kLanesPerRow = kRowBytes / 16;
  static constexpr int kRowsPerCopy = 32 / kLanesPerRow;
  static constexpr int kCopies = kTokens / kRowsPerCopy;
  static constexpr int kIds = (kTokens + 31) / 32;

  // Where 16 bytes of a token's vector are: eight tokens' same chunk lies in eight groups of banks.
  static __device__ __forceinline__ int place(int token, int chunk) {
    const int turned = kRowBytes >= 128 ? chunk ^ (token & 7) : chunk ^ (token >> 1 & 3);
    return token * kRowBytes + turned * 16;
  }
};

// Copies tiles of one sequence and KV head.
template <typename Cache, int kHeadDim>
struct TileReader {
  using Shape = Tile<Cache, kHeadDim>;

  const AttentionDecodeArgs& args;
  const int32_t* table;
  const unsigned char *keys, *values;  // of the KV head, and the chunk of the lane
  int kv_head, begin, lane;
  uint32_t seen;  // tokens from `begin` on

  __device__ __forceinline__ TileReader(const AttentionDecodeArgs& a, const Part& part)
      : args(a),
        kv_head(part.kv_head),
        begin(part.begin),
        lane(threadIdx.x % 32),
        seen(part.end - part.begin) {
    table = args.block_tables + int64_t(part.sequence) * args.table_stride;
    const int64_t at = int64_t(kv_head) * args.head_stride + lane % Shape::kLanesPerRow * 16;
    keys = static_cast<const unsigned char*>(args.keys) + at;
    values = static_cast<const unsigned char*>(args.values) + at;
  }

  // Whether some row sees a token. What a window hides need not be in the block table, and what
  // lies there need not be numbers.
  __device__ __forceinline__ bool is_seen(int token) const {
    return uint32_t(token - begin) < seen;
  }

  // The blocks of a tile: of each lane those of the tokens lane + 32 i.
  struct Blocks {
    int32_t of[Shape::kIds];
  };

  __device__ __forceinline__ Blocks find_blocks(int tile) const {
    Blocks blocks;
#pragma unroll
    for (int i = 0; i < Shape::kIds; ++i) {
      const int token = tile * Shape::kTokens + 32 * i + lane;
      blocks.of[i] = is_seen(token) ? table[token >> args.block_shift] : 0;
    }
    return blocks;
  }

  // Begins to copy a tile. Tokens that no row sees become zeros.
  __device__ __forceinline__ void copy(int tile, const Blocks& blocks, unsigned char* stage) const {
    const int within = (1 << args.block_shift) - 1;
#pragma unroll
    for (int i = 0; i < Shape::kCopies; ++i) {
      const int row = i * Shape::kRowsPerCopy + lane / Shape::kLanesPerRow;
      const int token = tile * Shape::kTokens + row;
      const int32_t block =
          __shfl_sync(0xffffffffu, blocks.of[i * Shape::kRowsPerCopy / 32], row % 32);
      const int64_t offset =
          int64_t(block) * args.block_stride + (token & within) * args.token_stride;
      unsigned char* to = stage + Shape::place(row, lane % Shape::kLanesPerRow);
      const bool present = is_seen(token);
      cp_async_16(to, keys + offset, present);
      cp_async_16(to + Shape::kBytes, values + offset, present);
    }
    if constexpr (Cache::kScaled) {
#pragma unroll
      for (int i = 0; i < Shape::kIds; ++i) {
        const int row = 32 * i + lane, token = tile * Shape::kTokens + row;
        if (row >= Shape::kTokens) break;
        const int64_t offset = int64_t(blocks.of[i]) * args.scale_block_stride +
                               (token & within) * args.scale_token_stride + kv_head;
        float* to = reinterpret_cast<float*>(stage + 2 * Shape::kBytes) + row;
        cp_async_4(to, args.key_scales + offset, is_seen(token));
        cp_async_4(to + Shape::kTokens, args.value_scales + offset, is_seen(token));
      }
    }
  }
};

// The queries of the rows of a part as the right factors of products with keys: lane / 4 is the row
// of eight.
template <typename Q, typename Cache, int kHeadDim, int kRowTiles>
__device__ __forceinline__ void load_queries(const AttentionDecodeArgs& args, const Part& part,
                                             uint32_t (&b)[kHeadDim / 16][kRowTiles][2]) {
  const int group = threadIdx.x % 32 / 4, in_group = threadIdx.x % 4;
#pragma unroll
  for (int n = 0; n < kRowTiles; ++n) {
    const int row = 8 * n + group;
    const int2 place = place_of(part, row, args);
    const uint16_t* query = static_cast<const uint16_t*>(args.queries) +
                            place.x * args.query_stride + place.y * args.query_head_stride;
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
      const uint2 pairs = Cache::queries(query + 16 * k, in_group);
      b[k][n][0] = convert<Q, typename Cache::Compute>(pairs.x);
      b[k][n][1] = convert<Q, typename Cache::Compute>(pairs.y);
    }
  }
}

}  // namespace meshserve
