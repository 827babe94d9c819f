// Sixteen floats at a time, on every instruction set: one zmm register, or two of ymm.
//
// `Operand` is what products are made of: bf16 where the machine multiplies pairs of bf16
// (vdpbf16ps), float elsewhere. `Pairs` are 16 pairs of operands, one pair for each lane.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace meshserve::MESHSERVE_ISA {

constexpr int lanes = 16;

#if defined(__AVX512F__)

using Floats = __m512;
using Mask = __mmask16;

inline Floats load(const float* from) { return _mm512_loadu_ps(from); }
inline void store(float* to, Floats a) { _mm512_storeu_ps(to, a); }
inline Floats broadcast(float a) { return _mm512_set1_ps(a); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats subtract(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats divide(Floats a, Floats b) { return _mm512_div_ps(a, b); }
// a * b + c, rounded once.
inline Floats fused(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
// The larger one, and the smaller; b where either is NaN.
inline Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats smaller(Floats a, Floats b) { return _mm512_min_ps(a, b); }
// The first `count` lanes, of 0 to 16.
inline Mask first_lanes(int count) { return static_cast<Mask>((1u << count) - 1); }
inline Floats select(Mask mask, Floats yes, Floats no) {
  return _mm512_mask_blend_ps(mask, no, yes);
}
inline float sum(Floats a) { return _mm512_reduce_add_ps(a); }
inline float maximum(Floats a) { return _mm512_reduce_max_ps(a); }
// 16 integers as floats.
inline Floats load_int8(const int8_t* from) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}
inline void store_int8(int8_t* to, Floats a) {
  const __m128i bytes = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(a));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bytes);
}
inline Floats magnitude(Floats a) { return _mm512_abs_ps(a); }

namespace detail {
inline Floats nearest(Floats a) {
  return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// a * 2**n for integral n, in the range of exp2.
inline Floats scale_by_power(Floats a, Floats n) { return _mm512_scalef_ps(a, n); }
}  // namespace detail

#else

struct Floats {
  __m256 low, high;
};
struct Mask {
  __m256 low, high;
};

inline Floats load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
inline void store(float* to, Floats a) {
  _mm256_storeu_ps(to, a.low);
  _mm256_storeu_ps(to + 8, a.high);
}
inline Floats broadcast(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
inline Floats add(Floats a, Floats b) {
  return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
}
inline Floats subtract(Floats a, Floats b) {
  return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)};
}
inline Floats multiply(Floats a, Floats b) {
  return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}
inline Floats divide(Floats a, Floats b) {
  return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)};
}
inline Floats fused(Floats a, Floats b, Floats c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Floats larger(Floats a, Floats b) {
  return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)};
}
inline Floats smaller(Floats a, Floats b) {
  return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)};
}
inline Mask first_lanes(int count) {
  const __m256i index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(count), index)),
          _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(count - 8), index))};
}
inline Floats select(Mask mask, Floats yes, Floats no) {
  return {_mm256_blendv_ps(no.low, yes.low, mask.low),
          _mm256_blendv_ps(no.high, yes.high, mask.high)};
}
inline float sum(Floats a) {
  const __m256 eight = _mm256_add_ps(a.low, a.high);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
inline float maximum(Floats a) {
  const __m256 eight = _mm256_max_ps(a.low, a.high);
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}
inline Floats load_int8(const int8_t* from) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
}
inline void store_int8(int8_t* to, Floats a) {
  const __m256i low = _mm256_cvtps_epi32(a.low), high = _mm256_cvtps_epi32(a.high);
  const __m128i words_low =
      _mm_packs_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
  const __m128i words_high =
      _mm_packs_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(words_low, words_high));
}
inline Floats magnitude(Floats a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.low), _mm256_andnot_ps(sign, a.high)};
}

namespace detail {
inline Floats nearest(Floats a) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.low, mode), _mm256_round_ps(a.high, mode)};
}
inline __m256 scale_by_power(__m256 a, __m256 n) {
  // Below the normal range the result is 0.
  const __m256 normal = _mm256_cmp_ps(n, _mm256_set1_ps(-126.0f), _CMP_NLT_UQ);
  const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
  const __m256i scaled = _mm256_add_epi32(_mm256_castps_si256(a), exponent);
  return _mm256_and_ps(_mm256_castsi256_ps(scaled), normal);
}
inline Floats scale_by_power(Floats a, Floats n) {
  return {scale_by_power(a.low, n.low), scale_by_power(a.high, n.high)};
}
}  // namespace detail

#endif

