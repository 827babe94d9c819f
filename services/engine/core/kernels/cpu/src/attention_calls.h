// Attention and the KV write as calls of their own, for whoever has no program of a whole step:
// tests and benchmarks.
#pragma once

#include "attention.h"
#include "rotary_kv.h"
#include "team.h"

namespace meshserve::MESHSERVE_ISA {

// `processors`, [threads - 1], is where the threads started stay; null: wherever there is room.
Team* make_team(int32_t threads, const int32_t* processors);
void free_team(Team* team);

// Runs the operation for each of `num_layers` layers of one step, one after the other.
void run_rotary_kv(Team* team, const RotaryKvArgs* layers, int32_t num_layers);
// The layers' plan is made here; they are of one shape.
void run_attention(Team* team, const AttentionArgs* layers, int32_t num_layers);

}  // namespace meshserve::MESHSERVE_ISA
