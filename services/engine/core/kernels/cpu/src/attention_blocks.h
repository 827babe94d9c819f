// The two products of attention, blocked for registers: scores = queries x keys, and sums = weights
// x values, for a few query rows and one chunk of keys.
//
// Each element is one chain of additions over the dimensions (or the tokens) in order, whatever the
// block it is computed in.
#pragma once

#include "attention.h"
#include "attention_expand.h"
#include "simd.h"

namespace meshserve::MESHSERVE_ISA {

constexpr int32_t chunk_tiles = attention_chunk / tile_tokens;

// Rows whose accumulators, with the vectors that feed them, fill the registers.
#if defined(__AVX512BF16__)
constexpr int32_t block_rows = 6;
constexpr int block_width(int rows) { return rows <= 3 ? 8 : 4; }
#elif defined(__AVX512F__)
constexpr int32_t block_rows = 4;
constexpr int block_width(int rows) { return rows <= 2 ? 8 : 4; }
#else
constexpr int32_t block_rows = 4;
constexpr int block_width(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }
#endif

// The tiles of one chunk, their elements bf16 or int8. Those beyond the last repeat it.
struct Chunk {
  const void* keys[chunk_tiles];
  const void* values[chunk_tiles];
  // [attention_chunk], where the cache is int8: the scales of the tokens, 0 where there is none.
  const float* key_scales;
  const float* value_scales;
  // Tiles that are needed next: the first row block fetches them while it multiplies, for no
  // processor foresees which block of the cache comes after which. A tile there has 1 /
  // 2**fetch_shift of the bytes of one here, which is so where this one has been expanded.
  const unsigned char* fetch_with_keys[chunk_tiles];
  const unsigned char* fetch_with_values[chunk_tiles];
  int fetch_shift;
};

inline void fetch(const unsigned char* tile, int32_t offset, int shift) {
  _mm_prefetch(reinterpret_cast<const char*>(tile + (offset >> shift)), _MM_HINT_T0);
}

// As far as two vectors of pairs go.
template <typename Element>
void fetch_two_pairs(const unsigned char* tile, int32_t offset, int shift) {
  constexpr int32_t bytes = 4 * lanes * int32_t{sizeof(Element)};
#pragma GCC unroll 2
  for (int32_t line = 0; line < bytes; line += 64)
    fetch(tile, offset * int32_t{sizeof(Element)} + line, shift);
}

// scores[row][16 * tile + token], for the tiles from `first_tile` to `last_tile`, both rounded to
// multiples of the width.
template <typename Element, int rows, bool fetching>
void multiply_keys(const Operand* queries, const Chunk& chunk, int32_t first_tile,
                   int32_t last_tile, int32_t head_dim, float* scores) {
  constexpr int width = block_width(rows);
  for (int32_t tile = first_tile / width * width; tile < last_tile; tile += width) {
    Floats sums[rows][width];
#pragma GCC unroll 8
    for (int row = 0; row < rows; ++row)
#pragma GCC unroll 8
      for (int i = 0; i < width; ++i) sums[row][i] = broadcast(0.0f);
    for (int32_t dim = 0; dim < head_dim; dim += 4) {
      const int32_t offset = dim * tile_tokens;
      Pairs keys[width][2];
#pragma GCC unroll 8
      for (int i = 0; i < width; ++i) {
        load_two_pairs(static_cast<const Element*>(chunk.keys[tile + i]) + offset, keys[i][0],
                       keys[i][1]);
        if constexpr (fetching)
          fetch_two_pairs<Element>(chunk.fetch_with_keys[tile + i], offset, chunk.fetch_shift);
      }
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
#pragma GCC unroll 8
        for (int row = 0; row < rows; ++row) {
          const Pairs query = broadcast_pair(queries + row * head_dim + dim + 2 * half);
#pragma GCC unroll 8
          for (int i = 0; i < width; ++i)
            sums[row][i] = add_products(sums[row][i], query, keys[i][half]);
        }
      }
    }
#pragma GCC unroll 8
    for (int row = 0; row < rows; ++row)
#pragma GCC unroll 8
      for (int i = 0; i < width; ++i)
        store(scores + row * attention_chunk + (tile + i) * tile_tokens, sums[row][i]);
  }
}

// Where a row's weighted sums go: `kept` times what is there, plus `added` times the chunk's. The
// first chunk's are stored as they are.
struct Fold {
  float* sums;
  bool first;
  float kept, added;
};

