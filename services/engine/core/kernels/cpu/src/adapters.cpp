#include "adapters.h"

#include <algorithm>

#include "linear_blocks.h"
#include "row_functions.h"
#include "simd.h"

namespace meshserve::MESHSERVE_ISA {

namespace {

// Rows that are multiplied together, and tiles of outputs, for their sums to stay in registers.
#if defined(__AVX512F__)
constexpr int block_rows = 4;
constexpr int block_tiles = 4;
#else
constexpr int block_rows = 2;
constexpr int block_tiles = 2;
#endif
// Sums of one output, so that each addition need not wait for the one before it.
constexpr int partial_sums = block_rows;
// Tiles of outputs of a task, an even number.
constexpr int task_tiles = 8;

constexpr int64_t pair_size = 2 * tile_outputs;  // of a tile's bf16 for two inputs

void unpack_int8(const Int8Group* groups, int32_t inputs, Operand* to) {
  for (int32_t group = 0; group < inputs / group_inputs; ++group, to += group_inputs) {
    const Floats scale = broadcast(groups[group].scale);
    for (int32_t i = 0; i < group_inputs; i += lanes)
      store_operands(to + i, multiply(load_int8(groups[group].values + i), scale));
  }
}

// Writes the sums of one tile of outputs for `R` rows.
template <int R>
void shrink_tile(const uint16_t* tile, int32_t inputs, const Operand* const* rows,
                 Operand* const* to) {
  Floats sums[R][partial_sums];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int p = 0; p < partial_sums; ++p) sums[r][p] = broadcast(0.0f);
  }
  for (int32_t pair = 0; pair < inputs / 2; pair += partial_sums) {
#pragma GCC unroll 16
    for (int p = 0; p < partial_sums; ++p) {
      const Pairs weights = load_pairs(tile + (pair + p) * pair_size);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const Pairs both = broadcast_pair(rows[r] + 2 * (pair + p));
        sums[r][p] = add_products(sums[r][p], weights, both);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int p = 1; p < partial_sums; ++p) sums[r][0] = add(sums[r][0], sums[r][p]);
    store_operands(to[r], sums[r][0]);
  }
}

// Adds to `T` tiles of outputs of `R` rows. up: of the first of them.
template <int R, int T>
void expand_block(const uint16_t* up, int32_t rank, int64_t step, const Operand* const* shrunk,
                  float* const* to, int64_t offset) {
  Floats sums[R][T];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) sums[r][t] = broadcast(0.0f);
  }
  const int64_t tile_size = rank / 2 * pair_size;
  for (int32_t pair = 0; pair < rank / 2; ++pair) {
    Pairs weights[T];
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) weights[t] = load_pairs(up + t * tile_size + pair * pair_size);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Pairs both = broadcast_pair(shrunk[r] + 2 * pair);
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) sums[r][t] = add_products(sums[r][t], weights[t], both);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
      float* sum = to[r] + offset + t * step;
      store(sum, add(load(sum), sums[r][t]));
    }
  }
}

template <int R>
void expand_part(const AdapterPart& part, int32_t first, int32_t last, const Operand* const* shrunk,
                 float* const* to) {
  const int64_t step = int64_t{part.tile_step} * tile_outputs;
  const int64_t tile_size = part.rank / 2 * pair_size;
  for (; first < last;) {
    const uint16_t* up = part.up + first * tile_size;
    const int64_t offset = int64_t{part.first_tile} * tile_outputs + first * step;
    if (last - first >= block_tiles) {
      expand_block<R, block_tiles>(up, part.rank, step, shrunk, to, offset);
      first += block_tiles;
    } else {
      expand_block<R, 1>(up, part.rank, step, shrunk, to, offset);
      ++first;
    }
  }
}

// Calls `run` with the number of rows as a constant.
template <int R, typename Run>
void with_rows(int count, const Run& run) {
  if (count == R) {
    run(std::integral_constant<int, R>());
  } else if constexpr (R > 1) {
    with_rows<R - 1>(count, run);
  }
}

// The tiles [first, last) of a row's sums, as its layer's epilogue has them.
void finish_row(Epilogue epilogue, const float* sums, int32_t first, int32_t last, float* output) {
  if (epilogue == Epilogue::gelu) {
    for (int32_t tile = first; tile < last; ++tile)
      store(output + tile * tile_outputs, gelu_tanh(load(sums + tile * tile_outputs)));
    return;
  }
  for (int32_t tile = first; tile < last; tile += 2) {
    const Floats gate = load(sums + tile * tile_outputs);
    const Floats value = load(sums + (tile + 1) * tile_outputs);
    const Floats open = epilogue == Epilogue::gated_silu ? silu(gate) : gelu_tanh(gate);
    store(output + tile / 2 * tile_outputs, multiply(open, value));
  }
}

const AdapterLinear& linear_of(const AdapterArgs& args, const AdapterRows::Block& block) {
  return args.adapters->loaded[block.adapter][args.layer];
}

int expanded_blocks(const AdapterArgs& args) {
  return follows_adapters(args.epilogue) ? static_cast<int>(args.rows->blocks().size())
                                         : args.rows->num_adapted();
}

}  // namespace

