// Causal attention of a step's queries over the paged KV cache, with grouped heads.
//
// One query's result is the same bit for bit however its step is composed: decode, a chunk of any
// size, any batch, any number of threads. Its keys are taken in chunks of `attention_chunk` at
// absolute positions; each chunk has a softmax of its own, and chunks are folded in order. How a
// step is cut into tasks changes who computes a chunk, never how.
//
// With a window, a query sees the keys at most `window` - 1 positions before its own. Its first
// chunk is then the one that the window begins in; what lies before that window's tile is not read.
#pragma once

#include <atomic>

#include "kv_layout.h"

namespace meshserve {

// Keys whose scores share a maximum, and the unit in which a context is split between threads.
constexpr int32_t attention_chunk = 128;

struct AttentionShape {
  int32_t heads, kv_heads, head_dim;
  int32_t window;  // tokens that a query sees, its own among them; 0: all before it
};

// The first position that a query at `position` sees.
inline int32_t first_seen(int32_t position, int32_t window) {
  return window > 0 && position >= window ? position - window + 1 : 0;
}

// The queries [query_begin, query_end) of a sequence, for all query heads of the KV heads from
// `kv_head` on, over the chunks [chunk_begin, chunk_end) of its context.
struct AttentionTask {
  int32_t sequence;
  int32_t kv_head, kv_heads;
  int32_t query_begin, query_end;
  int32_t chunk_begin, chunk_end;
  // Index into AttentionPlan::splits (of one KV head), or -1: this task has all that is seen of the
  // context.
  int32_t split;
  int64_t cost;
};

// A context that several tasks share: each leaves its chunks' results in `partials`, and the one
// that finishes last folds them.
struct AttentionSplit {
  std::atomic<int32_t> unfinished;  // tasks; the last one sets it back, for the next layer
  int32_t tasks;
  int32_t chunk_begin, chunk_end;
  int64_t partials;  // where they begin, in floats
};

// How a step's attention is cut into tasks; the same for all layers of one shape. The longest come
// first and are many times the shortest, so threads should claim them one by one.
struct AttentionPlan {
  AttentionTask* tasks;
  int32_t num_tasks;
  AttentionSplit* splits;
  int32_t num_splits;
  float* partials;
};

struct AttentionArgs {
  const StepView* step;
  KvLayout cache;        // with the step's own keys and values written
  const float* queries;  // [num_tokens, heads * head_dim], rotated
  int64_t query_stride;
  int32_t heads;
  int32_t window;  // as AttentionShape's
  float scale;     // on the scores, positive
  float softcap;   // bound that the scaled scores are bent towards, by tanh; 0: none
  float* output;   // [num_tokens, heads * head_dim]
  int64_t output_stride;
  const AttentionPlan* plan;
};

}  // namespace meshserve

namespace meshserve::MESHSERVE_ISA {

// Once per step: the bytes that its plan takes, and the plan, made in a workspace of that size
// (64-byte aligned), which must outlive it.
size_t attention_plan_bytes(const StepView& step, const AttentionShape& shape);
AttentionPlan plan_attention(const StepView& step, const AttentionShape& shape, int threads,
                             void* workspace);

// Per layer. Tasks are independent; `scratch` is 64-byte aligned and belongs to the thread.
int attention_tasks(const AttentionArgs& args);
size_t attention_scratch_bytes(const AttentionArgs& args);
void attention_run(const AttentionArgs& args, int task, void* scratch);

}  // namespace meshserve::MESHSERVE_ISA
