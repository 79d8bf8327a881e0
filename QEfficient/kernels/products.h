// SPDX-License-Identifier: BSD-3-Clause
// Products x W^T with W (N, K) in blocks of 4- or 8-bit numbers, laid out as for ONNX Runtime's MatMulNBits.
//
// A row of x is rounded to 8 bits, block by block, and multiplied as integers. Unsigned weights are used as they are stored: what their zero points
// add to a sum, zero * sum(x), is taken away from it, as integers: a sum begins with it. Several small blocks are multiplied side by side, each in lanes of its own, so that what is to
// be done once a block is done for all of them at once.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "lanes.h"
#include "registers.h"

constexpr int64_t kNearCache = 24 << 10;  // bytes of the nearest cache that a part of a panel may take

struct Weight {
  int64_t rows, columns, block, blocks;  // N, K, weights that share a scale, blocks of a row
  int bits;
  const uint8_t* data;   // (N, blocks, block * bits / 8); at 4 bits the even column is in the low half of a byte
  const float* scales;   // (N, blocks)
  const uint8_t* zeros;  // (N, row_zeros()), laid out as the weights are, or null: the middle of the range
  const float* bias;     // (N), or null

  int64_t row_bytes() const { return blocks * block * bits / 8; }
  int64_t row_zeros() const { return (blocks * bits + 7) / 8; }
};

// How the bytes of weights and the numbers of x they belong to become operands of `Sum::add`: a register of weights makes kParts operands. Each byte
// holds kColumns columns; `numbers` is given the 8-bit numbers of one of them for each byte.
struct Int4 {
  using Sum = Sum4;
  static constexpr int kBits = 4, kColumns = 2, kParts = 2;
  INLINE static void weights(Integers bytes, Integers* parts) {
    parts[0] = bytes & every8(15);
    parts[1] = shifted_right<4>(bytes) & every8(15);
  }
  static void numbers(Integers bytes, Integers* parts) { parts[0] = bytes; }
};
struct Int8 {
  using Sum = Sum8;
  static constexpr int kBits = 8, kColumns = 1, kParts = Sum::kHalves;
  INLINE static void weights(Integers bytes, Integers* parts) { Sum::halves(bytes, parts); }
  static void numbers(Integers bytes, Integers* parts) { Sum::signed_halves(bytes, parts); }
};

// What is multiplied at a time: Bytes (64 or 128) bytes of a row of weights, whose blocks take kBlockBytes each.
template <class F, int kBlockBytes, int Bytes>
struct Group {
  using Format = F;
  using Sum = typename Format::Sum;
  static constexpr int kBytes = Bytes, kRegisters = Bytes / kRegister, kBlocks = std::max(1, Bytes / kBlockBytes), kColumns = Bytes * Format::kColumns;
  static constexpr int kParts = kRegisters * Format::kParts;
  static constexpr int kPanelBytes = kRegister * (kParts + 2);  // of a row of x: the numbers, then for each lane what its sum begins with and their scale

  // The bytes, so that each 32-bit lane holds those of one block, the same in all registers: block_of(lane).
  static constexpr int kMixed = std::min(kBlocks, kRegisters);  // registers whose lanes stand side by side
  INLINE static void load(const void* p, Integers* registers) {
    for (int i = 0; i < kRegisters; ++i) registers[i] = loaded(static_cast<const uint8_t*>(p) + i * kRegister);
    for (int apart = 1; apart < kMixed; apart *= 2) {
      Integers from[kRegisters];
      for (int i = 0; i < kRegisters; ++i) from[i] = registers[i];
      for (int i = 0; i < kRegisters / 2; ++i) {
        registers[2 * i] = low_lanes(from[i], from[i + kRegisters / 2]);
        registers[2 * i + 1] = high_lanes(from[i], from[i + kRegisters / 2]);
      }
    }
  }
  static constexpr int block_of(int lane) {  // registers are mixed within 16 bytes, four lanes
    return (lane % kMixed * (Bytes / kMixed) / 16 + lane / 4) * kBlocks / (Bytes / 16);
  }

