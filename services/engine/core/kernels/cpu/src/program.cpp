#include "program.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#include "simd.h"

namespace meshserve::MESHSERVE_ISA {

namespace {

constexpr size_t alignment = 64;
// Rows that a thread converts by itself, sooner than another would be told to help.
constexpr int rows_per_claim = 4;
// Up to so many rows every thread converts all of them for itself, which costs less than waiting
// for each other.
constexpr int private_rows = 2;

bool converts(OpKind kind) { return kind == OpKind::norm || kind == OpKind::convert; }

}  // namespace

void Program::Freer::operator()(void* memory) const { std::free(memory); }

Program::Memory Program::allocate(size_t bytes) {
  const size_t whole = (std::max<size_t>(bytes, 1) + alignment - 1) / alignment * alignment;
  void* memory = std::aligned_alloc(alignment, whole);
  if (memory == nullptr) throw std::bad_alloc();
  return Memory(memory);
}

Program::Program(const ProgramSpec& spec, Team& team)
    : spec_(spec),
      ops_(spec.ops, spec.ops + spec.num_ops),
      layers_(spec.layers, spec.layers + spec.num_layers),
      counters_(static_cast<size_t>(spec.num_ops)),
      team_(team),
      scratch_(static_cast<size_t>(team.size())) {
  for (int i = 0; i < num_buffers; ++i) {
    if (i == static_cast<int>(Buffer::logits)) continue;
    const size_t floats =
        static_cast<size_t>(spec.widths[i]) * static_cast<size_t>(spec.max_tokens);
    buffers_[i] = allocate(floats * sizeof(float));
    data_[i] = static_cast<float*>(buffers_[i].get());
  }
  activations_ = allocate(static_cast<size_t>(activation_stride(spec.max_activation_inputs)) *
                          static_cast<size_t>(spec.max_tokens));
  private_activations_ =
      allocate(static_cast<size_t>(activation_stride(spec.max_activation_inputs)) * private_rows *
               scratch_.size());
}

void Program::run(const StepInput& input) {
  reserve_step(input);
  for (TaskCounter& counter : counters_) counter.reset();
  data_[static_cast<int>(Buffer::logits)] = input.logits;
  team_.run([this, &input](int rank) { run_ops(input, rank); });
}

void Program::run_ops(const StepInput& input, int rank) {
  int rows = input.view.num_tokens;
  for (size_t index = 0; index < ops_.size() && rows > 0; ++index) {
    execute(index, input, rank, rows);
    const OpKind kind = ops_[index].kind;
    if (kind == OpKind::select_rows) rows = input.num_rows;
    if (converts(kind) && rows <= private_rows) continue;
    prefetch_next_weights(index + 1, rank);
    team_.barrier();
  }
}

// Plans the attention and sees to its memory, which grows only when a step is larger than any
// before it.
void Program::reserve_step(const StepInput& input) {
  const AttentionShape shape{spec_.heads, spec_.kv_heads, spec_.head_dim};
  const size_t bytes = attention_plan_bytes(input.view, shape);
  if (bytes > plan_bytes_) {
    plan_workspace_ = allocate(bytes);
    plan_bytes_ = bytes;
  }
  plan_ = plan_attention(input.view, shape, team_.size(), plan_workspace_.get());
  AttentionArgs attention{};
  attention.step = &input.view;
  attention.cache = layers_.front();
  attention.heads = spec_.heads;
  attention.plan = &plan_;
  const size_t row_bytes = static_cast<size_t>(spec_.max_activation_inputs) * sizeof(float);
  const size_t needed = std::max(attention_scratch_bytes(attention), row_bytes);
  if (needed > scratch_bytes_) {
    for (Memory& scratch : scratch_) scratch = allocate(needed);
    scratch_bytes_ = needed;
  }
}

void Program::execute(size_t index, const StepInput& input, int rank, int rows) {
  const Op& op = ops_[index];
  void* scratch = scratch_[static_cast<size_t>(rank)].get();
  const auto share = [&](int count, int smallest, const auto& run) {
    TaskClaims claims(counters_[index], count, team_.size(), rank, smallest);
    for (int begin, end; claims.next(begin, end);) run(begin, end);
  };
  const auto share_each = [&](int count, int smallest, const auto& run) {
    share(count, smallest, [&](int begin, int end) {
      for (int task = begin; task < end; ++task) run(task);
    });
  };
  switch (op.kind) {
    case OpKind::embed:
      share_each(rows, rows_per_claim, [&](int row) {
        unpack_output(*op.weights, static_cast<int32_t>(input.token_ids[row]),
                      row_of(Buffer::residual, row));
      });
      break;
    case OpKind::norm:
    case OpKind::convert:
      if (rows <= private_rows) {
        for (int row = 0; row < rows; ++row) convert_row(op, row, rank, rows);
      } else {
        share_each(rows, rows_per_claim, [&](int row) { convert_row(op, row, rank, rows); });
      }
      break;
    case OpKind::linear: {
      const LinearArgs args{op.weights,
                            activations(op.format, op.weights->inputs, rank, rows),
                            rows,
                            data_[static_cast<int>(op.target)],
                            spec_.widths[static_cast<int>(op.target)],
                            op.epilogue};
      share(linear_tasks(args), 1, [&](int begin, int end) { linear_run(args, begin, end); });
      break;
    }
    case OpKind::rotary_kv: {
      const RotaryKvArgs args{&input.view,
                              layers_[static_cast<size_t>(op.layer)],
                              data_[static_cast<int>(op.source)],
                              spec_.widths[static_cast<int>(op.source)],
                              spec_.heads,
                              spec_.cos,
                              spec_.sin,
                              spec_.rotary_dim};
      share_each(rotary_kv_tasks(args), 1, [&](int task) { rotary_kv_run(args, task, scratch); });
      break;
    }
    case OpKind::attention: {
      const AttentionArgs args{&input.view,
                               layers_[static_cast<size_t>(op.layer)],
                               data_[static_cast<int>(op.source)],
                               spec_.widths[static_cast<int>(op.source)],
                               spec_.heads,
                               spec_.attention_scale,
                               data_[static_cast<int>(op.target)],
                               spec_.widths[static_cast<int>(op.target)],
                               &plan_};
      // One by one, since they come longest first.
      for (int task; counters_[index].take_one(attention_tasks(args), task);) {
        attention_run(args, task, scratch);
      }
      break;
    }
    case OpKind::select_rows:
      // Ascending, each to a place before or at its own: no row is overwritten before it is read.
      if (rank == 0) {
        for (int row = 0; row < input.num_rows; ++row) {
          const float* from = row_of(Buffer::residual, input.logits_rows[row]);
          std::memmove(row_of(Buffer::residual, row), from,
                       static_cast<size_t>(spec_.widths[0]) * sizeof(float));
        }
      }
      break;
  }
}

// While a thread waits for the others, the weights that it will read first are on their way.
void Program::prefetch_next_weights(size_t index, int rank) const {
  while (index < ops_.size() && converts(ops_[index].kind)) ++index;
  if (index == ops_.size() || ops_[index].kind != OpKind::linear) return;
  const LinearWeights& weights = *ops_[index].weights;
  LinearArgs args{};
  args.weights = &weights;
  const int share = TaskClaims::first_share(linear_tasks(args), team_.size());
  prefetch_strips(weights, rank * share, (rank + 1) * share);
}

void Program::convert_row(const Op& op, int64_t row, int rank, int rows) {
  const float* from = row_of(op.source, row);
  if (op.kind == OpKind::norm) {
    auto* normed = static_cast<float*>(scratch_[static_cast<size_t>(rank)].get());
    rms_norm(from, op.norm_weight, op.eps, op.width, normed);
    from = normed;
  }
  store_activations(activations(op.format, op.width, rank, rows), row, from);
}

Activations Program::activations(ActivationFormat format, int32_t inputs, int rank,
                                 int rows) const {
  const int64_t stride = activation_stride(inputs);
  void* memory = activations_.get();
  if (rows <= private_rows) {
    memory = static_cast<char*>(private_activations_.get()) +
             rank * private_rows * activation_stride(spec_.max_activation_inputs);
  }
  return {format, inputs, memory, stride};
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
