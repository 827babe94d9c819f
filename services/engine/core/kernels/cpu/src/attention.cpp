// Runs the tasks of attention: chunk by chunk, a few query rows at a time.
#include "attention.h"

#include <algorithm>

#include "attention_blocks.h"
#include "attention_chunks.h"
#include "attention_softmax.h"
#include "simd.h"

namespace meshserve::MESHSERVE_ISA {

namespace {

constexpr float log2_e = 1.44269504f;
// Up to so many rows, int8 is made bf16 on the way into each multiplication; for more rows once.
constexpr int32_t most_direct_rows = 2 * block_rows;

// One task: its queries, the heads of each, and where they are in the sequence.
class Attention {
 public:
  Attention(const AttentionArgs& args, const AttentionTask& task, void* memory)
      : args_(args),
        task_(task),
        head_dim_(args.cache.head_dim),
        heads_per_kv_(args.heads / args.cache.kv_heads),
        rows_((task.query_end - task.query_begin) * heads_per_kv_),
        kv_head_(task.kv_head),
        scale_(args.scale * log2_e),
        cap_(args.softcap / args.scale),
        scratch_(memory, args.cache, rows_) {
    const StepView& step = *args.step;
    const int32_t start = step.query_starts[task.sequence];
    const int32_t queries = step.query_starts[task.sequence + 1] - start;
    first_token_ = start + task.query_begin;
    first_position_ = step.context_lengths[task.sequence] - queries + task.query_begin;
    blocks_ = blocks_of(step, args.cache, task.sequence);
  }

  void run() {
    Tiles tiles = locate(kv_head_, task_.chunk_begin);
    for (const int32_t end = kv_head_ + task_.kv_heads; kv_head_ < end; ++kv_head_) {
      pack_queries();
      for (int32_t index = task_.chunk_begin; index < task_.chunk_end; ++index) {
        const Tiles next = index + 1 < task_.chunk_end ? locate(kv_head_, index + 1)
                           : kv_head_ + 1 < end        ? locate(kv_head_ + 1, task_.chunk_begin)
                                                       : tiles;
        attend(tiles, next, index, index == task_.chunk_begin || task_.split >= 0);
        if (task_.split >= 0) leave_partials(args_.plan->splits[task_.split], index);
        tiles = next;
      }
      if (task_.split < 0 || fold_split(args_.plan->splits[task_.split])) write_output();
    }
  }

 private:
  // Folds the partial results of a split context if this task is the last one to finish.
  bool fold_split(AttentionSplit& split) const {
    if (split.unfinished.fetch_sub(1, std::memory_order_acq_rel) > 1) return false;
    split.unfinished.store(split.tasks, std::memory_order_relaxed);
    for (int32_t index = split.chunk_begin; index < split.chunk_end; ++index)
      fold_partials(split, index);
    return true;
  }

  // Tokens of a chunk that exist for the last of the rows.
  int32_t tokens(int32_t index) const { return existing(rows_ - 1, index); }

  Tiles locate(int32_t kv_head, int32_t index) const {
    const KvLayout& cache = args_.cache;
    const int32_t last = (tokens(index) - 1) / tile_tokens;
    const int32_t first = hidden(0, index) / tile_tokens;
    Tiles tiles;
    for (int32_t tile = 0; tile < chunk_tiles; ++tile) {
      const int32_t token = index * attention_chunk + std::clamp(tile, first, last) * tile_tokens;
      const size_t offset = kv_tile_offset(cache, blocks_[token / cache.block_size], kv_head,
                                           token % cache.block_size);
      tiles.keys[tile] = static_cast<const unsigned char*>(cache.keys) + offset;
      tiles.values[tile] = static_cast<const unsigned char*>(cache.values) + offset;
    }
    return tiles;
  }

  // Tokens of a chunk up to a row's own.
  int32_t existing(int32_t row, int32_t index) const {
    const int32_t seen_by_first = first_position_ + 1 - index * attention_chunk;
    if (seen_by_first >= attention_chunk) return attention_chunk;
    return std::clamp(seen_by_first + row / heads_per_kv_, 0, attention_chunk);
  }

  // Tokens of a chunk that lie before a row's window.
  int32_t hidden(int32_t row, int32_t index) const {
    if (args_.window <= 0) return 0;
    const int32_t first = first_seen(first_position_ + row / heads_per_kv_, args_.window);
    return std::clamp(first - index * attention_chunk, 0, attention_chunk);
  }