  // What is given for each block, for each lane.
  INLINE static __m128 two(const float* p) { return _mm_castpd_ps(_mm_load_sd(reinterpret_cast<const double*>(p))); }
  INLINE static Floats spread(const float* p) {
    if constexpr (kBlocks == 1) return every(*p);
    if constexpr (kBlocks == 2 && kMixed == 2) return every_two(p);
    if constexpr (kBlocks == 4 && kMixed == 4) return every_four(p);
    return permuted(kBlocks == 8 ? _mm256_loadu_ps(p) : _mm256_castps128_ps256(kBlocks == 4 ? _mm_loadu_ps(p) : two(p)), of_lanes<1>());
  }
  INLINE static Integers zeros(const uint8_t* p, int64_t block) {  // of a row, from a block on
    constexpr int kBits = Format::kBits;
    p += block * kBits / 8;
    const int skip = static_cast<int>(block * kBits % 8);
    uint64_t bits = 0;
    if (skip == 0) {
      std::memcpy(&bits, p, (kBlocks * kBits + 7) / 8);
    } else {
      std::memcpy(&bits, p, (kBlocks * kBits + 11) / 8);
    }
    return shifted_each(every32(static_cast<int32_t>(bits >> skip)), of_lanes<kBits>()) & every32((1 << kBits) - 1);
  }

  // Writes a row's part of a panel, for weights that have zero points of their own or not.
  static void place(const int8_t* numbers, const float* scales, bool zeros, uint8_t* out) {
    Integers parts[kParts], ones[Format::kParts];
    for (int c = 0; c < Format::kColumns; ++c) {
      int8_t bytes[Bytes];
      for (int i = 0; i < Bytes; ++i) bytes[i] = numbers[i * Format::kColumns + c];
      Integers registers[kRegisters];
      load(bytes, registers);
      for (int i = 0; i < kRegisters; ++i) Format::numbers(registers[i], parts + i * Format::kParts + c);
    }
    Format::weights(every8(Format::kBits == 4 ? 0x11 : 1), ones);
    Sum sum;
    for (int p = 0; p < kParts; ++p) {
      sum.add(ones[p % Format::kParts], parts[p]);
      put(out + p * kRegister, parts[p]);
    }
    put(out + kParts * kRegister, Sum::negative(zeros ? sum.lanes : Sum::times(sum.lanes, every32(1 << (Format::kBits - 1)))));
    put(reinterpret_cast<float*>(out + (kParts + 1) * kRegister), spread(scales));
  }

 private:
  template <int kTimes>
  INLINE static Integers of_lanes() {
    alignas(kRegister) static constexpr auto blocks = [] {
      std::array<int32_t, kRegister / 4> made{};
      for (int lane = 0; lane < kRegister / 4; ++lane) made[lane] = block_of(lane) * kTimes;
      return made;
    }();
    return loaded(reinterpret_cast<const uint8_t*>(blocks.data()));
  }
};

// A row is `wide` groups of 128 bytes and then perhaps a narrow one of 64. The last one ends where the row ends, so that some of its blocks may be in
// the group before, too: for those the numbers of x are zeros. (Rows shorter than a group are extended by `product`.)
template <class F, int kBlockBytes>
struct Layout {
  using Format = F;
  using Wide = Group<F, kBlockBytes, 128>;
  using Narrow = Group<F, kBlockBytes, 64>;
  static constexpr int kBlock = kBlockBytes;
  static constexpr bool kLarge = kBlockBytes >= 64;
  static constexpr int kTogether = together_of(kLarge);
  int64_t row_bytes, wide;
  bool narrow;
  explicit Layout(const Weight& w) : row_bytes(std::max<int64_t>(128, w.row_bytes())) {
    const int64_t rest = row_bytes % 128;
    narrow = rest > 0 && rest <= 64;
    wide = row_bytes / 128 + (rest > 0 && !narrow);
  }
  int64_t begin(int64_t group) const { return group < wide ? std::min(group * 128, row_bytes - 128) : row_bytes - 64; }
  int64_t panel_bytes() const { return wide * Wide::kPanelBytes + narrow * Narrow::kPanelBytes; }
};

