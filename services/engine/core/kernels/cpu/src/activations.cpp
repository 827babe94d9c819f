#include "activations.h"

#include <cmath>

#include "simd.h"

namespace meshserve::MESHSERVE_ISA {

namespace {

void store_int8_group(const float* values, int8_t* bytes, float& scale, float& sum,
                      int32_t& offset) {
  const Floats first = load(values), second = load(values + lanes);
  // A NaN must come out as one: `larger` would drop it, the sum of magnitudes does not.
  const Floats magnitudes = larger(magnitude(first), magnitude(second));
  const float largest = maximum(magnitudes);
  const float total = MESHSERVE_ISA::sum(add(magnitude(first), magnitude(second)));
  scale = std::isfinite(total) ? largest / 127.0f : NAN;
  const Floats inverse = broadcast(largest > 0.0f && scale == scale ? 127.0f / largest : 0.0f);
  store_int8(bytes, multiply(first, inverse));
  store_int8(bytes + lanes, multiply(second, inverse));
  int32_t bytes_sum = 0;
  for (int i = 0; i < group_inputs; ++i) bytes_sum += bytes[i];
  sum = scale * static_cast<float>(bytes_sum);
  offset = -128 * bytes_sum;
}

}  // namespace

void store_activations(const Activations& to, int64_t row, const float* values) {
  if (to.format == ActivationFormat::operands) {
    auto* out = reinterpret_cast<Operand*>(static_cast<char*>(to.rows) + row * to.stride);
    for (int32_t i = 0; i < to.inputs; i += lanes) store_operands(out + i, load(values + i));
    return;
  }
  const Int8Row out = int8_row(to, row);
  for (int32_t group = 0; group < to.inputs / group_inputs; ++group) {
    store_int8_group(values + group * group_inputs, out.values + group * group_inputs,
                     out.scales[group], out.sums[group], out.offsets[group]);
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
