// Runs the tasks of attention: chunk by chunk, a few query rows at a time.
#include "attention.h"

#include <algorithm>
#include <limits>
#include <type_traits>

#include "attention_blocks.h"
#include "simd.h"

namespace meshserve::MESHSERVE_ISA {

namespace {

constexpr float log2_e = 1.44269504f;
constexpr int32_t state_floats = 16;  // a RowState, padded, behind each row of partial sums

// A softmax in the making: weights are relative to `maximum`, and the sums of weighted values that
// belong to it lie elsewhere.
struct RowState {
  float maximum;  // of the scores, before AttentionArgs::scale
  float total;    // of the weights
};

// A thread's memory for one task.
struct Scratch {
  Operand* queries;    // [rows][head_dim]
  float* sums;         // [rows][head_dim]
  RowState* states;    // [rows]
  float* scores;       // [block_rows][attention_chunk]
  Operand* weights;    // [block_rows][attention_chunk]
  uint16_t* expanded;  // int8: the keys and the values of a chunk as bf16
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
    take(states, rows);
    take(scores, size_t{block_rows} * attention_chunk);
    take(weights, size_t{block_rows} * attention_chunk);
    take(expanded, cache.format == KvFormat::int8 ? 2 * size_t{attention_chunk} * head_dim : 0);
  }
};

void expand_tile(const int8_t* from, int32_t elements, uint16_t* to) {
  for (int32_t i = 0; i < elements; i += lanes) store_bf16(to + i, load_int8(from + i));
}

// The keys and values of a sequence's chunk number `index`, of which the first `tokens` exist.
Chunk find_chunk(const KvLayout& cache, const int32_t* blocks, int32_t kv_head, int32_t index,
                 int32_t tokens, uint16_t* expanded) {
  Chunk chunk = {};
  const int32_t elements = tile_tokens * cache.head_dim;
  const int32_t tiles = (tokens + tile_tokens - 1) / tile_tokens;
  for (int32_t tile = 0; tile < tiles; ++tile) {
    const int32_t token = index * attention_chunk + tile * tile_tokens;
    const size_t offset =
        kv_tile_offset(cache, blocks[token / cache.block_size], kv_head, token % cache.block_size);
    const auto* keys = static_cast<const unsigned char*>(cache.keys) + offset;
    const auto* values = static_cast<const unsigned char*>(cache.values) + offset;
    if (cache.format == KvFormat::bf16) {
      chunk.keys[tile] = reinterpret_cast<const uint16_t*>(keys);
      chunk.values[tile] = reinterpret_cast<const uint16_t*>(values);
      continue;
    }
    uint16_t* to = expanded + tile * elements;
    expand_tile(reinterpret_cast<const int8_t*>(keys), elements, to);
    chunk.keys[tile] = to;
    to += chunk_tiles * elements;
    expand_tile(reinterpret_cast<const int8_t*>(values), elements, to);
    chunk.values[tile] = to;
    chunk.key_scales[tile] = reinterpret_cast<const float*>(keys + elements);
    chunk.value_scales[tile] = reinterpret_cast<const float*>(values + elements);
  }
  for (int32_t tile = tiles; tile < chunk_tiles; ++tile) chunk.keys[tile] = chunk.keys[tiles - 1];
  return chunk;
}

// Turns a row's scores into weights relative to their maximum; those of keys from `visible` on
// are 0, whatever their scores hold. `scale` is on the scores, times log2(e).
template <bool scaled>
RowState weigh(const float* scores, const Chunk& chunk, int32_t visible, float scale,
               Operand* weights) {
  Floats tiles[chunk_tiles];
  Floats largest = broadcast(-std::numeric_limits<float>::infinity());
  const Floats hidden = largest;
#pragma GCC unroll 8
  for (int32_t tile = 0; tile < chunk_tiles; ++tile) {
    const int32_t seen = std::clamp(visible - tile * tile_tokens, 0, tile_tokens);
    tiles[tile] = load(scores + tile * tile_tokens);
    if constexpr (scaled) {
      if (seen > 0) tiles[tile] = multiply(tiles[tile], load(chunk.key_scales[tile]));
    }
    tiles[tile] = select(first_lanes(seen), tiles[tile], hidden);
    largest = larger(largest, tiles[tile]);
  }
  RowState state;
  state.maximum = maximum(largest);
  const Floats origin = broadcast(state.maximum), factor = broadcast(scale);
  Floats total = broadcast(0.0f);
#pragma GCC unroll 8
  for (int32_t tile = 0; tile < chunk_tiles; ++tile) {
    Floats weight = exp2(multiply(subtract(tiles[tile], origin), factor));
    total = add(total, weight);
    if constexpr (scaled) {
      const int32_t seen = std::clamp(visible - tile * tile_tokens, 0, tile_tokens);
      if (seen > 0) {
        weight = multiply(weight, load(chunk.value_scales[tile]));
        weight = select(first_lanes(seen), weight, broadcast(0.0f));
      }
    }
    store_operands(weights + tile * tile_tokens, weight);
  }
  state.total = sum(total);
  return state;
}

// Returns how to join a chunk's result to `before`, which then covers the chunk too.
Fold join(RowState& before, const RowState& chunk, bool first, float scale) {
  if (first) {
    before = chunk;
    return {.skip = false, .first = true, .kept = 0.0f, .added = 1.0f};
  }
  const float maximum_of_both = std::max(before.maximum, chunk.maximum);
  alignas(64) float powers[lanes] = {(before.maximum - maximum_of_both) * scale,
                                     (chunk.maximum - maximum_of_both) * scale};
  store(powers, exp2(load(powers)));
  before.maximum = maximum_of_both;
  before.total = before.total * powers[0] + chunk.total * powers[1];
  return {.skip = false, .first = false, .kept = powers[0], .added = powers[1]};
}

// One task: its queries, the heads of each, and where they are in the sequence.
class Attention {
 public:
  Attention(const AttentionArgs& args, const AttentionTask& task, void* memory)
      : args_(args),
        task_(task),
        head_dim_(args.cache.head_dim),
        heads_per_kv_(args.heads / args.cache.kv_heads),
        rows_((task.query_end - task.query_begin) * heads_per_kv_),
        scale_(args.scale * log2_e),
        scratch_(memory, args.cache, rows_) {
    const StepView& step = *args.step;
    const int32_t start = step.query_starts[task.sequence];
    const int32_t queries = step.query_starts[task.sequence + 1] - start;
    first_token_ = start + task.query_begin;
    first_position_ = step.context_lengths[task.sequence] - queries + task.query_begin;
    blocks_ = step.block_tables + int64_t{task.sequence} * step.table_stride;
  }

