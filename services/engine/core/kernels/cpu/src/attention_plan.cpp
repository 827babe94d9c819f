// Cuts a step's attention into tasks.
#include <algorithm>
#include <new>

#include "attention.h"

namespace meshserve::MESHSERVE_ISA {

namespace {

// Query rows (tokens times the heads that share a KV head) of a task: enough that a chunk of keys,
// once fetched, is used many times; few enough that the rows stay in the second-level cache.
constexpr int32_t rows_per_task = 96;
// Contexts are split between tasks only below this many rows: others have tasks enough.
constexpr int32_t most_split_rows = 16;
// Fetching a chunk of keys and values takes about as long as this many rows' work on it.
constexpr int64_t fetch_rows = 4;
constexpr int64_t tasks_per_thread = 4;
constexpr size_t alignment = 64;

template <typename Integer>
Integer ceil_div(Integer a, Integer b) {
  return (a + b - 1) / b;
}

size_t aligned(size_t bytes) { return ceil_div(bytes, alignment) * alignment; }

struct Rows {
  int32_t per_token;
  int32_t tokens_per_task;

  explicit Rows(const AttentionShape& shape)
      : per_token(shape.heads / shape.kv_heads),
        tokens_per_task(std::max(1, rows_per_task / per_token)) {}
};

struct Sequence {
  int32_t queries, first_position, window;

  Sequence(const StepView& step, int32_t index, const AttentionShape& shape)
      : queries(step.query_starts[index + 1] - step.query_starts[index]),
        first_position(step.context_lengths[index] - queries),
        window(shape.window) {}

  // The chunks that the queries from `query_begin` to `query_end` see: where they begin and end.
  int32_t chunk_begin(int32_t query_begin) const {
    return first_seen(first_position + query_begin, window) / attention_chunk;
  }
  int32_t chunk_end(int32_t query_end) const {
    return ceil_div(first_position + query_end, attention_chunk);
  }
  int32_t chunks(int32_t query_begin, int32_t query_end) const {
    return chunk_end(query_end) - chunk_begin(query_begin);
  }
};

bool may_split(const Rows& rows, const Sequence& sequence) {
  return sequence.queries * rows.per_token <= most_split_rows &&
         sequence.queries <= rows.tokens_per_task && sequence.chunks(0, sequence.queries) > 1;
}

int64_t floats_per_row(const AttentionShape& shape) { return shape.head_dim + 2; }

struct Sizes {
  size_t tasks = 0, splits = 0, floats = 0;

  Sizes(const StepView& step, const AttentionShape& shape) {
    const Rows rows(shape);
    const auto kv_heads = static_cast<size_t>(shape.kv_heads);
    for (int32_t index = 0; index < step.num_sequences; ++index) {
      const Sequence sequence(step, index, shape);
      if (may_split(rows, sequence)) {
        const auto chunks = static_cast<size_t>(sequence.chunks(0, sequence.queries));
        tasks += chunks * kv_heads;
        splits += kv_heads;
        floats += chunks * kv_heads *
                  static_cast<size_t>(sequence.queries * rows.per_token * floats_per_row(shape));
      } else {
        tasks += static_cast<size_t>(ceil_div(sequence.queries, rows.tokens_per_task)) * kv_heads;
      }
    }
  }

  size_t task_bytes() const { return aligned(tasks * sizeof(AttentionTask)); }
  size_t split_bytes() const { return aligned(splits * sizeof(AttentionSplit)); }
  size_t bytes() const { return task_bytes() + split_bytes() + aligned(floats * sizeof(float)); }
};

class Planner {
 public:
  Planner(const StepView& step, const AttentionShape& shape, AttentionPlan& plan)
      : step_(step), shape_(shape), rows_(shape), plan_(plan) {}

  int64_t total_cost() const {
    int64_t total = 0;
    for (int32_t index = 0; index < step_.num_sequences; ++index) {
      const Sequence sequence(step_, index, shape_);
      for (int32_t begin = 0; begin < sequence.queries; begin += rows_.tokens_per_task) {
        const int32_t end = std::min(begin + rows_.tokens_per_task, sequence.queries);
        total += cost(end - begin, sequence.chunks(begin, end));
      }
    }
    return total * shape_.kv_heads;
  }

