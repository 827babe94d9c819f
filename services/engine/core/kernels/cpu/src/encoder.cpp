#include "encoder.h"

#include <algorithm>

#include "encoder_attention.h"
#include "encoder_rows.h"

namespace meshserve::MESHSERVE_ISA {

namespace {

// Rows that a thread takes through the operations between two attentions: enough to use weights
// often once they are in its caches, few enough that activations stay there as well.
constexpr int32_t most_block_rows = 64;
constexpr int32_t fewest_block_rows = 16;
// Parts for each thread, where there are sequences enough: so they end nearly together.
constexpr int32_t parts_per_thread = 4;

int32_t ceil_div(int32_t a, int32_t b) { return (a + b - 1) / b; }

}  // namespace

Encoder::Encoder(const EncoderSpec& spec, Team& team)
    : spec_(spec), ops_(spec.ops, spec.ops + spec.num_ops), team_(team) {
  Segment segment{0, 0};
  for (; segment.end < ops_.size(); ++segment.end) {
    if (ops_[segment.end].kind != EncoderOpKind::attention) continue;
    segments_.push_back(segment);
    segment.begin = segment.end + 1;
  }
  segments_.push_back(segment);
  counters_ = std::vector<TaskCounter>(2 * segments_.size());
  const auto threads = static_cast<size_t>(team.size());
  inner_.resize(threads);
  activations_.resize(threads);
  scratch_.resize(threads);
  const auto rows = static_cast<size_t>(most_block_rows);
  for (size_t rank = 0; rank < threads; ++rank) {
    const int32_t width = spec.widths[static_cast<int>(EncoderBuffer::inner)];
    inner_[rank] = allocate(rows * static_cast<size_t>(width) * sizeof(float));
    const auto stride = static_cast<size_t>(activation_stride(spec.max_activation_inputs));
    activations_[rank] = allocate(rows * stride);
  }
}

void Encoder::run(const EncoderInput& input) {
  reserve(input);
  divide(input);
  hidden_ = input.hidden;
  for (TaskCounter& counter : counters_) counter.reset();
  const bool alone = static_cast<int>(parts_.size()) >= 2 * team_.size() || team_.size() == 1;
  team_.run([&](int rank) { alone ? run_parts(input, rank) : run_together(input, rank); });
}

void Encoder::reserve(const EncoderInput& input) {
  if (input.num_tokens > max_tokens_) {
    for (const EncoderBuffer buffer : {EncoderBuffer::projected, EncoderBuffer::attended}) {
      const auto index = static_cast<size_t>(buffer);
      shared_[index] = allocate(static_cast<size_t>(spec_.widths[index]) *
                                static_cast<size_t>(input.num_tokens) * sizeof(float));
    }
    max_tokens_ = input.num_tokens;
  }
  int32_t longest = 0;
  for (int32_t i = 0; i < input.num_sequences; ++i)
    longest = std::max(longest, input.starts[i + 1] - input.starts[i]);
  if (longest > longest_) {
    const size_t bytes = EncoderScratch(nullptr, longest, spec_.head_dim).bytes;
    for (Memory& scratch : scratch_) scratch = allocate(bytes);
    longest_ = longest;
  }
}

// Puts consecutive sequences together until a part has rows enough.
void Encoder::divide(const EncoderInput& input) {
  const int32_t wanted = std::clamp(input.num_tokens / (parts_per_thread * team_.size()),
                                    fewest_block_rows, most_block_rows);
  parts_.clear();
  Part part{0, 0, 0, 0};
  for (int32_t sequence = 0; sequence < input.num_sequences; ++sequence) {
    const int32_t end = input.starts[sequence + 1];
    // The next sequence goes where it leaves the part nearer to what is wanted.
    const int32_t with = end - part.first_row, without = part.end_row - part.first_row;
    if (without > 0 && with - wanted > wanted - without) {
      parts_.push_back(part);
      part = {sequence, sequence, part.end_row, part.end_row};
    }
    part.end_sequence = sequence + 1;
    part.end_row = end;
  }
  parts_.push_back(part);
  // The longest first, for the threads to end together.
  std::stable_sort(parts_.begin(), parts_.end(), [](const Part& a, const Part& b) {
    return a.end_row - a.first_row > b.end_row - b.first_row;
  });
}

// A thread takes parts through all layers by itself.
void Encoder::run_parts(const EncoderInput& input, int rank) {
  for (int index; counters_[0].take_one(static_cast<int>(parts_.size()), index);) {
    const Part& part = parts_[static_cast<size_t>(index)];
    const int32_t rows = part.end_row - part.first_row;
    const int32_t blocks = ceil_div(rows, most_block_rows);
    for (const Segment& segment : segments_) {
      for (int32_t block = 0; block < blocks; ++block) {
        const int32_t begin = rows * block / blocks, end = rows * (block + 1) / blocks;
        run_rows(input, segment, rank, part.first_row + begin, end - begin);
      }
      if (segment.end == ops_.size()) break;
      for (int32_t sequence = part.first_sequence; sequence < part.end_sequence; ++sequence)
        for (int32_t head = 0; head < spec_.heads; ++head)
          attend(input, ops_[segment.end], rank, sequence, head);
    }
  }
}

// All threads share the rows, then the heads.
void Encoder::run_together(const EncoderInput& input, int rank) {
  const int32_t rows = input.num_tokens;
  const int32_t wanted =
      std::clamp(ceil_div(rows, 2 * team_.size()), fewest_block_rows, most_block_rows);
  const int32_t blocks = ceil_div(rows, wanted);
  for (size_t i = 0; i < segments_.size(); ++i) {
    const Segment& segment = segments_[i];
    for (int block; counters_[2 * i].take_one(blocks, block);) {
      const int32_t begin = rows * block / blocks, end = rows * (block + 1) / blocks;
      run_rows(input, segment, rank, begin, end - begin);
    }
    if (segment.end == ops_.size()) break;
    team_.barrier();
    const int heads = input.num_sequences * spec_.heads;
    for (int task; counters_[2 * i + 1].take_one(heads, task);)
      attend(input, ops_[segment.end], rank, task / spec_.heads, task % spec_.heads);
    team_.barrier();
  }
}

void Encoder::run_rows(const EncoderInput& input, const Segment& segment, int rank,
                       int32_t first_row, int32_t rows) {
  for (size_t index = segment.begin; index < segment.end; ++index) {
    const EncoderOp& op = ops_[index];
    const auto each_row = [&](EncoderBuffer buffer, const auto& run) {
      for (int32_t row = 0; row < rows; ++row) run(row, row_of(buffer, rank, first_row, row));
    };
    const Activations activations{op.format, op.width,
                                  activations_[static_cast<size_t>(rank)].get(),
                                  activation_stride(op.width)};
    switch (op.kind) {
      case EncoderOpKind::embed:
        each_row(EncoderBuffer::hidden, [&](int32_t row, float* to) {
          const int32_t token = first_row + row;
          embed_row(spec_.tables, spec_.hidden_size, input.token_ids[token], input.positions[token],
                    input.types[token], to);
        });
        break;
      case EncoderOpKind::norm:
        each_row(EncoderBuffer::hidden, [&](int32_t row, float* hidden) {
          // The inner buffer is of no use before the next linear layer.
          float* to = op.replaces ? hidden : row_of(EncoderBuffer::inner, rank, 0, 0);
          layer_norm(hidden, op.scale, op.shift, op.eps, spec_.hidden_size, to);
          if (op.converts) store_activations(activations, row, to);
        });
        break;
      case EncoderOpKind::activate:
        each_row(op.source, [&](int32_t row, float* from) {
          activate_row(op.function, op.gated != 0, op.width, from);
          store_activations(activations, row, from);
        });
        break;
      case EncoderOpKind::linear: {
        const LinearArgs args{op.weights,
                              activations,
                              rows,
                              row_of(op.target, rank, first_row, 0),
                              spec_.widths[static_cast<int>(op.target)],
                              op.epilogue,
                              0.0f};
        linear_run(args, 0, linear_tasks(args));
        break;
      }
      case EncoderOpKind::rotary:
        each_row(EncoderBuffer::projected, [&](int32_t row, float* heads) {
          const int64_t angles = int64_t{input.positions[first_row + row]} * (spec_.head_dim / 2);
          rotate_heads(heads, 2 * spec_.heads, spec_.head_dim, op.cos + angles, op.sin + angles);
        });
        break;
      case EncoderOpKind::attention:
        break;  // no segment has one
    }
  }
}

void Encoder::attend(const EncoderInput& input, const EncoderOp& op, int rank, int32_t sequence,
                     int32_t head) {
  const int32_t first = input.starts[sequence];
  const int64_t size = int64_t{spec_.heads} * spec_.head_dim, offset = head * spec_.head_dim;
  const EncoderHead args{
      row_of(EncoderBuffer::projected, rank, first, 0) + offset,
      size,
      2 * size,
      spec_.widths[static_cast<int>(EncoderBuffer::projected)],
      input.starts[sequence + 1] - first,
      spec_.head_dim,
      spec_.attention_scale,
      op.window,
      row_of(EncoderBuffer::attended, rank, first, 0) + offset,
      spec_.widths[static_cast<int>(EncoderBuffer::attended)],
  };
  EncoderAttention(args, scratch_[static_cast<size_t>(rank)].get()).run();
}

// Row `row` of the rows from `first_row` on, which is where a thread's own buffers begin.
float* Encoder::row_of(EncoderBuffer buffer, int rank, int32_t first_row, int32_t row) const {
  const auto index = static_cast<size_t>(buffer);
  const int64_t width = spec_.widths[index];
  if (buffer == EncoderBuffer::inner)
    return static_cast<float*>(inner_[static_cast<size_t>(rank)].get()) + row * width;
  float* memory =
      buffer == EncoderBuffer::hidden ? hidden_ : static_cast<float*>(shared_[index].get());
  return memory + (first_row + row) * width;
}

void* make_encoder(Team* team, const EncoderSpec* spec) {
  try {
    return new Encoder(*spec, *team);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

int32_t run_encoder(void* encoder, const EncoderInput* input) {
  try {
    static_cast<Encoder*>(encoder)->run(*input);
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

void free_encoder(void* encoder) { delete static_cast<Encoder*>(encoder); }

}  // namespace meshserve::MESHSERVE_ISA
