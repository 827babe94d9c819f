#include "program.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#include "simd.h"

namespace meshserve::MESHSERVE_ISA {

namespace {

constexpr size_t alignment = 64;
// Tasks of a linear layer are pairs of tiles: fewer in one claim would cost more than they take.
constexpr int smallest_claim = 2;
// Rows that one thread converts by itself, sooner than the others would be told to help.
constexpr int rows_per_claim = 4;

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
      tasks_(static_cast<size_t>(spec.num_ops)),
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
}

void Program::run(const StepInput& input) {
  reserve_step(input);
  for (TaskRange& tasks : tasks_) tasks.reset();
  data_[static_cast<int>(Buffer::logits)] = input.logits;
  team_.run([this, &input](int rank) {
    int rows = input.view.num_tokens;
    for (size_t i = 0; i < ops_.size() && rows > 0; ++i) {
      execute(ops_[i], tasks_[i], input, rank, rows);
      if (ops_[i].kind == OpKind::select_rows) rows = input.num_rows;
      team_.barrier();
    }
  });
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

template <typename Run>
void Program::share(TaskRange& tasks, int count, const Run& run) {
  for (int begin, end; tasks.claim(count, team_.size(), 1, begin, end);) {
    for (int task = begin; task < end; ++task) run(task);
  }
}

void Program::execute(const Op& op, TaskRange& tasks, const StepInput& input, int rank, int rows) {
  void* scratch = scratch_[static_cast<size_t>(rank)].get();
  switch (op.kind) {
    case OpKind::embed:
      share(tasks, rows, [&](int row) { embed(op, input, row); });
      break;
    case OpKind::norm:
    case OpKind::convert:
      for (int begin, end; tasks.claim(rows, team_.size(), rows_per_claim, begin, end);) {
        for (int row = begin; row < end; ++row) convert_row(op, row, rank);
      }
      break;
    case OpKind::linear:
      run_linear(op, tasks, rank, rows);
      break;
    case OpKind::rotary_kv: {
      const RotaryKvArgs args{&input.view,
                              layers_[static_cast<size_t>(op.layer)],
                              data_[static_cast<int>(op.source)],
                              spec_.widths[static_cast<int>(op.source)],
                              spec_.heads,
                              spec_.cos,
                              spec_.sin,
                              spec_.rotary_dim};
      share(tasks, rotary_kv_tasks(args), [&](int task) { rotary_kv_run(args, task, scratch); });
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
      // Longest first, so one by one.
      for (int begin, end;
           tasks.claim(attention_tasks(args), attention_tasks(args), 1, begin, end);) {
        attention_run(args, begin, scratch);
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

void Program::run_linear(const Op& op, TaskRange& tasks, int, int rows) {
  const Activations input{op.format, op.weights->inputs, activations_.get(),
                          activation_stride(op.weights->inputs)};
  const LinearArgs args{op.weights,
                        input,
                        rows,
                        data_[static_cast<int>(op.target)],
                        spec_.widths[static_cast<int>(op.target)],
                        op.epilogue};
  const int count = linear_tasks(args);
  for (int begin, end; tasks.claim(count, team_.size(), smallest_claim, begin, end);) {
    linear_run(args, begin, end);
  }
}

void Program::embed(const Op& op, const StepInput& input, int64_t row) {
  unpack_output(*op.weights, static_cast<int32_t>(input.token_ids[row]),
                row_of(Buffer::residual, row));
}

void Program::convert_row(const Op& op, int64_t row, int rank) {
  const Activations to{op.format, op.width, activations_.get(), activation_stride(op.width)};
  const float* from = row_of(op.source, row);
  if (op.kind == OpKind::norm) {
    auto* normed = static_cast<float*>(scratch_[static_cast<size_t>(rank)].get());
    rms_norm(from, op.norm_weight, op.eps, op.width, normed);
    from = normed;
  }
  store_activations(to, row, from);
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
