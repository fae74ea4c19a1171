// The icon generator's network as the kernel keeps it: weights packed once, for all images that are drawn.
#pragma once

#include <cstdint>
#include <vector>

namespace millijoule {

constexpr int LANES = 16;    // outputs that stand side by side in packed weights
constexpr int INPUTS = 4;    // inputs of an output that are multiplied at once
constexpr int GRID = 4;      // cells of an icon's oscillators, in each direction
constexpr int CELL = 8;      // pixels of a drawn cell, in each direction
constexpr int IMAGE = 64;    // pixels of an image, in each direction
constexpr int MAX_ICONS = 4; // of an image
constexpr int SIZES = 3;     // of an icon
constexpr int MULTIPLIER_BITS = 24;
constexpr int PULL_BITS = 11;
constexpr int AMPLITUDE = 127;
constexpr int LOGIT_LIMIT = 1024;
constexpr int TABLE_SHIFT = 6;
constexpr int TURN = 65536;

// A count of bytes made a multiple of four, which products take at once.
constexpr int padded(int count) { return (count + INPUTS - 1) / INPUTS * INPUTS; }

// int8 weights [outputs, inputs] as [outputs / 16][inputs / 4][16][4]: zeros beyond the last output, and after each of `groups`
// of inputs so many that its length is a multiple of four.
struct Layer {
  int outputs = 0, inputs = 0, blocks = 0;
  std::vector<int8_t> weights;
  std::vector<int32_t> bias;        // [blocks * 16], and sixteen more: outputs are read from any place on, sixteen at a time
  std::vector<int32_t> multiplier;  // alike
  std::vector<int32_t> row_sums;    // [blocks * 16]: of weights, for sources that are moved to be unsigned

  Layer() = default;
  Layer(const int8_t* w, const int32_t* b, const int32_t* m, int outputs, int inputs, int groups);
  int stride() const { return blocks * LANES; }
};

struct Coupling {
  Layer local, gather, spread;  // only their weights
  int rank = 0;
};

// Of a coupling, int64, which the length of a step decides: [channels], [rank], [n].
struct CouplingMultipliers {
  const int64_t *local, *gather, *spread;
};

struct ImageModel {
  int nouns, code, hidden, channels, width, mix, steps;
  bool coupled = false;
  Layer read_code, drive, near, enlarge, near_again, mix_layer, share;
  Coupling coupling;
  std::vector<int8_t> codes;                   // [nouns, code]
  std::vector<int32_t> sizes;                  // [2 SIZES, hidden]
  std::vector<int32_t> place;                  // [2, cells * 3 * channels]
  std::vector<uint8_t> ink[2];                 // [nouns, SIZES, side * side]: 1 where a cell is drawn
  std::vector<int32_t> colours, grounds;       // [n, 3]
  std::vector<int32_t> windows;                // [n, 3]: left, top, side, in cells
  std::vector<int32_t> sin_cos;                // [1024]: sine in the lower half, cosine in the upper
  std::vector<uint8_t> shares;                 // [2 LOGIT_LIMIT]
  int shade_levels, jitter;                    // what a seed varies, at most
  int n() const { return GRID * GRID * channels; }
};

}  // namespace millijoule
