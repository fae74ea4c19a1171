// Oscillators on a square grid of cells, coupled to their neighbours' cells and, by a low rank, to all; equations in
// kernels/oscillator.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "int8_layer.h"

namespace millijoule {

constexpr int STENCIL = 5;  // a cell, then its neighbours: left, right, up, down

// int8 weights by source: what one oscillator, or one z, adds to its targets. [sources][stride], zeros beyond the last target.
struct Columns {
  std::size_t stride = 0;
  std::vector<int8_t> weights;
};

struct SparseCoupling {
  int grid = 0, channels = 0, rank = 0;
  Layer local, gather, spread;  // only their weights
  // only where sums are to be updated by what changed: [sides * channels] to a cell's, [n] to z, [rank] to all
  Columns local_columns, gather_columns, spread_columns;

  int cells() const { return grid * grid; }
  int n() const { return cells() * channels; }
  int frame() const { return grid + 2; }  // cells in each direction, with a border of zeros
};

// Of a coupling, which the length of a step decides: [channels], [rank], [n]. int32 copies where all fit, for faster steps.
struct CouplingMultipliers {
  const int64_t *local = nullptr, *gather = nullptr, *spread = nullptr;
  std::vector<int32_t> local32, spread32;
  bool narrow = false;  // after the vectors, which it fills

  CouplingMultipliers() = default;
  CouplingMultipliers(const SparseCoupling& coupling, const int64_t* local, const int64_t* gather, const int64_t* spread)
      : local(local), gather(gather), spread(spread),
        narrow(narrowed(local, coupling.channels, local32) && narrowed(spread, coupling.n(), spread32)) {}

 private:
  static bool narrowed(const int64_t* from, int count, std::vector<int32_t>& to) {
    to.resize(count);
    for (int i = 0; i < count; ++i) {
      if (from[i] < std::numeric_limits<int32_t>::min() || from[i] > std::numeric_limits<int32_t>::max()) return false;
      to[i] = int32_t(from[i]);
    }
    return true;
  }
};

// What an image's oscillators are driven by, [images, n] each.
struct Drives {
  const int32_t *a, *b, *omega;
};

// How sums are come by. They are the same integers either way.
struct Manner {
  bool by_events = false;  // differences of what changed are added, where `up_to` of the sources have changed at most
  double up_to = 0;
  bool leave = false;      // an image at rest costs nothing more: no later step would change it
  int64_t* sent = nullptr; // [steps]: oscillators that had another sine or cosine than a step before; all in the first
  int64_t* spread = nullptr; // [steps]: the same of z
  int64_t* left = nullptr; // [steps]: images that were found at rest
};

// Sources that changed, two by two, and the differences of their sines and cosines, two int16 in an int32 each.
struct Changes {
  std::vector<int32_t> sources, sines, cosines;
  std::vector<int32_t> starts;  // of a group's pairs, and at last their end
};

// Memory of `images` images that take their steps together. Rows are waves: sines of an image, then its cosines.
struct SparseScratch {
  std::vector<int8_t> flat, framed, z;
  std::vector<int32_t> near, low, far;
  std::vector<const int8_t*> cell_rows, flat_rows, z_rows;
  std::vector<Changes> changed, changed_z;  // by image
  Changes none;
  std::vector<int32_t> theta, slots;        // slots: which of the images given stands there

  SparseScratch(const SparseCoupling& k, int images, bool by_events)
      : flat(std::size_t(2) * images * k.cells() * padded(k.channels)), framed(std::size_t(2) * images * k.frame() * k.frame() * padded(k.channels)),
        z(std::size_t(2) * images * padded(k.rank)), near(std::size_t(2) * images * k.cells() * k.local.stride()),
        low(std::size_t(2) * images * k.gather.stride()), far(std::size_t(2) * images * k.spread.stride()), cell_rows(std::size_t(2) * images * k.cells()),
        flat_rows(std::size_t(2) * images), z_rows(std::size_t(2) * images), changed(by_events ? images : 0), changed_z(by_events ? images : 0),
        theta(std::size_t(images) * k.n()), slots(images) {
    const int wide = padded(k.channels), frame = k.frame();
    for (int row = 0; row < 2 * images; ++row) {
      flat_rows[row] = flat.data() + std::size_t(row) * k.cells() * wide;
      z_rows[row] = z.data() + std::size_t(row) * padded(k.rank);
      for (int cell = 0; cell < k.cells(); ++cell)
        cell_rows[size_t(row) * k.cells() + cell] =
            framed.data() + ((std::size_t(row) * frame + cell / k.grid + 1) * frame + cell % k.grid + 1) * wide;
    }
    for (Changes& some : changed) {
      const std::size_t most = std::size_t(k.cells()) * ((k.channels + 1) / 2);
      some.sources.resize(2 * most), some.sines.resize(most), some.cosines.resize(most), some.starts.resize(k.cells() + 1);
    }
    for (Changes& some : changed_z) {
      const std::size_t most = (k.rank + 1) / 2;
      some.sources.resize(2 * most), some.sines.resize(most), some.cosines.resize(most), some.starts.resize(2);
    }
  }
};

}  // namespace millijoule
