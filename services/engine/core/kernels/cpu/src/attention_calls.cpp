// Runs single operations on a team of threads.
#include "attention_calls.h"

#include <memory>

#include "memory.h"

namespace meshserve::MESHSERVE_ISA {

namespace {

size_t whole_lines(size_t bytes) { return (bytes + 63) / 64 * 64; }

// Runs every task of every layer, `run(layer, task, scratch)`, on all threads of the team.
template <typename Run>
void run_layers(Team& team, int32_t num_layers, int tasks, size_t scratch_bytes, Run run) {
  const size_t stride = whole_lines(scratch_bytes);
  const Memory scratch = allocate(stride * static_cast<size_t>(team.size()));
  const std::unique_ptr<std::atomic<int>[]> next(new std::atomic<int>[num_layers]());
  team.run([&](int rank) {
    void* own = static_cast<unsigned char*>(scratch.get()) + stride * static_cast<size_t>(rank);
    for (int32_t layer = 0; layer < num_layers; ++layer) {
      for (int task; (task = next[layer].fetch_add(1, std::memory_order_relaxed)) < tasks;)
        run(layer, task, own);
      team.barrier();
    }
  });
}

}  // namespace

Team* make_team(int32_t threads, const int32_t* processors) {
  return new Team(threads, processors);
}

void free_team(Team* team) { delete team; }

void run_rotary_kv(Team* team, const RotaryKvArgs* layers, int32_t num_layers) {
  run_layers(
      *team, num_layers, rotary_kv_tasks(layers[0]), rotary_kv_scratch_bytes(layers[0]),
      [&](int32_t layer, int task, void* scratch) { rotary_kv_run(layers[layer], task, scratch); });
}

void run_attention(Team* team, const AttentionArgs* layers, int32_t num_layers) {
  AttentionArgs args = layers[0];
  const AttentionShape shape = {args.heads, args.cache.kv_heads, args.cache.head_dim, args.window};
  const Memory workspace = allocate(attention_plan_bytes(*args.step, shape));
  const AttentionPlan plan = plan_attention(*args.step, shape, team->size(), workspace.get());
  args.plan = &plan;
  run_layers(*team, num_layers, attention_tasks(args), attention_scratch_bytes(args),
             [&](int32_t layer, int task, void* scratch) {
               AttentionArgs own = layers[layer];
               own.plan = &plan;
               attention_run(own, task, scratch);
             });
}

}  // namespace meshserve::MESHSERVE_ISA
