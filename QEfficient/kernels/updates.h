// SPDX-License-Identifier: BSD-3-Clause
// What adapters add to a product: y += (x A) B, with A and B in floats, or in numbers of 8 bits, each row with the adapters that it uses.
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
#include "registers.h"

// Numbers of 8 bits have a scale for each rank, in the bytes behind them (kernels/ranks.py): what a row has with a rank is multiplied by both of them.
template <class T>
constexpr int64_t kTail = sizeof(T) == 1 ? 64 : 0;

template <class T>
struct Pieces {
  int64_t count, columns, ranks, rows;  // C, K, p, N
  const T* a;                           // (C, K + tail, p)
  const T* b;                           // (C, p, N + tail)
  const int64_t* starts;                // each of `shares` equal parts of the ranks adds to the columns from its start to the next one's alone
  int64_t shares;

  int64_t depth() const { return columns + kTail<T>; }
  int64_t stride() const { return rows + kTail<T>; }

  // What is to be multiplied with a rank of a piece.
  float scale(int64_t piece, int64_t rank) const {
    if constexpr (kTail<T> == 0) return 1.f;
    char bytes[sizeof(float)];
    for (size_t i = 0; i < sizeof(float); ++i) bytes[i] = a[(piece * depth() + columns + i) * ranks + rank];
    float of_a, of_b;
    std::memcpy(&of_a, bytes, sizeof(float));
    std::memcpy(&of_b, b + (piece * ranks + rank) * stride() + rows, sizeof(float));
    return of_a * of_b;
  }
};

// Rows of x that use a piece: some of `Updates::rows`, from `first` on.
struct Use {
  int64_t piece, first, count;
};

// A register of numbers of a row that goes on, or ends after `left` of them: looking for the end takes longer than what is computed.
template <bool kEnds, class T>
Floats load(const T* p, int64_t left) {
  if (!kEnds || left >= kFloats) return loaded(p);
  alignas(kRegister) T some[kFloats] = {};
  std::memcpy(some, p, left * sizeof(T));
  return loaded(some);
}

// A register of numbers of w from `at` on, of which `left` count. Up to `last` there are as many, whatever row they belong to, so none is looked for one
// by one.
template <bool kEnds, class T>
Floats load(const T* w, int64_t at, int64_t last, int64_t left) {
  return kEnds && at > last ? load<true>(w + at, left) : load<false>(w + at, left);
}

template <bool kEnds>
void store(float* p, Floats value, int64_t left) {
  if (!kEnds || left >= kFloats) return put(p, value);
  alignas(kRegister) float some[kFloats];
  put(some, value);
  std::memcpy(p, some, left * sizeof(float));
}

// y[m][c] += sum over k of x[m][k] * w[k][c], for M rows and V registers of columns, of which `left` columns are there. The sum begins with y, or with
// zeros, and is added to y then.
template <int M, int V, bool kEnds, bool kApart, class T>
void accumulate(const float* const* x, int64_t depth, const T* w, int64_t stride, int64_t left, float* const* y) {
  const int64_t last = (depth - 1) * stride + left - kFloats;
  Floats totals[M][V];
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < V; ++v) totals[m][v] = kApart ? every(0.f) : load<kEnds>(y[m] + v * kFloats, left - v * kFloats);
  for (int64_t k = 0; k < depth; ++k) {
    Floats parts[V];
    for (int v = 0; v < V; ++v) parts[v] = load<kEnds>(w, k * stride + v * kFloats, last, left - v * kFloats);
    for (int m = 0; m < M; ++m) {
      const Floats each = every(x[m][k]);
      for (int v = 0; v < V; ++v) totals[m][v] = multiplied_added(each, parts[v], totals[m][v]);
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int v = 0; v < V; ++v) {
      float* to = y[m] + v * kFloats;
      if (kApart) totals[m][v] = load<kEnds>(to, left - v * kFloats) + totals[m][v];
      store<kEnds>(to, totals[m][v], left - v * kFloats);
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
    if (left >= 2 * kFloats) {
      accumulate<M, 2, false, kApart>(x, depth, w + c, stride, left, at);
      c += 2 * kFloats;
    } else if (left >= kFloats) {
      accumulate<M, 1, false, kApart>(x, depth, w + c, stride, left, at);
      c += kFloats;
    } else {
      accumulate<M, 1, true, kApart>(x, depth, w + c, stride, left, at);
      c += kFloats;
    }
  }
}

// The quarters of a sum: the last takes what is left over.
constexpr int kQuarters = 4;
inline int64_t quarter_of(int64_t depth, int quarter) { return quarter < kQuarters ? depth / kQuarters * quarter : depth; }

