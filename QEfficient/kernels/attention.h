// SPDX-License-Identifier: BSD-3-Clause
// Attention of one token of each row over the row's cache.
//
// All query heads that share keys and values are computed together, so each is read from memory once, and some places at a time, so that memory has no
// rest while weights are made. Long caches are cut into parts at fixed places: a row's result depends neither on the rows beside it nor on the number
// of threads.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "lanes.h"

// One call. Sizes: B rows, H heads of queries and G of keys and values, D numbers in each, L places in the cache, R of each head that are turned.
struct Attention {
  int64_t rows, heads, kv_heads, size, places, turned;
  int64_t window;  // tokens that a token attends to, itself included; negative: all
  float scale;
  const float *query, *key, *value;  // (B, H D) and (B, G D)
  int64_t query_stride, key_stride;  // numbers from one row to the next
  float *keys, *values;              // (B, G, L, D), the cache
  const int32_t* last;               // (B,) the place of the token
  const float *cos, *sin;            // (positions, R / 2), or null
  float* y;                          // (B, H D)

  // The weights of some places for each head, relative to the largest score so far.
  struct Weights {
    std::vector<float> scores, largest, factors, totals;  // (heads, kBlock), (heads), (heads): for what was added up before, (heads, 8)

    void begin(int64_t heads) {
      heads = (heads + kLanes - 1) / kLanes * kLanes;
      scores.resize(heads * kBlock);
      largest.assign(heads, -std::numeric_limits<float>::infinity());
      factors.assign(heads, 0.f);
      totals.assign(heads * kLanes, 0.f);
    }

    // Makes weights of scores, of which `count` are there.
    void make(int64_t heads, int64_t count) {
      for (int64_t h = 0; h < heads; ++h) {
        float* of = scores.data() + h * kBlock;
        std::fill(of + count, of + kBlock, -std::numeric_limits<float>::infinity());
        factors[h] = largest[h];
        largest[h] = std::max(largest[h], largest_of(_mm256_max_ps(_mm256_loadu_ps(of), _mm256_loadu_ps(of + kLanes))));
      }
      for (int64_t h = 0; h < heads; h += kLanes)
        _mm256_storeu_ps(factors.data() + h, exponential(_mm256_sub_ps(_mm256_loadu_ps(factors.data() + h), _mm256_loadu_ps(largest.data() + h))));
      for (int64_t h = 0; h < heads; ++h) {
        const __m256 top = _mm256_set1_ps(largest[h]);
        float *of = scores.data() + h * kBlock, *total = totals.data() + h * kLanes;
        const __m256 a = exponential(_mm256_sub_ps(_mm256_loadu_ps(of), top)), b = exponential(_mm256_sub_ps(_mm256_loadu_ps(of + kLanes), top));
        _mm256_storeu_ps(of, a);
        _mm256_storeu_ps(of + kLanes, b);
        _mm256_storeu_ps(total, _mm256_fmadd_ps(_mm256_set1_ps(factors[h]), _mm256_loadu_ps(total), _mm256_add_ps(a, b)));
      }
    }
  };

  // Some places of the cache of a row's head: all that it attends to, or some of them.
  struct Part {
    int64_t row, head, first, count;
    bool all;
  };
  static constexpr int64_t kPart = 512, kBlock = 2 * kLanes;
  std::vector<Part> parts;
  std::vector<float> sums;  // (parts, H / G, D + 2): each head's sum of values, then its largest score and the sum of the weights

  int64_t group() const { return heads / kv_heads; }
  float* sums_at(int64_t part) { return sums.data() + part * group() * (size + 2); }

  // Writes the token's keys and values into the cache and cuts it into parts.
  void begin() {
    parts.clear();
    for (int64_t b = 0; b < rows; ++b)
      for (int64_t g = 0; g < kv_heads; ++g) {
        const int64_t at = ((b * kv_heads + g) * places + last[b]) * size, end = last[b] + 1;
        turn(key + b * key_stride + g * size, last[b], 1.f, keys + at);
        std::copy_n(value + b * key_stride + g * size, size, values + at);
        const int64_t first = window < 0 ? 0 : std::max<int64_t>(0, end - window);
        for (int64_t i = first; i < end;) {
          const int64_t next = std::min(end, (i / kPart + 1) * kPart);
          parts.push_back({b, g, i, next - i, next - i == end - first});
          i = next;
        }
      }
    sums.resize(parts.size() * group() * (size + 2));
  }

  void attend(int64_t i) {
    const Part& part = parts[i];
    thread_local std::vector<float> queries;
    thread_local Weights weights;
    queries.resize(group() * size);
    weights.begin(group());
    const int64_t from = ((part.row * kv_heads + part.head) * places + part.first) * size;
    for (int64_t h = 0; h < group(); ++h)
      turn(query + part.row * query_stride + (part.head * group() + h) * size, last[part.row], scale, queries.data() + h * size);
    float* out = sums_at(i);
    std::fill_n(out, group() * (size + 2), 0.f);
    for (int64_t k = 0; k < part.count; k += kBlock) {
      const int64_t count = std::min(kBlock, part.count - k);
      const float *k_at = keys + from + k * size, *v_at = values + from + k * size;
      for (int64_t j = 0; j < count; j += 4) {
        ask(k_at + (j + kBlock) * size, 4 * size);
        ask(v_at + (j + kBlock) * size, 4 * size);
        in_pairs([&](auto pair, int64_t h) {
          four_scores<pair()>(queries.data() + h * size, k_at + j * size, count - j, weights.scores.data() + h * kBlock + j, kBlock);
        });
      }
      weights.make(group(), count);
      in_pairs([&](auto pair, int64_t h) {
        add_values<pair()>(weights.scores.data() + h * kBlock, weights.factors.data() + h, v_at, count, out + h * (size + 2));
      });
    }
    for (int64_t h = 0; h < group(); ++h) {
      out[h * (size + 2) + size] = weights.largest[h];
      out[h * (size + 2) + size + 1] = sum_of(_mm256_loadu_ps(weights.totals.data() + h * kLanes));
    }
    if (part.all) join(i, i + 1);
  }