  void run() {
    pack_queries();
    if (task_.split < 0) {
      for (int32_t index = 0; index < task_.chunk_end; ++index)
        attend(index, index == 0, [&](int32_t row) { return Row{sums(row), state(row)}; });
      for (int32_t row = 0; row < rows_; ++row) write_output(row);
      return;
    }
    AttentionSplit& split = args_.plan->splits[task_.split];
    for (int32_t index = task_.chunk_begin; index < task_.chunk_end; ++index)
      attend(index, true, [&](int32_t row) { return partial(split, index, row); });
    if (split.unfinished.fetch_sub(1, std::memory_order_acq_rel) == 1) {
      split.unfinished.store(split.tasks, std::memory_order_relaxed);
      fold_partials(split);
    }
  }

 private:
  struct Row {
    float* sums;
    RowState& state;
  };

  int32_t visible(int32_t row, int32_t index) const {
    const int32_t seen = first_position_ + row / heads_per_kv_ + 1 - index * attention_chunk;
    return std::clamp(seen, 0, attention_chunk);
  }

  float* sums(int32_t row) const { return scratch_.sums + int64_t{row} * head_dim_; }
  RowState& state(int32_t row) const { return scratch_.states[row]; }

  Row partial(const AttentionSplit& split, int32_t index, int32_t row) const {
    const int64_t place = int64_t{index} * rows_ + row;
    float* sums = args_.plan->partials + split.partials + place * (head_dim_ + state_floats);
    return {sums, *reinterpret_cast<RowState*>(sums + head_dim_)};
  }

  void pack_queries() const {
    for (int32_t row = 0; row < rows_; ++row) {
      const float* from = args_.queries + offset(row, args_.query_stride);
      Operand* to = scratch_.queries + int64_t{row} * head_dim_;
      for (int32_t dim = 0; dim < head_dim_; dim += lanes)
        store_operands(to + dim, load(from + dim));
    }
  }

