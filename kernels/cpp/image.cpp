// The icon generator from tokens and seeds to pixels in one call; equations: workers/oscillators.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#include "image_model.h"
#include "in_threads.h"
#include "processor.h"

namespace millijoule {

#define MILLIJOULE_BODY "image_draw.inc"
#include "all_forms.inc"

namespace {

constexpr int ICON_TOKENS = 4, TOKENS = MAX_ICONS * ICON_TOKENS + 1;
constexpr int SHAPES_AT_ONCE = 16;  // whose scratch memory stays in the cache

struct Icon {
  int image, slot, colour, window, shape;  // shape: index into the covers of its kind
};

// Part `k` of the 16-bit parts, lowest first, of SplitMix64 started at `seed` (kernels/phase.py).
uint32_t noise(uint64_t seed, int k) {
  uint64_t z = seed + uint64_t(k / 4 + 1) * 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  z ^= z >> 31;
  return uint32_t(z >> (16 * (k % 4))) & 0xFFFF;
}

int varied(uint64_t seed, int k, int most) { return int(noise(seed, k) * uint32_t(2 * most + 1) / TURN) - most; }

uint8_t level(int value) { return uint8_t(std::min(std::max(value, 0), 255)); }

void lay(const ImageModel& m, const Icon& icon, uint64_t seed, const uint8_t* cover, uint8_t* image) {
  const int32_t* window = m.windows.data() + 3 * icon.window;
  const int pixels = window[2] * CELL;
  const int right = varied(seed, 1 + MAX_ICONS + 2 * icon.slot, m.jitter), down = varied(seed, 2 + MAX_ICONS + 2 * icon.slot, m.jitter);
  const int shade = varied(seed, 1 + icon.slot, m.shade_levels);
  const int32_t* paint = m.colours.data() + 3 * icon.colour;
  const int ink[3] = {level(paint[0] + shade), level(paint[1] + shade), level(paint[2] + shade)};
  const int left = std::max(right, 0), end = std::min(pixels, pixels + right);
  for (int y = std::max(down, 0); y < std::min(pixels, pixels + down); ++y) {
    const uint8_t* shares = cover + size_t(y - down) * pixels - right;
    uint8_t* to = image + (size_t(window[1] * CELL + y) * IMAGE + window[0] * CELL) * 3;
    for (int x = left; x < end; ++x) {
      if (x + 8 <= end) {  // most of a window is ground, or ink all through
        uint64_t eight;
        std::memcpy(&eight, shares + x, 8);
        if (eight == 0) {
          x += 7;
          continue;
        }
      }
      const unsigned share = shares[x];
      if (share == 0) continue;
      uint8_t* pixel = to + 3 * x;
      if (share == 255) {
        for (int k = 0; k < 3; ++k) pixel[k] = uint8_t(ink[k]);
      } else {
        for (int k = 0; k < 3; ++k) pixel[k] = uint8_t((pixel[k] * (255 - share) + ink[k] * share + 127) / 255);
      }
    }
  }
}

void draw_part(const ImageModel& m, const CouplingMultipliers& by, Form form, const int64_t* tokens, const uint64_t* seeds, int images, int steps, uint8_t* out) {
  std::vector<int32_t> shapes[2];
  std::vector<Icon> icons[2];
  std::vector<int32_t> number(size_t(m.nouns) * SIZES);
  for (int whole = 0; whole < 2; ++whole) {
    std::fill(number.begin(), number.end(), -1);
    const int side = whole ? 2 * GRID : GRID;
    for (int image = 0; image < images; ++image) {
      const int64_t* row = tokens + size_t(image) * TOKENS;
      for (int slot = 0; slot < MAX_ICONS; ++slot) {
        const int64_t* icon = row + slot * ICON_TOKENS;
        if (icon[0] == 0 || m.windows[3 * (icon[3] - 1) + 2] != side) continue;
        const int key = int((icon[0] - 1) * SIZES + icon[2] - 1);
        if (number[key] < 0) {  // a shape is drawn once
          number[key] = int(shapes[whole].size());
          shapes[whole].push_back(key);
        }
        icons[whole].push_back({image, slot, int(icon[1] - 1), int(icon[3] - 1), number[key]});
      }
    }
  }
  for (int image = 0; image < images; ++image) {
    const int32_t* paint = m.grounds.data() + 3 * tokens[size_t(image) * TOKENS + TOKENS - 1];
    const int shade = varied(seeds[image], 0, m.shade_levels);
    const uint8_t ground[3] = {level(paint[0] + shade), level(paint[1] + shade), level(paint[2] + shade)};
    uint8_t* to = out + size_t(image) * IMAGE * IMAGE * 3;
    for (int x = 0; x < IMAGE; ++x) std::memcpy(to + 3 * x, ground, 3);
    for (int y = 1; y < IMAGE; ++y) std::memcpy(to + size_t(y) * IMAGE * 3, to, IMAGE * 3);
  }
  for (int whole = 0; whole < 2; ++whole) {
    const int pixels = (whole ? 2 * GRID : GRID) * CELL;
    std::vector<uint8_t> covers(shapes[whole].size() * pixels * pixels);
    for (size_t first = 0; first < shapes[whole].size(); first += SHAPES_AT_ONCE) {
      const int some = int(std::min<size_t>(SHAPES_AT_ONCE, shapes[whole].size() - first));
      auto draw = plain::draw_shapes;
#if defined(MILLIJOULE_X86)
      if (form == AVX2) draw = avx2::draw_shapes;
      if (form == AVX512_VNNI) draw = avx512_vnni::draw_shapes;
#endif
      draw(m, by, shapes[whole].data() + first, some, whole, steps, covers.data() + first * pixels * pixels);
    }
    for (const Icon& icon : icons[whole])
      lay(m, icon, seeds[icon.image], covers.data() + size_t(icon.shape) * pixels * pixels, out + size_t(icon.image) * IMAGE * IMAGE * 3);
  }
}

}  // namespace
}  // namespace millijoule

