// SPDX-License-Identifier: BSD-3-Clause
// Registers of eight floats.
#pragma once
#include <immintrin.h>

#include <cstdint>

constexpr int64_t kLanes = 8;

// The four sums of the lanes of four registers.
inline __m128 sums_of(__m256 a, __m256 b, __m256 c, __m256 d) {
  const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  return _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
}
