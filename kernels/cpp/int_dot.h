// What the forms of `int_dot.inc` share: how rows are packed for it.
#pragma once

#include <cstdint>

namespace millijoule {

inline int64_t rounded_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// `weights` is [rows, k], row by row; `packed` holds rounded_up(rows, block) * rounded_up(k, group) values or more, `padded` of them a
// row; those beyond rows and k become 0. A block has `block` rows, and `group` neighbours along k stand together.
template <typename From, typename To>
void pack_rows(const From* weights, int64_t rows, int64_t k, int64_t padded, int64_t block, int64_t group, To* packed) {
  for (int64_t first = 0; first < rows; first += block)
    for (int64_t g = 0; g < padded / group; ++g)
      for (int64_t i = 0; i < block; ++i)
        for (int64_t j = 0; j < group; ++j) {
          const int64_t row = first + i, column = g * group + j;
          *packed++ = row < rows && column < k ? static_cast<To>(weights[row * k + column]) : To{0};
        }
}

}  // namespace millijoule
