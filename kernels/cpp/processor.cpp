#include "processor.h"

namespace millijoule {

Form best_form() {
#if defined(MILLIJOULE_X86)
  static const Form found = [] {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return PLAIN;
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vnni");
    return wide ? AVX512_VNNI : AVX2;
  }();
  return found;
#else
  return PLAIN;
#endif
}

}  // namespace millijoule

// Raised whenever an exported function takes other arguments, or one comes or goes: kernels/native_library.py asks for its own number.
MILLIJOULE_API int32_t millijoule_interface() { return 2; }

MILLIJOULE_API int32_t millijoule_best_form() { return millijoule::best_form(); }
