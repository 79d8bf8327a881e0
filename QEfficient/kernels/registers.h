// SPDX-License-Identifier: BSD-3-Clause
// What products of blocks need of registers: of 512 bits where the CPU adds up products of bytes in them, otherwise of 256.
//
// In wide registers several rows of weights are multiplied together, so that what is loaded of x serves all of them: together_of, for large blocks (64 bytes
// and more) and small ones. A Sum is of products of bytes, unsigned ones of weights and signed ones of activations, four of them in each lane of 32 bits.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "lanes.h"

#if !defined(__AVX2__) || !defined(__FMA__)
#error "these kernels need a CPU with AVX2 and FMA"
#endif
#if defined(__AVXVNNI__)
#define HAS_VNNI 1
#else
#define HAS_VNNI 0
#endif

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)

using Integers = __m512i;
using Floats = __m512;
constexpr int kRegister = 64;  // bytes
constexpr int together_of(bool large) { return large ? 4 : 2; }
#define IN_REGISTER(value) "+v"(value)

// Asks for the bytes of weights that are multiplied after those at p. Wide registers take them faster than the nearest cache can be asked for them: they are
// asked for in the next one, and those that are next of all in the nearest, if time is spent on `many` rows.
constexpr int64_t kAhead = 8192;
template <int kBytes, bool kMany>
INLINE void ask(const uint8_t* p, int64_t ahead) {
#pragma GCC unroll 2
  for (int i = 0; i < kBytes; i += kLine) {
    _mm_prefetch(reinterpret_cast<const char*>(p + ahead + i), _MM_HINT_T1);
    if (kMany) _mm_prefetch(reinterpret_cast<const char*>(p + 256 + i), _MM_HINT_T0);
  }
}

INLINE Integers loaded(const uint8_t* p) { return _mm512_loadu_si512(p); }
INLINE Floats loaded(const float* p) { return _mm512_loadu_ps(p); }
INLINE Floats loaded(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }  // floats of 16 bits
INLINE void put(uint8_t* p, Integers value) { _mm512_storeu_si512(p, value); }
INLINE void put(float* p, Floats value) { _mm512_storeu_ps(p, value); }
INLINE Integers every8(int value) { return _mm512_set1_epi8(static_cast<char>(value)); }
INLINE Integers every32(int32_t value) { return _mm512_set1_epi32(value); }
INLINE Floats every(float value) { return _mm512_set1_ps(value); }
INLINE Floats every_two(const float* p) { return _mm512_castpd_ps(_mm512_set1_pd(*reinterpret_cast<const double*>(p))); }
INLINE Floats every_four(const float* p) { return _mm512_broadcast_f32x4(_mm_loadu_ps(p)); }
template <int kBits>
INLINE Integers shifted_right(Integers value) {
  return _mm512_srli_epi16(value, kBits);
}
INLINE Integers shifted_each(Integers value, Integers bits) { return _mm512_srlv_epi32(value, bits); }
INLINE Integers low_lanes(Integers a, Integers b) { return _mm512_unpacklo_epi32(a, b); }
INLINE Integers high_lanes(Integers a, Integers b) { return _mm512_unpackhi_epi32(a, b); }
INLINE Floats permuted(__m256 values, Integers lanes) { return _mm512_permutexvar_ps(lanes, _mm512_castps256_ps512(values)); }
INLINE Floats floats(Integers value) { return _mm512_cvtepi32_ps(value); }
INLINE Floats multiplied_added(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }

struct Sum {
  static constexpr int kHalves = 1;
  Integers lanes = _mm512_setzero_si512();
  INLINE void add(Integers w, Integers x) { lanes = _mm512_dpbusd_epi32(lanes, w, x); }
  static void halves(Integers bytes, Integers* parts) { parts[0] = bytes; }
  static void signed_halves(Integers bytes, Integers* parts) { parts[0] = bytes; }
  static Integers times(Integers sums, Integers zeros) { return _mm512_madd_epi16(sums, zeros); }  // both fit into 16 bits
  static Integers negative(Integers sums) { return _mm512_sub_epi32(_mm512_setzero_si512(), sums); }
};
using Sum4 = Sum;
using Sum8 = Sum;

