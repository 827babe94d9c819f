#include "linear.h"

#include <algorithm>

#include "integers.h"

namespace meshserve::MESHSERVE_ISA {

namespace {

#if defined(__AVX512F__)
constexpr int most_rows = 6;
constexpr int most_sums = 12;  // blocks of rows x tiles whose sums stay in registers
#else
constexpr int most_rows = 3;
constexpr int most_sums = 4;
#endif

Floats sigmoid_times(Floats a) {
  // silu(a) = a / (1 + exp(-a))
  const Floats power = exp2(larger(broadcast(-126.0f), multiply(a, broadcast(-1.44269504f))));
  return divide(a, add(power, broadcast(1.0f)));
}

// The sums of `R` rows and `T` tiles, begun by one of the `accumulate`s below.
template <int R, int T>
struct Block {
  Floats sums[R][T];
};

template <int R, int T>
inline void accumulate_bf16(const LinearWeights& weights, int tile, const Activations& input,
                            int row, Block<R, T>& block) {
  const int64_t tile_elements = int64_t{weights.inputs} * tile_outputs;
  const auto* data = static_cast<const uint16_t*>(weights.data) + tile * tile_elements;
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
      const Pairs weight = load_pairs(data + t * tile_elements + i * tile_outputs);
      for (int r = 0; r < R; ++r) {
        block.sums[r][t] = add_products(block.sums[r][t], weight, pairs[r]);
      }
    }
  }
}

inline int32_t four_bytes(const int8_t* from) {
  int32_t four;
  std::memcpy(&four, from, sizeof four);
  return four;
}

template <int R, int T, WeightFormat format, bool with_minima>
inline void accumulate_quantised(const LinearWeights& weights, int tile, const Activations& input,
                                 int row, Block<R, T>& block) {
  constexpr int group_bytes = group_inputs * tile_outputs / (format == WeightFormat::q4 ? 2 : 1);
  const int32_t groups = weights.inputs / group_inputs;
  const int64_t tile_bytes = int64_t{groups} * group_bytes;
  const auto* data = static_cast<const uint8_t*>(weights.data) + tile * tile_bytes;
  const int64_t tile_scales = int64_t{groups} * tile_outputs;
  const uint16_t* scales = weights.scales + tile * tile_scales;
  const uint16_t* minima = with_minima ? weights.minima + tile * tile_scales : nullptr;
  Int8Row rows[R];
  for (int r = 0; r < R; ++r) {
    rows[r] = int8_row(input, row + r);
    for (int t = 0; t < T; ++t) block.sums[r][t] = broadcast(0.0f);
  }
  for (int32_t group = 0; group < groups; ++group) {
    // All of the block's products advance together: each addition waits for the one before it.
    Integers products[R][T];
    for (int r = 0; r < R; ++r) {
      const Integers begin = broadcast_integer(with_minima ? 0 : rows[r].offsets[group]);
      for (int t = 0; t < T; ++t) products[r][t] = begin;
    }
    const uint8_t* bytes = data + int64_t{group} * group_bytes;
    for (int step = 0; step < group_bytes / 64; ++step) {
      for (int t = 0; t < T; ++t) {
        const Bytes stored = load_bytes(bytes + t * tile_bytes + step * 64);
        const Bytes first = format == WeightFormat::q4 ? low_nibbles(stored) : stored;
        for (int r = 0; r < R; ++r) {
          const int8_t* values = rows[r].values + group * group_inputs + step * 4;
          products[r][t] = add_byte_products(products[r][t], first, four_bytes(values));
        }
        if constexpr (format == WeightFormat::q4) {
          const Bytes second = high_nibbles(stored);
          for (int r = 0; r < R; ++r) {
            const int8_t* values = rows[r].values + group * group_inputs + 16 + step * 4;
            products[r][t] = add_byte_products(products[r][t], second, four_bytes(values));
          }
        }
      }
    }
    for (int t = 0; t < T; ++t) {
      const int64_t offset = t * tile_scales + int64_t{group} * tile_outputs;
      const Floats scale = load_halves(scales + offset);
      for (int r = 0; r < R; ++r) {
        const Floats both = multiply(scale, broadcast(rows[r].scales[group]));
        block.sums[r][t] = fused(to_floats(products[r][t]), both, block.sums[r][t]);
      }
      if constexpr (with_minima) {
        const Floats minimum = load_halves(minima + offset);
        for (int r = 0; r < R; ++r) {
          block.sums[r][t] = fused(minimum, broadcast(rows[r].sums[group]), block.sums[r][t]);
        }
      }
    }
  }
}

template <int R, int T>
inline void finish(const LinearArgs& args, int tile, int row, Block<R, T>& block) {
  const LinearWeights& weights = *args.weights;
  if (weights.bias != nullptr) {
    for (int t = 0; t < T; ++t) {
      const Floats bias = load(weights.bias + (tile + t) * tile_outputs);
      for (int r = 0; r < R; ++r) block.sums[r][t] = add(block.sums[r][t], bias);
    }
  }
  if (args.epilogue == Epilogue::gated_silu) {
    const int32_t outputs = weights.outputs / 2;
    for (int t = 0; t + 1 < T; t += 2) {
      const int32_t column = (tile + t) / 2 * tile_outputs;
      for (int r = 0; r < R; ++r) {
        const Floats gated = multiply(sigmoid_times(block.sums[r][t]), block.sums[r][t + 1]);
        store_some(args.output + (row + r) * args.output_stride + column, gated, outputs - column);
      }
    }
    return;
  }
  for (int t = 0; t < T; ++t) {
    const int32_t column = (tile + t) * tile_outputs;
    const int32_t count = weights.outputs - column;
    for (int r = 0; r < R; ++r) {
      float* out = args.output + (row + r) * args.output_stride + column;
      const Floats before =
          args.epilogue == Epilogue::add ? load_some(out, count) : broadcast(0.0f);
      store_some(out,
                 args.epilogue == Epilogue::add ? add(before, block.sums[r][t]) : block.sums[r][t],
                 count);
    }
  }
}

