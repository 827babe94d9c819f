#include "linear.h"

#include <algorithm>

#include "linear_blocks.h"
#if defined(__AMX_TILE__)
#include "linear_tiles.h"
#endif

namespace meshserve::MESHSERVE_ISA {

namespace {

// Most rows of a block, for its sums to stay in registers: those of quantised weights are two for
// an output.
#if defined(__AVX512F__)
constexpr int bf16_rows = 10;
constexpr int quantised_rows = 6;
// Few rows more than that are still faster in one pass over the weights than in two.
constexpr int single_pass_rows = 8;
constexpr int wide_rows = 2;  // so few that two strips fit
#else
constexpr int bf16_rows = 2;
constexpr int quantised_rows = 2;
constexpr int single_pass_rows = 2;
constexpr int wide_rows = 1;
#endif
// How far ahead of the only pass over weights they are asked for.
constexpr int64_t prefetch_bytes = 4096;
// How much of a thread's first strips is asked for before their pass begins.
constexpr int64_t prefetched_bytes = 12 * 1024;

int64_t strip_bytes(const LinearWeights& weights) {
  if (weights.format == WeightFormat::bf16) return int64_t{weights.inputs} * strip_outputs * 2;
  return weights.inputs / group_inputs * strip_tiles *
         group_bytes(weights.format, weights.has_minima != 0);
}

template <typename Layout, int R>
void compute_strips(const LinearArgs& args, int strip, int last_strip, int row, Ahead& ahead) {
  if constexpr (R <= wide_rows && !Layout::quantised) {
    // Two strips at once, for sums that do not wait for each other; those of bytes start anew with
    // every group.
    for (; strip + 1 < last_strip; strip += 2) {
      compute_block<Layout, R, 2>(args, strip, row, ahead);
    }
  }
  for (; strip < last_strip; ++strip) compute_block<Layout, R, 1>(args, strip, row, ahead);
}

template <typename Layout, int R>
void compute_rows(const LinearArgs& args, int count, int strip, int last_strip, int row,
                  Ahead& ahead) {
  if (count == R) {
    compute_strips<Layout, R>(args, strip, last_strip, row, ahead);
  } else if constexpr (R > 1) {
    compute_rows<Layout, R - 1>(args, count, strip, last_strip, row, ahead);
  }
}

template <typename Layout>
void compute_range(const LinearArgs& args, int first_strip, int last_strip) {
  constexpr int most_rows = Layout::quantised ? quantised_rows : bf16_rows;
  constexpr int widest = std::max(most_rows, single_pass_rows);
  const int64_t whole = strip_bytes(*args.weights);
  Ahead ahead{static_cast<const char*>(args.weights->data) + first_strip * whole,
              Layout::strip_group_lines};
  if (args.rows <= single_pass_rows) {
    // Few rows pass over all strips, which come from memory.
    ahead.at += prefetch_bytes;
    compute_rows<Layout, widest>(args, args.rows, first_strip, last_strip, 0, ahead);
    return;
  }
  // Many pass over one strip after the other, which stays in the first-level cache meanwhile, as
  // the next one comes there, a part with each block. The blocks are of nearly equal size: 13 rows
  // are 5 + 4 + 4, not 6 + 6 + 1.
  const int blocks = std::max(2, (args.rows + most_rows - 1) / most_rows);
  const int64_t lines = (ahead.lines + blocks - 1) / blocks;
  for (int strip = first_strip; strip < last_strip; ++strip) {
    ahead.at = static_cast<const char*>(args.weights->data) + (strip + 1) * whole;
    const char* end = strip + 1 < last_strip ? ahead.at + whole : ahead.at;
    for (int block = 0, row = 0; block < blocks; ++block) {
      ahead.lines = ahead.at < end ? lines : 0;
      const int count = (args.rows - row + blocks - block - 1) / (blocks - block);
      compute_rows<Layout, widest>(args, count, strip, strip + 1, row, ahead);
      row += count;
    }
  }
}

template <typename Layout>
void compute(const LinearArgs& args, int first_strip, int last_strip) {
#if defined(__AMX_TILE__)
  if constexpr (!Layout::quantised) {
    compute_range_of_bf16(args, first_strip, last_strip, prefetch_bytes);
  } else if (args.rows >= fewest_rows_of_bytes) {
    compute_range_of_bytes<Layout>(args, first_strip, last_strip);
  } else {
    compute_range<Layout>(args, first_strip, last_strip);
  }
#else
  compute_range<Layout>(args, first_strip, last_strip);
#endif
}

}  // namespace

int linear_tasks(const LinearArgs& args) {
  return (args.weights->outputs + strip_outputs - 1) / strip_outputs;
}

void linear_run(const LinearArgs& args, int first_strip, int last_strip) {
  switch (args.weights->format) {
    case WeightFormat::bf16:
      return compute<Layout<WeightFormat::bf16, false>>(args, first_strip, last_strip);
    case WeightFormat::q8:
      if (args.weights->has_minima) {
        return compute<Layout<WeightFormat::q8, true>>(args, first_strip, last_strip);
      }
      return compute<Layout<WeightFormat::q8, false>>(args, first_strip, last_strip);
    case WeightFormat::q4:
      return compute<Layout<WeightFormat::q4, true>>(args, first_strip, last_strip);
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
