// A model's step as a list of operations, run by a team of threads in one call.
#pragma once

#include <vector>

#include "adapters.h"
#include "attention.h"
#include "experts.h"
#include "linear.h"
#include "memory.h"
#include "rotary_kv.h"
#include "sampling.h"
#include "step_costs.h"
#include "step_parts.h"
#include "team.h"

namespace meshserve {

// Where operations read and write rows of floats.
enum class Buffer : int32_t {
  residual = 0,
  projected = 1,
  attended = 2,
  gated = 3,
  logits = 4,
  routed = 5,  // what a router says of each expert
  mixed = 6,   // what each expert of a row makes of it
  sums = 7,    // of a layer whose gates wait for adapters
};
constexpr int num_buffers = 8;

enum class OpKind : int32_t {
  embed = 0,      // residual = rows of `weights`, by token id, times `scale`, plus `positions`
  norm = 1,       // activations = RMSNorm(residual) * norm_weight, or LayerNorm with a norm_bias
  convert = 2,    // activations = the rows of `source`
  linear = 3,     // target = activations times `weights`
  rotary_kv = 4,  // norms and rotates queries and keys in `projected`; writes the cache of `layer`
  attention = 5,  // attended = attention of `projected`'s queries over the cache of `layer`
  // residual, attended = their rows that logits are wanted of; later operations see only these
  select_rows = 6,
  add_norm = 7,  // residual += RMSNorm(source) * norm_weight
  // Mixtures of experts. What follows `route` has rows for each expert of a row, by expert.
  route = 8,           // the experts of each row, by its logits in `source`
  scatter_norm = 9,    // activations = RMSNorm(residual) * norm_weight, for each expert of a row
  expert_linear = 10,  // target = activations times the `weights` of their expert
  mix = 11,            // residual += the rows of `source`, by their experts' shares
  // Around a linear layer that adapters may change; where none does, they are passed over.
  shrink = 12,  // what of adapters reads the layer's input
  expand = 13,  // target += what they make of it
};

struct Op {
  OpKind kind;
  int32_t layer;
  Buffer source;
  Buffer target;
  Epilogue epilogue;
  ActivationFormat format;       // of the activations that norm and convert write
  float eps;                     // of norms
  int32_t width;                 // of the rows that norms and convert read
  const float* norm_weight;      // [width]; of rotary_kv, [head_dim] for queries, or null
  const float* norm_bias;        // [width], or null
  const float* key_norm;         // of rotary_kv: [head_dim], or null
  const LinearWeights* weights;  // of expert_linear: [experts.count]
  float scale;                   // of embed; of linear: the bound of its epilogue
  const float* positions;        // of embed: [max_positions, width], or null
  const float* cos;              // of rotary_kv: [max_positions, rotary_dim / 2]
  const float* sin;
  int32_t rotary_dim;
  int32_t window;        // of attention: tokens that a token sees, itself included; 0: all
  float softcap;         // of attention: bound of its products; 0: none
  ExpertsShape experts;  // of operations on the rows of experts; a count of 0 elsewhere
  int32_t adapted;       // number of a layer that adapters may change, from 1 on; 0 elsewhere
};

// What does not change from step to step.
struct ProgramSpec {
  const Op* ops;
  int32_t num_ops;
  int32_t heads, kv_heads, head_dim;
  float attention_scale;
  const KvLayout* layers;
  int32_t num_layers;
  int32_t max_tokens;             // of a step
  int32_t widths[num_buffers];    // floats in a row; logits are the caller's
  int32_t max_activation_inputs;  // of any norm or convert
  int32_t activation_bytes;       // of a token, a multiple of 64, whatever its activations are
  int32_t adapter_width;          // of what adapters make of a row: most ranks of one, at a layer
};

struct StepInput {
  StepView view;
  const int64_t* token_ids;    // [num_tokens]
  const int64_t* logits_rows;  // [num_rows]
  int32_t num_rows;
  float* logits;                 // [num_rows, vocabulary]
  const SampleArgs* sampling;    // what to choose from these logits; null: nothing
  const StepAdapters* adapters;  // null: no sequence has one
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
    int rows;                    // of the part, that the operation in hand is about
    const AdapterRows* adapted;  // these, by adapter; null where none has one
  };
  // The experts of a worker's rows, and their shares: [rows, per_token].
  struct Routes {
    int32_t* ids;
    float* shares;
  };

  void reserve(const StepInput& input);
  void sort_adapters(const StepInput& input);
  const AdapterRows* adapted(const AdapterRows& rows, const StepInput& input) const;
  bool adapts(const Op& op, const StepInput& input, const Worker& worker) const;
  AdapterArgs adapter_args(const Op& op, const StepInput& input, const Worker& worker) const;
  void run_divided(const StepInput& input, int rank, size_t num_ops);
  void run_together(const StepInput& input, int rank, size_t first_op);
  void execute(size_t index, const StepInput& input, const Worker& worker);
  void select_rows(Buffer buffer, const StepInput& input);
  void sample(const SampleArgs& args, int rank);
  void await_earlier_tokens(const Worker& worker, int layer);
  void prefetch_next_weights(size_t index, int rank) const;
  void embed_row(const Op& op, int32_t row, const StepInput& input, const StepPart& part);
  void convert_row(const Op& op, int64_t row, const Worker& worker);
  void add_norm_row(const Op& op, int64_t row, const Worker& worker);
  void scatter_row(const Op& op, int32_t row, const Worker& worker);
  void mix_row(const Op& op, int32_t row, const Worker& worker);
  void run_experts(const Op& op, int begin, int end, const Worker& worker);
  const float* normed(const Op& op, const float* row, int rank) const;
  int64_t row_stride(const Op& op, Buffer buffer) const;
  Routes routes(const ExpertsShape& experts, const Worker& worker) const;
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
  std::vector<int> plans_;  // of each operation of attention: which of StepPart::plans is its own
  StepParts parts_;
  std::vector<double> seconds_;  // that each thread worked on its part
  Memory buffers_[num_buffers];
  float* data_[num_buffers] = {};
  Memory activations_;
  Memory private_activations_;         // of each thread
  std::vector<Memory> scratch_;        // one for each thread
  ExpertsShape largest_experts_ = {};  // of any operation
  Memory routes_;
  Memory private_routes_;                   // of each thread
  std::vector<ExpertOrder> expert_orders_;  // one for each thread
  std::vector<int32_t> adapters_of_rows_;   // of a step
  std::vector<AdapterRows> adapter_rows_;   // of each part
  AdapterRows adapter_logits_rows_;         // of the rows that logits are wanted of
  int64_t shrunk_stride_;                   // bytes
  Memory shrunk_;
  size_t scratch_bytes_ = 0;
};

// For callers through the table of kernels. `make_program` returns null, and `run_program` not 0,
// where memory is short. A program uses the team and all that its spec points to until it is freed.
void* make_program(Team* team, const ProgramSpec* spec);
int32_t run_program(void* program, const StepInput* input);
void free_program(void* program);

}  // namespace meshserve::MESHSERVE_ISA
