// Blocks of a linear layer: the sums of a few rows and one or two strips, kept in registers.
#pragma once

#include <algorithm>

#include "integers.h"
#include "linear.h"
#include "row_functions.h"

namespace meshserve::MESHSERVE_ISA {

// Loops over rows and tiles are unrolled by pragma: a compiler that does so of itself does it too
// late to keep their arrays in registers. So are the steps of a group where there are registers to
// work on more than one of them.
#if defined(__AVX512F__)
constexpr int unrolled_steps = 8;
#else
constexpr int unrolled_steps = 1;
#endif

// Bytes of one group of a tile.
constexpr int64_t group_bytes(WeightFormat format, bool with_minima) {
  const int64_t levels = group_inputs * tile_outputs / (format == WeightFormat::q4 ? 2 : 1);
  return levels + tile_outputs * int64_t{sizeof(uint16_t)} * (with_minima ? 2 : 1);
}

// How weights of one kind are stored: in groups of `inputs`, each one tile after the other.
template <WeightFormat weight_format, bool with_minima>
struct Layout {
  static constexpr WeightFormat format = weight_format;
  static constexpr bool minima = with_minima;
  static constexpr bool quantised = format != WeightFormat::bf16;
  static constexpr int32_t inputs = quantised ? group_inputs : 8;
  static constexpr int64_t tile_bytes =
      quantised ? group_bytes(format, with_minima) : inputs * tile_outputs * 2;
  static constexpr int64_t strip_group_bytes = strip_tiles * tile_bytes;
  static constexpr int64_t strip_group_lines = strip_group_bytes / 64;
};

// Cache lines of weights that are asked for while a block is computed: `lines` with every group,
// from `at` on.
struct Ahead {
  const char* at;
  int64_t lines;
};

// Adds the products of one group of inputs to the sums of `R` rows and `T` tiles.
template <typename Layout, int R, int T>
inline void add_bf16(const uint8_t* const (&strips)[T / strip_tiles], const char* const (&rows)[R],
                     int64_t group, Floats (&sums)[R][T]) {
#pragma GCC unroll unrolled_steps
  for (int32_t pair = 0; pair < Layout::inputs / 2; ++pair) {
    Pairs weights[T];
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
      const int line = pair * strip_tiles + t % strip_tiles;
      const uint8_t* tile = strips[t / strip_tiles] + line * tile_outputs * 4;
      weights[t] = load_pairs(reinterpret_cast<const uint16_t*>(tile));
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const auto* row = reinterpret_cast<const Operand*>(rows[r]) + group * Layout::inputs;
      const Pairs both = broadcast_pair(row + pair * 2);
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) sums[r][t] = add_products(sums[r][t], weights[t], both);
    }
  }
}

template <typename Layout, int R, int T>
inline void add_quantised(const uint8_t* const (&strips)[T / strip_tiles],
                          const char* const (&rows)[R], int64_t group, Floats (&sums)[R][T]) {
  constexpr bool nibbles = Layout::format == WeightFormat::q4;
  constexpr int steps = nibbles ? 4 : 8;
  const Int8Group* inputs[R];
  const uint8_t* tiles[T];
  // All of the block's products advance together: each addition waits for the one before it.
  Integers products[R][T];
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) {
    tiles[t] = strips[t / strip_tiles] + t % strip_tiles * Layout::tile_bytes;
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    inputs[r] = reinterpret_cast<const Int8Group*>(rows[r]) + group;
    const Integers begin = broadcast_integer(Layout::minima ? 0 : inputs[r]->offset);
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) products[r][t] = begin;
  }
#pragma GCC unroll unrolled_steps
  for (int step = 0; step < steps; ++step) {
    Bytes stored[T];
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) stored[t] = load_bytes(tiles[t] + step * 64);
#pragma GCC unroll 2
    for (int half = 0; half < (nibbles ? 2 : 1); ++half) {
      Bytes levels[T];
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) {
        levels[t] = !nibbles    ? stored[t]
                    : half == 0 ? low_nibbles(stored[t])
                                : high_nibbles(stored[t]);
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const Bytes four = broadcast_bytes(inputs[r]->values + half * 16 + step * 4);
#pragma GCC unroll 16
        for (int t = 0; t < T; ++t) {
          products[r][t] = add_byte_products(products[r][t], levels[t], four);
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) {
    const auto* scales = reinterpret_cast<const uint16_t*>(tiles[t] + steps * 64);
    const Floats scale = load_halves(scales);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Floats both = multiply(scale, broadcast(inputs[r]->scale));
      sums[r][t] = fused(to_floats(products[r][t]), both, sums[r][t]);
    }
    if constexpr (Layout::minima) {
      const Floats minimum = load_halves(scales + tile_outputs);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        sums[r][t] = fused(minimum, broadcast(inputs[r]->sum), sums[r][t]);
      }
    }
  }
}

// a / (1 + exp(-a))
inline Floats silu(Floats a) {
  const Floats exponent = multiply(a, broadcast(-1.44269504f));
  const Floats power = exp2(smaller(broadcast(126.0f), larger(broadcast(-126.0f), exponent)));
  return divide(a, add(power, broadcast(1.0f)));
}

// Epilogues that take longer than to be inlined for.
inline bool has_function(Epilogue epilogue) {
  return epilogue == Epilogue::gated_gelu || epilogue == Epilogue::gelu ||
         epilogue == Epilogue::capped;
}

