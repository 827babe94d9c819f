#include "step_costs.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "program.h"

namespace meshserve::MESHSERVE_ISA {

namespace {

// A multiplication of attention takes as long as so many of a linear layer's.
constexpr double attention_cost = 4;
// Multiplications in the time that it takes to read a byte: from a cache that threads share, and
// from memory that they share, where those of bytes are faster. A step is divided where its threads
// have enough to multiply while each of them reads all weights. They drift apart by about a layer,
// so that a small one is in the cache when the second of them comes to it, and one of `far_layer`
// bytes is not.
constexpr double near_cost = 1.8, far_cost = 6, far_cost_of_bytes = 10, far_layer = 16 << 20;

double bytes_per_weight(const LinearWeights& weights) {
  if (weights.format == WeightFormat::bf16) return 2;
  const double scales = (weights.has_minima ? 4.0 : 2.0) / group_inputs;
  return (weights.format == WeightFormat::q4 ? 0.5 : 1.0) + scales;
}

}  // namespace

StepCosts step_costs(const ProgramSpec& spec, const std::vector<Op>& ops, size_t num_ops,
                     int threads) {
  StepCosts costs = {0, {}, std::numeric_limits<int32_t>::max()};
  double bytes = 0, far_costs = 0;
  for (size_t i = 0; i < num_ops; ++i) {
    const Op& op = ops[i];
    if (op.kind == OpKind::attention) {
      const auto known =
          std::find_if(costs.keys.begin(), costs.keys.end(),
                       [&](const StepCosts::Keys& each) { return each.window == op.window; });
      const double each = attention_cost * 2 * spec.heads * spec.head_dim;
      if (known != costs.keys.end()) {
        known->each += each;
      } else {
        costs.keys.push_back({op.window, each});
      }
    }
    if (op.kind != OpKind::linear && op.kind != OpKind::expert_linear) continue;
    const double size = double(op.weights->inputs) * op.weights->outputs;
    costs.token += size * std::max(op.experts.per_token, 1);
    const double read = size * bytes_per_weight(*op.weights) * std::max(op.experts.count, 1);
    bytes += read;
    far_costs += read * (op.weights->format == WeightFormat::bf16 ? far_cost : far_cost_of_bytes);
  }
  if (threads > 1 && !costs.keys.empty()) {
    const double far = std::min(1.0, bytes / spec.num_layers / far_layer);
    const double reading = (1 - far) * near_cost * bytes + far * far_costs;
    const double rows_of_thread = reading * threads / costs.token;
    costs.least_divided = static_cast<int32_t>(std::ceil(rows_of_thread)) * threads;
  }
  return costs;
}

}  // namespace meshserve::MESHSERVE_ISA
