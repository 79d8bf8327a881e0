// SPDX-License-Identifier: BSD-3-Clause
// What adapters add to a product: y += (x A) B, with A and B in floats of 16 or 32 bits, each row with the adapters that it uses.
//
// An adapter is a piece, or several of some ranks each. A row's sums are added in the order of the columns of x, then in that of the ranks, so they
// are the same however an adapter is cut, and whichever rows are computed together.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "lanes.h"

template <class T>
struct Pieces {
  int64_t count, columns, ranks, rows;  // C, K, p, N
  const T* a;                           // (C, K, p)
  const T* b;                           // (C, p, N)
  const int64_t* starts;                // each of `shares` equal parts of the ranks adds to the columns from its start to the next one's alone
  int64_t shares;
};

// Rows of x that use a piece: some of `Updates::rows`, from `first` on.
struct Use {
  int64_t piece, first, count;
};

// Eight numbers of a row that goes on, or ends after `left` of them: looking for the end takes longer than what is computed.
template <bool kEnds>
__m256 load(const uint16_t* p, int64_t left) {
  return _mm256_cvtph_ps(!kEnds || left >= kLanes ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)) : some(p, left));
}

template <bool kEnds>
__m256 load(const float* p, int64_t left) {
  return !kEnds || left >= kLanes ? _mm256_loadu_ps(p) : some(p, left);
}

// Eight numbers of w from `at` on, of which `left` count. Up to `last` there are eight, whatever row they belong to, so none is looked for one by one.
template <bool kEnds, class T>
__m256 load(const T* w, int64_t at, int64_t last, int64_t left) {
  return kEnds && at > last ? load<true>(w + at, left) : load<false>(w + at, left);
}

template <bool kEnds>
void store(float* p, __m256 value, int64_t left) {
  if (!kEnds || left >= kLanes) return _mm256_storeu_ps(p, value);
  alignas(32) float some[kLanes];
  _mm256_store_ps(some, value);
  std::memcpy(p, some, left * sizeof(float));
}

// y[m][c] += sum over k of x[m][k] * w[k][c], for M rows and V registers of columns, of which `left` columns are there. The sum begins with y, or with
// zeros, and is added to y then.
template <int M, int V, bool kEnds, bool kApart, class T>
void accumulate(const float* const* x, int64_t depth, const T* w, int64_t stride, int64_t left, float* const* y) {
  const int64_t last = (depth - 1) * stride + left - kLanes;
  __m256 totals[M][V];
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < V; ++v) totals[m][v] = kApart ? _mm256_setzero_ps() : load<kEnds>(y[m] + v * kLanes, left - v * kLanes);
  for (int64_t k = 0; k < depth; ++k) {
    __m256 parts[V];
    for (int v = 0; v < V; ++v) parts[v] = load<kEnds>(w, k * stride + v * kLanes, last, left - v * kLanes);
    for (int m = 0; m < M; ++m) {
      const __m256 each = _mm256_broadcast_ss(x[m] + k);
      for (int v = 0; v < V; ++v) totals[m][v] = _mm256_fmadd_ps(each, parts[v], totals[m][v]);
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int v = 0; v < V; ++v) {
      float* to = y[m] + v * kLanes;
      if (kApart) totals[m][v] = _mm256_add_ps(load<kEnds>(to, left - v * kLanes), totals[m][v]);
      store<kEnds>(to, totals[m][v], left - v * kLanes);
    }
  }
}

// The same for any number of columns.
template <int M, bool kApart, class T>
void accumulate(const float* const* x, int64_t depth, const T* w, int64_t stride, int64_t columns, float* const* y) {
  float* at[M];
  for (int64_t c = 0; c < columns;) {
    for (int m = 0; m < M; ++m) at[m] = y[m] + c;
    const int64_t left = columns - c;
    if (left >= 2 * kLanes) {
      accumulate<M, 2, false, kApart>(x, depth, w + c, stride, left, at);
      c += 2 * kLanes;
    } else {
      accumulate<M, 1, true, kApart>(x, depth, w + c, stride, left, at);
      c += kLanes;
    }
  }
}

// The quarters of a sum: the last takes what is left over.
constexpr int kQuarters = 4;
inline int64_t quarter_of(int64_t depth, int quarter) { return quarter < kQuarters ? depth / kQuarters * quarter : depth; }