// Writes functions of the sums of a block, [rows][tiles], from the output `first` on.
[[gnu::noinline]] inline void finish_function(const LinearArgs& args, int rows, int tiles,
                                              int32_t first, const float* sums, float* output) {
  const Floats cap = broadcast(args.cap);
  for (int r = 0; r < rows; ++r, output += args.output_stride) {
    for (int t = 0; t < tiles; ++t, sums += tile_outputs) {
      const Floats sum = load(sums);
      const int32_t at = first + t * tile_outputs;
      if (args.epilogue == Epilogue::gated_gelu) {
        const Floats value = load(sums + tile_outputs);
        store(output + at / 2, multiply(gelu_tanh(sum), value));
        ++t, sums += tile_outputs;
      } else if (at < args.weights->outputs) {
        const Floats value = args.epilogue == Epilogue::gelu
                                 ? gelu_tanh(sum)
                                 : multiply(hyperbolic_tangent(divide(sum, cap)), cap);
        store_some(output + at, value, args.weights->outputs - at);
      }
    }
  }
}

// Writes the sums of the matrix's last outputs, which are no whole block: [rows][T tiles].
template <int T>
void finish_last(const LinearArgs& args, int rows, const float* sums, float* output,
                 int32_t count) {
  for (int r = 0; r < rows; ++r, sums += T * tile_outputs, output += args.output_stride) {
    for (int32_t at = 0; at < count; at += tile_outputs) {
      Floats sum = load(sums + at);
      if (args.epilogue == Epilogue::add) sum = add(load_some(output + at, count - at), sum);
      store_some(output + at, sum, count - at);
    }
  }
}

template <int R, int T>
inline void finish(const LinearArgs& args, int strip, int row, Floats (&sums)[R][T]) {
  const LinearWeights& weights = *args.weights;
  const int32_t first = strip * strip_outputs;
  if (weights.bias != nullptr) {
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
      const Floats bias = load(weights.bias + first + t * tile_outputs);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) sums[r][t] = add(sums[r][t], bias);
    }
  }
  float* output = args.output + row * args.output_stride;
  if (has_function(args.epilogue)) [[unlikely]] {
    alignas(64) float all[R * T * tile_outputs];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) store(all + (r * T + t) * tile_outputs, sums[r][t]);
    }
    return finish_function(args, R, T, first, all, output);
  }
  if (args.epilogue == Epilogue::gated_silu) {
    output += first / 2;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r, output += args.output_stride) {
#pragma GCC unroll 16
      for (int t = 0; t < T; t += 2) {
        store(output + t / 2 * tile_outputs, multiply(silu(sums[r][t]), sums[r][t + 1]));
      }
    }
    return;
  }
  output += first;
  if (weights.outputs - first < T * tile_outputs) {
    alignas(64) float last[R * T * tile_outputs];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) store(last + (r * T + t) * tile_outputs, sums[r][t]);
    }
    return finish_last<T>(args, R, last, output, weights.outputs - first);
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r, output += args.output_stride) {
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
      float* to = output + t * tile_outputs;
      store(to, args.epilogue == Epilogue::add ? add(load(to), sums[r][t]) : sums[r][t]);
    }
  }
}

// Computes the block of `R` rows from `row` on and `S` strips from `strip` on.
template <typename Layout, int R, int S>
void compute_block(const LinearArgs& args, int strip, int row, Ahead& ahead) {
  constexpr int T = S * strip_tiles;
  if (args.epilogue == Epilogue::add) {
    // Another thread may have written it last.
    const float* output = args.output + row * args.output_stride + strip * strip_outputs;
    for (int r = 0; r < R; ++r, output += args.output_stride) {
      for (int t = 0; t < T; ++t) prefetch(output + t * tile_outputs);
    }
  }
  const int32_t groups = args.weights->inputs / Layout::inputs;
  const int64_t strip_bytes = groups * Layout::strip_group_bytes;
  const uint8_t* strips[S];
#pragma GCC unroll 16
  for (int s = 0; s < S; ++s) {
    strips[s] = static_cast<const uint8_t*>(args.weights->data) + (strip + s) * strip_bytes;
  }
  const char* rows[R];
  Floats sums[R][T];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    rows[r] = static_cast<const char*>(args.input.rows) + (row + r) * args.input.stride;
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) sums[r][t] = broadcast(0.0f);
  }
  const char* at = ahead.at;
  const int64_t lines = ahead.lines;
  for (int32_t group = 0; group < groups; ++group) {
    if (R <= 4 && lines == Layout::strip_group_lines) {
      // The only pass over weights that come from memory: with few rows, it has no time for a loop.
#pragma GCC unroll 32
      for (int line = 0; line < Layout::strip_group_lines; ++line) {
#pragma GCC unroll 16
        for (int s = 0; s < S; ++s) prefetch(at + s * strip_bytes + line * 64);
      }
    } else {
      for (int64_t line = 0; line < lines; ++line) prefetch(at + line * 64);
    }
    at += lines * 64;
    if constexpr (Layout::quantised) {
      add_quantised<Layout>(strips, rows, group, sums);
    } else {
      add_bf16<Layout>(strips, rows, group, sums);
    }
#pragma GCC unroll 16
    for (int s = 0; s < S; ++s) strips[s] += Layout::strip_group_bytes;
  }
  ahead.at = at + (S - 1) * strip_bytes;
  finish(args, strip, row, sums);
}

}  // namespace meshserve::MESHSERVE_ISA
