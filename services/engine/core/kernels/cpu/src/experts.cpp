#include "experts.h"

#include <algorithm>

#include "row_functions.h"

namespace meshserve::MESHSERVE_ISA {

void route_row(const float* logits, const ExpertsShape& shape, int32_t* ids, float* shares) {
  // The shares hold the logits of the experts chosen so far. Comparisons with NaN are false, so
  // that every place gets an expert whatever the logits are.
  int32_t chosen = 0;
  for (int32_t expert = 0; expert < shape.count; ++expert) {
    const float logit = logits[expert];
    if (chosen == shape.per_token) {
      if (!(logit > shares[chosen - 1])) continue;
      --chosen;
    }
    int32_t place = chosen++;
    for (; place > 0 && logit > shares[place - 1]; --place) {
      ids[place] = ids[place - 1];
      shares[place] = shares[place - 1];
    }
    ids[place] = expert;
    shares[place] = logit;
  }
  const float largest = shares[0];
  const auto powers = [&](const float* of, int32_t count) {
    const Floats power = exponential(subtract(load_some(of, count), broadcast(largest)));
    return select(first_lanes(std::min(count, lanes)), power, broadcast(0.0f));
  };
  Floats totals = broadcast(0.0f);
  const float* summed = shape.normalizes ? shares : logits;
  const int32_t count = shape.normalizes ? shape.per_token : shape.count;
  for (int32_t i = 0; i < count; i += lanes) totals = add(totals, powers(summed + i, count - i));
  const Floats inverse = broadcast(1.0f / sum(totals));
  for (int32_t i = 0; i < shape.per_token; i += lanes) {
    const int32_t some = shape.per_token - i;
    store_some(shares + i, multiply(powers(shares + i, some), inverse), some);
  }
}

ExpertOrder::ExpertOrder(const ExpertsShape& largest, int32_t most_rows) {
  const auto experts = static_cast<size_t>(largest.count);
  slots_.reserve(static_cast<size_t>(largest.per_token) * static_cast<size_t>(most_rows));
  starts_.reserve(experts + 1);
  active_.reserve(experts);
}

void ExpertOrder::sort(const int32_t* ids, int32_t rows, const ExpertsShape& shape) {
  per_token_ = shape.per_token;
  const auto count = static_cast<size_t>(rows * per_token_);
  starts_.assign(static_cast<size_t>(shape.count) + 1, 0);
  for (size_t i = 0; i < count; ++i) ++starts_[static_cast<size_t>(ids[i]) + 1];
  active_.clear();
  for (int32_t expert = 0; expert < shape.count; ++expert) {
    const auto index = static_cast<size_t>(expert);
    if (starts_[index + 1] > 0) active_.push_back(expert);
    starts_[index + 1] += starts_[index];
  }
  // Each expert's start moves up to the next one's as its slots are given away, and back
  // afterwards.
  slots_.resize(count);
  for (size_t i = 0; i < count; ++i) slots_[i] = starts_[static_cast<size_t>(ids[i])]++;
  for (size_t expert = starts_.size() - 1; expert > 0; --expert)
    starts_[expert] = starts_[expert - 1];
  starts_[0] = 0;
}

}  // namespace meshserve::MESHSERVE_ISA
