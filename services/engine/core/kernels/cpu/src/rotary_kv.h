// Norms and rotates a step's queries and keys in place and writes its keys and values to the cache.
#pragma once

#include "kv_layout.h"

namespace meshserve {

struct RotaryKvArgs {
  const StepView* step;
  KvLayout cache;
  float* qkv;  // [num_tokens, (heads + 2 * kv_heads) * head_dim]: queries, keys, values
  int64_t qkv_stride;
  int32_t heads;
  // Of each head of queries and of keys, RMSNorm's weights [head_dim], before rotation; or null.
  const float* query_norm;
  const float* key_norm;
  float norm_eps;
  // [max_position, rotary_dim / 2], any amplitude included. Dimension i < rotary_dim / 2 of a head
  // is rotated against dimension i + rotary_dim / 2; those from rotary_dim on are left alone.
  const float* cos;
  const float* sin;
  int32_t rotary_dim;
};

}  // namespace meshserve

namespace meshserve::MESHSERVE_ISA {

// Tasks are ranges of tokens. They write disjoint memory, and need no scratch.
int rotary_kv_tasks(const RotaryKvArgs& args);
size_t rotary_kv_scratch_bytes(const RotaryKvArgs& args);
void rotary_kv_run(const RotaryKvArgs& args, int task, void* scratch);

}  // namespace meshserve::MESHSERVE_ISA
