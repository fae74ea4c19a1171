// The icon generator's network as the kernel keeps it: weights packed once, for all images that are drawn.
#pragma once

#include <cstdint>
#include <vector>

#include "int8_layer.h"
#include "sparse_coupling.h"

namespace millijoule {

constexpr int GRID = 4;      // cells of an icon's oscillators, in each direction
constexpr int CELL = 8;      // pixels of a drawn cell, in each direction
constexpr int IMAGE = 64;    // pixels of an image, in each direction
constexpr int MAX_ICONS = 4; // of an image
constexpr int SIZES = 3;     // of an icon
constexpr int LOGIT_LIMIT = 1024;

struct ImageModel {
  int nouns, code, hidden, channels, width, mix, steps;
  bool coupled = false;
  Layer read_code, drive, near, enlarge, near_again, mix_layer, share;
  SparseCoupling coupling;
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
