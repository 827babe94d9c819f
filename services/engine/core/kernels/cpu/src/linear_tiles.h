// Blocks of a linear layer as products of tiles: up to 16 rows of activations by 16 outputs.
//
// Packed weights are B tiles as they lie in memory: 32 inputs of 16 outputs are 16 rows of pairs of
// bf16, or 8 rows of four bytes. Those in bf16 go through tiles whatever the number of rows, since
// tiles add up in an order of their own. Those in bytes do where rows are many: a group's sums are
// exact, and what becomes of them is what linear_blocks.h does, so that results are the same.
#pragma once

#include <algorithm>

#include "linear_blocks.h"
#include "tiles.h"

namespace meshserve::MESHSERVE_ISA {

// What is computed with two tiles of activations has four of sums, and two of weights in hand.
constexpr int first_sums = 0, first_rows = 4, first_weights = 6;

// Sums of a block of one strip, as they come out of tiles.
struct alignas(64) BlockSums {
  float of[strip_tiles][max_tile_rows][tile_outputs];
};

// Rows are taken in tiles of one size. The last one begins earlier where they do not fill it, and
// computes again what the one before it has computed, which is then left out.
struct RowTiles {
  int count;
  int rows;  // of each

  // `multiple`: of how many their number is one, if there are more than one.
  RowTiles(int all, int multiple) : count((all + max_tile_rows - 1) / max_tile_rows) {
    if (count > 1) count = (count + multiple - 1) / multiple * multiple;
    rows = (all + count - 1) / count;
  }
  int first(int tile, int all) const { return std::min(tile * rows, all - rows); }
  int known(int tile, int all) const { return tile * rows - first(tile, all); }
};

inline const char* activation_rows(const LinearArgs& args, int row) {
  return static_cast<const char*>(args.input.rows) + row * args.input.stride;
}

// Another thread may have written the residual stream last.
inline void prefetch_outputs(const LinearArgs& args, int strip, int row, int rows) {
  if (args.epilogue != Epilogue::add) return;
  const float* output = args.output + row * args.output_stride + strip * strip_outputs;
  for (int r = 0; r < rows; ++r, output += args.output_stride) {
    for (int t = 0; t < strip_tiles; ++t) prefetch(output + t * tile_outputs);
  }
}

inline void finish_block(const LinearArgs& args, int strip, int row, int rows, int known,
                         const BlockSums& sums) {
  for (int r = known; r < rows; ++r) {
    Floats of_row[1][strip_tiles];
#pragma GCC unroll 16
    for (int t = 0; t < strip_tiles; ++t) of_row[0][t] = load(sums.of[t][r]);
    finish<1, strip_tiles>(args, strip, row + r, of_row);
  }
}

// bf16: blocks of one tile of rows and one or two strips, or of two and one.

constexpr int32_t tile_inputs = 32;
constexpr int64_t tile_step_bytes = int64_t{tile_inputs} * strip_outputs * 2;

// Adds the products of 32 inputs of one strip, by `A` tiles of rows.
template <int A, int strip>
inline void add_strip_of_bf16(const uint8_t* weights) {
  constexpr int64_t stride = strip_outputs * 4;
  constexpr int sums = first_sums + strip * strip_tiles;
  load_tile<first_weights>(weights, stride);
  add_tile_of_bf16<sums, first_rows, first_weights>();
  if constexpr (A == 2) add_tile_of_bf16<sums + 2, first_rows + 1, first_weights>();
  load_tile<first_weights + 1>(weights + tile_outputs * 4, stride);
  add_tile_of_bf16<sums + 1, first_rows, first_weights + 1>();
  if constexpr (A == 2) add_tile_of_bf16<sums + 3, first_rows + 1, first_weights + 1>();
}

template <int A, int S>
void compute_tiles_of_bf16(const LinearArgs& args, int strip, const RowTiles& tiles, int first_tile,
                           Ahead& ahead) {
  static_assert(A * S <= 2);
  const int64_t strip_bytes = args.weights->inputs / tile_inputs * tile_step_bytes;
  const auto* weights = static_cast<const uint8_t*>(args.weights->data) + strip * strip_bytes;
  int rows[A];
  for (int a = 0; a < A; ++a) {
    rows[a] = tiles.first(first_tile + a, args.rows);
    for (int s = 0; s < S; ++s) prefetch_outputs(args, strip + s, rows[a], tiles.rows);
  }
  zero_tile<first_sums>();
  zero_tile<first_sums + 1>();
  if constexpr (A * S == 2) {
    zero_tile<first_sums + 2>();
    zero_tile<first_sums + 3>();
  }
  for (int32_t input = 0; input < args.weights->inputs; input += tile_inputs) {
    for (int s = 0; s < S; ++s) {
      const char* at = ahead.at + s * strip_bytes;
      for (int64_t line = 0; line < ahead.lines; ++line) prefetch(at + line * 64);
    }
    ahead.at += ahead.lines * 64;
    load_tile<first_rows>(activation_rows(args, rows[0]) + input * 2, args.input.stride);
    if constexpr (A == 2) {
      load_tile<first_rows + 1>(activation_rows(args, rows[1]) + input * 2, args.input.stride);
    }
    add_strip_of_bf16<A, 0>(weights);
    if constexpr (S == 2) add_strip_of_bf16<A, 1>(weights + strip_bytes);
    weights += tile_step_bytes;
  }
  ahead.at += (S - 1) * strip_bytes;
  BlockSums sums[A * S];
  store_tile<first_sums>(sums[0].of[0], sizeof sums[0].of[0][0]);
  store_tile<first_sums + 1>(sums[0].of[1], sizeof sums[0].of[0][0]);
  if constexpr (A * S == 2) {
    store_tile<first_sums + 2>(sums[1].of[0], sizeof sums[0].of[0][0]);
    store_tile<first_sums + 3>(sums[1].of[1], sizeof sums[0].of[0][0]);
  }
  for (int a = 0; a < A; ++a) {
    const int known = tiles.known(first_tile + a, args.rows);
    for (int s = 0; s < S; ++s) {
      finish_block(args, strip + s, rows[a], tiles.rows, known, sums[a + s]);
    }
  }
}

inline void compute_range_of_bf16(const LinearArgs& args, int first_strip, int last_strip,
                                  int64_t prefetch_bytes) {
  const RowTiles row_tiles(args.rows, 2);
  TileShapes shapes;
  for (int tile = 0; tile < first_weights; ++tile) shapes.set(tile, row_tiles.rows, 64);
  for (int tile = first_weights; tile < 8; ++tile) shapes.set(tile, tile_inputs / 2, 64);
  const Tiles tiles(shapes);
  const int64_t strip_bytes = args.weights->inputs / tile_inputs * tile_step_bytes;
  constexpr int64_t step_lines = tile_step_bytes / 64;
  Ahead ahead{static_cast<const char*>(args.weights->data) + first_strip * strip_bytes, step_lines};
  int strip = first_strip;
  if (row_tiles.count == 1) {
    ahead.at += prefetch_bytes;
    for (; strip + 1 < last_strip; strip += 2) {
      compute_tiles_of_bf16<1, 2>(args, strip, row_tiles, 0, ahead);
    }
    if (strip < last_strip) compute_tiles_of_bf16<1, 1>(args, strip, row_tiles, 0, ahead);
    return;
  }
  const int blocks = row_tiles.count / 2;
  const int64_t lines = (step_lines + blocks - 1) / blocks;
  for (; strip < last_strip; ++strip) {
    ahead.at = static_cast<const char*>(args.weights->data) + (strip + 1) * strip_bytes;
    const char* end = strip + 1 < last_strip ? ahead.at + strip_bytes : ahead.at;
    for (int block = 0; block < blocks; ++block) {
      ahead.lines = ahead.at < end ? lines : 0;
      compute_tiles_of_bf16<2, 1>(args, strip, row_tiles, block * 2, ahead);
    }
  }
}

// Bytes: blocks of one tile of rows and one of weights. The integers of a group leave their tile
// through memory, and are scaled while tiles are at the next group.

// Fewer rows are done with before their weights have come from memory. (More than 16 are taken in
// tiles of 9 at least.)
constexpr int fewest_rows_of_bytes = 9;

template <int R>
struct alignas(64) GroupProducts {
  int32_t of[R][tile_outputs];
};

// The bytes of one group of 16 outputs, unpacked.
struct alignas(64) GroupLevels {
  uint8_t of[group_inputs / 4][tile_outputs * 4];
};

inline void unpack_nibbles(const uint8_t* from, GroupLevels& to) {
#pragma GCC unroll 4
  for (int step = 0; step < 4; ++step) {
    const Bytes both = load_bytes(from + step * 64);
    _mm512_store_si512(to.of[step], low_nibbles(both));
    _mm512_store_si512(to.of[step + 4], high_nibbles(both));
  }
}

template <typename Layout, int R>
inline void scale_products(const uint8_t* weights, const char* rows, int64_t stride,
                           const GroupProducts<R>& products, Floats (&sums)[R]) {
  const auto* halves = reinterpret_cast<const uint16_t*>(
      weights + group_inputs * tile_outputs / (Layout::format == WeightFormat::q4 ? 2 : 1));
  const Floats scale = load_halves(halves);
  const Floats minimum = Layout::minima ? load_halves(halves + tile_outputs) : broadcast(0.0f);
  // Not to be computed for all rows at once and kept: there are too few registers.
  asm volatile("" : "+r"(stride));
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r, rows += stride) {
    const auto* inputs = reinterpret_cast<const Int8Group*>(rows);
    Integers product = _mm512_load_si512(products.of[r]);
    if constexpr (!Layout::minima) {
      product = _mm512_add_epi32(product, broadcast_integer(inputs->offset));
    }
    const Floats both = multiply(scale, broadcast(inputs->scale));
    sums[r] = fused(to_floats(product), both, sums[r]);
    if constexpr (Layout::minima) sums[r] = fused(minimum, broadcast(inputs->sum), sums[r]);
  }
}