  // Where what a row sees of a chunk ends; 0 where it sees nothing.
  int32_t visible(int32_t row, int32_t index) const {
    const int32_t end = existing(row, index);
    return hidden(row, index) < end ? end : 0;
  }

  // Whether a row sees nothing of the chunks before.
  bool begins(int32_t row, int32_t index) const {
    if (args_.window <= 0) return index == 0;
    const int32_t first = first_seen(first_position_ + row / heads_per_kv_, args_.window);
    return first / attention_chunk >= index;
  }

  float* sums(int32_t row) const { return scratch_.sums + int64_t{row} * head_dim_; }

  void pack_queries() const {
    for (int32_t row = 0; row < rows_; ++row) {
      const float* from = args_.queries + offset(row, args_.query_stride);
      Operand* to = scratch_.queries + int64_t{row} * head_dim_;
      for (int32_t dim = 0; dim < head_dim_; dim += lanes)
        store_operands(to + dim, load(from + dim));
    }
  }

  // Attends to one chunk, and joins its results to those of the chunks before unless it is `first`.
  void attend(const Tiles& tiles, const Tiles& next, int32_t index, bool first) const {
    const bool is_int8 = args_.cache.format == KvFormat::int8;
    const bool expand = is_int8 && rows_ > most_direct_rows;
    Chunk chunk =
        expand ? expanded(tiles, next, tokens(index), head_dim_, scratch_) : as_stored(tiles, next);
    if (is_int8) gather_scales(tiles, next, tokens(index), head_dim_, scratch_, chunk);
    for (int32_t row = 0; row < rows_; row += block_rows) {
      if (is_int8 && !expand) {
        attend_block<int8_t>(chunk, index, row, first);
      } else {
        attend_block<uint16_t>(chunk, index, row, first);
      }
    }
  }

  template <typename Element>
  void attend_block(const Chunk& chunk, int32_t index, int32_t row, bool first) const {
    const int32_t rows = std::min(rows_ - row, block_rows);
    if (row == 0) {
      dispatch<Element, true>(rows, chunk, index, row, first);
    } else {
      dispatch<Element, false>(rows, chunk, index, row, first);
    }
  }

  template <typename Element, bool fetching>
  void dispatch(int32_t rows, const Chunk& chunk, int32_t index, int32_t row, bool first) const {
    constexpr int five = std::min(5, block_rows), six = std::min(6, block_rows);
    switch (rows) {
      case 1:
        return attend_rows<Element, 1, fetching>(chunk, index, row, first);
      case 2:
        return attend_rows<Element, 2, fetching>(chunk, index, row, first);
      case 3:
        return attend_rows<Element, 3, fetching>(chunk, index, row, first);
      case 4:
        return attend_rows<Element, 4, fetching>(chunk, index, row, first);
      case 5:
        return attend_rows<Element, five, fetching>(chunk, index, row, first);
      case 6:
        return attend_rows<Element, six, fetching>(chunk, index, row, first);
    }
  }

  template <typename Element, int rows, bool fetching>
  void attend_rows(const Chunk& chunk, int32_t index, int32_t begin, bool first) const {
    int32_t seen[rows], before[rows] = {};
    for (int row = 0; row < rows; ++row) seen[row] = existing(begin + row, index);
    int32_t most = seen[rows - 1], least = 0;  // later rows see more
    if (args_.window > 0) [[unlikely]] {
      most = 0;
      least = attention_chunk;
      for (int row = 0; row < rows; ++row) {
        before[row] = hidden(begin + row, index);
        if (before[row] >= seen[row]) seen[row] = 0;
        most = std::max(most, seen[row]);
        if (seen[row] > 0) least = std::min(least, before[row]);
      }
    }
    // What stands in for the tiles before the first window may be in part unwritten.
    const int32_t first_tile = least / tile_tokens;
    if (most == 0) {
      if (first) store_states(begin, rows, {broadcast(no_score), broadcast(0.0f)});
      return;
    }
    multiply_keys<Element, rows, fetching>(scratch_.queries + int64_t{begin} * head_dim_, chunk,
                                           first_tile, (most + tile_tokens - 1) / tile_tokens,
                                           head_dim_, scratch_.scores);
    const auto weigh =
        args_.cache.format == KvFormat::int8 ? weigh_rows<rows, true> : weigh_rows<rows, false>;
    const RowStates states =
        weigh(scratch_.scores, chunk, before, seen, cap_, scale_, scratch_.weights);
    Fold folds[rows];
    find_folds(begin, rows, index, states, seen, first, folds);
    multiply_values<Element, rows, fetching>(scratch_.weights, chunk, first_tile, most, head_dim_,
                                             folds);
  }