// y[c] += sum over k of x[k] * w[k][c], of each quarter for itself, so that one addition does not wait for the other: S quarters at once.
template <int S, int V, bool kEnds, class T>
void accumulate_quarters(const float* x, int64_t depth, const T* w, int64_t stride, int64_t left, float* y) {
  const int64_t each = depth / kQuarters, last = (depth - 1) * stride + left - kFloats;
  for (int first = 0; first < kQuarters; first += S) {
    Floats totals[S][V];
    for (auto& of : totals)
      for (Floats& total : of) total = every(0.f);
    const auto add = [&](int s, int64_t k) {
      const Floats one = every(x[k]);
      for (int v = 0; v < V; ++v)
        totals[s][v] = multiplied_added(one, load<kEnds>(w, k * stride + v * kFloats, last, left - v * kFloats), totals[s][v]);
    };
    for (int64_t k = first * each; k < (first + 1) * each; ++k)
#pragma GCC unroll 4
      for (int s = 0; s < S; ++s) add(s, k + s * each);
    if (first + S == kQuarters)
      for (int64_t k = kQuarters * each; k < depth; ++k) add(S - 1, k);
    for (int v = 0; v < V; ++v) {
      Floats sum = load<kEnds>(y + v * kFloats, left - v * kFloats);
      for (int s = 0; s < S; ++s) sum = sum + totals[s][v];
      store<kEnds>(y + v * kFloats, sum, left - v * kFloats);
    }
  }
}

// The same for any number of columns.
template <class T>
void accumulate_quarters(const float* x, int64_t depth, const T* w, int64_t stride, int64_t columns, float* y) {
  for (int64_t c = 0; c < columns;) {
    const int64_t left = columns - c;
    if (left >= 4 * kFloats) {
      accumulate_quarters<2, 4, false>(x, depth, w + c, stride, left, y + c);
      c += 4 * kFloats;
    } else if (left >= 2 * kFloats) {
      accumulate_quarters<4, 2, false>(x, depth, w + c, stride, left, y + c);
      c += 2 * kFloats;
    } else if (left >= kFloats) {
      accumulate_quarters<4, 1, false>(x, depth, w + c, stride, left, y + c);
      c += kFloats;
    } else {
      accumulate_quarters<4, 1, true>(x, depth, w + c, stride, left, y + c);
      c += kFloats;
    }
  }
}

// The same for one row of x and a few rows of w, which are read on and on: they are far from each other in memory.
template <int Depth, bool kEnds, class T>
void accumulate_along(const float* x, const T* w, int64_t stride, int64_t columns, float* y) {
  Floats each[Depth];
  for (int k = 0; k < Depth; ++k) each[k] = every(x[k]);
  for (int64_t c = 0; c < columns; c += kFloats) {
    if (!kEnds && c * sizeof(T) % kLine == 0)  // of the rows that follow
      for (int k = 0; k < Depth; ++k) _mm_prefetch(reinterpret_cast<const char*>(w + (Depth + k) * stride + c), _MM_HINT_NTA);
    Floats total = load<kEnds>(y + c, columns - c);
    for (int k = 0; k < Depth; ++k) total = multiplied_added(each[k], load<kEnds>(w + k * stride + c, columns - c), total);
    store<kEnds>(y + c, total, columns - c);
  }
}

template <class T>
void accumulate_along(const float* x, int64_t depth, const T* w, int64_t stride, int64_t columns, float* y) {
  const int64_t whole = columns / kFloats * kFloats;
  int64_t k = 0;
  for (; k + 8 <= depth; k += 8) accumulate_along<8, false>(x + k, w + k * stride, stride, whole, y);
  for (; k < depth; ++k) accumulate_along<1, false>(x + k, w + k * stride, stride, whole, y);
  if (whole < columns)
    for (k = 0; k < depth; ++k) accumulate_along<1, true>(x + k, w + k * stride + whole, stride, columns - whole, y + whole);
}

// What some ranks of a piece add to some columns of y.
template <class T>
struct Part {
  Use use;
  int64_t rank, depth, column, columns;
  const T* b;  // (depth, columns), of Pieces::stride
};

// Rows of one call and the pieces that they use.
struct Updates {
  // What one thread does at once of the products with A: some rows of a use, of a part of the columns of x.
  static constexpr int64_t kRows = 16, kDepth = 1024;
  static int64_t parts_of(int64_t columns) { return (columns + kDepth - 1) / kDepth; }

  std::vector<Use> uses, jobs;
  std::vector<int32_t> rows;
  std::vector<float> products;  // (parts of the columns, rows, p), the products with A

  // `places` (B or 1, m, C) is not zero where a row uses a piece; null, or of a single row and piece: all rows use it.
  template <class T>
  void find(const Pieces<T>& pieces, int64_t count, const float* places, int64_t batch, int64_t most) {
    uses.clear();
    rows.clear();
    jobs.clear();
    products.clear();
    const bool all = !places || (batch == 1 && pieces.count == 1);
    const int64_t of_each = batch > 1 ? count / batch : count;
    if (pieces.count == 1 && pieces.ranks == pieces.shares && zeros(pieces.a, pieces.depth() * pieces.ranks)) return;  // the bare base
    for (int64_t c = 0; c < pieces.count; ++c) {
      Use use{c, static_cast<int64_t>(rows.size()), 0};
      for (int64_t row = 0; row < count; ++row) {
        bool used = all;
        for (int64_t m = 0; m < most && !used; ++m) used = places[(row / of_each * most + m) * pieces.count + c] != 0;
        if (used) rows.push_back(static_cast<int32_t>(row));
      }
      use.count = static_cast<int64_t>(rows.size()) - use.first;
      for (int64_t i = 0; i < use.count; i += kRows) jobs.push_back({c, use.first + i, std::min(kRows, use.count - i)});
      if (use.count) uses.push_back(use);
    }
    products.assign(parts_of(pieces.columns) * rows.size() * pieces.ranks, 0.f);
  }