// `R` rows from `row` on and 16 outputs, whose weights begin at `weights`.
template <typename Layout, int R>
void compute_tile_of_bytes(const LinearArgs& args, const uint8_t* weights, int row, Ahead& ahead,
                           float (&output)[max_tile_rows][tile_outputs]) {
  constexpr bool nibbles = Layout::format == WeightFormat::q4;
  const int32_t groups = args.weights->inputs / group_inputs;
  const char* rows = activation_rows(args, row);
  const int64_t stride = args.input.stride;
  GroupProducts<R> products[2];
  [[maybe_unused]] GroupLevels levels[2];
  Floats sums[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) sums[r] = broadcast(0.0f);
  if constexpr (nibbles) unpack_nibbles(weights, levels[0]);
  for (int32_t group = 0; group <= groups; ++group) {
    if (group < groups) {
      for (int64_t line = 0; line < ahead.lines; ++line) prefetch(ahead.at + line * 64);
      ahead.at += ahead.lines * 64;
      load_tile<first_rows>(rows, stride);
      load_tile<first_weights>(nibbles ? levels[group % 2].of[0] : weights, tile_outputs * 4);
      zero_tile<first_sums>();
      add_tile_of_bytes<first_sums, first_rows, first_weights>();
      store_tile<first_sums>(products[group % 2].of, sizeof products[0].of[0]);
    }
    if (nibbles && group + 1 < groups) {
      unpack_nibbles(weights + Layout::strip_group_bytes, levels[(group + 1) % 2]);
    }
    if (group > 0) {
      scale_products<Layout, R>(weights - Layout::strip_group_bytes, rows - sizeof(Int8Group),
                                stride, products[(group - 1) % 2], sums);
    }
    weights += Layout::strip_group_bytes;
    rows += sizeof(Int8Group);
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) store(output[r], sums[r]);
}

