// SPDX-License-Identifier: BSD-3-Clause
// Products x W^T with W (N, K) of 16-bit floats, which are made 32-bit floats and multiplied as such: the numbers are those of a 32-bit matrix, and half
// as many bytes are read.
//
// For few rows of x a product waits for memory: rows of W are read as they lie, and each result is a sum along them. For many it computes: some rows of
// W are laid out side by side, so that every number that is loaded serves several results.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "lanes.h"

struct Bfloat16 {
  static __m256 wide(__m128i bits) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16)); }
};
struct Float16 {
  static __m256 wide(__m128i bits) { return _mm256_cvtph_ps(bits); }
};

struct FloatWeight {
  int64_t rows, columns;  // N, K
  const uint16_t* data;   // (N, K)
  const float* bias;      // (N), or null

  float bias_of(int64_t n) const { return bias ? bias[n] : 0.f; }
};

constexpr int64_t kSoon = 1024;   // bytes between the weights of few rows that are multiplied and those that are asked for
constexpr int64_t kFewRows = 16;  // of x; as many and more are computed by panels
constexpr int64_t kPanel = 16;    // rows of W side by side
constexpr int64_t kDepth = 448;   // columns of W in a panel, which takes most of the nearest cache
constexpr int64_t kOfLine = kLine / sizeof(uint16_t);  // columns

template <class F>
__m256 wide(const uint16_t* p) {
  return F::wide(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

// y[m, n] for M rows of x and R rows of W, in U registers each.
template <class F, int M, int R, int U>
void dots(const FloatWeight& w, const float* x, int64_t n, float* y) {
  __m256 totals[M * R * U];
#pragma GCC unroll 16
  for (auto& total : totals) total = _mm256_setzero_ps();
  const int64_t columns = w.columns;
  const uint16_t* data = w.data + n * columns;
  const auto add = [&](int64_t k, int u, auto&& weights, auto&& numbers) {
    __m256 parts[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) parts[r] = weights(data + r * columns + k);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const __m256 each = numbers(x + m * columns + k);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) totals[(m * R + r) * U + u] = _mm256_fmadd_ps(each, parts[r], totals[(m * R + r) * U + u]);
    }
  };
  int64_t k = 0;
  for (; k + U * kLanes <= columns; k += U * kLanes) {
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) add(k + u * kLanes, u, wide<F>, [](const float* p) { return _mm256_loadu_ps(p); });
    if (M == 1) _mm_prefetch(reinterpret_cast<const char*>(data + k) + kSoon, _MM_HINT_NTA);  // needed once
  }
  for (; k < columns; k += kLanes)
    add(k, 0, [&](const uint16_t* p) { return F::wide(some(p, columns - k)); }, [&](const float* p) { return some(p, columns - k); });
#pragma GCC unroll 16
  for (int i = 0; i < M * R; ++i) {
    __m256 total = totals[i * U];
    for (int u = 1; u < U; ++u) total = _mm256_add_ps(total, totals[i * U + u]);
    y[i / R * w.rows + n + i % R] = sum_of(total) + w.bias_of(n + i % R);
  }
}

template <class F, int M, int R, int U>
void dots(const FloatWeight& w, const float* x, int64_t begin, int64_t end, float* y) {
  int64_t n = begin;
  for (; n + R <= end; n += R) dots<F, M, R, U>(w, x, n, y);
  for (; n < end; ++n) dots<F, M, 1, U>(w, x, n, y);
}

template <class F>
void dots(const FloatWeight& w, const float* x, int64_t count, int64_t begin, int64_t end, float* y) {
  const int64_t of_x = w.columns, of_y = w.rows;
  int64_t m = 0;
  for (; m + 4 <= count; m += 4) dots<F, 4, 3, 1>(w, x + m * of_x, begin, end, y + m * of_y);
  for (; m + 2 <= count; m += 2) dots<F, 2, 3, 1>(w, x + m * of_x, begin, end, y + m * of_y);
  if (m < count) dots<F, 1, 1, 4>(w, x + m * of_x, begin, end, y + m * of_y);
}

