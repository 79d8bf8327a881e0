// SPDX-License-Identifier: BSD-3-Clause
// A residual sum and its root-mean-square norm.
#pragma once
#include <cmath>
#include <cstdint>

#include "registers.h"

// A row of `count` numbers: sum = a + b, y = sum / sqrt(mean(sum^2) + epsilon) * weight.
inline void skip_norm(const float* a, const float* b, const float* weight, int64_t count, float epsilon, float* sum, float* y) {
  constexpr int kSums = 4;  // so that one addition does not wait for the other
  Floats squares[kSums];
#pragma GCC unroll 4
  for (Floats& of : squares) of = every(0.f);
  int64_t i = 0;
  for (; i + kSums * kFloats <= count; i += kSums * kFloats) {
#pragma GCC unroll 4
    for (int s = 0; s < kSums; ++s) {
      const Floats of = loaded(a + i + s * kFloats) + loaded(b + i + s * kFloats);
      put(sum + i + s * kFloats, of);
      squares[s] = multiplied_added(of, of, squares[s]);
    }
  }
  alignas(kRegister) float lanes[kFloats];
  put(lanes, (squares[0] + squares[1]) + (squares[2] + squares[3]));
  float total = 0;
  for (float lane : lanes) total += lane;
  for (; i < count; ++i) {
    sum[i] = a[i] + b[i];
    total += sum[i] * sum[i];
  }
  const float by = 1.f / std::sqrt(total / static_cast<float>(count) + epsilon);
  for (i = 0; i < count; ++i) y[i] = sum[i] * by * weight[i];
}