// y[c] += sum over k of x[k] * w[k][c], of each quarter for itself, so that one addition does not wait for the other: S quarters at once.
template <int S, int V, bool kEnds, class T>
void accumulate_quarters(const float* x, int64_t depth, const T* w, int64_t stride, int64_t left, float* y) {
  const int64_t each = depth / kQuarters, last = (depth - 1) * stride + left - kLanes;
  for (int first = 0; first < kQuarters; first += S) {
    __m256 totals[S][V];
    for (auto& of : totals)
      for (__m256& total : of) total = _mm256_setzero_ps();
    const auto add = [&](int s, int64_t k) {
      const __m256 one = _mm256_broadcast_ss(x + k);
      for (int v = 0; v < V; ++v)
        totals[s][v] = _mm256_fmadd_ps(one, load<kEnds>(w, k * stride + v * kLanes, last, left - v * kLanes), totals[s][v]);
    };
    for (int64_t k = first * each; k < (first + 1) * each; ++k)
#pragma GCC unroll 4
      for (int s = 0; s < S; ++s) add(s, k + s * each);
    if (first + S == kQuarters)
      for (int64_t k = kQuarters * each; k < depth; ++k) add(S - 1, k);
    for (int v = 0; v < V; ++v) {
      __m256 sum = load<kEnds>(y + v * kLanes, left - v * kLanes);
      for (int s = 0; s < S; ++s) sum = _mm256_add_ps(sum, totals[s][v]);
      store<kEnds>(y + v * kLanes, sum, left - v * kLanes);
    }
  }
}

// The same for any number of columns.
template <class T>
void accumulate_quarters(const float* x, int64_t depth, const T* w, int64_t stride, int64_t columns, float* y) {
  for (int64_t c = 0; c < columns;) {
    const int64_t left = columns - c;
    if (left >= 4 * kLanes) {
      accumulate_quarters<2, 4, false>(x, depth, w + c, stride, left, y + c);
      c += 4 * kLanes;
    } else if (left >= 2 * kLanes) {
      accumulate_quarters<4, 2, false>(x, depth, w + c, stride, left, y + c);
      c += 2 * kLanes;
    } else {
      accumulate_quarters<4, 1, true>(x, depth, w + c, stride, left, y + c);
      c += kLanes;
    }
  }
}

// The same for one row of x and a few rows of w, which are read on and on: they are far from each other in memory.
template <int Depth, bool kEnds, class T>
void accumulate_along(const float* x, const T* w, int64_t stride, int64_t columns, float* y) {
  __m256 each[Depth];
  for (int k = 0; k < Depth; ++k) each[k] = _mm256_broadcast_ss(x + k);
  for (int64_t c = 0; c < columns; c += kLanes) {
    if (!kEnds && c * sizeof(T) % kLine == 0)  // of the rows that follow
      for (int k = 0; k < Depth; ++k) _mm_prefetch(reinterpret_cast<const char*>(w + (Depth + k) * stride + c), _MM_HINT_NTA);
    __m256 total = load<kEnds>(y + c, columns - c);
    for (int k = 0; k < Depth; ++k) total = _mm256_fmadd_ps(each[k], load<kEnds>(w + k * stride + c, columns - c), total);
    store<kEnds>(y + c, total, columns - c);
  }
}

template <class T>
void accumulate_along(const float* x, int64_t depth, const T* w, int64_t stride, int64_t columns, float* y) {
  const int64_t whole = columns / kLanes * kLanes;
  int64_t k = 0;
  for (; k + 8 <= depth; k += 8) accumulate_along<8, false>(x + k, w + k * stride, stride, whole, y);
  for (; k < depth; ++k) accumulate_along<1, false>(x + k, w + k * stride, stride, whole, y);
  if (whole < columns)
    for (k = 0; k < depth; ++k) accumulate_along<1, true>(x + k, w + k * stride + whole, stride, columns - whole, y + whole);
}

// Rows of one call and the pieces that they use.
struct Updates {
  // What one thread does at once of the products with A: some rows of a use, some columns of x.
  struct Job {
    int64_t piece, first, count, part;
  };
  static constexpr int64_t kRows = 16, kDepth = 1024;

  std::vector<Use> uses;
  std::vector<int32_t> rows;
  std::vector<Job> jobs;
  std::vector<float> products;  // (parts of the columns, rows, p), the products with A