// A panel's eight rows of W from some columns on, with the columns that are there turned: out[k][row].
template <class F>
void turn(const uint16_t* data, int64_t stride, int64_t left, float* out) {
  __m256 rows[8], pairs[8], fours[8];
  for (int i = 0; i < 8; ++i) rows[i] = left < kLanes ? F::wide(some(data + i * stride, left)) : wide<F>(data + i * stride);
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 8; ++i) {  // columns i % 4 and i % 4 + 4 of four rows
    const int low = i / 4 * 4 + i % 4 / 2;
    const __m256d a = _mm256_castps_pd(pairs[low]), b = _mm256_castps_pd(pairs[low + 2]);
    fours[i] = _mm256_castpd_ps(i % 2 ? _mm256_unpackhi_pd(a, b) : _mm256_unpacklo_pd(a, b));
  }
  for (int i = 0; i < 4; ++i) {
    _mm256_store_ps(out + i * kPanel, _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20));
    _mm256_store_ps(out + (i + 4) * kPanel, _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31));
  }
}

// Adds to y (M, 16) what `depth` columns of x and of a panel give; what y holds before counts unless they are the first.
template <int M>
void tile(const float* x, int64_t of_x, const float* panel, int64_t depth, bool first, float* y, int64_t of_y) {
  __m256 totals[M][2];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    totals[m][0] = first ? _mm256_setzero_ps() : _mm256_loadu_ps(y + m * of_y);
    totals[m][1] = first ? _mm256_setzero_ps() : _mm256_loadu_ps(y + m * of_y + kLanes);
  }
  for (int64_t k = 0; k < depth; ++k, panel += kPanel) {
    const __m256 left = _mm256_load_ps(panel), right = _mm256_load_ps(panel + kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const __m256 each = _mm256_broadcast_ss(x + m * of_x + k);
      totals[m][0] = _mm256_fmadd_ps(each, left, totals[m][0]);
      totals[m][1] = _mm256_fmadd_ps(each, right, totals[m][1]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    _mm256_storeu_ps(y + m * of_y, totals[m][0]);
    _mm256_storeu_ps(y + m * of_y + kLanes, totals[m][1]);
  }
}

// Calls the tile of so many rows, at most six: as many as there are registers for.
inline void tile(int64_t rows, const float* x, int64_t of_x, const float* panel, int64_t depth, bool first, float* y, int64_t of_y) {
  static constexpr decltype(&tile<1>) of[] = {tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>};
  of[rows - 1](x, of_x, panel, depth, first, y, of_y);
}

template <class F>
void panels(const FloatWeight& w, const float* x, int64_t count, int64_t begin, int64_t end, float* y) {
  alignas(64) thread_local float panel[kDepth * kPanel];
  for (int64_t k = 0; k < w.columns; k += kDepth) {
    const int64_t depth = std::min(kDepth, w.columns - k);
    for (int64_t n = begin; n < end; n += kPanel) {
      for (int64_t i = 0; i < depth; i += kLanes)
        for (int64_t r = 0; r < kPanel; r += kLanes)
          turn<F>(w.data + (n + r) * w.columns + k + i, w.columns, depth - i, panel + i * kPanel + r);
      const int64_t lines = n + kPanel < end ? kPanel * (depth / kOfLine) : 0;
      for (int64_t m = 0, asked = 0; m < count; m += 6) {
        for (; asked < lines * (m + 6) / count && asked < lines; ++asked)  // of the next panel
          _mm_prefetch(reinterpret_cast<const char*>(w.data + (n + kPanel + asked % kPanel) * w.columns + k + asked / kPanel * kOfLine), _MM_HINT_T1);
        tile(std::min<int64_t>(6, count - m), x + m * w.columns + k, w.columns, panel, depth, k == 0, y + m * w.rows + n, w.rows);
      }
    }
  }
  if (w.bias)
    for (int64_t m = 0; m < count; ++m)
      for (int64_t n = begin; n < end; ++n) y[m * w.rows + n] += w.bias[n];
}

// y[:, begin:end] for all `count` rows of x.
template <class F>
void product(const FloatWeight& w, const float* x, int64_t count, int64_t begin, int64_t end, float* y) {
  const int64_t whole = count < kFewRows ? begin : begin + (end - begin) / kPanel * kPanel;
  if (whole > begin) panels<F>(w, x, count, begin, whole, y);
  if (whole < end) dots<F>(w, x, count, whole, end, y);
}
