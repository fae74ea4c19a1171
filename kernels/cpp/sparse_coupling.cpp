// Sparsely coupled oscillators, all steps of a batch in one call: sums are made anew in every step, or kept and updated by what
// changed. `kernels/oscillator.py` has the equation; every form and manner gives its bits.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <type_traits>
#include <vector>

#include "in_threads.h"
#include "processor.h"
#include "sparse_coupling.h"

namespace millijoule {

#define MILLIJOULE_BODY "sparse_steps.inc"
#include "all_forms.inc"

namespace {

// Images that take their steps together: so many that all fill the products' tiles, and so few that their sums stay in the cache.
constexpr int MOST_TOGETHER = 16, LEAST_TOGETHER = 3, OSCILLATORS_TOGETHER = 1 << 15;

int together(const SparseCoupling& k) { return std::max(LEAST_TOGETHER, std::min(MOST_TOGETHER, OSCILLATORS_TOGETHER / k.n())); }

// From weights of `targets` by `sources`, of which weight(target, source) is one.
template <typename Weight>
Columns columns_of(int targets, int sources, const Weight& weight) {
  Columns found;
  found.stride = in_lanes(targets);
  found.weights.resize(found.stride * sources);
  for (int source = 0; source < sources; ++source)
    for (int target = 0; target < targets; ++target) found.weights[source * found.stride + target] = weight(target, source);
  return found;
}

struct Kernel {
  SparseCoupling coupling;
  std::vector<int32_t> sin_cos;
};

}  // namespace
}  // namespace millijoule

using namespace millijoule;

// A coupling, to relax under and to free; null where there is no memory for it: int8 local [channels, 5 channels], gather [n, rank],
// spread [n, rank], and the table of sines in the lower half and cosines in the upper. All sizes were checked by the caller.
MILLIJOULE_API void* millijoule_sparse_coupling(const int8_t* local, const int8_t* gather, const int8_t* spread, const int32_t* sin_cos, int32_t grid,
                                                int32_t channels, int32_t rank) try {
  auto kernel = std::make_unique<Kernel>();
  SparseCoupling& k = kernel->coupling;
  k.grid = grid, k.channels = channels, k.rank = rank;
  const int n = k.n();
  std::vector<int8_t> transposed(size_t(n) * rank);
  for (int i = 0; i < n; ++i)
    for (int r = 0; r < rank; ++r) transposed[size_t(r) * n + i] = gather[size_t(i) * rank + r];
  const int sides = grid == 1 ? 1 : STENCIL;  // a single cell has no neighbours
  std::vector<int8_t> felt(size_t(channels) * sides * channels);
  for (int target = 0; target < channels; ++target)
    std::copy_n(local + size_t(target) * STENCIL * channels, sides * channels, felt.data() + size_t(target) * sides * channels);
  k.local = Layer(felt.data(), nullptr, nullptr, channels, sides * channels, sides);
  k.gather = Layer(transposed.data(), nullptr, nullptr, rank, n, k.cells());
  k.spread = Layer(spread, nullptr, nullptr, n, rank, 1);
  k.local_columns = columns_of(channels, sides * channels, [&](int target, int source) { return local[size_t(target) * STENCIL * channels + source]; });
  k.gather_columns = columns_of(rank, n, [&](int r, int i) { return gather[size_t(i) * rank + r]; });
  k.spread_columns = columns_of(n, rank, [&](int i, int r) { return spread[size_t(i) * rank + r]; });
  kernel->sin_cos.assign(sin_cos, sin_cos + (TURN >> TABLE_SHIFT));
  return kernel.release();
} catch (...) {
  return nullptr;
}

MILLIJOULE_API void millijoule_sparse_coupling_free(void* kernel) { delete static_cast<Kernel*>(kernel); }

// Phases int32 [images, n] after `steps` steps under drives [images, n] and multipliers, in place. With `by_events` sums are kept and
// updated where at most a share `up_to` of their sources changed; with `leave` images at rest leave. `counts` is int64 [3, steps], zeros
// (see Manner), or null. 0, or 1 where memory ran out: then phases are worth nothing.
MILLIJOULE_API int32_t millijoule_sparse_relax(const void* of, int32_t form, const int32_t* a, const int32_t* b, const int32_t* omega,
                                               const int64_t* local, const int64_t* gather, const int64_t* spread, int32_t steps, int64_t images,
                                               int64_t threads, int32_t by_events, double up_to, int32_t leave, int64_t* counts, int32_t* theta) try {
  const auto& kernel = *static_cast<const Kernel*>(of);
  const SparseCoupling& k = kernel.coupling;
  const CouplingMultipliers by(k, local, gather, spread);
  auto relax = plain::relax_coupled;
#if defined(MILLIJOULE_X86)
  if (form == AVX2) relax = avx2::relax_coupled;
  if (form == AVX512_VNNI) relax = avx512_vnni::relax_coupled;
#endif
  std::atomic<bool> failed{false};
  std::mutex adding;
  in_threads(images, threads, [&](int64_t first, int64_t end) {
    try {
      const int some = int(std::min<int64_t>(together(k), end - first));
      if (some <= 0) return;
      SparseScratch scratch(k, some, by_events);
      std::vector<int64_t> counted(counts ? size_t(3) * steps : 0);
      Manner manner;
      manner.by_events = by_events, manner.up_to = up_to, manner.leave = leave;
      if (counts) manner.sent = counted.data(), manner.spread = manner.sent + steps, manner.left = manner.spread + steps;
      for (; first < end; first += some) {
        const size_t at = size_t(first) * k.n();
        relax(k, kernel.sin_cos.data(), by, {a + at, b + at, omega + at}, steps, int(std::min<int64_t>(some, end - first)), manner, scratch, theta + at);
      }
      const std::lock_guard<std::mutex> lock(adding);
      for (size_t i = 0; i < counted.size(); ++i) counts[i] += counted[i];
    } catch (...) {
      failed = true;
    }
  });
  return failed;
} catch (...) {
  return 1;
}
