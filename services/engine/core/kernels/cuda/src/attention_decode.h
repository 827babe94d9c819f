// Attention of few queries a sequence over the paged cache: what its parts share.
#pragma once

#include "launch.h"
#include "numbers.h"

namespace meshserve {

struct AttentionDecodeArgs {
  const void* queries;  // [tokens, heads, head_dim]
  void* output;         // [tokens, heads, head_dim], contiguous
  const void* keys;     // [blocks, block_size, kv_heads, head_dim]
  const void* values;
  const float* key_scales;  // [blocks, block_size, kv_heads] or null
  const float* value_scales;
  const int32_t* query_starts;  // [sequences + 1]
  const int32_t* contexts;      // [sequences]
  const int32_t* block_tables;  // [sequences, table_stride]
  float* parts;                 // [pairs, splits, rows, head_dim]: sums of values, not divided
  float2* part_sums;            // [pairs, splits, rows]: the greatest score, and the sum of weights
  uint32_t* arrived;            // [pairs], zero before and after
  int64_t query_stride, query_head_stride;          // elements
  int32_t block_stride, token_stride, head_stride;  // bytes, of keys and of values
  int32_t scale_block_stride, scale_token_stride;   // elements; those of heads are one apart
  int32_t table_stride;
  int32_t sequences, kv_heads, heads_per_kv, head_dim;
  int32_t rows;  // of a tile, 8 or 16, and 8 of head_dim 256: queries * heads_per_kv
  int32_t row_tiles;
  int32_t splits;       // the most parts that a sequence is divided into
  int32_t least_tiles;  // of tokens, that a part has
  int32_t warps;
  int32_t block_shift;  // the block size is 1 << block_shift
  int32_t window;       // 0: none
  int32_t is_settled;   // lengths, tables and tokens of earlier steps are there before this starts
  float scale;
  float softcap;  // 0: none
  Format query_format, cache_format;
};

// What a block of threads computes: rows of one KV head of a sequence, over a part of its tokens.
struct Part {
  int sequence, kv_head, split, pair;
  int query_start, queries, first_row, rows;
  int seen_by_first;  // tokens that the first query of the sequence sees, were there no window
  int begin, end;     // tokens that some row sees: those before are not so much as looked at
  int tile_begin, tile_end;
  int parts;  // that the sequence is divided into

  // The query and the query head, of the KV head's, of a row. Rows that pad the last tile count as
  // its last.
  __device__ __forceinline__ int2 split_row(int row, const AttentionDecodeArgs& args) const {
    const int at = first_row + min(row, rows - 1);
    // A division takes as long as a dozen other instructions, and decoding needs none.
    if (queries == 1) return {0, at};
    const int query = at / args.heads_per_kv;
    return {query, at - query * args.heads_per_kv};
  }
};

// False where there is nothing to do. The grid is [KV heads, parts and tiles of rows, sequences]:
// blocks that run at once read what lies side by side.
template <int kRows, int kTile>
__device__ __forceinline__ bool find_part(const AttentionDecodeArgs& args, Part& part) {
  part.sequence = blockIdx.z;
  part.kv_head = blockIdx.x;
  const int row_tile = args.row_tiles == 1 ? 0 : blockIdx.y % args.row_tiles;
  part.split = args.row_tiles == 1 ? blockIdx.y : blockIdx.y / args.row_tiles;
  part.pair = (part.sequence * args.row_tiles + row_tile) * args.kv_heads + part.kv_head;
  part.query_start = args.query_starts[part.sequence];
  part.queries = args.query_starts[part.sequence + 1] - part.query_start;
  const int context = args.contexts[part.sequence];
  part.first_row = row_tile * kRows;
  part.rows = min(kRows, part.queries * args.heads_per_kv - part.first_row);
  if (part.rows <= 0) return false;
  part.seen_by_first = context - part.queries + 1;
  part.end = part.seen_by_first + part.split_row(kRows, args).x;
  const int first_query_sees = part.seen_by_first + part.split_row(0, args).x;
  part.begin = args.window > 0 ? max(0, first_query_sees - args.window) : 0;
  const int first_tile = part.begin / kTile;
  const int tiles = (part.end + kTile - 1) / kTile - first_tile;
  const int share = max((tiles + args.splits - 1) / args.splits, args.least_tiles);
  part.parts = (tiles + share - 1) / share;
  part.tile_begin = first_tile + part.split * share;
  part.tile_end = min(first_tile + tiles, part.tile_begin + share);
  return part.split < part.parts;
}

// Where a row of a part is in the queries and the output: its token, and its head.
__device__ __forceinline__ int2 place_of(const Part& part, int row,
                                         const AttentionDecodeArgs& args) {
  const int2 split = part.split_row(row, args);
  return {part.query_start + split.x, part.kv_head * args.heads_per_kv + split.y};
}

// By cache format, in files of their own, which compile side by side.
int32_t attend_same_bf16(const AttentionDecodeArgs& args, cudaStream_t stream);
int32_t attend_same_fp16(const AttentionDecodeArgs& args, cudaStream_t stream);
int32_t attend_e4m3(const AttentionDecodeArgs& args, cudaStream_t stream);
int32_t attend_int8(const AttentionDecodeArgs& args, cudaStream_t stream);

}  // namespace meshserve
