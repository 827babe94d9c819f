// The softmax of attention: the scores of a chunk become weights, and chunks are joined.
//
// A row's weights are relative to the largest score of its chunk; joining two chunks brings both to
// the larger maximum (Milakov and Gimelshein, arXiv:1805.02867).
#pragma once

#include <algorithm>
#include <limits>

#include "attention_blocks.h"
#include "row_functions.h"
#include "simd.h"

namespace meshserve::MESHSERVE_ISA {

constexpr float no_score = -std::numeric_limits<float>::infinity();

// A softmax in the making for each of up to 16 rows.
struct RowStates {
  Floats maxima;  // of the scores, before AttentionArgs::scale
  Floats totals;  // of the weights, which are relative to the maximum
};

// What brings the weighted sums of the chunks before, and of a further one, to a common maximum.
struct Factors {
  Floats kept, added;
};

// Makes the scores of keys before a row's window -inf, whatever they were.
inline void hide_first_scores(float* scores, int32_t hidden) {
  for (int32_t tile = 0; tile * tile_tokens < hidden; ++tile) {
    const Mask before = first_lanes(std::min(hidden - tile * tile_tokens, tile_tokens));
    float* from = scores + tile * tile_tokens;
    store(from, select(before, broadcast(no_score), load(from)));
  }
}

// Bends scores towards `cap`: cap * tanh(score / cap).
inline void cap_scores(float* scores, int32_t visible, float cap) {
  const Floats bound = broadcast(cap), inverse = broadcast(1.0f / cap);
  for (int32_t token = 0; token < visible; token += tile_tokens) {
    const Floats bent = hyperbolic_tangent(multiply(load(scores + token), inverse));
    store(scores + token, multiply(bent, bound));
  }
}

// Makes the scores of keys that a row does not see -inf, whatever they were.
inline void hide_scores(float* scores, int32_t visible) {
  for (int32_t tile = visible / tile_tokens; tile < chunk_tiles; ++tile) {
    const Mask seen = first_lanes(std::max(visible - tile * tile_tokens, 0));
    float* from = scores + tile * tile_tokens;
    store(from, select(seen, load(from), broadcast(no_score)));
  }
}

// Combines the tiles pairwise, always in the same order.
template <typename Combine>
Floats combine_tiles(Floats (&tiles)[chunk_tiles], Combine combine) {
#pragma GCC unroll 8
  for (int32_t distance = chunk_tiles / 2; distance > 0; distance /= 2)
#pragma GCC unroll 8
    for (int32_t tile = 0; tile < distance; ++tile)
      tiles[tile] = combine(tiles[tile], tiles[tile + distance]);
  return tiles[0];
}

inline float largest_score(const float* scores) {
  Floats tiles[chunk_tiles];
#pragma GCC unroll 8
  for (int32_t tile = 0; tile < chunk_tiles; ++tile)
    tiles[tile] = load(scores + tile * tile_tokens);
  return maximum(combine_tiles(tiles, larger));
}

// Writes the weights of a row; returns their total. With `value_scales`, the weights that are
// written are multiplied by the scales of their tokens' values.
template <bool scaled>
float write_weights(const float* scores, float largest, float scale, const float* value_scales,
                    Operand* weights) {
  const Floats origin = broadcast(largest), factor = broadcast(scale);
  Floats tiles[chunk_tiles];
#pragma GCC unroll 8
  for (int32_t tile = 0; tile < chunk_tiles; ++tile) {
    const Floats score = load(scores + tile * tile_tokens);
    tiles[tile] = exp2(multiply(subtract(score, origin), factor));
    Floats weight = tiles[tile];
    if constexpr (scaled) weight = multiply(weight, load(value_scales + tile * tile_tokens));
    store_operands(weights + tile * tile_tokens, weight);
  }
  return sum(combine_tiles(tiles, add));
}

// Turns the scores of a few rows into weights. Of a chunk a row sees the tokens from `hidden` to
// `visible`; one that sees nothing gets weights of 0. `scale` is on the scores, times log2(e);
// `cap`, on those before it, is none where it is 0.
template <int rows, bool scaled>
RowStates weigh_rows(float* scores, const Chunk& chunk, const int32_t* hidden,
                     const int32_t* visible, float cap, float scale, Operand* weights) {
  alignas(64) float maxima[lanes], totals[lanes] = {};
  std::fill(maxima, maxima + lanes, no_score);
  for (int row = 0; row < rows; ++row) {
    float* own = scores + row * attention_chunk;
    if constexpr (scaled) {
      for (int32_t token = 0; token < visible[row]; token += tile_tokens)
        store(own + token, multiply(load(own + token), load(chunk.key_scales + token)));
    }
    if (cap > 0.0f) cap_scores(own, visible[row], cap);
    if (hidden[row] > 0) hide_first_scores(own, hidden[row]);
    if (visible[row] < attention_chunk) hide_scores(own, visible[row]);
    maxima[row] = largest_score(own);
  }
  for (int row = 0; row < rows; ++row) {
    Operand* own = weights + row * attention_chunk;
    if (visible[row] == 0) {
      std::fill(own, own + attention_chunk, Operand{0});
    } else {
      totals[row] = write_weights<scaled>(scores + row * attention_chunk, maxima[row], scale,
                                          chunk.value_scales, own);
    }
  }
  return {load(maxima), load(totals)};
}

// Joins a chunk's states to those before it.
inline Factors join(RowStates& before, const RowStates& chunk, float scale) {
  const Floats maxima = larger(before.maxima, chunk.maxima), factor = broadcast(scale);
  const Factors factors = {exp2(multiply(subtract(before.maxima, maxima), factor)),
                           exp2(multiply(subtract(chunk.maxima, maxima), factor))};
  before.maxima = maxima;
  before.totals = fused(chunk.totals, factors.added, multiply(before.totals, factors.kept));
  return factors;
}

}  // namespace meshserve::MESHSERVE_ISA
