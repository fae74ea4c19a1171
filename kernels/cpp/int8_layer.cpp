#include "int8_layer.h"

namespace millijoule {

Layer::Layer(const int8_t* w, const int32_t* b, const int32_t* m, int outputs, int given, int groups)
    : outputs(outputs), inputs(groups * padded(given / groups)), blocks((outputs + LANES - 1) / LANES),
      weights(std::size_t(blocks) * LANES * inputs), bias((blocks + 1) * LANES), multiplier((blocks + 1) * LANES), row_sums(blocks * LANES) {
  const int size = given / groups;
  for (int o = 0; o < outputs; ++o) {
    for (int i = 0; i < given; ++i) {
      const int8_t weight = w[size_t(o) * given + i];
      const int at = i / size * padded(size) + i % size;
      weights[((std::size_t(o / LANES) * (inputs / INPUTS) + at / INPUTS) * LANES + o % LANES) * INPUTS + at % INPUTS] = weight;
      row_sums[o] += weight;
    }
    if (b) bias[o] = b[o];
    if (m) multiplier[o] = m[o];
  }
}

}  // namespace millijoule
