// Steps of densely coupled oscillators, all of a batch in one call: look-up, integer product, row scales, drive and phases stay in
// the caches. `kernels/dense_coupling.py` has the equation; every form here gives its bits.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#include "in_threads.h"
#include "int_dot.h"
#include "processor.h"

namespace millijoule {
namespace {

constexpr int MULTIPLIER_BITS = 24;

// Images that go through the steps together: their waves and one block of rows fit a cache of 1 MB at n = 4,096.
constexpr int64_t MOST_IMAGES = 24;

// Rows and columns are padded to a multiple of this, which every form's block divides.
constexpr int64_t PADDING = 64;

struct Step {
  int64_t n, m, driver_pairs, steps, fine_every;
  int32_t pull_bits, table_shift, fine_table_shift, drive_multiplier, driver_multiplier;
  const int32_t *coarse, *fine, *frequency;  // [padded]
  const int32_t* driver_frequency;           // [m]
  const int16_t* driver_coupling;            // [m, m]
  const uint16_t* table;                     // sine in the lower byte, cosine in the upper
  const int16_t *fine_sin, *fine_cos;
};

// Sines [2 * driver_pairs], then cosines, of one image's drivers; an odd last one stays 0.
void start_drivers(const Step& step, const int64_t* phi, int16_t* waves) {
  for (int64_t k = 0; k < step.m; ++k) {
    const int64_t index = (phi[k] & 0xffff) >> step.fine_table_shift;
    waves[k] = step.fine_sin[index];
    waves[2 * step.driver_pairs + k] = step.fine_cos[index];
  }
}

void advance_drivers(const Step& step, const int16_t* waves, int64_t* phi) {
  const int16_t *sines = waves, *cosines = waves + 2 * step.driver_pairs;
  const int64_t half = int64_t{1} << (MULTIPLIER_BITS - 1);
  for (int64_t k = 0; k < step.m; ++k) {
    int64_t sums[2] = {0, 0};
    for (int64_t l = 0; l < step.m; ++l) {
      const int64_t weight = step.driver_coupling[k * step.m + l];
      sums[0] += weight * sines[l];
      sums[1] += weight * cosines[l];
    }
    const int64_t u = (sums[0] * step.driver_multiplier + half) >> MULTIPLIER_BITS;
    const int64_t w = (sums[1] * step.driver_multiplier + half) >> MULTIPLIER_BITS;
    phi[k] += (cosines[k] * u - sines[k] * w + step.driver_frequency[k] + (int64_t{1} << (step.pull_bits - 1))) >>
              step.pull_bits;
  }
}

#define MILLIJOULE_BODY "dense_coupling.inc"
#include "all_forms.inc"

}  // namespace
}  // namespace millijoule

using namespace millijoule;

// Bytes of one packed weight.
MILLIJOULE_API int64_t millijoule_dense_weight_bytes(int32_t form) { return form == AVX512_VNNI ? 1 : 2; }

// int8 [n, n] -> `packed`, padded^2 weights, and `start` [padded]; padded is n rounded up to 64.
MILLIJOULE_API void millijoule_dense_pack([[maybe_unused]] int32_t form, const int8_t* weights, int64_t n, void* packed, int32_t* start) {
  const int64_t padded = rounded_up(n, PADDING);
#if defined(MILLIJOULE_X86)
  if (form == AVX512_VNNI) return avx512_vnni::pack_coupling(weights, n, padded, packed, start);
  if (form == AVX2) return avx2::pack_coupling(weights, n, padded, packed, start);
#endif
  plain::pack_coupling(weights, n, padded, packed, start);
}

// Numbers: n, m, steps, fine_every, pull_bits, table_shift, fine_table_shift, drive_multiplier, driver_multiplier.
// state: int32 [images, n + m], in and out (its drivers are left as they were); drive: int16 [classes, pairs of drivers, padded, 2];
// classes: -1 for none; fine and fine_start: null where there is no fine part. Returns 0, or 1 where memory was short: state is then
// undefined.
MILLIJOULE_API int32_t millijoule_dense_relax([[maybe_unused]] int32_t form, const int64_t* numbers, const int32_t* coarse_multipliers,
                                           const int32_t* fine_multipliers, const int32_t* frequency,
                                           const int32_t* driver_frequency, const int16_t* driver_coupling,
                                           const uint16_t* table, const int16_t* fine_sin, const int16_t* fine_cos,
                                           const void* coarse, const int32_t* coarse_start, const void* fine,
                                           const int32_t* fine_start, const int16_t* drive, const int64_t* classes,
                                           int64_t images, int32_t* state, int64_t threads) try {
  Step step{};
  step.n = numbers[0];
  step.m = numbers[1];
  step.driver_pairs = (step.m + 1) / 2;
  step.steps = numbers[2];
  step.fine_every = numbers[3];
  step.pull_bits = static_cast<int32_t>(numbers[4]);
  step.table_shift = static_cast<int32_t>(numbers[5]);
  step.fine_table_shift = static_cast<int32_t>(numbers[6]);
  step.drive_multiplier = static_cast<int32_t>(numbers[7]);
  step.driver_multiplier = static_cast<int32_t>(numbers[8]);
  step.coarse = coarse_multipliers;
  step.fine = fine_multipliers;
  step.frequency = frequency;
  step.driver_frequency = driver_frequency;
  step.driver_coupling = driver_coupling;
  step.table = table;
  step.fine_sin = fine_sin;
  step.fine_cos = fine_cos;
  const int64_t padded = rounded_up(step.n, PADDING), per_image = step.n + step.m;
  std::atomic<int32_t> failed{0};
  const auto some = [&](int64_t first, int64_t end) {
    try {
      for (; first < end; first += MOST_IMAGES) {
        const int count = static_cast<int>(std::min(MOST_IMAGES, end - first));
        int32_t* own = state + first * per_image;
#if defined(MILLIJOULE_X86)
        if (form == AVX512_VNNI) {
          avx512_vnni::relax_images(step, static_cast<const int8_t*>(coarse), static_cast<const int8_t*>(fine),
                                    coarse_start, fine_start, drive, classes + first, count, own, padded);
          continue;
        }
        if (form == AVX2) {
          avx2::relax_images(step, static_cast<const int16_t*>(coarse), static_cast<const int16_t*>(fine), coarse_start,
                             fine_start, drive, classes + first, count, own, padded);
          continue;
        }
#endif
        plain::relax_images(step, static_cast<const int16_t*>(coarse), static_cast<const int16_t*>(fine), coarse_start,
                            fine_start, drive, classes + first, count, own, padded);
      }
    } catch (...) {
      failed = 1;
    }
  };
  in_threads(images, threads, some);
  return failed;
} catch (...) {
  return 1;
}