  void store_states(int32_t begin, int32_t rows, const RowStates& states) const {
    store_some(scratch_.maxima + begin, states.maxima, rows);
    store_some(scratch_.totals + begin, states.totals, rows);
  }

  // Joins the states of a chunk to those of the rows from `begin` on, and says how to join the
  // sums.
  void find_folds(int32_t begin, int32_t rows, int32_t index, const RowStates& chunk,
                  const int32_t* seen, bool first, Fold* folds) const {
    alignas(64) float kept[lanes] = {}, added[lanes] = {};
    RowStates states = chunk;
    if (!first) {
      states = {load(scratch_.maxima + begin), load(scratch_.totals + begin)};
      const Factors factors = join(states, chunk, scale_);
      store(kept, factors.kept);
      store(added, factors.added);
    }
    store_states(begin, rows, states);
    for (int32_t row = 0; row < rows; ++row) {
      const bool own_first = first || begins(begin + row, index);
      folds[row] = {seen[row] > 0 ? sums(begin + row) : nullptr, own_first, kept[row], added[row]};
      if (own_first && seen[row] == 0) {
        // Its window begins later.
        scratch_.maxima[begin + row] = no_score;
        scratch_.totals[begin + row] = 0.0f;
      }
    }
  }

  // The results of a split context's chunk: [rows][head_dim], [rows] maxima and [rows] totals.
  float* partials(const AttentionSplit& split, int32_t index) const {
    const int64_t chunk = index - split.chunk_begin;
    return args_.plan->partials + split.partials + chunk * rows_ * (head_dim_ + 2);
  }

  void leave_partials(const AttentionSplit& split, int32_t index) const {
    float* to = partials(split, index);
    to = std::copy_n(scratch_.sums, int64_t{rows_} * head_dim_, to);
    to = std::copy_n(scratch_.maxima, rows_, to);
    std::copy_n(scratch_.totals, rows_, to);
  }

  void fold_partials(const AttentionSplit& split, int32_t index) const {
    const float* from = partials(split, index);
    const float* maxima = from + int64_t{rows_} * head_dim_;
    for (int32_t begin = 0; begin < rows_; begin += lanes) {
      const int32_t rows = std::min(rows_ - begin, lanes);
      int32_t seen[lanes];
      for (int32_t row = 0; row < rows; ++row) seen[row] = visible(begin + row, index);
      const RowStates states = {load_some(maxima + begin, rows),
                                load_some(maxima + rows_ + begin, rows)};
      Fold folds[lanes];
      find_folds(begin, rows, index, states, seen, index == split.chunk_begin, folds);
      for (int32_t row = 0; row < rows; ++row) {
        if (folds[row].sums == nullptr) continue;
        const float* own = from + int64_t{begin + row} * head_dim_;
        for (int32_t dim = 0; dim < head_dim_; dim += lanes)
          fold_into(folds[row].sums + dim, load(own + dim), folds[row]);
      }
    }
  }

  void write_output() const {
    for (int32_t row = 0; row < rows_; ++row) {
      float* to = args_.output + offset(row, args_.output_stride);
      const Floats factor = broadcast(1.0f / scratch_.totals[row]);
      for (int32_t dim = 0; dim < head_dim_; dim += lanes)
        store(to + dim, multiply(load(sums(row) + dim), factor));
    }
  }

  // Where a row's head is in the queries or the output.
  int64_t offset(int32_t row, int64_t stride) const {
    const int32_t head = kv_head_ * heads_per_kv_ + row % heads_per_kv_;
    return (first_token_ + row / heads_per_kv_) * stride + int64_t{head} * head_dim_;
  }

  const AttentionArgs& args_;
  const AttentionTask& task_;
  const int32_t head_dim_, heads_per_kv_, rows_;
  int32_t kv_head_;  // in work
  const float scale_;
  const float cap_;  // of the scores before their scale; 0: none
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
