// SPDX-License-Identifier: BSD-3-Clause
// Products x W^T with W (N, K) in blocks of 4- or 8-bit numbers, in strips of 16 rows (kernels/strips.py).
//
// A row of x is rounded to 8 bits, block by block, and multiplied as integers. Four bytes of each row of a strip stand side by side, so the lanes of a register
// belong to different rows: what x is multiplied by is the same in all of them, and sums need not be gathered from lanes. Unsigned weights are used as they
// are stored: what their zero points add to a sum, zero * sum(x), is taken away from it, as integers: a sum begins with it.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "lanes.h"
#include "registers.h"

constexpr int64_t kStrip = 16;          // rows
constexpr int64_t kQuads = 4 * kStrip;  // bytes: four of each row
constexpr int kOfQuads = kQuads / kRegister;  // registers that hold them

struct Weight {
  int64_t rows, columns, block, blocks;  // N, K, weights that share a scale, blocks of a row
  int bits;
  const uint8_t* data;   // (strips, block * blocks * bits / 32, 16, 4): four bytes of each row; at 4 bits the even column is in the low half of a byte
  const float* scales;   // (strips, blocks, 16)
  const uint8_t* zeros;  // (strips, blocks, 16), or null: the middle of the range
  const float* bias;     // (N), or null

  int64_t row_bytes() const { return blocks * block * bits / 8; }
  int64_t quads() const { return block * bits / 32; }  // of a block
};

// How four bytes of weights and the numbers of x they belong to become operands of `Sum::add`: kParts of each. A unit is what a row of x has of them.
struct Int4 {
  using Sum = Sum4;
  static constexpr int kBits = 4, kParts = 2, kColumns = 8, kUnit = 8;
  INLINE static void weights(Integers bytes, Integers* parts) {
    parts[0] = bytes & every8(15);
    parts[1] = shifted_right<4>(bytes) & every8(15);
  }
  INLINE static void unit(const int8_t* numbers, uint8_t* out) {  // the even columns, then the odd ones
    const __m128i order = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, -1, -1, -1, -1, -1, -1, -1, -1);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm_shuffle_epi8(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(numbers)), order));
  }
};
struct Int8 {
  using Sum = Sum8;
  static constexpr int kBits = 8, kParts = Sum::kHalves, kColumns = 4, kUnit = 4 * Sum::kHalves;
  INLINE static void weights(Integers bytes, Integers* parts) { Sum::halves(bytes, parts); }
  INLINE static void unit(const int8_t* numbers, uint8_t* out) { Sum::unit(numbers, out); }
};

// Rows of x, (M, K), as 8-bit numbers, in panels of 8, 4, 2 or 1 rows. A panel is read from its beginning to its end: block after block, and in a block unit
// after unit, each of all rows; then what the rows' sums begin with, and their scales.
struct Rows {
  std::vector<uint8_t> held;
  uint8_t* panels = nullptr;  // in it, where a line of the cache begins
  int64_t row_bytes = 0;

  template <class Format>
  static int64_t block_bytes(const Weight& w) {  // of a row
    return w.quads() * Format::kUnit + sizeof(int32_t) + sizeof(float);
  }

  template <class Format>
  void resize(int64_t rows, const Weight& w) {
    row_bytes = w.blocks * block_bytes<Format>(w);
    held.resize(rows * row_bytes + kLine - 1);
    panels = held.data() + kLine - 1;
    panels -= reinterpret_cast<uintptr_t>(panels) % kLine;
  }

  // How many rows the panel has that begins at row `m`, and which of the `rows` a panel begins at.
  static int64_t height(int64_t m, int64_t rows) { return rows - m >= 8 ? 8 : rows - m >= 4 ? 4 : rows - m >= 2 ? 2 : 1; }
  static int64_t count(int64_t rows) { return rows / 8 + __builtin_popcountll(rows % 8); }
  static int64_t begin_of(int64_t panel, int64_t rows) {
    int64_t first = std::min(panel, rows / 8) * 8;
    for (int64_t i = rows / 8; i < panel; ++i) first += height(first, rows);
    return first;
  }

  const uint8_t* panel(int64_t m) const { return panels + m * row_bytes; }

