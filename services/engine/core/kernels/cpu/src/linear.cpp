#include "linear.h"

#include <algorithm>

#include "integers.h"

namespace meshserve::MESHSERVE_ISA {

namespace {

// Most rows of a block, for its sums to stay in registers. Quantised weights have two sums for an
// output; few rows more than that are still faster in one pass over the weights than in two.
#if defined(__AVX512F__)
constexpr int bf16_rows = 8;
constexpr int quantised_rows = 6;
constexpr int single_pass_rows = 8;
constexpr int wide_rows = 2;  // so few that two strips fit
#else
constexpr int bf16_rows = 2;
constexpr int quantised_rows = 2;
constexpr int single_pass_rows = 2;
constexpr int wide_rows = 0;
#endif
// How far ahead of the only pass over weights they are asked for.
constexpr int64_t prefetch_bytes = 2048;
// How much of a thread's first strips is asked for before their pass begins.
constexpr int64_t prefetched_bytes = 12 * 1024;

// a / (1 + exp(-a))
Floats silu(Floats a) {
  const Floats exponent = multiply(a, broadcast(-1.44269504f));
  const Floats power = exp2(smaller(broadcast(126.0f), larger(broadcast(-126.0f), exponent)));
  return divide(a, add(power, broadcast(1.0f)));
}

// Bytes of one group of a tile.
constexpr int64_t group_bytes(WeightFormat format, bool with_minima) {
  const int64_t levels = group_inputs * tile_outputs / (format == WeightFormat::q4 ? 2 : 1);
  return levels + tile_outputs * int64_t{sizeof(uint16_t)} * (with_minima ? 2 : 1);
}

int64_t strip_bytes(const LinearWeights& weights) {
  if (weights.format == WeightFormat::bf16) return int64_t{weights.inputs} * strip_outputs * 2;
  return weights.inputs / group_inputs * strip_tiles *
         group_bytes(weights.format, weights.has_minima != 0);
}

// The sums of `R` rows and `S` strips, begun by one of the `accumulate`s below.
template <int R, int S>
struct Block {
  Floats sums[R][S * strip_tiles];
  bool first_pass;  // over these weights: they come from memory
};

template <int R, int S>
inline void accumulate_bf16(const LinearWeights& weights, int strip, const Activations& input,
                            int row, Block<R, S>& block) {
  constexpr int T = S * strip_tiles;
  const int64_t strip_elements = int64_t{weights.inputs} * strip_outputs;
  const auto* data = static_cast<const uint16_t*>(weights.data) + strip * strip_elements;
  const Operand* rows[R];
  for (int r = 0; r < R; ++r) {
    rows[r] = reinterpret_cast<const Operand*>(static_cast<const char*>(input.rows) +
                                               (row + r) * input.stride);
    for (int t = 0; t < T; ++t) block.sums[r][t] = broadcast(0.0f);
  }
  for (int32_t i = 0; i < weights.inputs; i += 2) {
    Pairs pairs[R];
    for (int r = 0; r < R; ++r) pairs[r] = broadcast_pair(rows[r] + i);
    for (int t = 0; t < T; ++t) {
      const uint16_t* tile = data + t / strip_tiles * strip_elements +
                             (int64_t{i} * strip_tiles + t % strip_tiles * 2) * tile_outputs;
      if (block.first_pass) prefetch(tile + prefetch_bytes / 2);
      const Pairs weight = load_pairs(tile);
      for (int r = 0; r < R; ++r) {
        block.sums[r][t] = add_products(block.sums[r][t], weight, pairs[r]);
      }
    }
  }
}

template <int R, int S, WeightFormat format, bool with_minima>
inline void accumulate_quantised(const LinearWeights& weights, int strip, const Activations& input,
                                 int row, Block<R, S>& block) {
  constexpr int T = S * strip_tiles;
  constexpr int64_t tile_bytes = group_bytes(format, with_minima);
  constexpr bool nibbles = format == WeightFormat::q4;
  constexpr int steps = nibbles ? 4 : 8;
  const int32_t groups = weights.inputs / group_inputs;
  const int64_t whole_strip = groups * strip_tiles * tile_bytes;
  const auto* data = static_cast<const uint8_t*>(weights.data) + strip * whole_strip;
  Int8Row rows[R];
  for (int r = 0; r < R; ++r) {
    rows[r] = int8_row(input, row + r);
    for (int t = 0; t < T; ++t) block.sums[r][t] = broadcast(0.0f);
  }
  for (int32_t group = 0; group < groups; ++group) {
    const uint8_t* tiles[T];
    for (int t = 0; t < T; ++t) {
      tiles[t] = data + t / strip_tiles * whole_strip +
                 (group * strip_tiles + t % strip_tiles) * tile_bytes;
      if (block.first_pass) {
        for (int64_t line = 0; line < tile_bytes; line += 64) {
          prefetch(tiles[t] + prefetch_bytes + line);
        }
      }
    }
    // All of the block's products advance together: each addition waits for the one before it.
    Integers products[R][T];
    for (int r = 0; r < R; ++r) {
      const Integers begin = broadcast_integer(with_minima ? 0 : rows[r].offsets[group]);
      for (int t = 0; t < T; ++t) products[r][t] = begin;
    }
    for (int step = 0; step < steps; ++step) {
      Bytes stored[T];
      for (int t = 0; t < T; ++t) stored[t] = load_bytes(tiles[t] + step * 64);
      for (int half = 0; half < (nibbles ? 2 : 1); ++half) {
        Bytes levels[T];
        for (int t = 0; t < T; ++t) {
          levels[t] = !nibbles    ? stored[t]
                      : half == 0 ? low_nibbles(stored[t])
                                  : high_nibbles(stored[t]);
        }
        for (int r = 0; r < R; ++r) {
          const int8_t* values = rows[r].values + group * group_inputs + half * 16 + step * 4;
          const Bytes four = broadcast_bytes(values);
          for (int t = 0; t < T; ++t) {
            products[r][t] = add_byte_products(products[r][t], levels[t], four);
          }
        }
      }
    }
    for (int t = 0; t < T; ++t) {
      const auto* scales = reinterpret_cast<const uint16_t*>(tiles[t] + steps * 64);
      const Floats scale = load_halves(scales);
      for (int r = 0; r < R; ++r) {
        const Floats both = multiply(scale, broadcast(rows[r].scales[group]));
        block.sums[r][t] = fused(to_floats(products[r][t]), both, block.sums[r][t]);
      }
      if constexpr (with_minima) {
        const Floats minimum = load_halves(scales + tile_outputs);
        for (int r = 0; r < R; ++r) {
          block.sums[r][t] = fused(minimum, broadcast(rows[r].sums[group]), block.sums[r][t]);
        }
      }
    }
  }
}

template <int R, int S>
inline void finish(const LinearArgs& args, int strip, int row, Block<R, S>& block) {
  constexpr int T = S * strip_tiles;
  const LinearWeights& weights = *args.weights;
  const int32_t first = strip * strip_outputs;
  if (weights.bias != nullptr) {
    for (int t = 0; t < T; ++t) {
      const Floats bias = load(weights.bias + first + t * tile_outputs);
      for (int r = 0; r < R; ++r) block.sums[r][t] = add(block.sums[r][t], bias);
    }
  }
  if (args.epilogue == Epilogue::gated_silu) {
    for (int t = 0; t < T; t += 2) {
      const int32_t column = first / 2 + t / 2 * tile_outputs;
      for (int r = 0; r < R; ++r) {
        store(args.output + (row + r) * args.output_stride + column,
              multiply(silu(block.sums[r][t]), block.sums[r][t + 1]));
      }
    }
    return;
  }
  for (int t = 0; t < T; ++t) {
    const int32_t column = first + t * tile_outputs;
    const int32_t count = weights.outputs - column;
    if (count <= 0) return;
    for (int r = 0; r < R; ++r) {
      float* out = args.output + (row + r) * args.output_stride + column;
      Floats sums = block.sums[r][t];
      if (args.epilogue == Epilogue::add) sums = add(load_some(out, count), sums);
      store_some(out, sums, count);
    }
  }
}

// The block of a weight format.
template <int R, int S, bool quantised>
void compute(const LinearArgs& args, int strip, int row, bool first_pass) {
  const LinearWeights& weights = *args.weights;
  Block<R, S> block;
  block.first_pass = first_pass;
  if (args.epilogue == Epilogue::add) {
    // Another thread may have written it last.
    for (int r = 0; r < R; ++r) {
      for (int t = 0; t < S * strip_tiles; ++t) {
        prefetch(args.output + (row + r) * args.output_stride + strip * strip_outputs +
                 t * tile_outputs);
      }
    }
  }
  if constexpr (!quantised) {
    accumulate_bf16<R, S>(weights, strip, args.input, row, block);
  } else if (weights.format == WeightFormat::q4) {
    accumulate_quantised<R, S, WeightFormat::q4, true>(weights, strip, args.input, row, block);
  } else if (weights.has_minima) {
    accumulate_quantised<R, S, WeightFormat::q8, true>(weights, strip, args.input, row, block);
  } else {
    accumulate_quantised<R, S, WeightFormat::q8, false>(weights, strip, args.input, row, block);
  }
  finish<R, S>(args, strip, row, block);
}

template <int R, bool quantised>
void compute_strips(const LinearArgs& args, int strip, int last_strip, int row, bool first_pass) {
  if constexpr (R <= wide_rows && !quantised) {
    // Two strips at once, for sums that do not wait for each other; those of bytes start anew with
    // every group.
    for (; strip + 1 < last_strip; strip += 2) {
      compute<R, 2, quantised>(args, strip, row, first_pass);
    }
  }
  for (; strip < last_strip; ++strip) compute<R, 1, quantised>(args, strip, row, first_pass);
}

template <int R, bool quantised>
void compute_rows(const LinearArgs& args, int count, int strip, int last_strip, int row,
                  bool first_pass) {
  if (count == R) {
    compute_strips<R, quantised>(args, strip, last_strip, row, first_pass);
  } else if constexpr (R > 1) {
    compute_rows<R - 1, quantised>(args, count, strip, last_strip, row, first_pass);
  }
}

template <bool quantised>
void compute_range(const LinearArgs& args, int first_strip, int last_strip, int most_rows) {
  // Blocks of nearly equal size: 8 rows are 4 + 4, not 6 + 2.
  const int blocks = (args.rows + most_rows - 1) / most_rows;
  // Few rows pass over all strips, which are read from memory once. Many pass over one strip after
  // the other, which stays in the first-level cache meanwhile, as the next one is on its way.
  const int step = blocks == 1 ? last_strip - first_strip : 1;
  const int64_t whole = strip_bytes(*args.weights);
  const int64_t portion = (whole / blocks + 63) / 64 * 64;
  for (int strip = first_strip; strip < last_strip; strip += step) {
    const auto* next = static_cast<const char*>(args.weights->data) + (strip + 1) * whole;
    for (int block = 0, row = 0; block < blocks; ++block) {
      if (blocks > 1 && strip + 1 < last_strip) {
        const int64_t end = std::min((block + 1) * portion, whole);
        for (int64_t byte = block * portion; byte < end; byte += 64) prefetch(next + byte);
      }
      const int count = (args.rows - row + blocks - block - 1) / (blocks - block);
      constexpr int widest = quantised ? single_pass_rows : bf16_rows;
      compute_rows<widest, quantised>(args, count, strip, strip + step, row, blocks == 1);
      row += count;
    }
  }
}

}  // namespace

int linear_tasks(const LinearArgs& args) {
  return (args.weights->outputs + strip_outputs - 1) / strip_outputs;
}

void linear_run(const LinearArgs& args, int first_strip, int last_strip) {
  if (args.weights->format == WeightFormat::bf16) {
    compute_range<false>(args, first_strip, last_strip, bf16_rows);
  } else {
    const bool single_pass = args.rows <= single_pass_rows;
    compute_range<true>(args, first_strip, last_strip,
                        single_pass ? single_pass_rows : quantised_rows);
  }
}

void prefetch_strips(const LinearWeights& weights, int first_strip, int last_strip) {
  const int64_t whole = strip_bytes(weights);
  const auto* data = static_cast<const char*>(weights.data) + first_strip * whole;
  const int64_t bytes = std::min((last_strip - first_strip) * whole, prefetched_bytes);
  for (int64_t byte = 0; byte < bytes; byte += 64) prefetch(data + byte);
}

void unpack_output(const LinearWeights& weights, int32_t output, float* values) {
  const int64_t strip = output / strip_outputs;
  const int32_t tile = output / tile_outputs % strip_tiles, lane = output % tile_outputs;
  const auto* data = static_cast<const uint8_t*>(weights.data) + strip * strip_bytes(weights);
  if (weights.format == WeightFormat::bf16) {
    const auto* pairs = reinterpret_cast<const uint16_t*>(data);
    for (int32_t i = 0; i < weights.inputs; ++i) {
      const int32_t pair = (i / 2 * strip_tiles + tile) * tile_outputs + lane;
      const uint32_t bits = uint32_t{pairs[pair * 2 + i % 2]} << 16;
      std::memcpy(values + i, &bits, sizeof bits);
    }
    return;
  }
  const bool nibbles = weights.format == WeightFormat::q4;
  const int64_t tile_bytes = group_bytes(weights.format, weights.has_minima != 0);
  for (int32_t group = 0; group < weights.inputs / group_inputs; ++group) {
    const uint8_t* bytes = data + (group * strip_tiles + tile) * tile_bytes;
    alignas(64) uint8_t levels[group_inputs];
    for (int32_t step = 0; step < 8; ++step) {
      const uint8_t* four = bytes + ((nibbles ? step % 4 : step) * tile_outputs + lane) * 4;
      for (int32_t i = 0; i < 4; ++i) {
        levels[step * 4 + i] = !nibbles ? four[i] : step < 4 ? four[i] & 0x0f : four[i] >> 4;
      }
    }
    alignas(64) float scales[lanes], minima[lanes];
    const auto* halves = reinterpret_cast<const uint16_t*>(bytes + (nibbles ? 256 : 512));
    store(scales, load_halves(halves));
    if (weights.has_minima) store(minima, load_halves(halves + tile_outputs));
    const float minimum = weights.has_minima ? minima[lane] : -128.0f * scales[lane];
    for (int32_t i = 0; i < group_inputs; ++i) {
      values[group * group_inputs + i] = scales[lane] * static_cast<float>(levels[i]) + minimum;
    }
  }
}

}  // namespace meshserve::MESHSERVE_ISA