  template <class T>
  static bool zeros(const T* p, int64_t count) {
    return p[0] == 0 && std::memcmp(p, p + 1, (count - 1) * sizeof(T)) == 0;
  }

  // A job's products with A, of a part of the columns.
  template <class T>
  void down(const Pieces<T>& pieces, const Use& job, int64_t part, const float* x) {
    const int64_t begin = part * kDepth, depth = std::min(kDepth, pieces.columns - begin), ranks = pieces.ranks;
    const T* a = pieces.a + (job.piece * pieces.depth() + begin) * ranks;
    float* made = products.data() + part * rows.size() * ranks;
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
  template <class T>
  void gather(const Pieces<T>& pieces) {
    const size_t size = rows.size() * pieces.ranks;
    for (size_t i = size; i < products.size(); ++i) products[i % size] += products[i];
    if constexpr (kTail<T> == 0) return;
    for (const Use& use : uses) {
      for (int64_t k = 0; k < pieces.ranks; ++k) {
        const float scale = pieces.scale(use.piece, k);
        for (int64_t i = use.first; i < use.first + use.count; ++i) products[i * pieces.ranks + k] *= scale;
      }
    }
  }

  // What the columns from `begin` to `end` of y get, in parts.
  template <class T>
  void divide(const Pieces<T>& pieces, int64_t begin, int64_t end, std::vector<Part<T>>& parts) const {
    parts.clear();
    const int64_t depth = pieces.ranks / pieces.shares;
    for (int64_t s = 0; s < pieces.shares; ++s) {
      const int64_t first = std::max(begin, pieces.starts[s]), last = std::min(end, s + 1 < pieces.shares ? pieces.starts[s + 1] : pieces.rows);
      if (first >= last) continue;
      for (const Use& use : uses)
        parts.push_back({use, s * depth, used(use, s * depth, depth, pieces.ranks), first, last - first,
                         pieces.b + (use.piece * pieces.ranks + s * depth) * pieces.stride() + first});
    }
  }

  // How many of `depth` ranks the rows of a use have: those that only fill a piece give zeros.
  int64_t used(const Use& use, int64_t rank, int64_t depth, int64_t ranks) const {
    const auto none = [&](int64_t k) {
      for (int64_t i = use.first; i < use.first + use.count; ++i)
        if (products[i * ranks + rank + k] != 0) return false;
      return true;
    };
    while (depth > 0 && none(depth - 1)) --depth;
    return depth;
  }

  // Adds a part.
  template <class T>
  void up(const Pieces<T>& pieces, const Part<T>& part, float* y) const {
    const auto from = [&](int64_t i) { return products.data() + i * pieces.ranks + part.rank; };
    const auto to = [&](int64_t i) { return y + rows[i] * pieces.rows + part.column; };
    const Use& use = part.use;
    int64_t i = use.first;
    for (; i + 4 <= use.first + use.count; i += 4) {
      const float* of[] = {from(i), from(i + 1), from(i + 2), from(i + 3)};
      float* at[] = {to(i), to(i + 1), to(i + 2), to(i + 3)};
      accumulate<4, false>(of, part.depth, part.b, pieces.stride(), part.columns, at);
    }
    for (; i < use.first + use.count; ++i) accumulate_along(from(i), part.depth, part.b, pieces.stride(), part.columns, to(i));
  }
};

// Asks for B's numbers of some parts, a few lines of the cache at a time.
template <class T>
struct Asking {
  const Part<T>*part, *end;
  int64_t stride, each;
  int64_t rank = 0, column = 0;
  static constexpr int64_t kOfLine = kLine / sizeof(T);

  Asking(const std::vector<Part<T>>& parts, int64_t apart, int64_t times) : part(parts.data()), end(part + parts.size()), stride(apart) {
    int64_t lines = 0;
    for (const Part<T>& p : parts) lines += p.depth * ((p.columns + kOfLine - 1) / kOfLine);
    each = times ? (lines + times - 1) / times : 0;
  }
  void operator()() {
    for (int64_t i = 0; i < each && part < end; ++i) {
      _mm_prefetch(reinterpret_cast<const char*>(part->b + rank * stride + column), _MM_HINT_T1);
      if (++rank < part->depth) continue;
      rank = 0, column += kOfLine;
      if (column < part->columns) continue;
      column = 0, ++part;
    }
  }
};