  // Rounds `size` columns of x, or as many as there are, from a block's beginning on, of all rows of the panel that begins at row `first`: of all, so that
  // two threads do not write one line of the cache in turns.
  template <class Format>
  void round(const float* x, int64_t first, int64_t rows, int64_t begin, int64_t size, const Weight& w) {
    const int64_t end = std::min(begin + size, w.columns), high = height(first, rows), units = w.quads();
    uint8_t* out = panels + first * row_bytes + begin / w.block * high * block_bytes<Format>(w);
    for (; begin < end; begin += w.block, out += high * block_bytes<Format>(w)) {
      const int64_t some = std::min(w.columns - begin, w.block);
      uint8_t* ends = out + units * high * Format::kUnit;
      for (int64_t m = 0; m < high; ++m) {
        int8_t numbers[kLargest];
        const float scale = round_block(x + (first + m) * w.columns + begin, some, numbers);
        std::memset(numbers + some, 0, w.block - some);
        int32_t sum = 0;
        for (int64_t i = 0; i < w.block; ++i) sum += numbers[i];
        sum *= w.zeros ? -1 : -(1 << (Format::kBits - 1));
        for (int64_t u = 0; u < units; ++u) Format::unit(numbers + u * Format::kColumns, out + (u * high + m) * Format::kUnit);
        std::memcpy(ends + m * sizeof(int32_t), &sum, sizeof(sum));
        std::memcpy(ends + (high + m) * sizeof(int32_t), &scale, sizeof(scale));
      }
    }
  }

 private:
  static constexpr int64_t kLargest = 256;  // block

  // Returns what the numbers are to be multiplied by.
  static float round_block(const float* x, int64_t size, int8_t* numbers) {
    uint32_t largest = 0;  // magnitudes order as their bits do, infinity and what is no number last
    for (int64_t i = 0; i < size; ++i) {
      uint32_t bits;
      std::memcpy(&bits, x + i, 4);
      largest = std::max(largest, bits & 0x7fffffffu);
    }
    float top;
    std::memcpy(&top, &largest, 4);
    const bool finite = largest < 0x7f800000u;
    const float inverse = finite && top > 1e-30f ? 127.f / top : 0.f;
    for (int64_t i = 0; i < size; ++i) numbers[i] = static_cast<int8_t>(static_cast<int32_t>(std::nearbyint((finite ? x[i] : 0.f) * inverse)));
    return finite ? (inverse != 0 ? 1.f / inverse : 0.f) : std::numeric_limits<float>::quiet_NaN();
  }
};


template <class T>
INLINE T read(const uint8_t* p) {
  T value;
  std::memcpy(&value, p, sizeof(T));
  return value;
}