  // Puts the parts together.
  void end() {
    for (size_t i = 0; i < parts.size();) {
      size_t next = i + 1;
      while (next < parts.size() && parts[next].row == parts[i].row && parts[next].head == parts[i].head) ++next;
      if (!parts[i].all) join(i, next);
      i = next;
    }
  }

 private:
  // Makes y of the parts of a row's head.
  void join(size_t first, size_t last) {
    for (int64_t h = 0; h < group(); ++h) {
      const auto of = [&](size_t p) { return sums_at(p) + h * (size + 2); };
      float largest = of(first)[size], total = 0;
      for (size_t p = first; p < last; ++p) largest = std::max(largest, of(p)[size]);
      float* out = y + parts[first].row * heads * size + (parts[first].head * group() + h) * size;
      std::fill_n(out, size, 0.f);
      for (size_t p = first; p < last; ++p) {
        const float weight = std::exp(of(p)[size] - largest);
        total += weight * of(p)[size + 1];
        for (int64_t d = 0; d < size; ++d) out[d] += weight * of(p)[d];
      }
      for (int64_t d = 0; d < size; ++d) out[d] /= total;
    }
  }

  // Asks for numbers that are needed soon; there may be none.
  static void ask(const float* p, int64_t count) {
    for (int64_t i = 0; i < count; i += 16) _mm_prefetch(reinterpret_cast<const char*>(p + i), _MM_HINT_NTA);
  }

  // Rotary embedding of one head at a position, halves against halves.
  void turn(const float* x, int64_t position, float by, float* out) const {
    const int64_t half = cos ? turned / 2 : 0;
    for (int64_t i = 0; i < half; ++i) {
      const float c = cos[position * half + i], s = sin[position * half + i];
      out[i] = by * (x[i] * c - x[i + half] * s);
      out[i + half] = by * (x[i + half] * c + x[i] * s);
    }
    for (int64_t i = 2 * half; i < size; ++i) out[i] = by * x[i];
  }

  // Calls `use` with 2 and the first head of each pair, then with 1 and the one that may be left: what is loaded serves both.
  template <class Use>
  void in_pairs(Use use) const {
    int64_t h = 0;
    for (; h + 2 <= group(); h += 2) use(std::integral_constant<int, 2>(), h);
    if (h < group()) use(std::integral_constant<int, 1>(), h);
  }

  // Scores of four keys, of which `left` are there, for P heads; the next head's are `stride` further on.
  template <int P>
  void four_scores(const float* q, const float* k, int64_t left, float* out, int64_t stride) const {
    const float* each[4];
    for (int64_t i = 0; i < 4; ++i) each[i] = k + std::min(i, left - 1) * size;
    __m256 totals[P][4];
    for (auto& of_head : totals)
      for (auto& total : of_head) total = _mm256_setzero_ps();
    for (int64_t d = 0; d < size; d += kLanes) {
      __m256 x[P];
      for (int p = 0; p < P; ++p) x[p] = _mm256_loadu_ps(q + p * size + d);
      for (int i = 0; i < 4; ++i) {
        const __m256 of_key = _mm256_loadu_ps(each[i] + d);
        for (int p = 0; p < P; ++p) totals[p][i] = _mm256_fmadd_ps(x[p], of_key, totals[p][i]);
      }
    }
    for (int p = 0; p < P; ++p) _mm_storeu_ps(out + p * stride, sums_of(totals[p][0], totals[p][1], totals[p][2], totals[p][3]));
  }

  // out = out * factors + sum over k of weights[k] * v[k], for P heads; the next head's weights are kBlock further on.
  template <int P>
  void add_values(const float* weights, const float* factors, const float* v, int64_t count, float* out) const {
    int64_t d = 0;
    for (; d + 4 * kLanes <= size; d += 4 * kLanes) add_values<P, 4>(weights, factors, v + d, count, out + d);
    for (; d < size; d += kLanes) add_values<P, 1>(weights, factors, v + d, count, out + d);
  }

  template <int P, int V>
  void add_values(const float* weights, const float* factors, const float* v, int64_t count, float* out) const {
    __m256 totals[P][V];
    for (int p = 0; p < P; ++p)
      for (int i = 0; i < V; ++i)
        totals[p][i] = _mm256_mul_ps(_mm256_broadcast_ss(factors + p), _mm256_loadu_ps(out + p * (size + 2) + i * kLanes));
    for (int64_t k = 0; k < count; ++k, v += size) {
      __m256 parts[V];
      for (int i = 0; i < V; ++i) parts[i] = _mm256_loadu_ps(v + i * kLanes);
      for (int p = 0; p < P; ++p) {
        const __m256 weight = _mm256_broadcast_ss(weights + p * kBlock + k);
        for (int i = 0; i < V; ++i) totals[p][i] = _mm256_fmadd_ps(weight, parts[i], totals[p][i]);
      }
    }
    for (int p = 0; p < P; ++p)
      for (int i = 0; i < V; ++i) _mm256_storeu_ps(out + p * (size + 2) + i * kLanes, totals[p][i]);
  }
};
