// SPDX-License-Identifier: BSD-3-Clause
// Registers of eight floats, and what else several kernels need.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#define INLINE __attribute__((always_inline)) inline  // compilers stop inlining where a unit has become large

constexpr int64_t kLanes = 8;
constexpr int64_t kLine = 64;     // bytes of a line of the caches

// The four sums of the lanes of four registers.
inline __m128 sums_of(__m256 a, __m256 b, __m256 c, __m256 d) {
  const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  return _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
}

inline float sum_of(__m256 a) {
  const __m256 none = _mm256_setzero_ps();
  return _mm_cvtss_f32(sums_of(a, none, none, none));
}

inline float largest_of(__m256 a) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

// Eight numbers, or as many as there are and then zeros.
inline __m128i some(const uint16_t* p, int64_t count) {
  alignas(16) uint16_t held[kLanes] = {};
  std::memcpy(held, p, std::min(count, kLanes) * sizeof(uint16_t));
  return _mm_load_si128(reinterpret_cast<const __m128i*>(held));
}
inline __m256 some(const float* p, int64_t count) {
  alignas(32) float held[kLanes] = {};
  std::memcpy(held, p, std::min(count, kLanes) * sizeof(float));
  return _mm256_load_ps(held);
}

// e^x, within 2 units in the last place; 0 is about 1e-38, NaN stays NaN.
inline __m256 exponential(__m256 x) {
  x = _mm256_min_ps(_mm256_set1_ps(88.f), _mm256_max_ps(_mm256_set1_ps(-87.f), x));  // in this order, NaN remains
  const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504088896341f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  x = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);  // log 2 in two parts
  x = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), x);
  __m256 p = _mm256_set1_ps(1.9875691500e-4f);  // Cephes, expf
  for (const float next : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = _mm256_fmadd_ps(p, x, _mm256_set1_ps(next));
  p = _mm256_fmadd_ps(p, _mm256_mul_ps(x, x), _mm256_add_ps(x, _mm256_set1_ps(1.f)));
  const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(p, _mm256_castsi256_ps(power));
}