template <int R, int T>
void compute(const LinearArgs& args, int tile, int row) {
  const LinearWeights& weights = *args.weights;
  Block<R, T> block;
  if (weights.format == WeightFormat::bf16) {
    accumulate_bf16<R, T>(weights, tile, args.input, row, block);
  } else if (weights.format == WeightFormat::q4) {
    accumulate_quantised<R, T, WeightFormat::q4, true>(weights, tile, args.input, row, block);
  } else if (weights.minima != nullptr) {
    accumulate_quantised<R, T, WeightFormat::q8, true>(weights, tile, args.input, row, block);
  } else {
    accumulate_quantised<R, T, WeightFormat::q8, false>(weights, tile, args.input, row, block);
  }
  finish<R, T>(args, tile, row, block);
}

// As many tiles as leave room in the registers, in twos since gates and values come in pairs.
template <int R>
constexpr int widest_block = std::clamp(most_sums / R / 2 * 2, 2, 8);

template <int R>
void compute_tiles(const LinearArgs& args, int tile, int last_tile, int row) {
  constexpr int widest = widest_block<R>;
  for (; tile + widest <= last_tile; tile += widest) compute<R, widest>(args, tile, row);
  if constexpr (widest > 2) {
    for (; tile + 2 <= last_tile; tile += 2) compute<R, 2>(args, tile, row);
  }
  if (tile < last_tile) compute<R, 1>(args, tile, row);
}

template <int R = most_rows>
void compute_rows(const LinearArgs& args, int count, int tile, int last_tile, int row) {
  if (count == R) {
    compute_tiles<R>(args, tile, last_tile, row);
  } else if constexpr (R > 1) {
    compute_rows<R - 1>(args, count, tile, last_tile, row);
  }
}

// Tiles whose weights stay in the first-level cache while all rows pass over them.
constexpr int resident_tiles(int32_t inputs) { return inputs <= 1024 ? 4 : 2; }

}  // namespace

int linear_tasks(const LinearArgs& args) {
  const int32_t tiles = (args.weights->outputs + tile_outputs - 1) / tile_outputs;
  return (tiles + 1) / 2;
}

void linear_run(const LinearArgs& args, int first_task, int last_task) {
  const int tiles = (args.weights->outputs + tile_outputs - 1) / tile_outputs;
  const int last_tile = std::min(2 * last_task, tiles);
  // Few rows: the weights are read once, from memory. Many: a few tiles for all rows.
  const int step = args.rows <= most_rows ? last_tile : resident_tiles(args.weights->inputs);
  for (int tile = 2 * first_task; tile < last_tile; tile += step) {
    const int end = std::min(tile + step, last_tile);
    // Blocks of nearly equal size: 8 rows are 4 + 4, not 6 + 2.
    const int blocks = (args.rows + most_rows - 1) / most_rows;
    for (int block = 0, row = 0; block < blocks; ++block) {
      const int count = (args.rows - row + blocks - block - 1) / (blocks - block);
      compute_rows(args, count, tile, end, row);
      row += count;
    }
  }
}

void unpack_output(const LinearWeights& weights, int32_t output, float* values) {
  const int64_t tile = output / tile_outputs, lane = output % tile_outputs;
  const int64_t tile_elements = int64_t{weights.inputs} * tile_outputs;
  if (weights.format == WeightFormat::bf16) {
    const auto* data = static_cast<const uint16_t*>(weights.data) + tile * tile_elements;
    for (int32_t i = 0; i < weights.inputs; ++i) {
      const uint32_t bits = uint32_t{data[(i / 2 * tile_outputs + lane) * 2 + i % 2]} << 16;
      std::memcpy(values + i, &bits, sizeof bits);
    }
    return;
  }
  const bool nibbles = weights.format == WeightFormat::q4;
  const auto* data =
      static_cast<const uint8_t*>(weights.data) + tile * tile_elements / (nibbles ? 2 : 1);
  alignas(64) float scales[lanes], minima[lanes];
  for (int32_t group = 0; group < weights.inputs / group_inputs; ++group) {
    const int64_t offset = (tile * (weights.inputs / group_inputs) + group) * tile_outputs;
    store(scales, load_halves(weights.scales + offset));
    if (weights.minima != nullptr) store(minima, load_halves(weights.minima + offset));
    for (int32_t i = 0; i < group_inputs; ++i) {
      const int32_t place = (i / 4 * tile_outputs + static_cast<int32_t>(lane)) * 4 + i % 4;
      int32_t byte;
      if (nibbles) {
        const uint8_t both = data[group * 256 + place % 256];
        byte = place < 256 ? both & 0x0f : both >> 4;
      } else {
        byte = data[group * 512 + place];
      }
      const float minimum = weights.minima != nullptr ? minima[lane] : -128.0f * scales[lane];
      values[group * group_inputs + i] = scales[lane] * static_cast<float>(byte) + minimum;
    }
  }
}

}  // namespace meshserve::MESHSERVE_ISA
