// Samples rows of logits. One pass finds the peak and the largest logit of each block; filters then
// look at the blocks that reach above a bound known beforehand, and never sort the vocabulary.
#include "sampling.h"

#include <algorithm>
#include <cfloat>
#include <type_traits>

#include "sampling_edits.h"
#include "sampling_row.h"
#include "sampling_select.h"
#include "team.h"

namespace meshserve::MESHSERVE_ISA {

namespace {

constexpr double log2_e = 1.4426950408889634;

// What a thread works with. The small comes first: most rows touch little of the rest.
struct Scratch {
  float* maxima;
  double* masses;
  float* raw_maxima;
  Candidates first, second;
  float *raw, *copy;  // a row each

  // Returns the bytes taken; with null pointers throughout where `memory` is null.
  size_t place(void* memory, int vocab) {
    auto* start = static_cast<unsigned char*>(memory);
    size_t used = 0;
    const auto take = [&](auto*& pointer, int count) {
      using Number = std::remove_reference_t<decltype(*pointer)>;
      pointer = start == nullptr ? nullptr : reinterpret_cast<Number*>(start + used);
      used += (static_cast<size_t>(count) * sizeof(Number) + 63) / 64 * 64;
    };
    const int blocks = LogitsRow::num_blocks(vocab);
    take(maxima, blocks);
    take(masses, blocks);
    take(raw_maxima, blocks);
    for (Candidates* set : {&first, &second}) {
      take(set->values, vocab + lanes);
      take(set->weights, vocab + lanes);
      set->count = 0;
    }
    take(raw, vocab);
    take(copy, vocab);
    return used;
  }
};

// A value that no fewer than `wanted` logits reach, and not many more where that is to be had.
float bound_for_count(const LogitsRow& row, int64_t wanted, Scratch& scratch) {
  if (wanted > row.blocks()) return minus_infinity;
  // As many blocks have a logit of at least the largest logit of the least of them.
  std::copy_n(row.maxima(), row.blocks(), scratch.first.values);
  scratch.first.count = row.blocks();
  return smallest_kept<false>(scratch.first, scratch.second, double(wanted));
}

// The `wanted`th largest logit; wanted < vocab.
float floor_for_count(const LogitsRow& row, int64_t wanted, Scratch& scratch) {
  const float bound = bound_for_count(row, wanted, scratch);
  scratch.first.count = row.collect(bound, scratch.first.values);
  return smallest_kept<false>(scratch.first, scratch.second, double(wanted));
}

// Gathers the logits from `bound` up with their weights; returns the sum of these.
double weigh(const LogitsRow& row, float bound, float scale, Candidates& into) {
  into.count = row.collect(bound, into.values);
  ExactSum sum;
  for (int i = 0; i < into.count; i += lanes) {
    const Floats weights = row.weights(load(into.values + i), scale);
    store(into.weights + i, weights);
    sum.add(keep(lanes_below(into.count - i), weights));
  }
  return sum.total();
}

// The smallest logit that top-p keeps among those from `floor` up.
float floor_for_mass(LogitsRow& row, double top_p, float floor, float scale, Scratch& scratch) {
  if (!(top_p > 0.0)) return row.peak();
  if (floor > minus_infinity) {
    const double mass = weigh(row, floor, scale, scratch.first);
    return smallest_kept<true>(scratch.first, scratch.second, top_p * mass);
  }
  const double mass = row.mass(minus_infinity, scale);
  // All logits below this bound together weigh less than what top-p leaves out, however many they
  // are. A little room is for rounding; should it not suffice, all logits are gathered.
  const double least = 0.5 * (1.0 - top_p) * mass / row.size();
  const auto bound = static_cast<float>(row.peak() + std::log2(least) / scale);
  const double gathered = weigh(row, bound, scale, scratch.first);
  if (gathered < top_p * mass) weigh(row, minus_infinity, scale, scratch.first);
  return smallest_kept<true>(scratch.first, scratch.second, top_p * mass);
}

bool is_given(const SampleArgs& args, int row) {
  return args.given != nullptr && args.given[row] >= 0;
}

int choose(LogitsRow& row, const SampleArgs& args, int index, Scratch& scratch) {
  if (is_given(args, index)) return static_cast<int>(args.given[index]);
  const float temperature = args.temperature == nullptr ? 0.0f : args.temperature[index];
  if (!(temperature > 0.0f)) return row.argmax();
  // In bounds, so that neither 0 nor -Inf times it is NaN.
  const auto scale =
      static_cast<float>(std::clamp(log2_e / temperature, double{FLT_MIN}, double{FLT_MAX}));
  float floor = minus_infinity;
  if (args.top_k[index] > 0 && args.top_k[index] < args.vocab)
    floor = floor_for_count(row, args.top_k[index], scratch);
  if (args.top_p[index] < 1.0f)
    floor = std::max(floor, floor_for_mass(row, args.top_p[index], floor, scale, scratch));
  if (args.min_p[index] > 0.0f) {
    const double below = std::min(std::log(double{args.min_p[index]}), 0.0) * temperature;
    floor = std::max(floor, static_cast<float>(row.peak() + below));
  }
  return row.draw(floor, scale, args.uniforms[index]);
}

// Writes the likeliest tokens; ties in the order of tokens.
void report_likeliest(const LogitsRow& row, const SampleArgs& args, int index, double log_sum,
                      Scratch& scratch) {
  const int64_t wanted = std::min<int64_t>(args.logprobs[index], args.vocab);
  if (wanted <= 0) return;
  int64_t* tokens = args.top_tokens + int64_t{index} * args.most_logprobs;
  float* logprobs = args.top_logprobs + int64_t{index} * args.most_logprobs;
  const float floor = wanted < args.vocab ? floor_for_count(row, wanted, scratch) : minus_infinity;
  int64_t found = 0;
  row.for_each(floor, [&](int token, float logit) {
    if (logit > floor) tokens[found++] = token;
  });
  row.for_each(floor, [&](int token, float logit) {
    if (logit == floor && found < wanted) tokens[found++] = token;
  });
  std::sort(tokens, tokens + found, [&](int64_t a, int64_t b) {
    const float of_a = row.logit(a), of_b = row.logit(b);
    return of_a != of_b ? of_a > of_b : a < b;
  });
  for (int64_t i = 0; i < found; ++i)
    logprobs[i] = static_cast<float>(double{row.logit(tokens[i])} - log_sum);
}

SampleStatus sample_row(const SampleArgs& args, int index, Scratch& scratch) {
  float* logits = args.logits + index * args.stride;
  const bool reported = args.logprobs != nullptr && args.logprobs[index] >= 0;
  const bool edited = has_edits(args, index);
  if (is_given(args, index) && args.given[index] >= args.vocab) return SampleStatus::unknown_token;
  if (has_mask(args, index)) apply_mask(args, index, logits);
  LogitsRow row(logits, args.vocab, scratch.maxima, scratch.masses);
  if (!reported) {
    if (edited && !apply_edits(args, index, logits, scratch.copy))
      return SampleStatus::unknown_token;
    if (!row.scan()) return SampleStatus::not_finite;
    args.tokens[index] = choose(row, args, index, scratch);
    return SampleStatus::chosen;
  }
  // Log-probabilities are those of the model, before the edits.
  LogitsRow raw(edited ? scratch.raw : logits, args.vocab, scratch.raw_maxima, scratch.masses);
  if (edited) {
    std::copy_n(logits, args.vocab, scratch.raw);
    if (!apply_edits(args, index, logits, scratch.copy)) return SampleStatus::unknown_token;
  }
  if (!raw.scan() || !row.scan()) return SampleStatus::not_finite;
  const auto scale = static_cast<float>(log2_e);
  const double log_sum = raw.peak() + std::log(raw.mass(minus_infinity, scale));
  report_likeliest(raw, args, index, log_sum, scratch);
  const int token = choose(row, args, index, scratch);
  args.tokens[index] = token;
  args.chosen_logprobs[index] = static_cast<float>(double{raw.logit(token)} - log_sum);
  return SampleStatus::chosen;
}

}  // namespace

int sample_tasks(const SampleArgs& args) { return args.rows; }

size_t sample_scratch_bytes(const SampleArgs& args) { return Scratch().place(nullptr, args.vocab); }

void sample_run(const SampleArgs& args, int row, void* scratch) {
  Scratch own;
  own.place(scratch, args.vocab);
  args.tokens[row] = 0;
  args.statuses[row] = sample_row(args, row, own);
}

size_t sampling_scratch_bytes(const SampleArgs* args) { return sample_scratch_bytes(*args); }

void run_sampling(Team* team, const SampleArgs* args, void* scratch) {
  if (team == nullptr || args->rows == 1) {
    for (int row = 0; row < args->rows; ++row) sample_run(*args, row, scratch);
    return;
  }
  const size_t stride = sample_scratch_bytes(*args);
  TaskCounter rows;
  team->run([&](int rank) {
    void* own = static_cast<unsigned char*>(scratch) + stride * static_cast<size_t>(rank);
    for (int row; rows.take_one(args->rows, row);) sample_run(*args, row, own);
  });
}

}  // namespace meshserve::MESHSERVE_ISA
