// How a step's rows are divided between threads that each compute their own.
//
// Threads that share the outputs of every operation meet at a barrier after each, and activations
// pass from one processor's caches to another's. That pays for few rows: the weights, read from
// memory, take longest, and are read once. With more rows a thread does better alone with some of
// them, from the embedding to the last layer. Only a sequence that is cut makes one thread wait for
// another, for the keys and values of earlier tokens; and a thread whose processor is taken away
// for a moment holds nobody else up before the step's end.
#pragma once

#include <atomic>
#include <vector>

#include "attention.h"
#include "memory.h"
#include "step_costs.h"

namespace meshserve {

// Consecutive rows of a step, and their sequences, or what is here of them, as a step of its own.
struct StepPart {
  StepView view;
  std::vector<AttentionPlan> plans;  // for each shape of attention
  int32_t first_row = 0, end_row = 0;
  double cost = 0;
  // Earlier tokens of the first sequence are in the parts from this one to the one before.
  int first_awaited = 0;
  // The layers whose keys and values have been stored, in this step.
  alignas(64) std::atomic<int32_t> stored_layers{0};

  // What `view` and `plans` point to.
  std::vector<int32_t> query_starts, context_lengths;
  Memory plan_workspace;
  size_t plan_bytes = 0;
};

}  // namespace meshserve

namespace meshserve::MESHSERVE_ISA {

class StepParts {
 public:
  // `shapes`: those of attention that layers have.
  StepParts(int threads, std::vector<AttentionShape> shapes);

  // Makes one part of all rows, which all threads share. Throws std::bad_alloc, as does `divide`.
  void join(const StepView& step);
  // Makes a part for each thread, of its share of the cost, which may be no row at all.
  void divide(const StepView& step, const StepCosts& costs);

  bool divided() const { return divided_; }
  // The part that a thread works on.
  StepPart& of(int rank) { return parts_[divided_ ? static_cast<size_t>(rank) : 0]; }
  const std::vector<StepPart>& all() const { return parts_; }

  // Says how long each thread worked on its part: one that shares its processor gets less to do.
  void learn(const std::vector<double>& seconds);

 private:
  void plan(StepPart& part, int threads);

  std::vector<AttentionShape> shapes_;
  bool divided_ = false;
  std::vector<StepPart> parts_;
  std::vector<double> shares_;  // of each thread; they add up to 1
};

}  // namespace meshserve::MESHSERVE_ISA