inline void fold_into(float* before, Floats sums, const Fold& fold) {
  if (fold.first) return store(before, sums);
  const Floats kept = multiply(load(before), broadcast(fold.kept));
  store(before, fused(sums, broadcast(fold.added), kept));
}

template <typename Element, int width>
void load_vectors(const Element* from, Pairs (&pairs)[width]) {
  if constexpr (width == 1) {
    pairs[0] = load_pairs(from);
  } else {
#pragma GCC unroll 8
    for (int i = 0; i < width; i += 2) load_two_pairs(from + 2 * lanes * i, pairs[i], pairs[i + 1]);
  }
}

// Folds weights x values of the dimensions [dim, dim + 16 * width), and of the tokens from the tile
// `first_tile` to `visible`. A row without a place for its sums sees nothing of the chunk.
template <typename Element, int rows, int width, bool fetching>
void multiply_values(const Operand* weights, const Chunk& chunk, int32_t first_tile,
                     int32_t visible, int32_t head_dim, int32_t dim, const Fold* folds) {
  constexpr int32_t tile_pairs = tile_tokens / 2;
  Floats sums[rows][width];
#pragma GCC unroll 8
  for (int row = 0; row < rows; ++row)
#pragma GCC unroll 8
    for (int i = 0; i < width; ++i) sums[row][i] = broadcast(0.0f);
  const auto add_pair = [&](int32_t pair, const Pairs(&values)[width]) {
#pragma GCC unroll 8
    for (int row = 0; row < rows; ++row) {
      const Pairs weight = broadcast_pair(weights + row * attention_chunk + 2 * pair);
#pragma GCC unroll 8
      for (int i = 0; i < width; ++i) sums[row][i] = add_products(sums[row][i], weight, values[i]);
    }
  };
  const auto offset_in_tile = [&](int32_t pair) {
    return (pair % tile_pairs * head_dim + dim) * 2;
  };
  const int32_t whole_pairs = visible / 2;
  for (int32_t pair = first_tile * tile_pairs; pair < whole_pairs; ++pair) {
    const int32_t offset = offset_in_tile(pair);
    const auto* from = static_cast<const Element*>(chunk.values[pair / tile_pairs]) + offset;
    Pairs values[width];
    load_vectors(from, values);
    if constexpr (fetching) {
      const unsigned char* next = chunk.fetch_with_values[pair / tile_pairs];
#pragma GCC unroll 8
      for (int i = 0; i < width; i += 2)
        fetch_two_pairs<Element>(next, offset + 2 * lanes * i, chunk.fetch_shift);
    }
    add_pair(pair, values);
  }
  if (visible % 2) {
    // The other token of the pair is not there yet: what its place holds must not be multiplied.
    const auto* from = static_cast<const Element*>(chunk.values[whole_pairs / tile_pairs]) +
                       offset_in_tile(whole_pairs);
    Pairs values[width];
    load_vectors(from, values);
#pragma GCC unroll 8
    for (int i = 0; i < width; ++i) values[i] = first_of_pairs(values[i]);
    add_pair(whole_pairs, values);
  }
#pragma GCC unroll 8
  for (int row = 0; row < rows; ++row) {
    if (folds[row].sums == nullptr) continue;
#pragma GCC unroll 8
    for (int i = 0; i < width; ++i)
      fold_into(folds[row].sums + dim + lanes * i, sums[row][i], folds[row]);
  }
}

template <typename Element, int rows, bool fetching>
void multiply_values(const Operand* weights, const Chunk& chunk, int32_t first_tile,
                     int32_t visible, int32_t head_dim, const Fold* folds) {
  constexpr int width = block_width(rows) < 4 ? block_width(rows) : 4;
  int32_t dim = 0;
  for (; dim + width * lanes <= head_dim; dim += width * lanes)
    multiply_values<Element, rows, width, fetching>(weights, chunk, first_tile, visible, head_dim,
                                                    dim, folds);
  if constexpr (width > 2) {
    if (dim + 2 * lanes <= head_dim) {
      multiply_values<Element, rows, 2, fetching>(weights, chunk, first_tile, visible, head_dim,
                                                  dim, folds);
      dim += 2 * lanes;
    }
  }
  if (dim < head_dim)
    multiply_values<Element, rows, 1, fetching>(weights, chunk, first_tile, visible, head_dim, dim,
                                                folds);
}

}  // namespace meshserve::MESHSERVE_ISA