using namespace millijoule;

struct LayerArrays {
  const int8_t* weights;
  const int32_t* bias;
  const int32_t* multiplier;
  int32_t outputs, inputs, groups;
};

struct ImageArrays {  // mirrored in kernels/image.py
  int32_t nouns, code, hidden, channels, width, mix, steps, rank, colours, grounds, windows, shade_levels, jitter;
  LayerArrays layers[7];    // in the order of the model's file
  LayerArrays coupling[3];  // local, gather, spread; of rank 0 there is none
  const int8_t* codes;
  const int32_t *sizes, *place;
  const uint8_t* ink[2];
  const int32_t *colour_levels, *ground_levels, *window_places, *sin_cos;
  const uint8_t* shares;
};

static Layer packed(const LayerArrays& a) { return Layer(a.weights, a.bias, a.multiplier, a.outputs, a.inputs, a.groups); }

template <class T>
static std::vector<T> copied(const T* from, size_t count) { return std::vector<T>(from, from + count); }

// A model, to draw with and to free; null where there is no memory for it. All sizes were checked by the caller.
MILLIJOULE_API void* millijoule_image_model(const ImageArrays* from) try {
  auto m = std::make_unique<ImageModel>();
  const ImageArrays& a = *from;
  m->nouns = a.nouns, m->code = a.code, m->hidden = a.hidden, m->channels = a.channels, m->width = a.width, m->mix = a.mix;
  m->steps = a.steps, m->shade_levels = a.shade_levels, m->jitter = a.jitter, m->coupled = a.rank > 0;
  m->read_code = packed(a.layers[0]), m->drive = packed(a.layers[1]), m->near = packed(a.layers[2]);
  m->enlarge = packed(a.layers[3]), m->near_again = packed(a.layers[4]), m->mix_layer = packed(a.layers[5]);
  m->share = packed(a.layers[6]);
  if (m->coupled) {
    m->coupling.grid = GRID, m->coupling.channels = a.channels, m->coupling.rank = a.rank;
    m->coupling.local = packed(a.coupling[0]), m->coupling.gather = packed(a.coupling[1]), m->coupling.spread = packed(a.coupling[2]);
  }
  m->codes.resize(size_t(a.nouns) * padded(a.code));
  for (int noun = 0; noun < a.nouns; ++noun) std::memcpy(m->codes.data() + size_t(noun) * padded(a.code), a.codes + size_t(noun) * a.code, a.code);
  m->sizes = copied(a.sizes, size_t(2) * SIZES * a.hidden);
  m->place = copied(a.place, size_t(2) * 3 * m->n());
  for (int whole = 0; whole < 2; ++whole) m->ink[whole] = copied(a.ink[whole], size_t(a.nouns) * SIZES * GRID * GRID * (whole ? 4 : 1));
  m->colours = copied(a.colour_levels, size_t(3) * a.colours);
  m->grounds = copied(a.ground_levels, size_t(3) * a.grounds);
  m->windows = copied(a.window_places, size_t(3) * a.windows);
  m->sin_cos = copied(a.sin_cos, TURN >> TABLE_SHIFT);
  m->shares = copied(a.shares, 2 * LOGIT_LIMIT);
  return m.release();
} catch (...) {
  return nullptr;
}

MILLIJOULE_API void millijoule_image_model_free(void* model) { delete static_cast<ImageModel*>(model); }

// Images uint8 [images, 64, 64, 3] from tokens int64 [images, 17], checked by the caller, and seeds; the multipliers are null without
// a coupling. 0, or 1 where memory ran out.
MILLIJOULE_API int32_t millijoule_draw_images(const void* model, int32_t form, const int64_t* tokens, const uint64_t* seeds, int32_t images,
                                              int32_t steps, int32_t threads, const int64_t* local, const int64_t* gather, const int64_t* spread,
                                              uint8_t* out) try {
  const auto& m = *static_cast<const ImageModel*>(model);
  const CouplingMultipliers by = m.coupled ? CouplingMultipliers(m.coupling, local, gather, spread) : CouplingMultipliers();
  std::atomic<int32_t> failed{0};
  in_threads(images, threads, [&](int64_t first, int64_t end) {
    try {
      draw_part(m, by, Form(form), tokens + first * TOKENS, seeds + first, int(end - first), steps, out + first * IMAGE * IMAGE * 3);
    } catch (...) {
      failed = 1;
    }
  });
  return failed;
} catch (...) {
  return 1;
}
