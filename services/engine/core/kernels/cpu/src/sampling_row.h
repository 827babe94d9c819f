// One row of logits, read in blocks: whoever looks for large values passes most blocks over.
#pragma once

#include <cmath>
#include <limits>

#include "sampling_lanes.h"

namespace meshserve::MESHSERVE_ISA {

constexpr float minus_infinity = -std::numeric_limits<float>::infinity();

class LogitsRow {
 public:
  static constexpr int block_size = 256;
  static constexpr int num_blocks(int vocab) { return (vocab + block_size - 1) / block_size; }

  // `maxima` and `masses` have room for num_blocks(vocab) numbers each.
  LogitsRow(const float* logits, int vocab, float* maxima, double* masses)
      : logits_(logits), vocab_(vocab), maxima_(maxima), masses_(masses) {}

  // Finds the largest logit, to be called first. False if it is not finite, which is so if any is
  // NaN or +Inf or all are -Inf; there is nothing more to learn of such a row.
  bool scan() {
    Bits nan = 0;
    float peak = minus_infinity;
    for (int block = 0; block < blocks(); ++block) {
      Floats first = broadcast(minus_infinity), second = first;
      const int end = end_of(block);
      int i = begin_of(block);
      for (; i + 2 * lanes <= end; i += 2 * lanes) {
        const Floats a = load(logits_ + i), b = load(logits_ + i + lanes);
        nan |= unordered(a, b);
        first = larger(a, first);
        second = larger(b, second);
      }
      for (; i < end; i += lanes) {
        const Floats a = vector(i);
        nan |= unordered(a, a);
        first = larger(a, first);
      }
      maxima_[block] = maximum(larger(first, second));
      if (maxima_[block] > peak) {
        peak = maxima_[block];
        peak_block_ = block;
      }
    }
    peak_ = peak;
    return nan == 0 && std::isfinite(peak);
  }

  float peak() const { return peak_; }
  int size() const { return vocab_; }
  float logit(int64_t token) const { return logits_[token]; }
  int blocks() const { return num_blocks(vocab_); }
  const float* maxima() const { return maxima_; }

  // The first of the largest.
  int argmax() const {
    int token = begin_of(peak_block_);
    while (logits_[token] != peak_) ++token;
    return token;
  }

  // exp((logit - peak) / temperature), with scale = log2(e) / temperature.
  Floats weights(Floats logits, float scale) const {
    return exp2(multiply(subtract(logits, broadcast(peak_)), broadcast(scale)));
  }

  // The sum of the weights of all logits from `floor` up.
  double mass(float floor, float scale) {
    const Floats floors = broadcast(floor);
    double total = 0.0;
    for (int block = 0; block < blocks(); ++block) {
      ExactSum sum;
      if (maxima_[block] >= floor) {
        for (int i = begin_of(block); i < end_of(block); i += lanes) {
          const Floats logits = vector(i);
          sum.add(keep(at_least(logits, floors), weights(logits, scale)));
        }
      }
      masses_[block] = sum.total();
      total += masses_[block];
    }
    return total;
  }

  // The token at which the weights, added up in the order of tokens, exceed the share `uniform` of
  // their sum. Logits below the floor weigh nothing.
  int draw(float floor, float scale, double uniform) {
    const double target = uniform * mass(floor, scale);
    double sum = 0.0, before = 0.0;
    int chosen_block = peak_block_;
    for (int block = 0; block < blocks() && sum <= target; ++block) {
      if (masses_[block] <= 0.0) continue;
      chosen_block = block;
      before = sum;
      sum += masses_[block];
    }
    // Rounding may keep the sum at the target to the end: then it is the last that weighs anything.
    int chosen = argmax();
    sum = before;
    for (int i = begin_of(chosen_block); i < end_of(chosen_block); i += lanes) {
      alignas(64) float each[lanes];
      const Floats logits = vector(i);
      store(each, keep(at_least(logits, broadcast(floor)), weights(logits, scale)));
      for (int lane = 0; lane < lanes; ++lane) {
        if (each[lane] <= 0.0f) continue;
        chosen = i + lane;
        sum += double{each[lane]};
        if (sum > target) return chosen;
      }
    }
    return chosen;
  }

  // Writes all logits from `floor` up, and anything into the 16 behind them; returns their number.
  int collect(float floor, float* to) const {
    const Floats floors = broadcast(floor);
    int count = 0;
    for (int block = 0; block < blocks(); ++block) {
      if (maxima_[block] < floor) continue;
      for (int i = begin_of(block); i < end_of(block); i += lanes) {
        const Floats logits = vector(i);
        const Bits kept = at_least(logits, floors) & lanes_below(vocab_ - i);
        compact(to + count, kept, logits);
        count += __builtin_popcount(kept);
      }
    }
    return count;
  }

  // Calls visit(token, logit) for all logits from `floor` up, in the order of tokens.
  template <typename Visit>
  void for_each(float floor, Visit visit) const {
    for (int block = 0; block < blocks(); ++block) {
      if (maxima_[block] < floor) continue;
      for (int token = begin_of(block); token < end_of(block); ++token)
        if (logits_[token] >= floor) visit(token, logits_[token]);
    }
  }

 private:
  static int begin_of(int block) { return block * block_size; }
  int end_of(int block) const {
    const int end = (block + 1) * block_size;
    return end < vocab_ ? end : vocab_;
  }
  // The logits from i on, -Inf beyond the end.
  Floats vector(int i) const {
    if (i + lanes <= vocab_) return load(logits_ + i);
    const int count = vocab_ - i;
    return select(first_lanes(count), load_some(logits_ + i, count), broadcast(minus_infinity));
  }

  const float* logits_;
  int vocab_;
  float* maxima_;   // of each block
  double* masses_;  // of each block: what it added to the latest `mass`
  float peak_ = minus_infinity;
  int peak_block_ = 0;
};

}  // namespace meshserve::MESHSERVE_ISA
