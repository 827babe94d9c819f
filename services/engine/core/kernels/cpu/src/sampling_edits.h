// Changes to the logits of a row before it is sampled.
#pragma once

#include <algorithm>

#include "sampling.h"
#include "sampling_row.h"

namespace meshserve::MESHSERVE_ISA {

inline bool any(const TokenNumbers& of, int row) {
  return of.offsets != nullptr && of.offsets[row] < of.offsets[row + 1];
}

inline bool has_processed(const SampleArgs& args, int row) {
  return args.processed.of_rows != nullptr && args.processed.of_rows[row] >= 0;
}

inline bool has_edits(const SampleArgs& args, int row) {
  return has_processed(args, row) || any(args.repetition, row) || any(args.subtracted, row) ||
         any(args.added, row) || any(args.allowed, row) || any(args.banned, row);
}

inline bool has_mask(const SampleArgs& args, int row) {
  return args.masks.of_rows != nullptr && args.masks.of_rows[row] >= 0;
}

// Leaves no logits but those of tokens whose bit is set.
inline void apply_mask(const SampleArgs& args, int row, float* logits) {
  const int vocab = args.vocab;
  const int64_t num_words = (int64_t{vocab} + 31) / 32;
  const uint32_t* words = args.masks.words + args.masks.of_rows[row] * num_words;
  const Floats nothing = broadcast(minus_infinity);
  for (int i = 0; i < vocab; i += lanes) {
    const Bits kept = words[i / 32] >> (i % 32) & all_lanes;
    if (kept == all_lanes) continue;
    const int count = std::min(lanes, vocab - i);
    const Floats left = select(mask_of(kept), load_some(logits + i, count), nothing);
    store_some(logits + i, left, count);
  }
}

// Calls edit(token, index of its number) for each; false, at once, at a token out of range.
template <typename Edit>
bool for_each_token(const TokenNumbers& of, int row, int vocab, Edit edit) {
  if (of.offsets == nullptr) return true;
  for (int64_t i = of.offsets[row]; i < of.offsets[row + 1]; ++i) {
    const int64_t token = of.tokens[i];
    if (token < 0 || token >= vocab) return false;
    edit(token, i);
  }
  return true;
}

// Edits the logits of a row; `copy` has room for as many. False if a token is out of range.
inline bool apply_edits(const SampleArgs& args, int row, float* logits, float* copy) {
  const int vocab = args.vocab;
  if (has_processed(args, row))
    std::copy_n(args.processed.logits + args.processed.of_rows[row] * vocab, vocab, logits);
  bool known = for_each_token(args.repetition, row, vocab, [&](int64_t token, int64_t i) {
    // CTRL (Keskar et al., arXiv:1909.05858), so that it lowers whatever the sign.
    const float penalty = args.repetition.numbers[i];
    float& logit = logits[token];
    logit = logit > 0.0f ? logit / penalty : logit * penalty;
  });
  known = known && for_each_token(args.subtracted, row, vocab, [&](int64_t token, int64_t i) {
            logits[token] -= args.subtracted.numbers[i];
          });
  known = known && for_each_token(args.added, row, vocab, [&](int64_t token, int64_t i) {
            logits[token] += args.added.numbers[i];
          });
  if (any(args.allowed, row)) {
    std::copy_n(logits, vocab, copy);
    std::fill_n(logits, vocab, minus_infinity);
    known = known && for_each_token(args.allowed, row, vocab,
                                    [&](int64_t token, int64_t) { logits[token] = copy[token]; });
  }
  return known && for_each_token(args.banned, row, vocab,
                                 [&](int64_t token, int64_t) { logits[token] = minus_infinity; });
}

}  // namespace meshserve::MESHSERVE_ISA
