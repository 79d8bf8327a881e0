// SPDX-License-Identifier: BSD-3-Clause
// Products x W^T with W (N, K) in blocks of 4- or 8-bit numbers, laid out as for ONNX Runtime's MatMulNBits.
//
// A row of x is rounded to 8 bits, block by block, and multiplied as integers. Unsigned weights are used as they are stored: what their zero points
// add to a sum, zero * sum(x), is taken away from it, as integers. Several small blocks are multiplied side by side, each in lanes of its own, so that what is to
// be done once a block is done for all of them at once.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "lanes.h"

#if !defined(__AVX2__) || !defined(__FMA__)
#error "these kernels need a CPU with AVX2 and FMA"
#endif
#if (defined(__AVX512VNNI__) && defined(__AVX512VL__)) || defined(__AVXVNNI__)
#define HAS_VNNI 1
#else
#define HAS_VNNI 0
#endif

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

// Sums of products, eight lanes of them; `add` takes 32 bytes of weights and as many of activations, `take` what the zero points
// of unsigned weights add to each lane: its sum(x) `times` the zero point.
#if HAS_VNNI
struct Sum {
  __m256i lanes = _mm256_setzero_si256();
  void add(__m256i w, __m256i x) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    lanes = _mm256_dpbusd_epi32(lanes, w, x);
#else
    lanes = _mm256_dpbusd_avx_epi32(lanes, w, x);
#endif
  }
  void join(Sum other) { lanes = _mm256_add_epi32(lanes, other.lanes); }
  void take(__m256i taken) { lanes = _mm256_sub_epi32(lanes, taken); }
  static __m256i times(__m256i sums, __m256i zeros) { return _mm256_madd_epi16(sums, zeros); }  // both fit into 16 bits
  __m256i total() const { return lanes; }
};
using Sum4 = Sum;
using Sum8 = Sum;
#else
struct Sum4 {  // of up to 8 additions, each of at most 2 * 15 * 127, in 16 bits
  __m256i lanes = _mm256_setzero_si256();
  void add(__m256i w, __m256i x) { lanes = _mm256_add_epi16(lanes, _mm256_maddubs_epi16(w, x)); }
  void join(Sum4 other) { lanes = _mm256_add_epi16(lanes, other.lanes); }
  void take(__m256i taken) { lanes = _mm256_sub_epi16(lanes, taken); }
  static __m256i times(__m256i sums, __m256i zeros) { return _mm256_mullo_epi16(sums, _mm256_or_si256(zeros, _mm256_slli_epi32(zeros, 16))); }
  __m256i total() const { return _mm256_madd_epi16(lanes, _mm256_set1_epi16(1)); }
};
struct Sum8 {  // products of 8-bit numbers do not fit pairwise into 16 bits: both sides are 16 bits wide
  __m256i lanes = _mm256_setzero_si256();
  void add(__m256i w, __m256i x) { lanes = _mm256_add_epi32(lanes, _mm256_madd_epi16(w, x)); }
  void join(Sum8 other) { lanes = _mm256_add_epi32(lanes, other.lanes); }
  void take(__m256i taken) { lanes = _mm256_sub_epi32(lanes, taken); }
  static __m256i times(__m256i sums, __m256i zeros) { return _mm256_madd_epi16(sums, zeros); }
  __m256i total() const { return lanes; }
};
#endif

// How the bytes of weights and the numbers of x they belong to become operands of `add`: 32 bytes of weights make kParts operands. Each byte holds
// kColumns columns; `numbers` is given the 8-bit numbers of one of them for each byte.
struct Int4 {
  using Sum = Sum4;
  static constexpr int kBits = 4, kColumns = 2, kParts = 2;
  static void weights(__m256i bytes, __m256i* parts) {
    const __m256i low = _mm256_set1_epi8(15);
    parts[0] = _mm256_and_si256(bytes, low);
    parts[1] = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), low);
  }
  static void numbers(__m256i bytes, __m256i* parts) { parts[0] = bytes; }
};
struct Int8 {
  using Sum = Sum8;
  static constexpr int kBits = 8, kColumns = 1, kParts = HAS_VNNI ? 1 : 2;
#if HAS_VNNI
  static void weights(__m256i bytes, __m256i* parts) { parts[0] = bytes; }
  static void numbers(__m256i bytes, __m256i* parts) { parts[0] = bytes; }
#else
  static void weights(__m256i bytes, __m256i* parts) {
    parts[0] = _mm256_and_si256(bytes, _mm256_set1_epi16(255));
    parts[1] = _mm256_srli_epi16(bytes, 8);
  }
  static void numbers(__m256i bytes, __m256i* parts) {
    parts[0] = _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8);
    parts[1] = _mm256_srai_epi16(bytes, 8);
  }
#endif
};

