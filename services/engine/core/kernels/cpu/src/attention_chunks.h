// A thread's memory for one task of attention, and what the products read of the cache.
#pragma once

#include <algorithm>
#include <type_traits>

#include "attention_blocks.h"
#include "attention_expand.h"
#include "simd.h"

namespace meshserve::MESHSERVE_ISA {

// A thread's memory for one task.
struct Scratch {
  Operand* queries;    // [rows][head_dim]
  float* sums;         // [rows][head_dim]
  float* maxima;       // [rows], and
  float* totals;       // [rows]: the RowStates of all rows; padded
  float* scores;       // [block_rows][attention_chunk]
  Operand* weights;    // [block_rows][attention_chunk]
  uint16_t* expanded;  // int8: the keys of a chunk as bf16, and its values
  float* scales;       // int8: those of the keys, and of the values
  size_t bytes = 0;

  Scratch(void* memory, const KvLayout& cache, int32_t num_rows) {
    const auto rows = static_cast<size_t>(num_rows);
    const auto head_dim = static_cast<size_t>(cache.head_dim);
    const auto take = [&](auto*& pointer, size_t count) {
      pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(
          static_cast<unsigned char*>(memory) + bytes);
      bytes += (count * sizeof(*pointer) + 63) / 64 * 64;
    };
    take(queries, rows * head_dim);
    take(sums, rows * head_dim);
    take(maxima, rows + lanes);
    take(totals, rows + lanes);
    take(scores, size_t{block_rows} * attention_chunk);
    take(weights, size_t{block_rows} * attention_chunk);
    const size_t expanded_tokens = cache.format == KvFormat::int8 ? 2 * attention_chunk : 0;
    take(expanded, expanded_tokens * head_dim);
    take(scales, expanded_tokens);
  }
};

// Copies the scales of a tile's first `tokens` tokens, and 0 for the others.
inline void copy_scales(const unsigned char* from, int32_t tokens, float* to) {
  const Floats scales = load(reinterpret_cast<const float*>(from));
  store(to, select(first_lanes(std::clamp(tokens, 0, tile_tokens)), scales, broadcast(0.0f)));
}

// Where the tiles of a chunk are in the cache; those beyond the last repeat it.
struct Tiles {
  const unsigned char* keys[chunk_tiles];
  const unsigned char* values[chunk_tiles];
};

inline Chunk as_stored(const Tiles& tiles, const Tiles& next) {
  Chunk chunk = {};
  for (int32_t tile = 0; tile < chunk_tiles; ++tile) {
    chunk.keys[tile] = tiles.keys[tile];
    chunk.values[tile] = tiles.values[tile];
  }
  std::copy_n(tiles.values, chunk_tiles, chunk.fetch_with_keys);
  std::copy_n(next.keys, chunk_tiles, chunk.fetch_with_values);
  return chunk;
}

// Puts the scales of a chunk's tokens where they lie together, and asks for those of the next.
inline void gather_scales(const Tiles& tiles, const Tiles& next, int32_t tokens, int32_t head_dim,
                          const Scratch& scratch, Chunk& chunk) {
  const int32_t elements = tile_tokens * head_dim;
  for (int32_t tile = 0; tile < chunk_tiles; ++tile) {
    const int32_t first = tile * tile_tokens;
    copy_scales(tiles.keys[tile] + elements, tokens - first, scratch.scales + first);
    copy_scales(tiles.values[tile] + elements, tokens - first,
                scratch.scales + attention_chunk + first);
    fetch(next.keys[tile], elements, 0);
    fetch(next.values[tile], elements, 0);
  }
  chunk.key_scales = scratch.scales;
  chunk.value_scales = scratch.scales + attention_chunk;
}

// With the elements as bf16, for many rows to multiply.
inline Chunk expanded(const Tiles& tiles, const Tiles& next, int32_t tokens, int32_t head_dim,
                      const Scratch& scratch) {
  Chunk chunk = as_stored(tiles, next);
  const int32_t elements = tile_tokens * head_dim;
  const auto expand_tile = [&](const unsigned char* from, int32_t index) {
    uint16_t* place = scratch.expanded + index * elements;
    expand_int8(reinterpret_cast<const int8_t*>(from), elements, place);
    return place;
  };
  for (int32_t tile = 0; tile < chunk_tiles; ++tile) {
    const bool there = tile * tile_tokens < tokens;
    chunk.keys[tile] = there ? expand_tile(tiles.keys[tile], tile) : chunk.keys[tile - 1];
    if (there) chunk.values[tile] = expand_tile(tiles.values[tile], chunk_tiles + tile);
  }
  chunk.fetch_shift = 1;
  return chunk;
}

}  // namespace meshserve::MESHSERVE_ISA