// 2**a for a <= 127. Relative error below 2e-7 where the result is a normal number, and 0 or a
// subnormal one below; NaN stays NaN. 2**a = 2**n * 2**f with n the nearest integer and a
// polynomial for 2**f, |f| <= 1/2, fitted for the least relative error (9.2e-8).
inline Floats exp2(Floats a) {
  const Floats bounded = larger(broadcast(-150.0f), a);
  const Floats n = detail::nearest(bounded);
  const Floats f = subtract(bounded, n);
  Floats power = broadcast(0.001326472731307149f);
  power = fused(power, f, broadcast(0.009671512991189957f));
  power = fused(power, f, broadcast(0.05550733581185341f));
  power = fused(power, f, broadcast(0.24022242426872253f));
  power = fused(power, f, broadcast(0.6931470036506653f));
  power = fused(power, f, broadcast(1.0f));
  return detail::scale_by_power(power, n);
}

// Reads `count` floats, or all lanes if that is fewer, with 0 in the rest; and writes as many.
#if defined(__AVX512F__)
inline Floats load_some(const float* from, int count) {
  if (count >= lanes) return load(from);
  return _mm512_maskz_loadu_ps(first_lanes(count), from);
}
inline void store_some(float* to, Floats a, int count) {
  // What a masked store has written is slow to be read again.
  if (count >= lanes) return store(to, a);
  _mm512_mask_storeu_ps(to, first_lanes(count), a);
}
#else
inline Floats load_some(const float* from, int count) {
  if (count >= lanes) return load(from);
  alignas(64) float padded[lanes] = {};
  std::memcpy(padded, from, static_cast<size_t>(count) * sizeof(float));
  return load(padded);
}
inline void store_some(float* to, Floats a, int count) {
  if (count >= lanes) return store(to, a);
  alignas(64) float padded[lanes];
  store(padded, a);
  std::memcpy(to, padded, static_cast<size_t>(count) * sizeof(float));
}
#endif

// The nearest bf16, ties to even; NaN stays NaN.
inline uint16_t to_bf16(float a) {
  uint32_t bits;
  std::memcpy(&bits, &a, sizeof bits);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#if defined(__AVX512BF16__)

inline void store_bf16(uint16_t* to, Floats a) {
  const auto rounded = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), rounded);
}

using Operand = uint16_t;
using Pairs = __m512i;

inline void store_operands(Operand* to, Floats a) { store_bf16(to, a); }
// The 32 bf16 at `from`.
inline Pairs load_pairs(const uint16_t* from) { return _mm512_loadu_si512(from); }
// The two operands at `from`, in all lanes.
inline Pairs broadcast_pair(const Operand* from) {
  int32_t both;
  std::memcpy(&both, from, sizeof both);
  return _mm512_set1_epi32(both);
}
// The pairs with 0 for their second members, whatever those are.
inline Pairs first_of_pairs(Pairs a) { return _mm512_and_si512(a, _mm512_set1_epi32(0xffff)); }
// sums + a.first * b.first + a.second * b.second
inline Floats add_products(Floats sums, Pairs a, Pairs b) {
  return _mm512_dpbf16_ps(sums, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}

#else

inline void store_bf16(uint16_t* to, Floats a) {
  alignas(64) float each[lanes];
  store(each, a);
  for (int lane = 0; lane < lanes; ++lane) to[lane] = to_bf16(each[lane]);
}

using Operand = float;
struct Pairs {
  Floats first, second;
};

inline void store_operands(Operand* to, Floats a) { store(to, a); }
#if defined(__AVX512F__)
inline Pairs load_pairs(const uint16_t* from) {
  const __m512i both = _mm512_loadu_si512(from);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(both, 16)),
          _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(-65536)))};
}
#else
inline Pairs load_pairs(const uint16_t* from) {
  const auto* halves = reinterpret_cast<const __m256i*>(from);
  const __m256i low = _mm256_loadu_si256(halves), high = _mm256_loadu_si256(halves + 1);
  const __m256i upper = _mm256_set1_epi32(-65536);
  return {{_mm256_castsi256_ps(_mm256_slli_epi32(low, 16)),
           _mm256_castsi256_ps(_mm256_slli_epi32(high, 16))},
          {_mm256_castsi256_ps(_mm256_and_si256(low, upper)),
           _mm256_castsi256_ps(_mm256_and_si256(high, upper))}};
}
#endif
inline Pairs broadcast_pair(const Operand* from) {
  return {broadcast(from[0]), broadcast(from[1])};
}
inline Pairs first_of_pairs(Pairs a) { return {a.first, broadcast(0.0f)}; }
inline Floats add_products(Floats sums, Pairs a, Pairs b) {
  return fused(a.second, b.second, fused(a.first, b.first, sums));
}

#endif

}  // namespace meshserve::MESHSERVE_ISA
