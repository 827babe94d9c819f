#include "activations.h"

#include <cmath>
#include <cstring>

#include "integers.h"
#include "simd.h"

namespace meshserve::MESHSERVE_ISA {

namespace {

void store_int8_group(const float* values, Int8Group& to) {
  const Floats first = load(values), second = load(values + lanes);
  const float largest = largest_magnitude(first, second);
  const float inverse = 127.0f / largest;
  if (!std::isfinite(largest) || !std::isfinite(inverse)) {
    // NaN and infinity make the whole group NaN: an input that is broken must not look like a
    // number. Values whose inverse is none are 0, or as good as 0.
    std::memset(to.values, 0, sizeof to.values);
    to.scale = to.sum = std::isfinite(largest) ? 0.0f : NAN;
    to.offset = 0;
    return;
  }
  to.scale = largest / 127.0f;
  const Floats factor = broadcast(inverse);
  const int32_t levels = store_levels(to.values, multiply(first, factor), multiply(second, factor));
  to.sum = to.scale * static_cast<float>(levels);
  to.offset = -128 * levels;
}

}  // namespace

size_t activation_bytes(const Activations& of) {
  const auto inputs = static_cast<size_t>(of.inputs);
  return of.format == ActivationFormat::operands ? inputs * sizeof(Operand)
                                                 : inputs / group_inputs * sizeof(Int8Group);
}

void store_activations(const Activations& to, int64_t row, const float* values) {
  if (to.format == ActivationFormat::operands) {
    auto* out = reinterpret_cast<Operand*>(static_cast<char*>(to.rows) + row * to.stride);
    for (int32_t i = 0; i < to.inputs; i += lanes) store_operands(out + i, load(values + i));
    return;
  }
  Int8Group* out = int8_row(to, row);
  for (int32_t group = 0; group < to.inputs / group_inputs; ++group) {
    store_int8_group(values + group * group_inputs, out[group]);
  }
}

void rms_norm(const float* row, const float* weight, float eps, int32_t size, float* out) {
  Floats squares = broadcast(0.0f);
  for (int32_t i = 0; i < size; i += lanes) {
    const Floats values = load(row + i);
    squares = fused(values, values, squares);
  }
  const float mean = sum(squares) / static_cast<float>(size);
  const Floats factor = broadcast(1.0f / std::sqrt(mean + eps));
  for (int32_t i = 0; i < size; i += lanes) {
    store(out + i, multiply(multiply(load(row + i), factor), load(weight + i)));
  }
}

}  // namespace meshserve::MESHSERVE_ISA
