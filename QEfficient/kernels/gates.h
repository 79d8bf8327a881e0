// SPDX-License-Identifier: BSD-3-Clause
// The gate of a feed-forward layer, silu(gate) * up, with silu(x) = x / (1 + e^-x), in one pass.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "lanes.h"

inline __m256 gated(__m256 gate, __m256 up) {
  const __m256 below = _mm256_add_ps(_mm256_set1_ps(1.f), exponential(_mm256_sub_ps(_mm256_setzero_ps(), gate)));
  return _mm256_mul_ps(_mm256_div_ps(gate, below), up);
}

// y of `count` numbers.
inline void gate(const float* gate, const float* up, int64_t count, float* y) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) _mm256_storeu_ps(y + i, gated(_mm256_loadu_ps(gate + i), _mm256_loadu_ps(up + i)));
  if (i == count) return;
  alignas(32) float last[kLanes];
  _mm256_store_ps(last, gated(some(gate + i, count - i), some(up + i, count - i)));
  std::memcpy(y + i, last, (count - i) * sizeof(float));
}