// What is multiplied at a time: Bytes (64 or 128) bytes of a row of weights, whose blocks take kBlockBytes each.
template <class F, int kBlockBytes, int Bytes>
struct Group {
  using Format = F;
  using Sum = typename Format::Sum;
  static constexpr int kBytes = Bytes, kRegisters = Bytes / 32, kBlocks = std::max(1, Bytes / kBlockBytes), kColumns = Bytes * Format::kColumns;
  static constexpr int kParts = kRegisters * Format::kParts;
  static constexpr int kPanelBytes = 32 * (kParts + 2);  // of a row of x: the numbers, then for each lane what is taken away and their scale

  // The bytes, so that each 32-bit lane holds those of one block, the same in all registers: block_of(lane).
  static void load(const void* p, __m256i* registers) {
    for (int i = 0; i < kRegisters; ++i) registers[i] = _mm256_loadu_si256(static_cast<const __m256i*>(p) + i);
    for (int apart = 1; apart < std::min(kBlocks, kRegisters); apart *= 2) {
      __m256i from[kRegisters];
      for (int i = 0; i < kRegisters; ++i) from[i] = registers[i];
      for (int i = 0; i < kRegisters / 2; ++i) {
        registers[2 * i] = _mm256_unpacklo_epi32(from[i], from[i + kRegisters / 2]);
        registers[2 * i + 1] = _mm256_unpackhi_epi32(from[i], from[i + kRegisters / 2]);
      }
    }
  }
  static constexpr int block_of(int lane) {  // a register that is loaded holds two blocks where there are more blocks than registers
    return kBlocks > kRegisters ? lane % kRegisters * 2 + lane / 4 : lane % kBlocks;
  }
  template <int kTimes>
  static __m256i blocks_of() {
    return _mm256_setr_epi32(block_of(0) * kTimes, block_of(1) * kTimes, block_of(2) * kTimes, block_of(3) * kTimes, block_of(4) * kTimes,
                             block_of(5) * kTimes, block_of(6) * kTimes, block_of(7) * kTimes);
  }

  // What is given for each block, for each lane.
  static __m256 spread(const float* p) {
    if (kBlocks == 1) return _mm256_broadcast_ss(p);
    if (kBlocks == 2) return _mm256_castpd_ps(_mm256_broadcast_sd(reinterpret_cast<const double*>(p)));
    if (kBlocks == 4 && kRegisters == 4) return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(p));
    const __m256 blocks = kBlocks == 4 ? _mm256_castps128_ps256(_mm_loadu_ps(p)) : _mm256_loadu_ps(p);
    return _mm256_permutevar8x32_ps(blocks, blocks_of<1>());
  }
  static __m256i zeros(const uint8_t* p, int64_t block) {  // of a row, from a block on
    constexpr int kBits = Format::kBits;
    p += block * kBits / 8;
    const int skip = static_cast<int>(block * kBits % 8);
    uint64_t bits = 0;
    if (skip == 0) {
      std::memcpy(&bits, p, (kBlocks * kBits + 7) / 8);
    } else {
      std::memcpy(&bits, p, (kBlocks * kBits + 11) / 8);
    }
    const __m256i of_lanes = _mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int32_t>(bits >> skip)), blocks_of<kBits>());
    return _mm256_and_si256(of_lanes, _mm256_set1_epi32((1 << kBits) - 1));
  }

  // Writes a row's part of a panel, for weights that have zero points of their own or not.
  static void place(const int8_t* numbers, const float* scales, bool zeros, uint8_t* out) {
    __m256i parts[kParts], ones[Format::kParts];
    for (int c = 0; c < Format::kColumns; ++c) {
      int8_t bytes[Bytes];
      for (int i = 0; i < Bytes; ++i) bytes[i] = numbers[i * Format::kColumns + c];
      __m256i registers[kRegisters];
      load(bytes, registers);
      for (int i = 0; i < kRegisters; ++i) Format::numbers(registers[i], parts + i * Format::kParts + c);
    }
    Format::weights(_mm256_set1_epi8(Format::kBits == 4 ? 0x11 : 1), ones);
    Sum sum;
    for (int p = 0; p < kParts; ++p) {
      sum.add(ones[p % Format::kParts], parts[p]);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out) + p, parts[p]);
    }
    const __m256i taken = zeros ? sum.lanes : Sum::times(sum.lanes, _mm256_set1_epi32(1 << (Format::kBits - 1)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out) + kParts, taken);
    _mm256_storeu_ps(reinterpret_cast<float*>(out) + 8 * (kParts + 1), spread(scales));
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

