// Finds where a filter cuts a set of values off, without sorting them.
#pragma once

#include <utility>

#include "sampling_lanes.h"

namespace meshserve::MESHSERVE_ISA {

// Values in no particular order, each with a weight. Both arrays have room for 16 more.
struct Candidates {
  float* values;
  float* weights;
  int count;
};

namespace detail {

inline float median(float a, float b, float c) {
  const float low = a < b ? a : b, high = a < b ? b : a;
  return c < low ? low : (c > high ? high : c);
}

// A value of the set that is likely to lie near its middle (Tukey's ninther).
inline float pivot_of(const Candidates& set) {
  const float* values = set.values;
  const auto at = [&](int ninth) { return values[int64_t{set.count} * ninth / 9]; };
  return median(median(at(0), at(1), at(2)), median(at(3), at(4), at(5)),
                median(at(6), at(7), at(8)));
}

// smallest_kept of a set so small that it may as well be sorted.
template <bool weighted>
float smallest_kept_of_few(const Candidates& set, double above, double target) {
  float* values = set.values;
  float* weights = set.weights;
  for (int i = 1; i < set.count; ++i) {
    for (int j = i; j > 0 && values[j - 1] < values[j]; --j) {
      std::swap(values[j - 1], values[j]);
      if constexpr (weighted) std::swap(weights[j - 1], weights[j]);
    }
  }
  int last = 0;
  for (int i = 0; i < set.count && above < target; ++i) {
    last = i;
    above += weighted ? double{weights[i]} : 1.0;
  }
  return values[last];
}

}  // namespace detail

// The smallest value that is kept where values are kept from the largest down for as long as the
// weights of those before do not add up to `target` (> 0); without weights each counts as 1. The
// set must not be empty and hold no NaN. Both sets are overwritten; `spare` has as much room.
//
// Quickselect (Hoare, "Find", CACM 4, 1961) on the sums of weights: each turn splits what is left
// by one of its values and goes on with the side in which the cut lies.
template <bool weighted>
float smallest_kept(Candidates set, Candidates spare, double target) {
  constexpr int few = 24;
  double above = 0.0;  // of all values beyond those in `set`; less than `target`
  while (set.count > few) {
    const float pivot = detail::pivot_of(set);
    const Floats pivots = broadcast(pivot);
    int more = 0, less = 0;
    ExactSum weight_more, weight_equal;
    for (int i = 0; i < set.count; i += lanes) {
      const Bits present = lanes_below(set.count - i);
      const Floats values = load(set.values + i);
      const Bits is_more = greater(values, pivots) & present;
      const Bits is_equal = equal(values, pivots) & present;
      const Bits is_less = present & ~(is_more | is_equal);
      if constexpr (weighted) {
        const Floats weights = load(set.weights + i);
        weight_more.add(keep(is_more, weights));
        weight_equal.add(keep(is_equal, weights));
        compact(set.weights + more, is_more, weights);
        compact(spare.weights + less, is_less, weights);
      }
      // What is larger stays in the set: it is never written beyond what has been read.
      compact(set.values + more, is_more, values);
      compact(spare.values + less, is_less, values);
      more += __builtin_popcount(is_more);
      less += __builtin_popcount(is_less);
    }
    const double with_more = above + (weighted ? weight_more.total() : double(more));
    if (with_more >= target && more > 0) {
      set.count = more;
      continue;
    }
    const int same = set.count - more - less;
    const double with_equal = with_more + (weighted ? weight_equal.total() : double(same));
    if (with_equal >= target || less == 0) return pivot;
    above = with_equal;
    std::swap(set, spare);
    set.count = less;
  }
  return detail::smallest_kept_of_few<weighted>(set, above, target);
}

}  // namespace meshserve::MESHSERVE_ISA