// What T rows of weights add, in one register. Each has two of four lanes: the first and the second row those of the lower half, in large blocks, the third
// and the fourth those of the upper one; in small blocks there are two rows, in both halves. One row alone stands in all of its register.
template <int T, bool kLarge>
INLINE Integers together(const Sum* sums) {
  const auto pair = [](Integers a, Integers b) { return _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b)); };
  const auto two = [](Integers a, Integers b) { return _mm512_add_epi32(_mm512_shuffle_i64x2(a, b, 0x44), _mm512_shuffle_i64x2(a, b, 0xee)); };
  if constexpr (T == 4) return two(pair(sums[0].lanes, sums[1].lanes), pair(sums[2].lanes, sums[3].lanes));
  if constexpr (T == 2) return pair(sums[0].lanes, sums[1].lanes);
  const Integers one = _mm512_add_epi32(sums[0].lanes, sums[1].lanes), of_one = pair(one, one);
  return kLarge ? two(of_one, of_one) : of_one;
}
template <int T>
INLINE Floats together(const Floats* rows) {
  if constexpr (T == 4) return _mm512_mask_blend_ps(0xff00, together<2>(rows), together<2>(rows + 2));
  return T == 2 ? _mm512_mask_blend_ps(0xcccc, rows[0], rows[1]) : rows[0];
}

// The sums of R (1 or 4) rows, T of which share a register; registers are `kStride` apart.
template <int R, int T, bool kLarge, int kStride>
INLINE __m128 sums_of_rows(const Floats* totals) {
  const auto folded = [](Floats v, bool upper) {
    const __m256 low = _mm512_castps512_ps256(v), high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1));
    const __m256 half = kLarge ? (upper ? high : low) : _mm256_add_ps(low, high);
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  };
  const auto pair = [&](int row) {
    if constexpr (T > 1 || R == 1) return folded(totals[row / T * kStride], row % T == 2);
    return _mm_movelh_ps(folded(totals[row * kStride], false), folded(totals[(row + 1) * kStride], false));
  };
  return _mm_hadd_ps(pair(0), pair(R == 1 ? 0 : 2));
}

#else

using Integers = __m256i;
using Floats = __m256;
constexpr int kRegister = 32;
constexpr int together_of(bool) { return 1; }
#define IN_REGISTER(value) "+x"(value)

// Asks for the bytes of weights that are multiplied after those at p, as what is needed once.
constexpr int64_t kAhead = 2048;
template <int kBytes, bool kMany>
INLINE void ask(const uint8_t* p, int64_t ahead) {
#pragma GCC unroll 2
  for (int i = 0; i < kBytes; i += kLine) _mm_prefetch(reinterpret_cast<const char*>(p + ahead + i), _MM_HINT_NTA);
}

INLINE Integers loaded(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const Integers*>(p)); }
INLINE Floats loaded(const float* p) { return _mm256_loadu_ps(p); }
INLINE Floats loaded(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
INLINE void put(uint8_t* p, Integers value) { _mm256_storeu_si256(reinterpret_cast<Integers*>(p), value); }
INLINE void put(float* p, Floats value) { _mm256_storeu_ps(p, value); }
INLINE Integers every8(int value) { return _mm256_set1_epi8(static_cast<char>(value)); }
INLINE Integers every32(int32_t value) { return _mm256_set1_epi32(value); }
INLINE Floats every(float value) { return _mm256_set1_ps(value); }
INLINE Floats every_two(const float* p) { return _mm256_castpd_ps(_mm256_broadcast_sd(reinterpret_cast<const double*>(p))); }
INLINE Floats every_four(const float* p) { return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(p)); }
template <int kBits>
INLINE Integers shifted_right(Integers value) {
  return _mm256_srli_epi16(value, kBits);
}
INLINE Integers shifted_each(Integers value, Integers bits) { return _mm256_srlv_epi32(value, bits); }
INLINE Integers low_lanes(Integers a, Integers b) { return _mm256_unpacklo_epi32(a, b); }
INLINE Integers high_lanes(Integers a, Integers b) { return _mm256_unpackhi_epi32(a, b); }
INLINE Floats permuted(__m256 values, Integers lanes) { return _mm256_permutevar8x32_ps(values, lanes); }
INLINE Floats floats(Integers value) { return _mm256_cvtepi32_ps(value); }
INLINE Floats multiplied_added(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }

