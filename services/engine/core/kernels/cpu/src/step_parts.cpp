#include "step_parts.h"

#include <algorithm>
#include <utility>

namespace meshserve::MESHSERVE_ISA {

namespace {

// How far one step's measure of the threads moves their shares.
constexpr double learning_rate = 0.1;
// However slow a thread has been, it gets this much of an even share.
constexpr double least_share = 0.5;

// Makes a part of the rows [begin, end), the first of which is of `sequence`.
void cut_out(const StepView& step, int32_t sequence, int32_t begin, int32_t end, StepPart& part) {
  part.first_row = begin;
  part.end_row = end;
  part.stored_layers.store(0, std::memory_order_relaxed);
  part.query_starts.assign(1, 0);
  part.context_lengths.clear();
  StepView view = step;
  view.num_tokens = end - begin;
  view.positions = step.positions + begin;
  view.slots = step.slots + begin;
  view.block_tables = step.block_tables + int64_t{sequence} * step.table_stride;
  for (; sequence < step.num_sequences && step.query_starts[sequence] < end; ++sequence) {
    const int32_t sequence_end = step.query_starts[sequence + 1];
    const int32_t later = std::max(sequence_end - end, 0);  // rows of it, in later parts
    part.query_starts.push_back(sequence_end - later - begin);
    part.context_lengths.push_back(step.context_lengths[sequence] - later);
  }
  view.num_sequences = static_cast<int32_t>(part.context_lengths.size());
  view.query_starts = part.query_starts.data();
  view.context_lengths = part.context_lengths.data();
  part.view = view;
}

}  // namespace

StepParts::StepParts(int threads, std::vector<AttentionShape> shapes)
    : shapes_(std::move(shapes)),
      parts_(static_cast<size_t>(threads)),
      shares_(parts_.size(), 1.0 / threads) {}

void StepParts::join(const StepView& step) {
  divided_ = false;
  StepPart& part = parts_.front();
  part.first_row = 0;
  part.end_row = step.num_tokens;
  part.view = step;
  plan(part, static_cast<int>(parts_.size()));
}

void StepParts::divide(const StepView& step, const StepCosts& costs) {
  divided_ = true;
  const auto cost = [&](int32_t row) { return costs.of_token(step.positions[row]); };
  double total = 0;
  for (int32_t row = 0; row < step.num_tokens; ++row) total += cost(row);
  int32_t row = 0, sequence = 0;
  double spent = 0, goal = 0;
  for (size_t index = 0; index < parts_.size(); ++index) {
    StepPart& part = parts_[index];
    const int32_t begin = row;
    const double before = spent;
    const bool last = index + 1 == parts_.size();
    goal += total * shares_[index];
    for (; row < step.num_tokens && (last || spent + cost(row) / 2 < goal); ++row)
      spent += cost(row);
    while (sequence < step.num_sequences && step.query_starts[sequence + 1] <= begin) ++sequence;
    cut_out(step, sequence, begin, row, part);
    part.cost = spent - before;
    part.first_awaited = static_cast<int>(index);
    if (begin < row && begin > step.query_starts[sequence]) {
      part.first_awaited = 0;
      const auto& parts = parts_;
      while (parts[static_cast<size_t>(part.first_awaited)].end_row <= step.query_starts[sequence])
        ++part.first_awaited;
    }
    plan(part, 1);
  }
}

void StepParts::plan(StepPart& part, int threads) {
  size_t bytes = 0;
  for (const AttentionShape& shape : shapes_) bytes += attention_plan_bytes(part.view, shape);
  if (bytes > part.plan_bytes) {
    part.plan_workspace = allocate(bytes);
    part.plan_bytes = bytes;
  }
  auto* workspace = static_cast<unsigned char*>(part.plan_workspace.get());
  part.plans.clear();
  for (const AttentionShape& shape : shapes_) {
    part.plans.push_back(plan_attention(part.view, shape, threads, workspace));
    workspace += attention_plan_bytes(part.view, shape);
  }
}

void StepParts::learn(const std::vector<double>& seconds) {
  double speeds = 0;
  for (size_t i = 0; i < parts_.size(); ++i) {
    if (parts_[i].cost <= 0 || seconds[i] <= 0) return;
    speeds += parts_[i].cost / seconds[i];
  }
  const double least = least_share / static_cast<double>(parts_.size());
  double total = 0;
  for (size_t i = 0; i < parts_.size(); ++i) {
    const double share = parts_[i].cost / seconds[i] / speeds;
    shares_[i] = std::max(shares_[i] + learning_rate * (share - shares_[i]), least);
    total += shares_[i];
  }
  for (double& share : shares_) share /= total;
}

}  // namespace meshserve::MESHSERVE_ISA
