// Attention of one head of an encoder: every token of a sequence sees all of them, or those near.
//
// Keys and values of the head are packed into tiles of 16 tokens as the paged cache has them
// (kv_layout.h), and a few queries at a time are multiplied with them. Scores of a query are all
// there before its softmax, so a token's result depends on its sequence alone.
#pragma once

#include <algorithm>
#include <limits>

#include "attention_blocks.h"
#include "simd.h"

namespace meshserve::MESHSERVE_ISA {

struct EncoderHead {
  const float* queries;  // of the sequence's first token; keys and values are at these distances
  int64_t keys, values;  // floats
  int64_t stride;        // floats from a token to the next
  int32_t num_tokens, head_dim;
  float scale;
  int32_t window;  // how far a token sees; negative: everywhere
  float* output;
  int64_t output_stride;
};

// A thread's memory for one head.
struct EncoderScratch {
  uint16_t* keys;    // [tiles][head_dim / 2][16 tokens][2]
  uint16_t* values;  // [tiles][8 pairs][head_dim][2]
  Operand* queries;  // [block_rows][head_dim]
  float* scores;     // [block_rows][tiles * 16]
  Operand* weights;  // [chunks][block_rows][attention_chunk]
  float* sums;       // [block_rows][head_dim]
  size_t bytes = 0;

  EncoderScratch(void* memory, int32_t num_tokens, int32_t head_dim) {
    const auto chunks = static_cast<size_t>((num_tokens + attention_chunk - 1) / attention_chunk);
    const size_t tokens = chunks * attention_chunk, dim = static_cast<size_t>(head_dim);
    const auto take = [&](auto*& pointer, size_t count) {
      pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(
          static_cast<unsigned char*>(memory) + bytes);
      bytes += (count * sizeof(*pointer) + 63) / 64 * 64;
    };
    take(keys, tokens * dim);
    take(values, tokens * dim);
    take(queries, block_rows * dim);
    take(scores, block_rows * tokens);
    take(weights, block_rows * tokens);
    take(sums, block_rows * dim);
  }
};

class EncoderAttention {
 public:
  EncoderAttention(const EncoderHead& head, void* memory)
      : head_(head),
        dim_(head.head_dim),
        tiles_((head.num_tokens + tile_tokens - 1) / tile_tokens),
        scratch_(memory, head.num_tokens, head.head_dim) {}

  void run() const {
    for (int32_t tile = 0; tile < tiles_; ++tile) pack(tile);
    for (int32_t row = 0; row < head_.num_tokens; row += block_rows) attend(row);
  }

 private:
  static constexpr float no_score = -std::numeric_limits<float>::infinity();
  static constexpr float log2_e = 1.44269504f;

  uint16_t* key_tile(int32_t tile) const {
    return scratch_.keys + int64_t{tile} * tile_tokens * dim_;
  }
  uint16_t* value_tile(int32_t tile) const {
    return scratch_.values + int64_t{tile} * tile_tokens * dim_;
  }

  // Tokens that are not there have keys and values of 0.
  void pack(int32_t tile) const {
    alignas(64) uint16_t rounded[2][lanes];
    for (int32_t token = 0; token < tile_tokens; token += 2) {
      const int32_t first = tile * tile_tokens + token;
      for (int32_t dim = 0; dim < dim_; dim += lanes) {
        round_pair(first, head_.keys + dim, rounded);
        uint16_t* keys = key_tile(tile) + dim * tile_tokens + 2 * token;
        for (int32_t i = 0; i < lanes; i += 2) {
          std::memcpy(keys + i * tile_tokens, rounded[0] + i, 4);
          std::memcpy(keys + i * tile_tokens + 2, rounded[1] + i, 4);
        }
        round_pair(first, head_.values + dim, rounded);
        uint16_t* values = value_tile(tile) + (token / 2 * dim_ + dim) * 2;
        for (int32_t i = 0; i < lanes; ++i) {
          values[2 * i] = rounded[0][i];
          values[2 * i + 1] = rounded[1][i];
        }
      }
    }
  }

  void round_pair(int32_t first, int64_t offset, uint16_t (&to)[2][lanes]) const {
    const float* from = head_.queries + first * head_.stride + offset;
    for (int32_t i = 0; i < 2; ++i, from += head_.stride) {
      store_bf16(to[i], first + i < head_.num_tokens ? load(from) : broadcast(0.0f));
    }
  }

