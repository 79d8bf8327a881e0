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
