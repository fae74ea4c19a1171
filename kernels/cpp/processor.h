// What this processor can do, asked once. Every function of the library has a plain form and forms for instructions; all give
// the same bits, so which of them runs is a matter of speed alone.
#pragma once

#include <cstdint>

#define MILLIJOULE_API extern "C" __attribute__((visibility("default")))

#if defined(__x86_64__)
#define MILLIJOULE_X86 1
#include <immintrin.h>
#endif

// Forms, as MILLIJOULE_FORM names them where a file is compiled once for each (`all_forms.inc`).
#define MILLIJOULE_PLAIN 0
#define MILLIJOULE_AVX2 1
#define MILLIJOULE_AVX512_VNNI 2

// Put before and after code that is compiled for more than the common instructions; include headers before it.
#if defined(__clang__)
#define MILLIJOULE_TARGET_AVX2 \
  _Pragma("clang attribute push(__attribute__((target(\"avx2,fma\"))), apply_to = function)")
#define MILLIJOULE_TARGET_AVX512_VNNI \
  _Pragma("clang attribute push(__attribute__((target(\"avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni\"))), apply_to = function)")
#define MILLIJOULE_TARGET_END _Pragma("clang attribute pop")
#else
#define MILLIJOULE_TARGET_AVX2 _Pragma("GCC push_options") _Pragma("GCC target(\"avx2,fma\")")
#define MILLIJOULE_TARGET_AVX512_VNNI \
  _Pragma("GCC push_options") _Pragma("GCC target(\"avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni\")")
#define MILLIJOULE_TARGET_END _Pragma("GCC pop_options")
#endif

namespace millijoule {

// In order: a later form runs wherever an earlier one does.
enum Form : int32_t { PLAIN = MILLIJOULE_PLAIN, AVX2 = MILLIJOULE_AVX2, AVX512_VNNI = MILLIJOULE_AVX512_VNNI };

// The last form that this processor runs.
Form best_form();

}  // namespace millijoule