#if HAS_VNNI
struct Sum {
  static constexpr int kHalves = 1;
  Integers lanes = _mm256_setzero_si256();
  INLINE void add(Integers w, Integers x) { lanes = _mm256_dpbusd_avx_epi32(lanes, w, x); }
  static void halves(Integers bytes, Integers* parts) { parts[0] = bytes; }
  static void signed_halves(Integers bytes, Integers* parts) { parts[0] = bytes; }
  static Integers times(Integers sums, Integers zeros) { return _mm256_madd_epi16(sums, zeros); }  // both fit into 16 bits
  static Integers negative(Integers sums) { return _mm256_sub_epi32(_mm256_setzero_si256(), sums); }
};
using Sum4 = Sum;
using Sum8 = Sum;

template <int T, bool kLarge>
INLINE Integers together(const Sum* sums) {
  return _mm256_add_epi32(sums[0].lanes, sums[1].lanes);
}
#else
struct Sum4 {  // of up to 8 additions, each of at most 2 * 15 * 127, in 16 bits
  Integers lanes = _mm256_setzero_si256();
  INLINE void add(Integers w, Integers x) { lanes = _mm256_add_epi16(lanes, _mm256_maddubs_epi16(w, x)); }
  static Integers times(Integers sums, Integers zeros) { return _mm256_mullo_epi16(sums, _mm256_or_si256(zeros, _mm256_slli_epi32(zeros, 16))); }
  static Integers negative(Integers sums) { return _mm256_sub_epi16(_mm256_setzero_si256(), sums); }
};
struct Sum8 {  // products of 8-bit numbers do not fit pairwise into 16 bits: both sides are 16 bits wide, every other byte in a half of its own
  static constexpr int kHalves = 2;
  Integers lanes = _mm256_setzero_si256();
  INLINE void add(Integers w, Integers x) { lanes = _mm256_add_epi32(lanes, _mm256_madd_epi16(w, x)); }
  static void halves(Integers bytes, Integers* parts) {
    parts[0] = _mm256_and_si256(bytes, _mm256_set1_epi16(255));
    parts[1] = _mm256_srli_epi16(bytes, 8);
  }
  static void signed_halves(Integers bytes, Integers* parts) {
    parts[0] = _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8);
    parts[1] = _mm256_srai_epi16(bytes, 8);
  }
  static Integers times(Integers sums, Integers zeros) { return _mm256_madd_epi16(sums, zeros); }
  static Integers negative(Integers sums) { return _mm256_sub_epi32(_mm256_setzero_si256(), sums); }
};

template <int T, bool kLarge>
INLINE Integers together(const Sum4* sums) {
  return _mm256_madd_epi16(_mm256_add_epi16(sums[0].lanes, sums[1].lanes), _mm256_set1_epi16(1));
}
template <int T, bool kLarge>
INLINE Integers together(const Sum8* sums) {
  return _mm256_add_epi32(sums[0].lanes, sums[1].lanes);
}
#endif

template <int T>
INLINE Floats together(const Floats* rows) {
  return rows[0];
}

// The sums of R (1 or 4) rows, whose registers are `kStride` apart.
template <int R, int T, bool kLarge, int kStride>
INLINE __m128 sums_of_rows(const Floats* totals) {
  const Floats none = _mm256_setzero_ps();
  if constexpr (R == 1) return sums_of(totals[0], none, none, none);
  return sums_of(totals[0], totals[kStride], totals[2 * kStride], totals[3 * kStride]);
}
#endif

constexpr int64_t kFloats = kRegister / sizeof(float);