// Rows of x, (M, K), as 8-bit numbers, in panels of 8, 4 or 1 rows. A panel is read from its beginning to its end: group after group, and in a group
// row after row.
struct Rows {
  std::vector<uint8_t> held;
  uint8_t* panels = nullptr;  // in it, where a line of the cache begins
  int64_t row_bytes = 0;

  template <class Layout>
  void resize(int64_t rows, const Weight& w) {
    row_bytes = Layout(w).panel_bytes();
    held.resize(rows * row_bytes + kLine - 1);
    panels = held.data() + kLine - 1;
    panels -= reinterpret_cast<uintptr_t>(panels) % kLine;
  }

  // How many rows the panel has that begins at row `m`.
  static int64_t height(int64_t m, int64_t rows) { return rows - m >= 8 ? 8 : rows - m >= 4 ? 4 : 1; }

  const uint8_t* panel(int64_t m) const { return panels + m * row_bytes; }

  template <class Layout>
  void round(const float* x, int64_t row, int64_t rows, const Weight& w) {
    const int64_t of_eight = rows / 8 * 8;
    const int64_t first = row < of_eight ? row / 8 * 8 : row < of_eight + (rows - of_eight) / 4 * 4 ? of_eight : row;
    const int64_t high = height(first, rows);
    const Layout layout(w);
    uint8_t* out = panels + first * row_bytes;
    for (int64_t g = 0; g < layout.wide; ++g) {
      group<typename Layout::Wide>(x, g * Layout::Wide::kColumns, layout.begin(g), w, out + (row - first) * Layout::Wide::kPanelBytes);
      out += high * Layout::Wide::kPanelBytes;
    }
    if (layout.narrow)
      group<typename Layout::Narrow>(x, layout.wide * Layout::Wide::kColumns, layout.begin(layout.wide), w,
                                     out + (row - first) * Layout::Narrow::kPanelBytes);
  }

 private:
  // Rounds what belongs to the group of weights that begins at byte `at`, without the columns before `fresh`.
  template <class Group>
  static void group(const float* x, int64_t fresh, int64_t at, const Weight& w, uint8_t* out) {
    constexpr int kSize = Group::kColumns / Group::kBlocks;  // columns of a block
    int8_t numbers[Group::kColumns];
    float scales[Group::kBlocks];
    for (int b = 0; b < Group::kBlocks; ++b) {
      const int64_t begin = at * 8 / w.bits + b * kSize;
      const int64_t size = begin < fresh ? 0 : std::clamp<int64_t>(w.columns - begin, 0, kSize);
      scales[b] = round_block(x + begin, size, numbers + b * kSize);
      std::memset(numbers + b * kSize + size, 0, kSize - size);
    }
    Group::place(numbers, scales, w.zeros != nullptr, out);
  }

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

// A row of the weight.
struct WeightRow {
  const uint8_t* data;
  const float* scales;
  const uint8_t* zeros;