  // `places` (B or 1, m, C) is not zero where a row uses a piece; null, or of a single row and piece: all rows use it.
  template <class T>
  void find(const Pieces<T>& pieces, int64_t count, const float* places, int64_t batch, int64_t most) {
    uses.clear();
    rows.clear();
    jobs.clear();
    const bool all = !places || (batch == 1 && pieces.count == 1);
    const int64_t of_each = batch > 1 ? count / batch : count, parts = (pieces.columns + kDepth - 1) / kDepth;
    for (int64_t c = 0; c < pieces.count; ++c) {
      Use use{c, static_cast<int64_t>(rows.size()), 0};
      for (int64_t row = 0; row < count; ++row) {
        bool used = all;
        for (int64_t m = 0; m < most && !used; ++m) used = places[(row / of_each * most + m) * pieces.count + c] != 0;
        if (used) rows.push_back(static_cast<int32_t>(row));
      }
      use.count = static_cast<int64_t>(rows.size()) - use.first;
      for (int64_t i = 0; i < use.count; i += kRows)
        for (int64_t part = 0; part < parts; ++part) jobs.push_back({c, use.first + i, std::min(kRows, use.count - i), part});
      if (use.count) uses.push_back(use);
    }
    products.assign(parts * rows.size() * pieces.ranks, 0.f);
  }

  // A job's products with A.
  template <class T>
  void down(const Pieces<T>& pieces, const Job& job, const float* x) {
    const int64_t begin = job.part * kDepth, depth = std::min(kDepth, pieces.columns - begin), ranks = pieces.ranks;
    const T* a = pieces.a + (job.piece * pieces.columns + begin) * ranks;
    float* made = products.data() + job.part * rows.size() * ranks;
    const auto from = [&](int64_t i) { return x + rows[i] * pieces.columns + begin; };
    const auto to = [&](int64_t i) { return made + i * ranks; };
    int64_t i = job.first;
    for (; i + 4 <= job.first + job.count; i += 4) {
      for (int q = 0; q < kQuarters; ++q) {  // as for a row alone
        const int64_t k = quarter_of(depth, q);
        const float* of[] = {from(i) + k, from(i + 1) + k, from(i + 2) + k, from(i + 3) + k};
        float* y[] = {to(i), to(i + 1), to(i + 2), to(i + 3)};
        accumulate<4, true>(of, quarter_of(depth, q + 1) - k, a + k * ranks, ranks, ranks, y);
      }
    }
    for (; i < job.first + job.count; ++i) accumulate_quarters(from(i), depth, a, ranks, ranks, to(i));
  }

  // Adds up the parts, in their order.
  void gather() {
    const size_t size = jobs.empty() ? 0 : products.size() / (jobs.back().part + 1);
    for (size_t i = size; i < products.size(); ++i) products[i % size] += products[i];
  }

  // Adds what the columns from `begin` to `end` of y get.
  template <class T>
  void up(const Pieces<T>& pieces, int64_t begin, int64_t end, float* y) const {
    const int64_t depth = pieces.ranks / pieces.shares;
    for (int64_t s = 0; s < pieces.shares; ++s) {
      const int64_t first = std::max(begin, pieces.starts[s]), last = std::min(end, s + 1 < pieces.shares ? pieces.starts[s + 1] : pieces.rows);
      if (first >= last) continue;
      for (const Use& use : uses) up(pieces, use, s * depth, depth, first, last - first, y);
    }
  }

 private:
  // The same for some ranks of one piece.
  template <class T>
  void up(const Pieces<T>& pieces, const Use& use, int64_t rank, int64_t depth, int64_t column, int64_t columns, float* y) const {
    const T* b = pieces.b + (use.piece * pieces.ranks + rank) * pieces.rows + column;
    const auto from = [&](int64_t i) { return products.data() + i * pieces.ranks + rank; };
    const auto to = [&](int64_t i) { return y + rows[i] * pieces.rows + column; };
    int64_t i = use.first;
    for (; i + 4 <= use.first + use.count; i += 4) {
      const float* of[] = {from(i), from(i + 1), from(i + 2), from(i + 3)};
      float* at[] = {to(i), to(i + 1), to(i + 2), to(i + 3)};
      accumulate<4, false>(of, depth, b, pieces.rows, columns, at);
    }
    for (; i < use.first + use.count; ++i) {
      int64_t used = depth;
      while (used > 0 && from(i)[used - 1] == 0) --used;  // ranks that only fill a piece
      accumulate_along(from(i), used, b, pieces.rows, columns, to(i));
    }
  }
};
