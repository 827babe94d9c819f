// What a step's rows cost, and when its threads should each compute their own.
#pragma once

#include <vector>

#include "attention.h"

namespace meshserve {

struct Op;
struct ProgramSpec;

// In multiplications of a linear layer.
struct StepCosts {
  // Of each token that a token attends to, in the layers of one window.
  struct Keys {
    int32_t window;
    double each;
  };

  double token;            // of a token by itself
  std::vector<Keys> keys;  // of those that it attends to
  int32_t least_divided;   // rows of a step, of which each thread should compute its own

  double of_token(int32_t position) const {
    double cost = token;
    for (const Keys& each : keys)
      cost += each.each * (position + 1 - first_seen(position, each.window));
    return cost;
  }
};

}  // namespace meshserve

namespace meshserve::MESHSERVE_ISA {

// `num_ops`: those at the beginning of a program that take each row by itself.
StepCosts step_costs(const ProgramSpec& spec, const std::vector<Op>& ops, size_t num_ops,
                     int threads);

}  // namespace meshserve::MESHSERVE_ISA
