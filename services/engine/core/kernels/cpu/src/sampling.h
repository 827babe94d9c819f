// Choosing the next token of each row of logits: edits, temperature, top-k, top-p, min-p, the draw.
//
// The meaning of all of it is given by services/engine/core/sampler.py and logit_edits.py. A row is
// a task, and its choice depends on that row alone. Python's mirror of the structures is in
// sampling.py.
#pragma once

#include <cstddef>
#include <cstdint>

namespace meshserve {

class Team;

// Numbers for some tokens of each row: those of row i are [offsets[i], offsets[i + 1]). A token
// comes once in a row. `offsets` is null where no row has any.
struct TokenNumbers {
  const int64_t* offsets;
  const int64_t* tokens;
  const float* numbers;
};

// Which tokens may follow, one bit for each: token t of a mask is bit t % 32 of its word t / 32.
struct TokenMasks {
  const int64_t* of_rows;  // [rows], the mask of each row or -1; null where no row has any
  const uint32_t* words;   // [masks, ceil(vocab / 32)], one mask after the other
};

// What has been made of the logits of some rows before all other edits.
struct ProcessedLogits {
  const int64_t* of_rows;  // [rows], the place of each row or -1; null where no row has any
  const float* logits;     // [processed, vocab]
};

enum class SampleStatus : int32_t {
  chosen = 0,
  not_finite = 1,     // NaN or +Inf among the logits, or -Inf alone
  unknown_token = 2,  // an edit names a token that the vocabulary does not have
};

struct SampleArgs {
  float* logits;   // [rows, vocab], edited in place
  int64_t stride;  // floats from a row to the next
  int32_t rows;
  int32_t vocab;

  // [rows] each, and off at: temperature 0 (greedy), top_k 0, top_p 1, min_p 0. The temperature is
  // null where all rows are greedy, and then the next four are not read.
  const float* temperature;
  const int64_t* top_k;
  const float* top_p;
  const float* min_p;
  const double* uniforms;   // in [0, 1)
  const int64_t* logprobs;  // likeliest tokens to report, -1 for no log-probabilities; may be null
  const int64_t* given;     // tokens that are not chosen but known, -1 for none; may be null

  // In this order. A row with allowed tokens loses all others; `numbers` of the last two is unused.
  TokenNumbers repetition, subtracted, added, allowed, banned;

  int64_t* tokens;         // [rows]
  SampleStatus* statuses;  // [rows]
  // Of the logits as they were before the edits, after the mask.
  float* chosen_logprobs;  // [rows]
  int32_t most_logprobs;   // columns of the next two, the most that a row asks for
  int64_t* top_tokens;     // [rows, most_logprobs], the likeliest first
  float* top_logprobs;     // [rows, most_logprobs]

  // Applied before all else: log-probabilities too are those among the tokens left.
  TokenMasks masks;
  // Taken in place of a row's own by all but its log-probabilities.
  ProcessedLogits processed;
};

}  // namespace meshserve

namespace meshserve::MESHSERVE_ISA {

int sample_tasks(const SampleArgs& args);
// 64-byte aligned memory that a thread needs while it runs a task.
size_t sample_scratch_bytes(const SampleArgs& args);
void sample_run(const SampleArgs& args, int row, void* scratch);

// All rows, on a team of threads or, where it is null, on the caller alone. `scratch` is 64-byte
// aligned and has sample_scratch_bytes for each thread.
void run_sampling(Team* team, const SampleArgs* args, void* scratch);
size_t sampling_scratch_bytes(const SampleArgs* args);

}  // namespace meshserve::MESHSERVE_ISA