  // The queries from `begin` on; those beyond the last repeat it, and are not written.
  void attend(int32_t begin) const {
    const int32_t last = head_.num_tokens - 1;
    const int32_t rows = std::min(block_rows, head_.num_tokens - begin);
    for (int32_t row = 0; row < block_rows; ++row) {
      const float* from = head_.queries + std::min(begin + row, last) * head_.stride;
      for (int32_t dim = 0; dim < dim_; dim += lanes)
        store_operands(scratch_.queries + row * dim_ + dim, load(from + dim));
    }
    const int32_t first_seen = head_.window < 0 ? 0 : std::max(begin - head_.window, 0);
    const int32_t last_seen =
        head_.window < 0 ? last : std::min(begin + rows - 1 + head_.window, last);
    const int32_t first_tile = first_seen / tile_tokens, end_tile = last_seen / tile_tokens + 1;
    int32_t tile = first_tile;
    for (; tile + 4 <= end_tile; tile += 4) score_tiles<4>(tile, first_tile);
    if (tile + 2 <= end_tile) {
      score_tiles<2>(tile, first_tile);
      tile += 2;
    }
    if (tile < end_tile) score_tiles<1>(tile, first_tile);
    float totals[block_rows];
    for (int32_t row = 0; row < block_rows; ++row)
      totals[row] = weigh(row, std::min(begin + row, last), first_tile, end_tile);
    add_values(first_tile, end_tile);
    for (int32_t row = 0; row < rows; ++row) {
      float* to = head_.output + (begin + row) * head_.output_stride;
      const Floats factor = broadcast(1.0f / totals[row]);
      for (int32_t dim = 0; dim < dim_; dim += lanes)
        store(to + dim, multiply(load(scratch_.sums + row * dim_ + dim), factor));
    }
  }

  float* scores(int32_t row) const { return scratch_.scores + int64_t{row} * tiles_ * tile_tokens; }

  // Scores of `width` tiles of keys; those of `first_tile` come first in memory.
  template <int width>
  void score_tiles(int32_t tile, int32_t first_tile) const {
    Floats sums[block_rows][width];
#pragma GCC unroll 8
    for (int row = 0; row < block_rows; ++row)
#pragma GCC unroll 8
      for (int i = 0; i < width; ++i) sums[row][i] = broadcast(0.0f);
    for (int32_t dim = 0; dim < dim_; dim += 2) {
      Pairs keys[width];
#pragma GCC unroll 8
      for (int i = 0; i < width; ++i) keys[i] = load_pairs(key_tile(tile + i) + dim * tile_tokens);
#pragma GCC unroll 8
      for (int row = 0; row < block_rows; ++row) {
        const Pairs query = broadcast_pair(scratch_.queries + row * dim_ + dim);
#pragma GCC unroll 8
        for (int i = 0; i < width; ++i) sums[row][i] = add_products(sums[row][i], query, keys[i]);
      }
    }
#pragma GCC unroll 8
    for (int row = 0; row < block_rows; ++row)
#pragma GCC unroll 8
      for (int i = 0; i < width; ++i)
        store(scores(row) + (tile - first_tile + i) * tile_tokens, sums[row][i]);
  }

  // Makes the scores of the query at `position` weights; returns their total.
  float weigh(int32_t row, int32_t position, int32_t first_tile, int32_t end_tile) const {
    const int32_t begin = head_.window < 0 ? 0 : std::max(position - head_.window, 0);
    const int32_t end = head_.window < 0 ? head_.num_tokens
                                         : std::min(position + head_.window + 1, head_.num_tokens);
    float* own = scores(row);
    Floats most = broadcast(no_score);
    for (int32_t tile = first_tile; tile < end_tile; ++tile) {
      float* at = own + (tile - first_tile) * tile_tokens;
      const int32_t token = tile * tile_tokens;
      Floats score = load(at);
      if (token < begin || token + tile_tokens > end) {
        const Mask before = first_lanes(std::clamp(begin - token, 0, tile_tokens));
        const Mask seen = first_lanes(std::clamp(end - token, 0, tile_tokens));
        score = select(seen, select(before, broadcast(no_score), score), broadcast(no_score));
        store(at, score);
      }
      most = larger(most, score);
    }
    const Floats origin = broadcast(maximum(most)), factor = broadcast(head_.scale * log2_e);
    Floats total = broadcast(0.0f);
    for (int32_t tile = first_tile; tile < end_tile; ++tile) {
      const int32_t at = (tile - first_tile) * tile_tokens;
      const Floats weight = exp2(multiply(subtract(load(own + at), origin), factor));
      total = add(total, weight);
      Operand* chunk = scratch_.weights + at / attention_chunk * block_rows * attention_chunk;
      store_operands(chunk + row * attention_chunk + at % attention_chunk, weight);
    }
    return sum(total);
  }

  void add_values(int32_t first_tile, int32_t end_tile) const {
    for (int32_t at = first_tile; at < end_tile; at += chunk_tiles) {
      Chunk chunk = {};
      const int32_t count = std::min(end_tile - at, chunk_tiles);
      for (int32_t tile = 0; tile < count; ++tile) chunk.values[tile] = value_tile(at + tile);
      Fold folds[block_rows];
      for (int32_t row = 0; row < block_rows; ++row)
        folds[row] = {scratch_.sums + row * dim_, at == first_tile, 1.0f, 1.0f};
      const Operand* weights =
          scratch_.weights + (at - first_tile) / chunk_tiles * block_rows * attention_chunk;
      // Beyond the last token there are weights and values of 0.
      multiply_values<uint16_t, block_rows, false>(weights, chunk, 0, count * tile_tokens, dim_,
                                                   folds);
    }
  }

  const EncoderHead& head_;
  const int32_t dim_, tiles_;
  const EncoderScratch scratch_;
};

}  // namespace meshserve::MESHSERVE_ISA
