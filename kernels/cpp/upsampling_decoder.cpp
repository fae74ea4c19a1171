// The decoder of `kernels/upsampling_decoder.py`: convolutions of int16 in NHWC, exact in int32, a batch in one call.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#include "in_threads.h"
#include "int_dot.h"
#include "processor.h"

namespace millijoule {
namespace {

constexpr int ACTIVATION = 2047;

// Images that go through the layers together, and what of them should stay in a core's cache.
constexpr int64_t MOST_IMAGES = 16, CACHED_BYTES = 512 * 1024;

// Where an output place reads from and writes to, in values of one image.
struct Places {
  std::vector<int64_t> from, to;
};

struct Layer {
  int64_t parities, rows, down, right, channels, columns;  // channels: those taken, even
  int64_t channels_out, stride, in_values, out_values;
  const int16_t* weights;
  const int32_t* bias;
  const float* multipliers;
  std::vector<Places> places;  // by parity
};

// Places of an image of `size` pixels a side, padded by one on each side, NHWC.
void lay_out(Layer& layer, int64_t size, bool last) {
  const int64_t side = size + 2, twice = layer.parities == 4 ? 2 : 1;
  layer.stride = side * layer.channels;
  layer.in_values = side * side * layer.channels;
  layer.channels_out = last ? layer.rows : layer.rows + layer.rows % 2;
  const int64_t out_side = size * twice + 2;
  layer.out_values = last ? size * size * 3 : out_side * out_side * layer.channels_out;
  layer.places.resize(layer.parities);
  for (int64_t parity = 0; parity < layer.parities; ++parity) {
    const int64_t down = parity / 2, right = parity % 2;  // both 0 where there is one parity
    Places& places = layer.places[parity];
    for (int64_t y = 0; y < size; ++y)
      for (int64_t x = 0; x < size; x += layer.columns) {
        places.from.push_back(((y + down) * side + x + right) * layer.channels);
        if (last) places.to.push_back((y * size + x) * 3);
        else places.to.push_back(((y * twice + down + 1) * out_side + x * twice + right + 1) * layer.channels_out);
      }
  }
}

// The frame of zeros around each image of `size` pixels a side.
void clear_frame(int16_t* images, int64_t count, int64_t size, int64_t channels) {
  const int64_t side = size + 2, row = side * channels;
  for (int64_t b = 0; b < count; ++b, images += side * row) {
    std::fill_n(images, row, int16_t{0});
    for (int64_t y = 1; y <= size; ++y) {
      std::fill_n(images + y * row, channels, int16_t{0});
      std::fill_n(images + (y + 1) * row - channels, channels, int16_t{0});
    }
    std::fill_n(images + (side - 1) * row, row, int16_t{0});
  }
}

#define MILLIJOULE_BODY "upsampling_decoder.inc"
#include "all_forms.inc"

void decode_images(int32_t form, const std::vector<Layer>& layers, int64_t size, const uint8_t* table, int64_t reach,
                   int64_t images, const int16_t* features, uint8_t* pixels) {
  int64_t most = layers[0].in_values;
  for (const Layer& layer : layers) most = std::max(most, layer.out_values);
  std::vector<int16_t> in(most * images), out(most * images);
  const int64_t channels = layers[0].channels, side = size + 2;
  for (int64_t b = 0; b < images; ++b)
    for (int64_t y = 0; y < size; ++y)
      std::copy_n(features + (b * size + y) * size * channels, size * channels,
                  in.data() + b * layers[0].in_values + ((y + 1) * side + 1) * channels);
  for (const Layer& layer : layers) {
    const bool last = &layer == &layers.back();
    if (layer.parities == 4) size *= 2;
    if (!last) clear_frame(out.data(), images, size, layer.channels_out);
    int16_t* to = last ? nullptr : out.data();
#if defined(MILLIJOULE_X86)
    if (form == AVX512_VNNI) avx512_vnni::convolve(layer, images, in.data(), to, table, reach, pixels);
    else if (form == AVX2) avx2::convolve(layer, images, in.data(), to, table, reach, pixels);
    else
#endif
      plain::convolve(layer, images, in.data(), to, table, reach, pixels);
    in.swap(out);
  }
  (void)form;
}

}  // namespace
}  // namespace millijoule

using namespace millijoule;

// Rows of a block of a layer with `rows` rows.
MILLIJOULE_API int64_t millijoule_decoder_block([[maybe_unused]] int32_t form, int64_t rows) {
#if defined(MILLIJOULE_X86)
  if (form == AVX512_VNNI) return avx512_vnni::block_of(rows);
#endif
  return plain::block_of(rows);
}

// int16 [rows, k], k even -> rows rounded up to the block, times k.
MILLIJOULE_API void millijoule_decoder_pack(int64_t block, const int16_t* weights, int64_t rows, int64_t k,
                                            int16_t* packed) {
  pack_rows(weights, rows, k, k, block, 2, packed);
}

// shapes: int64 [layers, 6], as `_shapes` in Python; weights, bias, multipliers: of each layer, packed; features: int16
// [images, size, size, channels of the first layer]; pixels: uint8 [images, final size, final size, 3]. Returns 0, or 1 where memory
// was short: pixels are then undefined.
MILLIJOULE_API int32_t millijoule_decode(int32_t form, int64_t layers, const int64_t* shapes, const void* const* weights,
                                         const void* const* bias, const void* const* multipliers, const uint8_t* table,
                                         int64_t reach, int64_t images, int64_t size, const int16_t* features,
                                         uint8_t* pixels, int64_t threads) {
  std::atomic<int32_t> failed{0};
  try {
    std::vector<Layer> all(layers);
    int64_t final_size = size;
    for (int64_t l = 0; l < layers; ++l) {
      Layer& layer = all[l];
      const int64_t* shape = shapes + 6 * l;
      layer.parities = shape[0];
      layer.rows = shape[1];
      layer.down = shape[2];
      layer.right = shape[3];
      layer.channels = shape[4];
      layer.columns = shape[5];
      layer.weights = static_cast<const int16_t*>(weights[l]);
      layer.bias = static_cast<const int32_t*>(bias[l]);
      layer.multipliers = static_cast<const float*>(multipliers[l]);
      lay_out(layer, final_size, l + 1 == layers);
      if (layer.parities == 4) final_size *= 2;
    }
    const int64_t per_image = size * size * all[0].channels, per_picture = final_size * final_size * 3;
    in_threads(images, threads, [&](int64_t first, int64_t end) {
      try {
        for (; first < end; first += MOST_IMAGES)
          decode_images(form, all, size, table, reach, std::min(MOST_IMAGES, end - first), features + first * per_image,
                        pixels + first * per_picture);
      } catch (...) {
        failed = 1;
      }
    });
  } catch (...) {
    failed = 1;
  }
  return failed;
}
