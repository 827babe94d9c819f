#include "program.h"

#include <algorithm>
#include <chrono>
#include <cstring>

#include "row_functions.h"
#include "simd.h"

namespace meshserve::MESHSERVE_ISA {

namespace {

// Rows that a thread converts by itself, sooner than another would be told to help.
constexpr int rows_per_claim = 4;
// Up to so many rows every thread converts all of them for itself, which costs less than waiting
// for each other.
constexpr int private_rows = 2;
bool converts(OpKind kind) {
  return kind == OpKind::norm || kind == OpKind::convert || kind == OpKind::route ||
         kind == OpKind::scatter_norm;
}

bool adds_to_residual(const Op& op) {
  return op.kind == OpKind::add_norm || op.kind == OpKind::mix ||
         ((op.kind == OpKind::linear || op.kind == OpKind::expand) && op.epilogue == Epilogue::add);
}

bool is_about_adapters(OpKind kind) { return kind == OpKind::shrink || kind == OpKind::expand; }

std::vector<AttentionShape> attention_shapes(const ProgramSpec& spec, const std::vector<Op>& ops,
                                             std::vector<int>& index_of_op) {
  std::vector<AttentionShape> shapes;
  for (size_t i = 0; i < ops.size(); ++i) {
    if (ops[i].kind != OpKind::attention) continue;
    const auto same = [&](const AttentionShape& shape) { return shape.window == ops[i].window; };
    const auto known = std::find_if(shapes.begin(), shapes.end(), same);
    index_of_op[i] = static_cast<int>(known - shapes.begin());
    if (known == shapes.end())
      shapes.push_back({spec.heads, spec.kv_heads, spec.head_dim, ops[i].window});
  }
  return shapes;
}

ExpertsShape largest_experts(const std::vector<Op>& ops) {
  ExpertsShape largest = {};
  for (const Op& op : ops) {
    largest.count = std::max(largest.count, op.experts.count);
    largest.per_token = std::max(largest.per_token, op.experts.per_token);
  }
  return largest;
}

// Rows that an operation has for each of a step's.
int rows_per_row(const Op& op) { return std::max(op.experts.per_token, 1); }

int32_t strips(const LinearWeights& weights) {
  return (weights.outputs + strip_outputs - 1) / strip_outputs;
}

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

Program::Program(const ProgramSpec& spec, Team& team)
    : spec_(spec),
      ops_(spec.ops, spec.ops + spec.num_ops),
      num_row_ops_(static_cast<size_t>(
          std::find_if(ops_.begin(), ops_.end(),
                       [](const Op& op) { return op.kind == OpKind::select_rows; }) -
          ops_.begin())),
      num_layer_ops_(static_cast<size_t>(
          ops_.rend() - std::find_if(ops_.rbegin(), ops_.rend(), adds_to_residual))),
      layers_(spec.layers, spec.layers + spec.num_layers),
      counters_(ops_.size() + 1),
      team_(team),
      costs_(step_costs(spec, ops_, num_row_ops_, team.size())),
      plans_(ops_.size()),
      parts_(team.size(), attention_shapes(spec, ops_, plans_)),
      seconds_(static_cast<size_t>(team.size())),
      scratch_(static_cast<size_t>(team.size())),
      largest_experts_(largest_experts(ops_)),
      expert_orders_(static_cast<size_t>(team.size()),
                     ExpertOrder(largest_experts_, spec.max_tokens)),
      adapter_rows_(static_cast<size_t>(team.size())),
      shrunk_stride_(activation_stride(spec.adapter_width)) {
  for (int i = 0; i < num_buffers; ++i) {
    if (i == static_cast<int>(Buffer::logits)) continue;
    const size_t floats =
        static_cast<size_t>(spec.widths[i]) * static_cast<size_t>(spec.max_tokens);
    buffers_[i] = allocate(floats * sizeof(float));
    data_[i] = static_cast<float*>(buffers_[i].get());
  }
  const auto activation_bytes = static_cast<size_t>(spec.activation_bytes);
  activations_ = allocate(activation_bytes * static_cast<size_t>(spec.max_tokens));
  private_activations_ = allocate(activation_bytes * private_rows * scratch_.size());
  const size_t route_bytes =
      static_cast<size_t>(largest_experts_.per_token) * (sizeof(int32_t) + sizeof(float));
  routes_ = allocate(route_bytes * static_cast<size_t>(spec.max_tokens));
  private_routes_ = allocate(route_bytes * private_rows * scratch_.size());
  shrunk_ = allocate(static_cast<size_t>(shrunk_stride_) * static_cast<size_t>(spec.max_tokens));
}

void Program::run(const StepInput& input) {
  reserve(input);
  for (TaskCounter& counter : counters_) counter.reset();
  data_[static_cast<int>(Buffer::logits)] = input.logits;
  // Where logits are wanted of all rows, as in decode, none is left out on the way.
  const size_t num_own_ops =
      input.num_rows == input.view.num_tokens ? num_layer_ops_ : num_row_ops_;
  team_.run([this, &input, num_own_ops](int rank) {
    if (parts_.divided()) {
      run_divided(input, rank, num_own_ops);
      team_.barrier();
    }
    run_together(input, rank, parts_.divided() ? num_own_ops : 0);
    if (input.sampling != nullptr) sample(*input.sampling, rank);
  });
  if (parts_.divided()) parts_.learn(seconds_);
}

// Divides the step and sees to its memory, which grows only when a step is larger than any before.
void Program::reserve(const StepInput& input) {
  const StepView& view = input.view;
  if (view.num_tokens >= costs_.least_divided) {
    parts_.divide(view, costs_);
  } else {
    parts_.join(view);
  }
  size_t needed = static_cast<size_t>(spec_.max_activation_inputs) * sizeof(float);
  for (int rank = 0; rank < team_.size(); ++rank) {
    AttentionArgs attention{};
    attention.cache = layers_.front();
    attention.heads = spec_.heads;
    for (const AttentionPlan& plan : parts_.of(rank).plans) {
      attention.plan = &plan;
      needed = std::max(needed, attention_scratch_bytes(attention));
    }
  }
  if (input.sampling != nullptr) {
    needed = std::max(needed, sample_scratch_bytes(*input.sampling));
  }
  if (input.adapters != nullptr) {
    sort_adapters(input);
    needed = std::max(needed, shrink_scratch_bytes(spec_.max_activation_inputs));
  }
  if (needed > scratch_bytes_) {
    for (Memory& scratch : scratch_) scratch = allocate(needed);
    scratch_bytes_ = needed;
  }
}

// Sorts the rows of each part by adapter, and those that go on where others are left out.
void Program::sort_adapters(const StepInput& input) {
  const StepView& view = input.view;
  adapters_of_rows_.resize(static_cast<size_t>(view.num_tokens));
  for (int32_t sequence = 0; sequence < view.num_sequences; ++sequence) {
    std::fill(adapters_of_rows_.begin() + view.query_starts[sequence],
              adapters_of_rows_.begin() + view.query_starts[sequence + 1],
              input.adapters->of_sequence[sequence]);
  }
  const int parts = parts_.divided() ? team_.size() : 1;
  for (int rank = 0; rank < parts; ++rank) {
    const StepPart& part = parts_.of(rank);
    adapter_rows_[static_cast<size_t>(rank)].sort(adapters_of_rows_.data() + part.first_row,
                                                  part.end_row - part.first_row);
  }
  // In place: each from a place at or behind its own.
  for (int32_t row = 0; row < input.num_rows; ++row) {
    adapters_of_rows_[static_cast<size_t>(row)] =
        adapters_of_rows_[static_cast<size_t>(input.logits_rows[row])];
  }
  adapter_logits_rows_.sort(adapters_of_rows_.data(), input.num_rows);
}

const AdapterRows* Program::adapted(const AdapterRows& rows, const StepInput& input) const {
  return input.adapters != nullptr && rows.any() ? &rows : nullptr;
}

// Whether any row of a worker's goes through an adapter that changes the operation's layer.
bool Program::adapts(const Op& op, const StepInput& input, const Worker& worker) const {
  return worker.adapted != nullptr && op.adapted > 0 &&
         worker.adapted->rank_tiles(*input.adapters, op.adapted - 1) > 0;
}

AdapterArgs Program::adapter_args(const Op& op, const StepInput& input,
                                  const Worker& worker) const {
  const int64_t first_row = worker.part.first_row;
  const Buffer sums = gates(op.epilogue) ? Buffer::sums : op.target;
  return {worker.adapted,
          input.adapters,
          op.adapted - 1,
          activations(op.format, op.weights->inputs, worker),
          static_cast<char*>(shrunk_.get()) + first_row * shrunk_stride_,
          shrunk_stride_,
          row_of(sums, first_row),
          spec_.widths[static_cast<int>(sums)],
          op.weights->outputs,
          op.epilogue,
          row_of(op.target, first_row),
          spec_.widths[static_cast<int>(op.target)]};
}

// A thread's own rows through the first `num_ops` operations, which take each row by itself.
void Program::run_divided(const StepInput& input, int rank, size_t num_ops) {
  StepPart& part = parts_.of(rank);
  double& taken = seconds_[static_cast<size_t>(rank)];
  taken = 0;
  const Worker worker{part, rank, true, part.view.num_tokens,
                      adapted(adapter_rows_[static_cast<size_t>(rank)], input)};
  double since = seconds();
  for (size_t index = 0; index < num_ops && worker.rows > 0; ++index) {
    const Op& op = ops_[index];
    if (is_about_adapters(op.kind) && !adapts(op, input, worker)) continue;
    if (op.kind == OpKind::attention && part.first_awaited < rank) {
      taken += seconds() - since;
      await_earlier_tokens(worker, op.layer);
      since = seconds();
    }
    execute(index, input, worker);
    if (op.kind == OpKind::rotary_kv)
      part.stored_layers.store(op.layer + 1, std::memory_order_release);
  }
  taken += seconds() - since;
}

void Program::await_earlier_tokens(const Worker& worker, int layer) {
  for (int rank = worker.part.first_awaited; rank < worker.rank; ++rank) {
    const StepPart& earlier = parts_.of(rank);
    if (earlier.first_row == earlier.end_row) continue;
    team_.await([&] { return earlier.stored_layers.load(std::memory_order_acquire) > layer; });
  }
}

// All threads share each operation, from `first_op` on.
void Program::run_together(const StepInput& input, int rank, size_t first_op) {
  Worker worker{parts_.of(parts_.divided() ? 0 : rank), rank, false, input.view.num_tokens,
                adapted(adapter_rows_.front(), input)};
  for (size_t index = first_op; index < ops_.size() && worker.rows > 0; ++index) {
    const OpKind kind = ops_[index].kind;
    if (is_about_adapters(kind) && !adapts(ops_[index], input, worker)) continue;
    execute(index, input, worker);
    if (kind == OpKind::select_rows) {
      worker.rows = input.num_rows;
      worker.adapted = adapted(adapter_logits_rows_, input);
    }
    if (converts(kind) && worker.rows <= private_rows) continue;
    // Nobody reads what it writes before the end of the layer itself.
    if (kind == OpKind::shrink) continue;
    prefetch_next_weights(index + 1, rank);
    team_.barrier();
  }
}

void Program::sample(const SampleArgs& args, int rank) {
  void* scratch = scratch_[static_cast<size_t>(rank)].get();
  // One by one, since some rows take far longer than others.
  for (int row; counters_.back().take_one(sample_tasks(args), row);) {
    sample_run(args, row, scratch);
  }
}

void Program::execute(size_t index, const StepInput& input, const Worker& worker) {
  const Op& op = ops_[index];
  const StepPart& part = worker.part;
  const int64_t first_row = part.first_row;
  void* scratch = scratch_[static_cast<size_t>(worker.rank)].get();
  const auto share = [&](int count, int smallest, const auto& run) {
    if (worker.alone) return run(0, count);
    TaskClaims claims(counters_[index], count, team_.size(), worker.rank, smallest);
    for (int begin, end; claims.next(begin, end);) run(begin, end);
  };
  const auto share_each = [&](int count, int smallest, const auto& run) {
    share(count, smallest, [&](int begin, int end) {
      for (int task = begin; task < end; ++task) run(task);
    });
  };
  const auto convert_each = [&](int count, const auto& run) {
    if (worker.rows > private_rows) return share_each(count, rows_per_claim, run);
    for (int row = 0; row < count; ++row) run(row);
  };
  switch (op.kind) {
    case OpKind::embed:
      share_each(worker.rows, rows_per_claim, [&](int row) { embed_row(op, row, input, part); });
      break;
    case OpKind::norm:
      convert_each(worker.rows, [&](int row) { convert_row(op, row, worker); });
      break;
    case OpKind::convert:
      convert_each(worker.rows * rows_per_row(op), [&](int row) { convert_row(op, row, worker); });
      break;
    case OpKind::add_norm:
      share_each(worker.rows, 1, [&](int row) { add_norm_row(op, row, worker); });
      break;
    case OpKind::route:
      convert_each(worker.rows, [&](int row) {
        const Routes own = routes(op.experts, worker);
        const int64_t place = int64_t{row} * op.experts.per_token;
        route_row(row_of(op.source, first_row + row), op.experts, own.ids + place,
                  own.shares + place);
      });
      break;
    case OpKind::scatter_norm:
      // Each thread for itself, sooner than it would wait for another to have done it.
      expert_orders_[static_cast<size_t>(worker.rank)].sort(routes(op.experts, worker).ids,
                                                            worker.rows, op.experts);
      convert_each(worker.rows, [&](int row) { scatter_row(op, row, worker); });
      break;
    case OpKind::expert_linear: {
      const ExpertOrder& order = expert_orders_[static_cast<size_t>(worker.rank)];
      const int tasks = static_cast<int>(order.active().size()) * strips(*op.weights);
      share(tasks, 1, [&](int begin, int end) { run_experts(op, begin, end, worker); });
      break;
    }
    case OpKind::mix:
      share_each(worker.rows, 1, [&](int row) { mix_row(op, row, worker); });
      break;
    case OpKind::linear: {
      const bool waits = follows_adapters(op.epilogue) && adapts(op, input, worker);
      const Buffer target = waits && gates(op.epilogue) ? Buffer::sums : op.target;
      const LinearArgs args{op.weights,
                            activations(op.format, op.weights->inputs, worker),
                            worker.rows,
                            row_of(target, first_row),
                            spec_.widths[static_cast<int>(target)],
                            waits ? Epilogue::store : op.epilogue,
                            op.scale};
      share(linear_tasks(args), 1, [&](int begin, int end) { linear_run(args, begin, end); });
      break;
    }
    case OpKind::shrink: {
      const AdapterArgs args = adapter_args(op, input, worker);
      share_each(shrink_tasks(args), 1, [&](int task) { shrink_run(args, task, scratch); });
      break;
    }
    case OpKind::expand: {
      const AdapterArgs args = adapter_args(op, input, worker);
      share_each(expand_tasks(args), 1, [&](int task) { expand_run(args, task); });
      break;
    }
    case OpKind::rotary_kv: {
      const RotaryKvArgs args{&part.view,
                              layers_[static_cast<size_t>(op.layer)],
                              row_of(op.source, first_row),
                              spec_.widths[static_cast<int>(op.source)],
                              spec_.heads,
                              op.norm_weight,
                              op.key_norm,
                              op.eps,
                              op.cos,
                              op.sin,
                              op.rotary_dim};
      share_each(rotary_kv_tasks(args), 1, [&](int task) { rotary_kv_run(args, task, scratch); });
      break;
    }
    case OpKind::attention: {
      const AttentionArgs args{&part.view,
                               layers_[static_cast<size_t>(op.layer)],
                               row_of(op.source, first_row),
                               spec_.widths[static_cast<int>(op.source)],
                               spec_.heads,
                               op.window,
                               spec_.attention_scale,
                               op.softcap,
                               row_of(op.target, first_row),
                               spec_.widths[static_cast<int>(op.target)],
                               &part.plans[static_cast<size_t>(plans_[index])]};
      if (worker.alone) {
        for (int task = 0; task < attention_tasks(args); ++task) attention_run(args, task, scratch);
        break;
      }
      // One by one, since they come longest first.
      for (int task; counters_[index].take_one(attention_tasks(args), task);) {
        attention_run(args, task, scratch);
      }
      break;
    }
    case OpKind::select_rows:
      if (worker.rank == 0 && input.num_rows < input.view.num_tokens) {
        select_rows(Buffer::residual, input);
        select_rows(Buffer::attended, input);
      }
      break;
  }
}

void Program::select_rows(Buffer buffer, const StepInput& input) {
  const size_t bytes = static_cast<size_t>(spec_.widths[static_cast<int>(buffer)]) * sizeof(float);
  // Ascending, each to a place before or at its own: no row is overwritten before it is read.
  for (int row = 0; row < input.num_rows; ++row) {
    std::memmove(row_of(buffer, row), row_of(buffer, input.logits_rows[row]), bytes);
  }
}

// While a thread waits for the others, the weights that it will read first are on their way.
void Program::prefetch_next_weights(size_t index, int rank) const {
  const auto passes = [](OpKind kind) { return converts(kind) || is_about_adapters(kind); };
  while (index < ops_.size() && passes(ops_[index].kind)) ++index;
  if (index == ops_.size() || ops_[index].kind != OpKind::linear) return;
  const LinearWeights& weights = *ops_[index].weights;
  LinearArgs args{};
  args.weights = &weights;
  const int share = TaskClaims::first_share(linear_tasks(args), team_.size());
  prefetch_strips(weights, rank * share, (rank + 1) * share);
}

void Program::embed_row(const Op& op, int32_t row, const StepInput& input, const StepPart& part) {
  const int32_t token = part.first_row + row;
  float* to = row_of(Buffer::residual, token);
  unpack_output(*op.weights, static_cast<int32_t>(input.token_ids[token]), to);
  if (op.scale != 1.0f) {
    for (int32_t i = 0; i < op.width; i += lanes)
      store(to + i, multiply(load(to + i), broadcast(op.scale)));
  }
  if (op.positions != nullptr) {
    const float* position = op.positions + int64_t{part.view.positions[row]} * op.width;
    for (int32_t i = 0; i < op.width; i += lanes)
      store(to + i, add(load(to + i), load(position + i)));
  }
}

// A row in a thread's scratch, normed.
const float* Program::normed(const Op& op, const float* row, int rank) const {
  auto* to = static_cast<float*>(scratch_[static_cast<size_t>(rank)].get());
  if (op.norm_bias != nullptr) {
    layer_norm(row, op.norm_weight, op.norm_bias, op.eps, op.width, to);
  } else {
    rms_norm(row, op.norm_weight, op.eps, op.width, to);
  }
  return to;
}

void Program::convert_row(const Op& op, int64_t row, const Worker& worker) {
  // The rows of a row's experts take the place of a wider one.
  const float* from = row_of(op.source, worker.part.first_row) + row * row_stride(op, op.source);
  if (op.kind == OpKind::norm) from = normed(op, from, worker.rank);
  store_activations(activations(op.format, op.width, worker), row, from);
}

void Program::add_norm_row(const Op& op, int64_t row, const Worker& worker) {
  const int64_t index = worker.part.first_row + row;
  const float* added = normed(op, row_of(op.source, index), worker.rank);
  float* to = row_of(Buffer::residual, index);
  for (int32_t i = 0; i < op.width; i += lanes) store(to + i, add(load(to + i), load(added + i)));
}

void Program::scatter_row(const Op& op, int32_t row, const Worker& worker) {
  const float* from = row_of(Buffer::residual, worker.part.first_row + row);
  const ExpertOrder& order = expert_orders_[static_cast<size_t>(worker.rank)];
  const Activations to = activations(op.format, op.width, worker);
  const auto at = [&](int32_t place) {
    return static_cast<char*>(to.rows) + order.slot(row, place) * to.stride;
  };
  store_activations(to, order.slot(row, 0), normed(op, from, worker.rank));
  for (int32_t place = 1; place < op.experts.per_token; ++place)
    std::memcpy(at(place), at(0), activation_bytes(to));
}

// The tasks of the experts that have rows, one after the other: strips of their matrices.
void Program::run_experts(const Op& op, int begin, int end, const Worker& worker) {
  const ExpertOrder& order = expert_orders_[static_cast<size_t>(worker.rank)];
  const int32_t each = strips(*op.weights);
  const Activations all = activations(op.format, op.weights->inputs, worker);
  for (int task = begin; task < end;) {
    const int32_t expert = order.active()[static_cast<size_t>(task / each)];
    const int64_t slot = order.first_slot(expert);
    const int first = task % each, last = std::min(first + end - task, int{each});
    Activations input = all;
    input.rows = static_cast<char*>(all.rows) + slot * all.stride;
    const LinearArgs args{
        op.weights + expert,
        input,
        order.rows(expert),
        row_of(op.target, worker.part.first_row) + slot * row_stride(op, op.target),
        row_stride(op, op.target),
        op.epilogue,
        op.scale};
    linear_run(args, first, last);
    task += last - first;
  }
}

void Program::mix_row(const Op& op, int32_t row, const Worker& worker) {
  const ExpertOrder& order = expert_orders_[static_cast<size_t>(worker.rank)];
  const float* shares = routes(op.experts, worker).shares + int64_t{row} * op.experts.per_token;
  const float* all = row_of(op.source, worker.part.first_row);
  float* to = row_of(Buffer::residual, worker.part.first_row + row);
  for (int32_t place = 0; place < op.experts.per_token; ++place) {
    const float* from = all + order.slot(row, place) * row_stride(op, op.source);
    const Floats share = broadcast(shares[place]);
    for (int32_t i = 0; i < op.width; i += lanes)
      store(to + i, fused(load(from + i), share, load(to + i)));
  }
}

Program::Routes Program::routes(const ExpertsShape& experts, const Worker& worker) const {
  const bool is_private = worker.rows <= private_rows;
  const int64_t most = is_private ? private_rows : spec_.max_tokens;
  const int64_t owner = is_private ? worker.rank : 0;
  const int64_t largest = largest_experts_.per_token;
  auto* ids = static_cast<int32_t*>((is_private ? private_routes_ : routes_).get()) +
              owner * most * largest * 2;
  auto* shares = reinterpret_cast<float*>(ids + most * largest);
  const int64_t first = is_private ? 0 : int64_t{worker.part.first_row} * experts.per_token;
  return {ids + first, shares + first};
}

// Floats from a row to the next, of rows that may be those of experts.
int64_t Program::row_stride(const Op& op, Buffer buffer) const {
  return spec_.widths[static_cast<int>(buffer)] / rows_per_row(op);
}

Activations Program::activations(ActivationFormat format, int32_t inputs,
                                 const Worker& worker) const {
  // Where a thread's rows begin must not depend on the operation: others may be elsewhere.
  const int64_t most = spec_.activation_bytes;
  char* memory = static_cast<char*>(activations_.get()) + worker.part.first_row * most;
  if (worker.rows <= private_rows) {
    memory = static_cast<char*>(private_activations_.get()) + worker.rank * private_rows * most;
  }
  return {format, inputs, memory, activation_stride(inputs)};
}

float* Program::row_of(Buffer buffer, int64_t row) const {
  const int index = static_cast<int>(buffer);
  return data_[index] + row * spec_.widths[index];
}

void* make_program(Team* team, const ProgramSpec* spec) {
  try {
    return new Program(*spec, *team);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

int32_t run_program(void* program, const StepInput* input) {
  try {
    static_cast<Program*>(program)->run(*input);
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

void free_program(void* program) { delete static_cast<Program*>(program); }

}  // namespace meshserve::MESHSERVE_ISA
