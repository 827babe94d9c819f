// An encoder as a list of operations, run over a batch of whole sequences by a team of threads in
// one call.
//
// Operations up to the next attention take each row by itself. So a thread goes through them with a
// few rows at a time, whose activations stay in its own caches. Where there are sequences enough,
// each thread takes some of them through all layers and never waits for another; else all threads
// share the rows, and then the heads, and wait for each other once for each.
#pragma once

#include <vector>

#include "linear.h"
#include "memory.h"
#include "team.h"

namespace meshserve {

// Where operations read and write rows of floats. Those of `inner` are of no use to later
// operations on other rows.
enum class EncoderBuffer : int32_t { hidden = 0, projected = 1, attended = 2, inner = 3 };
constexpr int num_encoder_buffers = 4;

enum class EncoderOpKind : int32_t {
  embed = 0,      // hidden = the sum of the rows of the tables
  norm = 1,       // activations = LayerNorm(hidden), which may replace `hidden` as well
  activate = 2,   // activations = the rows of `source`, through an activation function
  linear = 3,     // target = activations times `weights`
  rotary = 4,     // rotates queries and keys in `projected`
  attention = 5,  // attended = attention of the queries in `projected`
};

enum class ActivationFunction : int32_t {
  none = 0,
  gelu = 1,
  gelu_tanh = 2,
  relu = 3,
  silu = 4,
  tanh = 5,
};

struct EncoderOp {
  EncoderOpKind kind;
  EncoderBuffer source, target;
  Epilogue epilogue;        // of linear
  ActivationFormat format;  // of the activations that are written
  ActivationFunction function;
  int32_t gated;       // activate: the first half of a row is activated and multiplies the second
  int32_t replaces;    // norm: whether the normalised rows become those of `hidden`
  int32_t converts;    // norm: whether activations are written
  int32_t width;       // of the activations that are written
  int32_t window;      // attention: how far a token sees; negative: all of its sequence
  float eps;           // of norm
  const float* scale;  // norm: [width]
  const float* shift;  // norm: [width], or null
  const float* cos;    // rotary: [max_positions, head_dim / 2]
  const float* sin;
  const LinearWeights* weights;
};

// Rows of bf16, of the size of `hidden`. `positions` and `types` may be null.
struct EmbeddingTables {
  const uint16_t* words;
  const uint16_t* positions;
  const uint16_t* types;
  int32_t first_position;
};

struct EncoderSpec {
  const EncoderOp* ops;
  int32_t num_ops;
  EmbeddingTables tables;
  int32_t hidden_size, heads, head_dim;
  float attention_scale;
  int32_t widths[num_encoder_buffers];
  int32_t max_activation_inputs;
};

struct EncoderInput {
  int32_t num_tokens, num_sequences;
  const int32_t* starts;     // [num_sequences + 1]: the rows of each sequence
  const int32_t* token_ids;  // [num_tokens]
  const int32_t* positions;  // [num_tokens]
  const int32_t* types;      // [num_tokens]
  float* hidden;             // [num_tokens, hidden_size]: the result
};

}  // namespace meshserve

namespace meshserve::MESHSERVE_ISA {

class Encoder {
 public:
  Encoder(const EncoderSpec& spec, Team& team);

  // Throws std::bad_alloc where buffers do not fit.
  void run(const EncoderInput& input);

 private:
  // Sequences, or one that is long, and their rows.
  struct Part {
    int32_t first_sequence, end_sequence;
    int32_t first_row, end_row;
  };
  // Operations between two attentions.
  struct Segment {
    size_t begin, end;
  };

  void reserve(const EncoderInput& input);
  void divide(const EncoderInput& input);
  void run_parts(const EncoderInput& input, int rank);
  void run_together(const EncoderInput& input, int rank);
  void run_rows(const EncoderInput& input, const Segment& segment, int rank, int32_t first_row,
                int32_t rows);
  void attend(const EncoderInput& input, const EncoderOp& op, int rank, int32_t sequence,
              int32_t head);
  float* row_of(EncoderBuffer buffer, int rank, int32_t first_row, int32_t row) const;

  EncoderSpec spec_;
  std::vector<EncoderOp> ops_;
  std::vector<Segment> segments_;  // an attention between each and the next
  Team& team_;
  std::vector<Part> parts_;
  std::vector<TaskCounter> counters_;  // of parts, or of each segment and attention
  int32_t max_tokens_ = 0, longest_ = 0;
  Memory shared_[num_encoder_buffers];  // [max_tokens, width]; none of `hidden` and `inner`
  float* hidden_ = nullptr;
  std::vector<Memory> inner_;        // of each thread, [block_rows, width]
  std::vector<Memory> activations_;  // of each thread
  std::vector<Memory> scratch_;      // of each thread, for attention
};

// For callers through the table of kernels. `make_encoder` returns null, and `run_encoder` not 0,
// where memory is short. An encoder uses the team and all that its spec points to until it is
// freed.
void* make_encoder(Team* team, const EncoderSpec* spec);
int32_t run_encoder(void* encoder, const EncoderInput* input);
void free_encoder(void* encoder);

}  // namespace meshserve::MESHSERVE_ISA
