#include "checksums.h"

#include <cstring>

#include "bytes.h"

#if defined(MILLIJOULE_X86)
#include <immintrin.h>
#endif

namespace millijoule {
namespace {

constexpr uint32_t CRC_POLYNOMIAL = 0xEDB88320u;  // reflected
constexpr int SLICES = 8;

struct CrcTables {
  uint32_t of[SLICES][256];  // of[k][b]: what byte b does to the checksum when k bytes follow it
  CrcTables() {
    for (uint32_t b = 0; b < 256; ++b) {
      uint32_t crc = b;
      for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (crc & 1 ? CRC_POLYNOMIAL : 0);
      of[0][b] = crc;
    }
    for (int k = 1; k < SLICES; ++k)
      for (uint32_t b = 0; b < 256; ++b) of[k][b] = (of[k - 1][b] >> 8) ^ of[0][of[k - 1][b] & 255];
  }
};

uint32_t crc_sliced(uint32_t crc, const uint8_t* data, size_t size) {
  static const CrcTables tables;
  const auto& of = tables.of;
  for (; size >= 8; data += 8, size -= 8) {
    const uint64_t x = load64(data) ^ crc;
    crc = of[7][x & 255] ^ of[6][(x >> 8) & 255] ^ of[5][(x >> 16) & 255] ^ of[4][(x >> 24) & 255] ^
          of[3][(x >> 32) & 255] ^ of[2][(x >> 40) & 255] ^ of[1][(x >> 48) & 255] ^ of[0][x >> 56];
  }
  for (; size; ++data, --size) crc = (crc >> 8) ^ of[0][(crc ^ *data) & 255];
  return crc;
}

constexpr uint32_t ADLER_PRIME = 65521;
constexpr size_t ADLER_RUN = 5536;  // bytes after which sums are reduced: below RFC 1950's 5552, and a multiple of 32

void adler_plain(uint32_t& a, uint32_t& b, const uint8_t* data, size_t size) {
  for (size_t i = 0; i < size; ++i) {
    a += data[i];
    b += a;
  }
}

}  // namespace

#if defined(MILLIJOULE_X86)
#if defined(__clang__)
_Pragma("clang attribute push(__attribute__((target(\"sse4.1,pclmul\"))), apply_to = function)")
#else
_Pragma("GCC push_options") _Pragma("GCC target(\"sse4.1,pclmul\")")
#endif
namespace {

// Folding by carry-less multiplication: Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ
// Instruction", Intel 2009. Constants are x^n mod P, reflected, of its table for this polynomial.
inline __m128i fold(__m128i x, __m128i by, __m128i next) {
  const __m128i low = _mm_clmulepi64_si128(x, by, 0x00);
  const __m128i high = _mm_clmulepi64_si128(x, by, 0x11);
  return _mm_xor_si128(_mm_xor_si128(low, high), next);
}

inline __m128i at(const uint8_t* data) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(data)); }

// `size` is a multiple of 16, at least 64.
uint32_t crc_folded(uint32_t crc, const uint8_t* data, size_t size) {
  const __m128i by_64 = _mm_set_epi64x(0x01c6e41596, 0x0154442bd4);
  const __m128i by_16 = _mm_set_epi64x(0x00ccaa009e, 0x01751997d0);
  __m128i x0 = _mm_xor_si128(at(data), _mm_cvtsi32_si128(static_cast<int>(crc)));
  __m128i x1 = at(data + 16), x2 = at(data + 32), x3 = at(data + 48);
  for (data += 64, size -= 64; size >= 64; data += 64, size -= 64) {
    x0 = fold(x0, by_64, at(data));
    x1 = fold(x1, by_64, at(data + 16));
    x2 = fold(x2, by_64, at(data + 32));
    x3 = fold(x3, by_64, at(data + 48));
  }
  x0 = fold(fold(fold(x0, by_16, x1), by_16, x2), by_16, x3);
  for (; size; data += 16, size -= 16) x0 = fold(x0, by_16, at(data));
  // 128 bits to 64, to 32: the last step is Barrett's reduction
  const __m128i low_32 = _mm_setr_epi32(-1, 0, -1, 0);
  __m128i x = _mm_xor_si128(_mm_srli_si128(x0, 8), _mm_clmulepi64_si128(x0, by_16, 0x10));
  const __m128i by_8 = _mm_set_epi64x(0, 0x0163cd6124);
  x = _mm_xor_si128(_mm_srli_si128(x, 4), _mm_clmulepi64_si128(_mm_and_si128(x, low_32), by_8, 0x00));
  const __m128i barrett = _mm_set_epi64x(0x01f7011641, 0x01db710641);
  __m128i quotient = _mm_clmulepi64_si128(_mm_and_si128(x, low_32), barrett, 0x10);
  quotient = _mm_clmulepi64_si128(_mm_and_si128(quotient, low_32), barrett, 0x00);
  return static_cast<uint32_t>(_mm_extract_epi32(_mm_xor_si128(x, quotient), 1));
}

}  // namespace
MILLIJOULE_TARGET_END
MILLIJOULE_TARGET_AVX2
namespace {

// `size` is a multiple of 32, at most ADLER_RUN. b gains 32 a per 32 bytes, and each byte as often as bytes follow it, and once.
void adler_avx2(uint32_t& a, uint32_t& b, const uint8_t* data, size_t size) {
  const __m256i zero = _mm256_setzero_si256(), one = _mm256_set1_epi16(1);
  const __m256i weights = _mm256_setr_epi8(32, 31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16, 15, 14,
                                           13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1);
  __m256i sums = zero, sums_before = zero, weighted = zero;
  for (size_t i = 0; i < size; i += 32) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data + i));
    sums_before = _mm256_add_epi32(sums_before, sums);
    sums = _mm256_add_epi32(sums, _mm256_sad_epu8(x, zero));
    weighted = _mm256_add_epi32(weighted, _mm256_madd_epi16(_mm256_maddubs_epi16(x, weights), one));
  }
  uint32_t s[8], before[8], w[8];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(s), sums);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(before), sums_before);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(w), weighted);
  b += a * static_cast<uint32_t>(size);
  for (int k = 0; k < 8; ++k) {
    a += s[k];
    b += 32 * before[k] + w[k];
  }
}

}  // namespace
MILLIJOULE_TARGET_END
#endif

uint32_t crc32(Form form, uint32_t crc, const uint8_t* data, size_t size) {
  crc = ~crc;
#if defined(MILLIJOULE_X86)
  static const bool folds = __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1");
  if (form >= AVX2 && folds && size >= 64) {
    const size_t folded = size & ~size_t{15};
    crc = crc_folded(crc, data, folded);
    data += folded;
    size -= folded;
  }
#endif
  (void)form;
  return ~crc_sliced(crc, data, size);
}

uint32_t adler32(Form form, const uint8_t* data, size_t size) {
  uint32_t a = 1, b = 0;
  while (size) {
    size_t run = size < ADLER_RUN ? size : ADLER_RUN;
#if defined(MILLIJOULE_X86)
    if (form >= AVX2 && run >= 32) {
      run &= ~size_t{31};
      adler_avx2(a, b, data, run);
    } else {
      adler_plain(a, b, data, run);
    }
#else
    (void)form;
    adler_plain(a, b, data, run);
#endif
    a %= ADLER_PRIME;
    b %= ADLER_PRIME;
    data += run;
    size -= run;
  }
  return b << 16 | a;
}

}  // namespace millijoule
