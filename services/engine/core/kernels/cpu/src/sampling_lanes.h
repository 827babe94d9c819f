// What sampling does to sixteen logits at a time beyond simd.h: comparing, compacting, exact sums.
#pragma once

#include <cstdint>

#include "simd.h"

namespace meshserve::MESHSERVE_ISA {

// One bit for each lane.
using Bits = uint32_t;
constexpr Bits all_lanes = 0xffff;

inline Bits lanes_below(int count) { return count >= lanes ? all_lanes : (1u << count) - 1; }

#if defined(__AVX512F__)

inline Bits at_least(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
inline Bits greater(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
inline Bits equal(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
// Whether a lane of either is NaN.
inline Bits unordered(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q); }
inline Mask mask_of(Bits bits) { return static_cast<Mask>(bits); }
inline Floats keep(Bits kept, Floats a) { return _mm512_maskz_mov_ps(mask_of(kept), a); }
// Writes the lanes of `kept` one after the other, and anything up to to[16] behind them.
inline void compact(float* to, Bits kept, Floats a) {
  store(to, _mm512_maskz_compress_ps(static_cast<__mmask16>(kept), a));
}

// A sum of floats in double precision, in an order of its own that never changes.
class ExactSum {
 public:
  void add(Floats a) {
    low_ = _mm512_add_pd(low_, _mm512_cvtps_pd(_mm512_castps512_ps256(a)));
    high_ = _mm512_add_pd(high_, _mm512_cvtps_pd(_mm512_extractf32x8_ps(a, 1)));
  }
  double total() const { return _mm512_reduce_add_pd(_mm512_add_pd(low_, high_)); }

 private:
  __m512d low_ = _mm512_setzero_pd(), high_ = _mm512_setzero_pd();
};

#else

namespace detail {
inline Bits bits(__m256 low, __m256 high) {
  return static_cast<Bits>(_mm256_movemask_ps(low)) |
         (static_cast<Bits>(_mm256_movemask_ps(high)) << 8);
}
}  // namespace detail

inline Bits at_least(Floats a, Floats b) {
  return detail::bits(_mm256_cmp_ps(a.low, b.low, _CMP_GE_OQ),
                      _mm256_cmp_ps(a.high, b.high, _CMP_GE_OQ));
}
inline Bits greater(Floats a, Floats b) {
  return detail::bits(_mm256_cmp_ps(a.low, b.low, _CMP_GT_OQ),
                      _mm256_cmp_ps(a.high, b.high, _CMP_GT_OQ));
}
inline Bits equal(Floats a, Floats b) {
  return detail::bits(_mm256_cmp_ps(a.low, b.low, _CMP_EQ_OQ),
                      _mm256_cmp_ps(a.high, b.high, _CMP_EQ_OQ));
}
inline Bits unordered(Floats a, Floats b) {
  return detail::bits(_mm256_cmp_ps(a.low, b.low, _CMP_UNORD_Q),
                      _mm256_cmp_ps(a.high, b.high, _CMP_UNORD_Q));
}
inline Mask mask_of(Bits bits) {
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const auto half = [lane](Bits of) {
    const __m256i own = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(of)), lane);
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(own, lane));
  };
  return {half(bits & 0xff), half(bits >> 8)};
}
inline Floats keep(Bits kept, Floats a) {
  const Mask mask = mask_of(kept);
  return {_mm256_and_ps(a.low, mask.low), _mm256_and_ps(a.high, mask.high)};
}
inline void compact(float* to, Bits kept, Floats a) {
  alignas(32) float each[lanes];
  store(each, a);
  for (; kept != 0; kept &= kept - 1) *to++ = each[__builtin_ctz(kept)];
}

class ExactSum {
 public:
  void add(Floats a) {
    sums_[0] = _mm256_add_pd(sums_[0], _mm256_cvtps_pd(_mm256_castps256_ps128(a.low)));
    sums_[1] = _mm256_add_pd(sums_[1], _mm256_cvtps_pd(_mm256_extractf128_ps(a.low, 1)));
    sums_[2] = _mm256_add_pd(sums_[2], _mm256_cvtps_pd(_mm256_castps256_ps128(a.high)));
    sums_[3] = _mm256_add_pd(sums_[3], _mm256_cvtps_pd(_mm256_extractf128_ps(a.high, 1)));
  }
  double total() const {
    const __m256d four =
        _mm256_add_pd(_mm256_add_pd(sums_[0], sums_[1]), _mm256_add_pd(sums_[2], sums_[3]));
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
    return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
  }

 private:
  __m256d sums_[4] = {_mm256_setzero_pd(), _mm256_setzero_pd(), _mm256_setzero_pd(),
                      _mm256_setzero_pd()};
};

#endif

}  // namespace meshserve::MESHSERVE_ISA