// Adds to the totals of M rows of x what a group of weights gives. `scales` and `zeros` are a row's, `block` is the group's first. The weights
// to be asked for are `ahead` bytes further on, their scales `scales_ahead` floats.
template <class Group, int M, bool kZeros>
inline void add_group(const uint8_t* weights, const float* scales, const uint8_t* zeros, int64_t block, int64_t ahead, int64_t scales_ahead,
                      const uint8_t* panel, __m256* totals) {
  __m256i registers[Group::kRegisters], parts[Group::kParts];
  Group::load(weights, registers);
#pragma GCC unroll 4
  for (int i = 0; i < Group::kRegisters; ++i) Group::Format::weights(registers[i], parts + i * Group::Format::kParts);
#pragma GCC unroll 2
  for (int i = 0; i < Group::kBytes; i += kLine) _mm_prefetch(reinterpret_cast<const char*>(weights + ahead + i), _MM_HINT_NTA);  // needed once
  if (Group::kBlocks >= 4)  // otherwise a line of scales lasts long
    _mm_prefetch(reinterpret_cast<const char*>(scales + block + scales_ahead), _MM_HINT_T0);
  const __m256 scale = Group::spread(scales + block);
  const __m256i zero = kZeros ? Group::zeros(zeros, block) : _mm256_setzero_si256();
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    const auto* x = reinterpret_cast<const __m256i*>(panel + m * Group::kPanelBytes);
    typename Group::Sum sum, other;  // two, so that one addition does not wait for the other
#pragma GCC unroll 8
    for (int i = 0; i < Group::kParts; i += 2) {
      sum.add(parts[i], _mm256_load_si256(x + i));
      other.add(parts[i + 1], _mm256_load_si256(x + i + 1));
      if (M > 1) asm("" : "+x"(sum.lanes), "+x"(other.lanes));  // in this order: with all products first there are not registers enough for the weights
    }
    sum.join(other);
    const __m256i taken = _mm256_load_si256(x + Group::kParts);
    sum.take(kZeros ? Group::Sum::times(taken, zero) : taken);
    const __m256 factor = _mm256_mul_ps(scale, _mm256_load_ps(reinterpret_cast<const float*>(x + Group::kParts + 1)));
    totals[m] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum.total()), factor, totals[m]);
  }
}

// y[m, n] for M rows of x and R rows of the weight, which are read as they lie, one after the other: memory is fastest so. Of a panel that does not
// fit into the nearest cache they are multiplied by a part, then by the next.
template <class Layout, int M, int R, bool kZeros>
void tile(const Weight& w, const Rows& x, int64_t m0, int64_t n0, float* y) {
  const Layout layout(w);
  const int64_t row_bytes = layout.row_bytes, blocks = w.blocks, row_zeros = w.zeros ? w.row_zeros() : 0;
  const int64_t ahead = (kAhead + row_bytes - 1) / row_bytes;  // rows
  const int64_t parts = std::max<int64_t>(1, (layout.wide * M * Layout::Wide::kPanelBytes + kNearCache - 1) / kNearCache);
  __m256 totals[R * M];
  for (auto& total : totals) total = _mm256_setzero_ps();
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t first = layout.wide * part / parts, last = layout.wide * (part + 1) / parts;
    for (int r = 0; r < R; ++r) {
      const uint8_t *data = w.data + (n0 + r) * row_bytes, *zeros = w.zeros + (n0 + r) * row_zeros;
      const uint8_t* panel = x.panel(m0) + first * M * Layout::Wide::kPanelBytes;
      __m256 sums[M];
      std::copy_n(totals + r * M, M, sums);
      const auto add = [&](auto group, int64_t g) {
        const int64_t at = layout.begin(g);
        add_group<decltype(group), M, kZeros>(data + at, w.scales + (n0 + r) * blocks, zeros, at / Layout::kBlock, ahead * row_bytes,
                                              ahead * blocks, panel, sums);
        panel += M * group.kPanelBytes;
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
        const __m256* of = totals + r * M + m;
        const __m128 bias = w.bias ? _mm_loadu_ps(w.bias + n0 + r) : _mm_setzero_ps();
        _mm_storeu_ps(to + r, _mm_add_ps(sums_of(of[0], of[M], of[2 * M], of[3 * M]), bias));
      }
    } else {
      for (int r = 0; r < R; ++r) to[r] = sum_of(totals[r * M + m]) + (w.bias ? w.bias[n0 + r] : 0.f);
    }
  }
}

template <class Layout, int M, int R>
void product(const Weight& w, const Rows& x, int64_t m, int64_t begin, int64_t end, float* y) {
  const auto most = w.zeros ? tile<Layout, M, R, true> : tile<Layout, M, R, false>;
  const auto rest = w.zeros ? tile<Layout, M, 1, true> : tile<Layout, M, 1, false>;
  int64_t n = begin;
  for (; n + R <= end; n += R) most(w, x, m, n, y);
  for (; n < end; ++n) rest(w, x, m, n, y);
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
template <class Layout>
void product(const Weight& w, const Rows& x, int64_t count, int64_t begin, int64_t end, float* y) {
  if (w.row_bytes() < 128) {
    const Extended extended(w, begin, end, 128 / Layout::kBlock);
    return product<Layout>(extended.weight, x, count, 0, end - begin, y + begin);
  }
  for (int64_t m = 0; m < count; m += Rows::height(m, count)) {
    switch (Rows::height(m, count)) {
      case 8: product<Layout, 8, 8>(w, x, m, begin, end, y); break;
      case 4: product<Layout, 4, 8>(w, x, m, begin, end, y); break;
      default: product<Layout, 1, 4>(w, x, m, begin, end, y);
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