  // Attends to one chunk and joins its results to those of `row_of(row)`.
  template <typename RowOf>
  void attend(int32_t index, bool first, RowOf row_of) const {
    const int32_t tokens = visible(rows_ - 1, index);
    const Chunk chunk =
        find_chunk(args_.cache, blocks_, task_.kv_head, index, tokens, scratch_.expanded);
    for (int32_t row = 0; row < rows_; row += block_rows) {
      switch (std::min(rows_ - row, block_rows)) {
        case 1:
          attend_rows<1>(chunk, index, row, first, row_of);
          break;
        case 2:
          attend_rows<2>(chunk, index, row, first, row_of);
          break;
        case 3:
          attend_rows<3>(chunk, index, row, first, row_of);
          break;
        case 4:
          attend_rows<4>(chunk, index, row, first, row_of);
          break;
        case 5:
          attend_rows<std::min(5, block_rows)>(chunk, index, row, first, row_of);
          break;
        case 6:
          attend_rows<std::min(6, block_rows)>(chunk, index, row, first, row_of);
          break;
      }
    }
  }

  template <int rows, typename RowOf>
  void attend_rows(const Chunk& chunk, int32_t index, int32_t begin, bool first,
                   RowOf row_of) const {
    const int32_t most = visible(begin + rows - 1, index);  // later rows see more
    if (most == 0) return;
    const Operand* queries = scratch_.queries + int64_t{begin} * head_dim_;
    multiply_keys<rows>(queries, chunk, (most + tile_tokens - 1) / tile_tokens, head_dim_,
                        scratch_.scores);
    Fold folds[rows];
    float* sums[rows];
    for (int row = 0; row < rows; ++row) {
      const int32_t seen = visible(begin + row, index);
      const Row joined = row_of(begin + row);
      sums[row] = joined.sums;
      const RowState chunk_state = weigh_row(row, chunk, seen);
      folds[row] = seen == 0 ? Fold{.skip = true, .first = false, .kept = 1.0f, .added = 0.0f}
                             : join(joined.state, chunk_state, first, scale_);
    }
    multiply_values<rows>(scratch_.weights, chunk, most, head_dim_, folds, sums);
  }

  RowState weigh_row(int32_t row, const Chunk& chunk, int32_t seen) const {
    const float* scores = scratch_.scores + row * attention_chunk;
    Operand* weights = scratch_.weights + row * attention_chunk;
    if (args_.cache.format == KvFormat::int8)
      return weigh<true>(scores, chunk, seen, scale_, weights);
    return weigh<false>(scores, chunk, seen, scale_, weights);
  }

  void fold_partials(const AttentionSplit& split) const {
    for (int32_t row = 0; row < rows_; ++row) {
      for (int32_t index = 0; index < split.num_chunks && visible(row, index) > 0; ++index) {
        const Row chunk = partial(split, index, row);
        const Fold fold = join(state(row), chunk.state, index == 0, scale_);
        for (int32_t dim = 0; dim < head_dim_; dim += lanes)
          fold_into(sums(row) + dim, load(chunk.sums + dim), fold);
      }
      write_output(row);
    }
  }

  void write_output(int32_t row) const {
    float* to = args_.output + offset(row, args_.output_stride);
    const Floats factor = broadcast(1.0f / state(row).total);
    for (int32_t dim = 0; dim < head_dim_; dim += lanes)
      store(to + dim, multiply(load(sums(row) + dim), factor));
  }

  // Where a row's head is in the queries or the output.
  int64_t offset(int32_t row, int64_t stride) const {
    const int32_t head = task_.kv_head * heads_per_kv_ + row % heads_per_kv_;
    return (first_token_ + row / heads_per_kv_) * stride + int64_t{head} * head_dim_;
  }

  const AttentionArgs& args_;
  const AttentionTask& task_;
  const int32_t head_dim_, heads_per_kv_, rows_;
  const float scale_;
  const Scratch scratch_;
  int32_t first_token_, first_position_;
  const int32_t* blocks_;
};

}  // namespace

int attention_tasks(const AttentionArgs& args) { return args.plan->num_tasks; }

size_t attention_scratch_bytes(const AttentionArgs& args) {
  int32_t most = 0;
  for (int32_t i = 0; i < args.plan->num_tasks; ++i)
    most = std::max(most, args.plan->tasks[i].query_end - args.plan->tasks[i].query_begin);
  return Scratch(nullptr, args.cache, most * (args.heads / args.cache.kv_heads)).bytes;
}

void attention_run(const AttentionArgs& args, int task, void* scratch) {
  Attention(args, args.plan->tasks[task], scratch).run();
}

}  // namespace meshserve::MESHSERVE_ISA
