// int8 weights as all forms multiply them, and the fixed-point numbers around them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace millijoule {

constexpr int LANES = 16;    // outputs that stand side by side in packed weights
constexpr int INPUTS = 4;    // inputs of an output that are multiplied at once
constexpr int MULTIPLIER_BITS = 24;
constexpr int PULL_BITS = 11;
constexpr int AMPLITUDE = 127;
constexpr int TABLE_SHIFT = 6;
constexpr int TURN = 65536;

// A count of bytes made a multiple of four, which products take at once.
constexpr int padded(int count) { return (count + INPUTS - 1) / INPUTS * INPUTS; }

// A count of outputs made a multiple of sixteen.
constexpr int in_lanes(int count) { return (count + LANES - 1) / LANES * LANES; }

// int8 weights [outputs, inputs] as [outputs / 16][inputs / 4][16][4]: zeros beyond the last output, and after each of `groups`
// of inputs so many that its length is a multiple of four.
struct Layer {
  int outputs = 0, inputs = 0, blocks = 0;
  std::vector<int8_t> weights;
  std::vector<int32_t> bias;         // [(blocks + 1) * 16]: sixteen at once may be read from any output on
  std::vector<int32_t> multiplier;   // [(blocks + 1) * 16]
  std::vector<int32_t> row_sums;     // [blocks * 16]: of weights, for sources that are moved to be unsigned

  Layer() = default;
  Layer(const int8_t* w, const int32_t* b, const int32_t* m, int outputs, int inputs, int groups);
  int stride() const { return blocks * LANES; }
};

}  // namespace millijoule
