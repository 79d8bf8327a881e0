// SPDX-License-Identifier: BSD-3-Clause
// What products of blocks need of registers: of 512 bits where the CPU adds up products of bytes in them, otherwise of 256.
//
// A Sum is of products of bytes, unsigned ones of weights and signed ones of activations, four of them in each lane of 32 bits.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "lanes.h"

#if !defined(__AVX2__) || !defined(__FMA__)
#error "these kernels need a CPU with AVX2 and FMA"
#endif
#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define HAS_WIDE 1
#else
#define HAS_WIDE 0
#endif
#if HAS_WIDE || defined(__AVXVNNI__)
#define HAS_VNNI 1
#else
#define HAS_VNNI 0
#endif

#if HAS_WIDE

using Integers = __m512i;
using Floats = __m512;
constexpr int kRegister = 64;  // bytes
#define IN_REGISTER(value) "+v"(value)

// Asks for weights that are multiplied after those at p, in the second cache: the nearest cannot be asked as fast as they are multiplied. Where one row waits for
// them anyway, the CPU sees by itself what is read.
template <bool kMany>
INLINE void ask(const uint8_t* p) {
  if (kMany) _mm_prefetch(reinterpret_cast<const char*>(p + 8192), _MM_HINT_T1);
}

INLINE Integers loaded(const uint8_t* p) { return _mm512_loadu_si512(p); }
INLINE Floats loaded(const float* p) { return _mm512_loadu_ps(p); }
INLINE Floats loaded(const int8_t* p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))); }
INLINE void put(float* p, Floats value) { _mm512_storeu_ps(p, value); }
INLINE Integers every8(int value) { return _mm512_set1_epi8(static_cast<char>(value)); }
INLINE Integers every32(int32_t value) { return _mm512_set1_epi32(value); }
INLINE Floats every(float value) { return _mm512_set1_ps(value); }
template <int kBits>
INLINE Integers shifted_right(Integers value) {
  return _mm512_srli_epi16(value, kBits);
}
INLINE Integers added(Integers a, Integers b) { return _mm512_add_epi32(a, b); }
INLINE Floats floats(Integers value) { return _mm512_cvtepi32_ps(value); }
INLINE Floats multiplied_added(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }

// Both fit into 16 bits.
INLINE Integers times(Integers sums, Integers zeros) { return _mm512_madd_epi16(sums, zeros); }
INLINE Integers lanes_of(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
INLINE Integers products_added(Integers sums, Integers w, Integers x) { return _mm512_dpbusd_epi32(sums, w, x); }

#else

using Integers = __m256i;
using Floats = __m256;
constexpr int kRegister = 32;
#define IN_REGISTER(value) "+x"(value)

// Asks for weights that are multiplied after those at p, as what is needed once.
template <bool>
INLINE void ask(const uint8_t* p) {
  _mm_prefetch(reinterpret_cast<const char*>(p + 2048), _MM_HINT_NTA);
}

INLINE Integers loaded(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const Integers*>(p)); }
INLINE Floats loaded(const float* p) { return _mm256_loadu_ps(p); }
INLINE Floats loaded(const int8_t* p) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))); }
INLINE void put(float* p, Floats value) { _mm256_storeu_ps(p, value); }
INLINE Integers every8(int value) { return _mm256_set1_epi8(static_cast<char>(value)); }
INLINE Integers every32(int32_t value) { return _mm256_set1_epi32(value); }
INLINE Floats every(float value) { return _mm256_set1_ps(value); }
template <int kBits>
INLINE Integers shifted_right(Integers value) {
  return _mm256_srli_epi16(value, kBits);
}
INLINE Integers added(Integers a, Integers b) { return _mm256_add_epi32(a, b); }
INLINE Floats floats(Integers value) { return _mm256_cvtepi32_ps(value); }
INLINE Floats multiplied_added(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }

// Both fit into 16 bits.
INLINE Integers times(Integers sums, Integers zeros) { return _mm256_madd_epi16(sums, zeros); }
INLINE Integers lanes_of(const uint8_t* p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))); }
#if HAS_VNNI
INLINE Integers products_added(Integers sums, Integers w, Integers x) { return _mm256_dpbusd_avx_epi32(sums, w, x); }
#endif

#endif

#if HAS_VNNI
struct Sum {
  static constexpr bool kNarrow = false;
  static constexpr int kHalves = 1;
  Integers lanes = every32(0);
  INLINE void add(Integers w, Integers x) { lanes = products_added(lanes, w, x); }
  INLINE Integers added_to(Integers sum) const { return added(sum, lanes); }
  static void halves(Integers bytes, Integers* parts) { parts[0] = bytes; }
  static void unit(const int8_t* numbers, uint8_t* out) { std::memcpy(out, numbers, 4); }
};
using Sum4 = Sum;
using Sum8 = Sum;
#else
struct Sum4 {  // of up to 8 additions, each of at most 2 * 15 * 127, in 16 bits
  static constexpr bool kNarrow = true;
  Integers lanes = every32(0);
  INLINE void add(Integers w, Integers x) { lanes = _mm256_add_epi16(lanes, _mm256_maddubs_epi16(w, x)); }
  INLINE Integers added_to(Integers sum) const { return added(sum, _mm256_madd_epi16(lanes, _mm256_set1_epi16(1))); }
};
struct Sum8 {  // products of 8-bit numbers do not fit pairwise into 16 bits: both sides are 16 bits wide, every other byte in a half of its own
  static constexpr bool kNarrow = false;
  static constexpr int kHalves = 2;
  Integers lanes = every32(0);
  INLINE void add(Integers w, Integers x) { lanes = _mm256_add_epi32(lanes, _mm256_madd_epi16(w, x)); }
  INLINE Integers added_to(Integers sum) const { return added(sum, lanes); }
  static void halves(Integers bytes, Integers* parts) {
    parts[0] = _mm256_and_si256(bytes, _mm256_set1_epi16(255));
    parts[1] = _mm256_srli_epi16(bytes, 8);
  }
  static void unit(const int8_t* numbers, uint8_t* out) {  // of each half
    const int16_t wide[] = {numbers[0], numbers[2], numbers[1], numbers[3]};
    std::memcpy(out, wide, sizeof(wide));
  }
};
#endif

constexpr int64_t kFloats = kRegister / sizeof(float);