void AdapterRows::sort(const int32_t* adapters, int32_t rows) {
  adapters_.clear();
  rows_.resize(static_cast<size_t>(rows));
  blocks_.clear();
  for (int32_t row = 0; row < rows; ++row) {
    if (adapters[row] < 0) continue;
    const auto place = std::lower_bound(adapters_.begin(), adapters_.end(), adapters[row]);
    if (place == adapters_.end() || *place != adapters[row]) adapters_.insert(place, adapters[row]);
  }
  int32_t* next = rows_.data();
  const auto take = [&](int32_t adapter) {
    const int32_t* begin = next;
    for (int32_t row = 0; row < rows; ++row) {
      if (adapters[row] == adapter) *next++ = row;
    }
    for (; begin < next; begin += block_rows) {
      const auto left = static_cast<int32_t>(next - begin);
      blocks_.push_back({adapter, begin, std::min(left, int32_t{block_rows})});
    }
  };
  for (const int32_t adapter : adapters_) take(adapter);
  num_adapted_ = static_cast<int32_t>(blocks_.size());
  take(-1);
}

int32_t AdapterRows::rank_tiles(const StepAdapters& adapters, int32_t layer) const {
  int32_t most = 0;
  for (const int32_t each : adapters_)
    most = std::max(most, adapters.loaded[each][layer].rank_tiles);
  return most;
}

size_t shrink_scratch_bytes(int32_t inputs) {
  return static_cast<size_t>(inputs) * sizeof(Operand) * block_rows;
}

int shrink_tasks(const AdapterArgs& args) {
  return args.rows->num_adapted() * args.rows->rank_tiles(*args.adapters, args.layer);
}

void shrink_run(const AdapterArgs& args, int task, void* scratch) {
  const int num_blocks = args.rows->num_adapted();
  const AdapterRows::Block& block = args.rows->blocks()[static_cast<size_t>(task % num_blocks)];
  const AdapterLinear& linear = linear_of(args, block);
  // Those that this adapter lacks are tiles of another one's rank.
  int32_t tile = task / num_blocks;
  if (tile >= linear.rank_tiles) return;
  const AdapterPart* part = linear.parts;
  for (; tile >= part->rank / tile_outputs; ++part) tile -= part->rank / tile_outputs;
  const int32_t inputs = args.input.inputs;
  const Operand* rows[block_rows];
  Operand* to[block_rows];
  for (int32_t r = 0; r < block.count; ++r) {
    const char* row = static_cast<const char*>(args.input.rows) + block.rows[r] * args.input.stride;
    if (args.input.format == ActivationFormat::int8) {
      Operand* unpacked = static_cast<Operand*>(scratch) + int64_t{r} * inputs;
      unpack_int8(reinterpret_cast<const Int8Group*>(row), inputs, unpacked);
      rows[r] = unpacked;
    } else {
      rows[r] = reinterpret_cast<const Operand*>(row);
    }
    to[r] = reinterpret_cast<Operand*>(args.shrunk + block.rows[r] * args.shrunk_stride) +
            part->first_shrunk + tile * tile_outputs;
  }
  const uint16_t* down = part->down + int64_t{tile} * (inputs / 2) * pair_size;
  with_rows<block_rows>(block.count,
                        [&](auto count) { shrink_tile<count()>(down, inputs, rows, to); });
}

int expand_tasks(const AdapterArgs& args) {
  const int tiles = args.outputs / tile_outputs;
  return expanded_blocks(args) * ((tiles + task_tiles - 1) / task_tiles);
}

void expand_run(const AdapterArgs& args, int task) {
  const int num_blocks = expanded_blocks(args);
  const AdapterRows::Block& block = args.rows->blocks()[static_cast<size_t>(task % num_blocks)];
  const int32_t first = task / num_blocks * task_tiles;
  const int32_t last = std::min(first + task_tiles, args.outputs / tile_outputs);
  const Operand* shrunk[block_rows];
  float* sums[block_rows];
  for (int32_t r = 0; r < block.count; ++r) sums[r] = args.sums + block.rows[r] * args.sums_stride;
  if (block.adapter >= 0) {
    const AdapterLinear& linear = linear_of(args, block);
    for (const AdapterPart* part = linear.parts; part < linear.parts + linear.num_parts; ++part) {
      // Its tiles among those of the task.
      const auto before = [&](int32_t tile) {
        const int32_t passed = tile - part->first_tile + part->tile_step - 1;
        return std::clamp(passed / part->tile_step, 0, part->tiles);
      };
      for (int32_t r = 0; r < block.count; ++r) {
        shrunk[r] =
            reinterpret_cast<const Operand*>(args.shrunk + block.rows[r] * args.shrunk_stride) +
            part->first_shrunk;
      }
      with_rows<block_rows>(block.count, [&](auto count) {
        expand_part<count()>(*part, before(first), before(last), shrunk, sums);
      });
    }
  }
  if (!follows_adapters(args.epilogue)) return;
  for (int32_t r = 0; r < block.count; ++r) {
    finish_row(args.epilogue, sums[r], first, last,
               args.output + block.rows[r] * args.output_stride);
  }
}

}  // namespace meshserve::MESHSERVE_ISA