// y[m, n] for M rows of x, those of the panel, and the rows of a strip, which are read as they lie: memory is fastest so. `meanwhile` is called after each
// block.
template <class Format, int M, bool kZeros, class Meanwhile>
void tile(const Weight& w, const uint8_t* x, int64_t strip, float* y, Meanwhile& meanwhile) {
  using Sum = typename Format::Sum;
  constexpr int kChains = M <= 2 ? 2 : 1;  // sums of a row, so that one addition does not wait for the other
  constexpr int64_t kAtOnce = 4;           // quads: of every block, a multiple
  const int64_t quads = w.quads();
  const uint8_t* data = w.data + strip * kStrip * w.row_bytes();
  const float* scales = w.scales + strip * kStrip * w.blocks;
  const uint8_t* zeros = kZeros ? w.zeros + strip * kStrip * w.blocks : nullptr;
  Floats totals[kOfQuads * M];
#pragma GCC unroll 16
  for (Floats& total : totals) total = every(0.f);
  for (int64_t b = 0; b < w.blocks; ++b) {
    const uint8_t* begins = x + quads * M * Format::kUnit;
    const uint8_t* x_scales = begins + M * sizeof(int32_t);
#pragma GCC unroll 2
    for (int r = 0; r < kOfQuads; ++r) {
      Integers sums[M];
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        sums[m] = every32(read<int32_t>(begins + m * sizeof(int32_t)));
        if (kZeros) sums[m] = times(sums[m], lanes_of(zeros + r * kFloats));
      }
      const uint8_t* of = x;
      for (int64_t q = 0; q < quads;) {
        Sum some[M * kChains];
        const int64_t end = Sum::kNarrow ? q + kAtOnce : quads;
#pragma GCC unroll 1
        for (; q < end; q += kAtOnce) {
#pragma GCC unroll 4
          for (int i = 0; i < kAtOnce; ++i) {
            const uint8_t* at = data + (q + i) * kQuads + r * kRegister;
            Integers parts[Format::kParts];
            Format::weights(loaded(at), parts);
            if (r == 0) ask<(M > 1)>(at);
#pragma GCC unroll 2
            for (int p = 0; p < Format::kParts; ++p) {
#pragma GCC unroll 8
              for (int m = 0; m < M; ++m) {
                Sum& sum = some[m * kChains + (i * Format::kParts + p) % kChains];
                sum.add(parts[p], every32(read<int32_t>(of + m * Format::kUnit + p * sizeof(int32_t))));
                if (M > 2) asm("" : IN_REGISTER(sum.lanes));  // in this order: the weights stay in registers
              }
            }
            of += M * Format::kUnit;
          }
        }
#pragma GCC unroll 8
        for (int m = 0; m < M * kChains; ++m) sums[m / kChains] = some[m].added_to(sums[m / kChains]);
      }
      const Floats scale = loaded(scales + r * kFloats);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        Floats& total = totals[r * M + m];
        total = multiplied_added(floats(sums[m]), scale * every(read<float>(x_scales + m * sizeof(float))), total);
      }
    }
    data += quads * kQuads, scales += kStrip;
    if (kZeros) zeros += kStrip;
    x += M * Rows::block_bytes<Format>(w);
    if (M > 1) meanwhile();  // one row waits for memory as it is
  }
  const int64_t n = strip * kStrip, left = std::min(kStrip, w.rows - n);
  for (int m = 0; m < M; ++m) {
    alignas(kRegister) float made[kStrip], bias[kStrip] = {};
    if (w.bias) std::memcpy(bias, w.bias + n, left * sizeof(float));
    for (int r = 0; r < kOfQuads; ++r) put(made + r * kFloats, totals[r * M + m] + loaded(bias + r * kFloats));
    std::memcpy(y + m * w.rows + n, made, left * sizeof(float));
  }
}

// y[:, n] for all `count` rows of x, and the rows of some strips.
template <class Format, class Meanwhile>
void product(const Weight& w, const Rows& x, int64_t count, int64_t begin, int64_t end, float* y, Meanwhile& meanwhile) {
  const auto all = [&](int64_t m, auto high) {
    constexpr int M = decltype(high)::value;
    const auto make = w.zeros ? tile<Format, M, true, Meanwhile> : tile<Format, M, false, Meanwhile>;
    for (int64_t strip = begin; strip < end; ++strip) make(w, x.panel(m), strip, y + m * w.rows, meanwhile);
  };
  for (int64_t m = 0; m < count; m += Rows::height(m, count)) {
    switch (Rows::height(m, count)) {
      case 8: all(m, std::integral_constant<int, 8>()); break;
      case 4: all(m, std::integral_constant<int, 4>()); break;
      case 2: all(m, std::integral_constant<int, 2>()); break;
      default: all(m, std::integral_constant<int, 1>());
    }
  }
}

// Row `n` of the weight.
inline void row_of(const Weight& w, int64_t n, float* out) {
  const int64_t strip = n / kStrip, lane = n % kStrip;
  const uint8_t* data = w.data + strip * kStrip * w.row_bytes() + lane * 4;
  for (int64_t k = 0; k < w.columns; ++k) {
    const int64_t at = (strip * w.blocks + k / w.block) * kStrip + lane, byte = k * w.bits / 8;
    const int held = data[byte / 4 * kQuads + byte % 4], number = w.bits == 8 ? held : k % 2 ? held >> 4 : held & 15;
    out[k] = (number - (w.zeros ? w.zeros[at] : 1 << (w.bits - 1))) * w.scales[at];
  }
}
