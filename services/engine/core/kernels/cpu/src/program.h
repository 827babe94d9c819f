// A model's step as a list of operations, run by a team of threads in one call.
#pragma once

#include <vector>

#include "attention.h"
#include "linear.h"
#include "memory.h"
#include "rotary_kv.h"
#include "sampling.h"
#include "step_costs.h"
#include "step_parts.h"
#include "team.h"

namespace meshserve {

// Where operations read and write rows of floats.
enum class Buffer : int32_t { residual = 0, projected = 1, attended = 2, gated = 3, logits = 4 };
constexpr int num_buffers = 5;

enum class OpKind : int32_t {
  embed = 0,      // residual = rows of `weights`, by token id
  norm = 1,       // activations = RMSNorm(residual) * norm_weight
  convert = 2,    // activations = the rows of `source`
  linear = 3,     // target = activations times `weights`
  rotary_kv = 4,  // rotates queries and keys in `projected`; writes the cache of `layer`
  attention = 5,  // attended = attention of `projected`'s queries over the cache of `layer`
  // residual, attended = their rows that logits are wanted of; later operations see only these
  select_rows = 6,
};

struct Op {
  OpKind kind;
  int32_t layer;
  Buffer source;
  Buffer target;
  Epilogue epilogue;
  ActivationFormat format;   // of the activations that norm and convert write
  float eps;                 // of norm
  int32_t width;             // of the rows that norm and convert read
  const float* norm_weight;  // [width]
  const LinearWeights* weights;
};

// What does not change from step to step.
struct ProgramSpec {
  const Op* ops;
  int32_t num_ops;
  int32_t heads, kv_heads, head_dim, rotary_dim;
  float attention_scale;
  const float* cos;  // [max_positions, rotary_dim / 2]
  const float* sin;
  const KvLayout* layers;
  int32_t num_layers;
  int32_t max_tokens;             // of a step
  int32_t widths[num_buffers];    // floats in a row; logits are the caller's
  int32_t max_activation_inputs;  // of any norm or convert
};

struct StepInput {
  StepView view;
  const int64_t* token_ids;    // [num_tokens]
  const int64_t* logits_rows;  // [num_rows]
  int32_t num_rows;
  float* logits;               // [num_rows, vocabulary]
  const SampleArgs* sampling;  // what to choose from these logits; null: nothing
};

}  // namespace meshserve

namespace meshserve::MESHSERVE_ISA {

class Program {
 public:
  Program(const ProgramSpec& spec, Team& team);

  // One step. The K and V of its tokens are in the cache afterwards.
  void run(const StepInput& input);

 private:
  // One thread at work: on a part that it shares with all others, or on its own.
  struct Worker {
    StepPart& part;
    int rank;
    bool alone;
    int rows;  // of the part, that the operation in hand is about
  };

  void reserve(const StepInput& input);
  void run_divided(const StepInput& input, int rank, size_t num_ops);
  void run_together(const StepInput& input, int rank, size_t first_op);
  void execute(size_t index, const StepInput& input, const Worker& worker);
  void select_rows(Buffer buffer, const StepInput& input);
  void sample(const SampleArgs& args, int rank);
  void await_earlier_tokens(const Worker& worker, int layer);
  void prefetch_next_weights(size_t index, int rank) const;
  void convert_row(const Op& op, int64_t row, const Worker& worker);
  Activations activations(ActivationFormat format, int32_t inputs, const Worker& worker) const;
  float* row_of(Buffer buffer, int64_t row) const;

  ProgramSpec spec_;
  std::vector<Op> ops_;
  size_t num_row_ops_;    // at the beginning, about all rows of a step and each row by itself
  size_t num_layer_ops_;  // all but those that make logits of the residual stream
  std::vector<KvLayout> layers_;
  std::vector<TaskCounter> counters_;  // one for each operation, and one for the choice at the end
  Team& team_;
  StepCosts costs_;
  StepParts parts_;
  std::vector<double> seconds_;  // that each thread worked on its part
  Memory buffers_[num_buffers];
  float* data_[num_buffers] = {};
  Memory activations_;
  Memory private_activations_;   // of each thread
  std::vector<Memory> scratch_;  // one for each thread
  size_t scratch_bytes_ = 0;
};

// For callers through the table of kernels. `make_program` returns null, and `run_program` not 0,
// where memory is short. A program uses the team and all that its spec points to until it is freed.
void* make_program(Team* team, const ProgramSpec* spec);
int32_t run_program(void* program, const StepInput* input);
void free_program(void* program);

}  // namespace meshserve::MESHSERVE_ISA