  WeightRow(const Weight& w, int64_t n)
      : data(w.data + n * w.row_bytes()), scales(w.scales + n * w.blocks), zeros(w.zeros ? w.zeros + n * w.row_zeros() : nullptr) {}
};

// Adds to the totals of M rows of x what a group of T rows of weights gives, the one that begins at their byte `at`, with the block `block`. The weights
// to be asked for are `ahead` bytes further on, their scales `scales_ahead` floats.
template <class Group, int M, int T, bool kLarge, bool kZeros>
INLINE void add_group(const WeightRow* rows, int64_t at, int64_t block, int64_t ahead, int64_t scales_ahead, const uint8_t* panel, Floats* totals) {
  using Sum = typename Group::Sum;
  Integers parts[T][Group::kParts], zeros[T];
  Floats scales[T];
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) {
    const uint8_t* data = rows[t].data + at;
    const float* scale = rows[t].scales + block;
    Integers registers[Group::kRegisters];
    Group::load(data, registers);
#pragma GCC unroll 4
    for (int i = 0; i < Group::kRegisters; ++i) Group::Format::weights(registers[i], parts[t] + i * Group::Format::kParts);
    ask<Group::kBytes, (M > 1)>(data, ahead);
    if (Group::kBlocks >= 4)  // otherwise a line of scales lasts long
      _mm_prefetch(reinterpret_cast<const char*>(scale + scales_ahead), _MM_HINT_T0);
    scales[t] = Group::spread(scale);
    if (kZeros) zeros[t] = Group::zeros(rows[t].zeros, block);
  }
  const Floats scale = together<T>(scales);
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    const uint8_t* x = panel + m * Group::kPanelBytes;
    const Integers begin = loaded(x + Group::kParts * kRegister);
    Sum sums[std::max(T, 2)];  // of several rows, or of one in two, so that one addition does not wait for the other
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) sums[t].lanes = kZeros ? Sum::times(begin, zeros[t]) : begin;
#pragma GCC unroll 8
    for (int i = 0; i < Group::kParts; ++i) {
      Integers numbers = loaded(x + i * kRegister);
      if (T > 1) asm("" : IN_REGISTER(numbers));  // loaded once
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) sums[T > 1 ? t : i % 2].add(parts[t][i], numbers);
      if (M == 1 || (T == 1 && i % 2 == 0)) continue;
#pragma GCC unroll 4
      for (Sum& sum : sums) asm("" : IN_REGISTER(sum.lanes));  // in this order: with all products first there are not registers enough for the weights
    }
    totals[m] = multiplied_added(floats(together<T, kLarge>(sums)), scale * loaded(reinterpret_cast<const float*>(x + (Group::kParts + 1) * kRegister)), totals[m]);
  }
}

// y[m, n] for M rows of x and R rows of the weight, T at a time, which are read as they lie, one after the other: memory is fastest so. Of a panel that
// does not fit into the nearest cache they are multiplied by a part, then by the next. `meanwhile` is called after each group.
template <class Layout, int M, int R, int T, bool kZeros, class Meanwhile>
void tile(const Weight& w, const Rows& x, int64_t m0, int64_t n0, float* y, Meanwhile& meanwhile) {
  const Layout layout(w);
  const int64_t ahead = (kAhead + layout.row_bytes - 1) / layout.row_bytes;  // rows
  const int64_t parts = std::max<int64_t>(1, (layout.wide * M * Layout::Wide::kPanelBytes + kNearCache - 1) / kNearCache);
  Floats totals[R / T * M];
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t first = layout.wide * part / parts, last = layout.wide * (part + 1) / parts;
    for (int r = 0; r < R / T; ++r) {
      const int64_t n = n0 + r * T;
      const WeightRow rows[] = {{w, n}, {w, n + 1 % T}, {w, n + 2 % T}, {w, n + 3 % T}};
      const uint8_t* panel = x.panel(m0) + first * M * Layout::Wide::kPanelBytes;
      Floats sums[M];
      for (int m = 0; m < M; ++m) sums[m] = part ? totals[r * M + m] : every(0.f);
      const auto add = [&](auto group, int64_t g) {
        const int64_t at = layout.begin(g);
        add_group<decltype(group), M, T, Layout::kLarge, kZeros>(rows, at, at / Layout::kBlock, ahead * layout.row_bytes, ahead * w.blocks, panel, sums);
        panel += M * group.kPanelBytes;
        if (M > 1) meanwhile();  // one row waits for memory as it is
      };
      for (int64_t g = first; g < last; ++g) add(typename Layout::Wide(), g);
      if (layout.narrow && last == layout.wide) add(typename Layout::Narrow(), last);
      std::copy_n(sums, M, totals + r * M);
    }
  }
  for (int m = 0; m < M; ++m) {
    float* to = y + (m0 + m) * w.rows + n0;
    if constexpr (R % 4 == 0) {
      for (int r = 0; r < R; r += 4) {
        const __m128 bias = w.bias ? _mm_loadu_ps(w.bias + n0 + r) : _mm_setzero_ps();
        _mm_storeu_ps(to + r, _mm_add_ps(sums_of_rows<4, T, Layout::kLarge, M>(totals + r / T * M + m), bias));
      }
    } else {
      *to = _mm_cvtss_f32(sums_of_rows<1, T, Layout::kLarge, M>(totals + m)) + (w.bias ? w.bias[n0] : 0.f);
    }
  }
}