  void add(int32_t index, int64_t most_cost) {
    const Sequence sequence(step_, index, shape_);
    const int32_t chunks = sequence.chunks(0, sequence.queries);
    const int64_t whole = cost(sequence.queries, chunks);
    const bool split = whole > most_cost && may_split(rows_, sequence);
    if (whole * shape_.kv_heads <= most_cost && sequence.queries <= rows_.tokens_per_task) {
      // All heads in one task: a block's heads lie together, and each is fetched during the one
      // before.
      add_task({index, 0, shape_.kv_heads, 0, sequence.queries, sequence.chunk_begin(0),
                sequence.chunk_end(sequence.queries), -1, 0});
      return;
    }
    for (int32_t kv_head = 0; kv_head < shape_.kv_heads; ++kv_head) {
      if (split) {
        add_split(index, kv_head, sequence, ceil_div(whole, most_cost));
        continue;
      }
      for (int32_t begin = 0; begin < sequence.queries; begin += rows_.tokens_per_task) {
        const int32_t end = std::min(begin + rows_.tokens_per_task, sequence.queries);
        add_task({index, kv_head, 1, begin, end, sequence.chunk_begin(begin),
                  sequence.chunk_end(end), -1, 0});
      }
    }
  }

 private:
  int64_t cost(int32_t queries, int32_t chunks) const {
    return chunks * (int64_t{queries} * rows_.per_token + fetch_rows);
  }

  void add_split(int32_t index, int32_t kv_head, const Sequence& sequence, int64_t parts) {
    const int32_t queries = sequence.queries, first = sequence.chunk_begin(0);
    const int32_t chunks = sequence.chunks(0, queries);
    const auto tasks = static_cast<int32_t>(std::min<int64_t>(parts, chunks));
    new (&plan_.splits[plan_.num_splits])
        AttentionSplit{tasks, tasks, first, first + chunks, partials_};
    for (int32_t part = 0; part < tasks; ++part) {
      const int32_t begin = chunks * part / tasks, end = chunks * (part + 1) / tasks;
      add_task({index, kv_head, 1, 0, queries, first + begin, first + end, plan_.num_splits, 0});
    }
    ++plan_.num_splits;
    partials_ += int64_t{chunks} * queries * rows_.per_token * floats_per_row(shape_);
  }

  void add_task(AttentionTask task) {
    task.cost =
        task.kv_heads * cost(task.query_end - task.query_begin, task.chunk_end - task.chunk_begin);
    plan_.tasks[plan_.num_tasks++] = task;
  }

  const StepView& step_;
  const AttentionShape& shape_;
  Rows rows_;
  AttentionPlan& plan_;
  int64_t partials_ = 0;
};

}  // namespace

size_t attention_plan_bytes(const StepView& step, const AttentionShape& shape) {
  return Sizes(step, shape).bytes();
}

AttentionPlan plan_attention(const StepView& step, const AttentionShape& shape, int threads,
                             void* workspace) {
  const Sizes sizes(step, shape);
  auto* bytes = static_cast<unsigned char*>(workspace);
  AttentionPlan plan = {};
  plan.tasks = reinterpret_cast<AttentionTask*>(bytes);
  plan.splits = reinterpret_cast<AttentionSplit*>(bytes + sizes.task_bytes());
  plan.partials = reinterpret_cast<float*>(bytes + sizes.task_bytes() + sizes.split_bytes());
  Planner planner(step, shape, plan);
  // No task longer than a fraction of a thread's share, or the others wait for it at the end.
  const int64_t most_cost =
      std::max<int64_t>(1, planner.total_cost() / (threads * tasks_per_thread));
  for (int32_t index = 0; index < step.num_sequences; ++index) planner.add(index, most_cost);
  std::sort(plan.tasks, plan.tasks + plan.num_tasks,
            [](const AttentionTask& a, const AttentionTask& b) { return a.cost > b.cost; });
  return plan;
}

}  // namespace meshserve::MESHSERVE_ISA
