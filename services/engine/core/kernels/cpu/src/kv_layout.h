// The layout of the paged KV cache, and one step's tokens as all layers see them.
//
// A block holds `block_size` tokens of every KV head; block_size is a multiple of 16. Per KV head a
// block is a row of tiles of 16 tokens, laid out for instructions that multiply pairs of bf16:
//
//   keys    [head_dim / 2][16 tokens][2 dims]   16 scores come from broadcasting a pair of a query
//   values  [8 pairs][head_dim][2 tokens]       a pair of weights is broadcast against two tokens
//
// bf16: the elements are bf16. int8: they are int8 in the same order, followed by 16 floats, the
// scales of the tile's tokens: value = element * scale.
//
// What no token has written yet is undefined, NaN included: a block keeps what its last owner left.
#pragma once

#include <cstddef>
#include <cstdint>

namespace meshserve {

enum class KvFormat : int32_t { bf16 = 0, int8 = 1 };

// The cache of one layer.
struct KvLayout {
  void* keys;            // of block 0
  void* values;          // of block 0
  int64_t block_stride;  // bytes from a block to the next, for keys and for values
  int32_t block_size;    // tokens, a multiple of 16
  int32_t kv_heads;
  int32_t head_dim;  // a multiple of 16
  KvFormat format;
  int32_t group;  // of layers, whose slots and block tables are this layer's
};

// The tokens of a step, flattened over its sequences.
struct StepView {
  int32_t num_tokens, num_sequences;
  const int32_t* positions;        // [num_tokens]
  const int64_t* slots;            // [groups, num_tokens], block * block_size + offset
  const int32_t* query_starts;     // [num_sequences + 1]: the tokens of each sequence
  const int32_t* context_lengths;  // [num_sequences], these tokens included
  const int32_t* block_tables;     // [groups, num_sequences, table_stride]
  int32_t table_stride;
  // From a group's slots, and block tables, to the next group's.
  int64_t group_slots, group_tables;
};

}  // namespace meshserve

namespace meshserve::MESHSERVE_ISA {

constexpr int32_t tile_tokens = 16;

inline size_t kv_tile_bytes(KvFormat format, int32_t head_dim) {
  const size_t elements = size_t{tile_tokens} * static_cast<size_t>(head_dim);
  return format == KvFormat::bf16 ? elements * 2 : elements + tile_tokens * sizeof(float);
}

// Where a token's keys and values go in a layer.
inline int64_t slot_of(const StepView& step, const KvLayout& cache, int32_t token) {
  return step.slots[cache.group * step.group_slots + token];
}

// The blocks of a sequence in a layer.
inline const int32_t* blocks_of(const StepView& step, const KvLayout& cache, int32_t sequence) {
  return step.block_tables + cache.group * step.group_tables +
         int64_t{sequence} * step.table_stride;
}

// Bytes from block 0's keys (or values) to the tile of a KV head that holds token `offset` of a
// block.
inline size_t kv_tile_offset(const KvLayout& cache, int64_t block, int32_t kv_head,
                             int32_t offset) {
  const int32_t tile = kv_head * (cache.block_size / tile_tokens) + offset / tile_tokens;
  return static_cast<size_t>(block * cache.block_stride) +
         static_cast<size_t>(tile) * kv_tile_bytes(cache.format, cache.head_dim);
}

}  // namespace meshserve::MESHSERVE_ISA