template <class Layout, int M, int R, int T, class Meanwhile>
void product(const Weight& w, const Rows& x, int64_t m, int64_t begin, int64_t end, float* y, Meanwhile& meanwhile) {
  const auto most = w.zeros ? tile<Layout, M, R, T, true, Meanwhile> : tile<Layout, M, R, T, false, Meanwhile>;
  const auto rest = w.zeros ? tile<Layout, M, 1, 1, true, Meanwhile> : tile<Layout, M, 1, 1, false, Meanwhile>;
  int64_t n = begin;
  for (; n + R <= end; n += R) most(w, x, m, n, y, meanwhile);
  for (; n < end; ++n) rest(w, x, m, n, y, meanwhile);
}

// The same rows, with blocks of zeros at their ends, in memory of its own.
struct Extended {
  Weight weight;
  std::vector<uint8_t> data, zeros;
  std::vector<float> scales;

  Extended(const Weight& w, int64_t begin, int64_t end, int64_t blocks) : weight(w) {
    weight.blocks = blocks;
    data.resize((end - begin) * weight.row_bytes());
    scales.resize((end - begin) * blocks);
    if (w.zeros) zeros.resize((end - begin) * weight.row_zeros());
    for (int64_t n = begin; n < end; ++n) {
      std::memcpy(data.data() + (n - begin) * weight.row_bytes(), w.data + n * w.row_bytes(), w.row_bytes());
      std::memcpy(scales.data() + (n - begin) * blocks, w.scales + n * w.blocks, w.blocks * sizeof(float));
      if (w.zeros) std::memcpy(zeros.data() + (n - begin) * weight.row_zeros(), w.zeros + n * w.row_zeros(), w.row_zeros());
    }
    weight.data = data.data();
    weight.scales = scales.data();
    weight.zeros = w.zeros ? zeros.data() : nullptr;
    weight.bias = w.bias ? w.bias + begin : nullptr;
  }
};

// y[:, begin:end] for all `count` rows of x.
template <class Layout, class Meanwhile>
void product(const Weight& w, const Rows& x, int64_t count, int64_t begin, int64_t end, float* y, Meanwhile& meanwhile) {
  if (w.row_bytes() < 128) {
    const Extended extended(w, begin, end, 128 / Layout::kBlock);
    return product<Layout>(extended.weight, x, count, 0, end - begin, y + begin, meanwhile);
  }
  for (int64_t m = 0; m < count; m += Rows::height(m, count)) {
    switch (Rows::height(m, count)) {
      case 8: product<Layout, 8, 8, Layout::kTogether>(w, x, m, begin, end, y, meanwhile); break;
      case 4: product<Layout, 4, 8, Layout::kTogether>(w, x, m, begin, end, y, meanwhile); break;
      default: product<Layout, 1, 4, 1>(w, x, m, begin, end, y, meanwhile);
    }
  }
}

// Calls `use` with the layout of the weight.
template <class Use>
auto with_layout(const Weight& w, Use&& use) {
  switch (w.block) {
    case 32: return w.bits == 4 ? use(Layout<Int4, 16>(w)) : use(Layout<Int8, 32>(w));
    case 64: return w.bits == 4 ? use(Layout<Int4, 32>(w)) : use(Layout<Int8, 64>(w));
    case 128: return w.bits == 4 ? use(Layout<Int4, 64>(w)) : use(Layout<Int8, 128>(w));
    default: return w.bits == 4 ? use(Layout<Int4, 128>(w)) : use(Layout<Int8, 256>(w));
  }
}
