// What an encoder does with single rows: embeddings, LayerNorm, activation functions, rotation.
#pragma once

#include <algorithm>

#include "encoder.h"
#include "row_functions.h"
#include "simd.h"

namespace meshserve::MESHSERVE_ISA {

inline Floats load_bf16(const uint16_t* from) {
#if defined(__AVX512F__)
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
#else
  const auto* halves = reinterpret_cast<const __m128i*>(from);
  const auto expand = [](__m128i eight) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(eight), 16));
  };
  return {expand(_mm_loadu_si128(halves)), expand(_mm_loadu_si128(halves + 1))};
#endif
}

// a times the normal distribution's share below it. With z = |a| / sqrt(2), erfc(z) is exp(-z * z)
// times a polynomial in 1 / (1 + 0.3275911 z) (Abramowitz and Stegun, 7.1.26; error below 1.5e-7).
inline Floats gelu(Floats a) {
  const Floats z = multiply(magnitude(a), broadcast(0.70710678f));
  const Floats t = divide(broadcast(1.0f), fused(z, broadcast(0.3275911f), broadcast(1.0f)));
  Floats tail = broadcast(1.061405429f);
  tail = fused(tail, t, broadcast(-1.453152027f));
  tail = fused(tail, t, broadcast(1.421413741f));
  tail = fused(tail, t, broadcast(-0.284496736f));
  tail = fused(tail, t, broadcast(0.254829592f));
  const Floats square = multiply(z, z);
  tail = multiply(multiply(tail, t), exponential(subtract(broadcast(0.0f), square)));
  // Of the share that is on the other side of 0: a / 2 * erfc(z) for a < 0, a less that for a > 0.
  const Floats other = multiply(multiply(magnitude(a), broadcast(-0.5f)), tail);
  const Floats positive = larger(broadcast(0.0f), a);  // NaN where a is
  return add(positive, other);
}

inline Floats apply(ActivationFunction function, Floats a) {
  switch (function) {
    case ActivationFunction::none:
      return a;
    case ActivationFunction::gelu:
      return gelu(a);
    case ActivationFunction::gelu_tanh:
      return gelu_tanh(a);
    case ActivationFunction::relu:
      return larger(broadcast(0.0f), a);
    case ActivationFunction::silu:
      return sigmoid_times(a, a);
    case ActivationFunction::tanh:
      return hyperbolic_tangent(a);
  }
  return a;
}

// Activates a row of `width` floats in place; the values that a gated one multiplies follow it.
inline void activate_row(ActivationFunction function, bool gated, int32_t width, float* row) {
  if (function == ActivationFunction::none && !gated) return;
  for (int32_t i = 0; i < width; i += lanes) {
    const Floats activated = apply(function, load(row + i));
    store(row + i, gated ? multiply(activated, load(row + width + i)) : activated);
  }
}

inline void embed_row(const EmbeddingTables& tables, int32_t width, int32_t token_id,
                      int32_t position, int32_t type, float* to) {
  const auto row_of = [width](const uint16_t* table, int32_t row) {
    return table == nullptr ? nullptr : table + int64_t{row} * width;
  };
  const uint16_t* word = row_of(tables.words, token_id);
  const uint16_t* place = row_of(tables.positions, position + tables.first_position);
  const uint16_t* kind = row_of(tables.types, type);
  for (int32_t i = 0; i < width; i += lanes) {
    Floats sum = load_bf16(word + i);
    if (place != nullptr) sum = add(sum, load_bf16(place + i));
    if (kind != nullptr) sum = add(sum, load_bf16(kind + i));
    store(to + i, sum);
  }
}

// Rotates the halves of each head against each other (Su et al., arXiv:2104.09864).
inline void rotate_heads(float* heads, int32_t count, int32_t head_dim, const float* cos,
                         const float* sin) {
  const int32_t half = head_dim / 2;
  for (int32_t head = 0; head < count; ++head, heads += head_dim) {
    for (int32_t i = 0; i < half; i += lanes) {
      const int32_t some = std::min(half - i, lanes);
      const Floats c = load_some(cos + i, some), s = load_some(sin + i, some);
      const Floats first = load_some(heads + i, some);
      const Floats second = load_some(heads + half + i, some);
      store_some(heads + i, subtract(multiply(first, c), multiply(second, s)), some);
      store_some(heads + half + i, fused(first, s, multiply(second, c)), some);
    }
  }
}

}  // namespace meshserve::MESHSERVE_ISA