template <typename Layout, int R>
void compute_tile_of_bytes(int count, const LinearArgs& args, const uint8_t* weights, int row,
                           Ahead& ahead, float (&output)[max_tile_rows][tile_outputs]) {
  if (count == R) {
    compute_tile_of_bytes<Layout, R>(args, weights, row, ahead, output);
  } else if constexpr (R > fewest_rows_of_bytes) {
    compute_tile_of_bytes<Layout, R - 1>(count, args, weights, row, ahead, output);
  }
}

template <typename Layout>
void compute_range_of_bytes(const LinearArgs& args, int first_strip, int last_strip) {
  const RowTiles row_tiles(args.rows, 1);
  TileShapes shapes;
  shapes.set(first_sums, row_tiles.rows, tile_outputs * 4);
  shapes.set(first_rows, row_tiles.rows, group_inputs);
  shapes.set(first_weights, group_inputs / 4, tile_outputs * 4);
  const Tiles tiles(shapes);
  const int64_t strip_bytes = args.weights->inputs / group_inputs * Layout::strip_group_bytes;
  const int passes = row_tiles.count * strip_tiles;
  const int64_t lines = (Layout::strip_group_lines + passes - 1) / passes;
  for (int strip = first_strip; strip < last_strip; ++strip) {
    const auto* weights = static_cast<const uint8_t*>(args.weights->data) + strip * strip_bytes;
    Ahead ahead{reinterpret_cast<const char*>(weights) + strip_bytes, 0};
    const char* end = strip + 1 < last_strip ? ahead.at + strip_bytes : ahead.at;
    for (int tile = 0; tile < row_tiles.count; ++tile) {
      const int row = row_tiles.first(tile, args.rows);
      prefetch_outputs(args, strip, row, row_tiles.rows);
      BlockSums sums;
      for (int t = 0; t < strip_tiles; ++t) {
        ahead.lines = ahead.at < end ? lines : 0;
        compute_tile_of_bytes<Layout, max_tile_rows>(
            row_tiles.rows, args, weights + t * Layout::tile_bytes, row, ahead, sums.of[t]);
      }
      finish_block(args, strip, row, row_tiles.rows, row_tiles.known(tile, args.rows), sums);
    }
  }
}

}  // namespace meshserve::MESHSERVE_ISA
