// What a step's rows cost, and when its threads should each compute their own.
#pragma once

#include <vector>

#include "kv_layout.h"

namespace meshserve {

struct Op;
struct ProgramSpec;

// In multiplications of a linear layer.
struct StepCosts {
  double token;           // of a token by itself
  double key;             // of each token that it attends to
  int32_t least_divided;  // rows of a step, of which each thread should compute its own
};

}  // namespace meshserve

namespace meshserve::MESHSERVE_ISA {

// `num_ops`: those at the beginning of a program that take each row by itself.
StepCosts step_costs(const ProgramSpec& spec, const std::vector<Op>& ops, size_t num_ops,
                     int threads);

}  // namespace meshserve::MESHSERVE_ISA
