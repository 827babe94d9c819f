// Functions of single numbers and rows that decoders and encoders share.
#pragma once

#include <cmath>

#include "simd.h"

namespace meshserve::MESHSERVE_ISA {

// 2**(a * log2(e)), within what exp2 takes.
inline Floats exponential(Floats a) {
  const Floats exponent = multiply(a, broadcast(1.44269504f));
  return exp2(smaller(broadcast(126.0f), larger(broadcast(-126.0f), exponent)));
}

// a / (1 + exp(-a))
inline Floats sigmoid_times(Floats a, Floats exponent) {
  const Floats power = exponential(subtract(broadcast(0.0f), exponent));
  return divide(a, add(power, broadcast(1.0f)));
}

// Hendrycks and Gimpel, arXiv:1606.08415: a * sigmoid(2 sqrt(2 / pi) (a + 0.044715 a^3)).
inline Floats gelu_tanh(Floats a) {
  const Floats square = multiply(a, a);
  const Floats inner = fused(multiply(square, a), broadcast(0.044715f), a);
  return sigmoid_times(a, multiply(inner, broadcast(1.5957691f)));
}

inline Floats hyperbolic_tangent(Floats a) {
  const Floats power = exponential(multiply(a, broadcast(2.0f)));
  const Floats rest = divide(broadcast(2.0f), add(power, broadcast(1.0f)));
  return subtract(broadcast(1.0f), rest);
}

// LayerNorm (Ba et al., arXiv:1607.06450) of a row; `shift` may be null, and `to` may be `row`.
inline void layer_norm(const float* row, const float* scale, const float* shift, float eps,
                       int32_t width, float* to) {
  Floats total = broadcast(0.0f);
  for (int32_t i = 0; i < width; i += lanes) total = add(total, load(row + i));
  const Floats mean = broadcast(sum(total) / static_cast<float>(width));
  Floats squares = broadcast(0.0f);
  for (int32_t i = 0; i < width; i += lanes) {
    const Floats centred = subtract(load(row + i), mean);
    squares = fused(centred, centred, squares);
  }
  const float variance = sum(squares) / static_cast<float>(width);
  const Floats factor = broadcast(1.0f / std::sqrt(variance + eps));
  for (int32_t i = 0; i < width; i += lanes) {
    const Floats normed = multiply(subtract(load(row + i), mean), factor);
    const Floats scaled = multiply(normed, load(scale + i));
    store(to + i, shift == nullptr ? scaled : add(scaled, load(shift + i)));
  }
}

}  // namespace meshserve::MESHSERVE_ISA
