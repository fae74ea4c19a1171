// Images as PNG files (W3C, third edition), many in one call.
//
// Three kinds of images, told apart by their pixels alone:
// * at most 256 colours, and often enough used to be worth a palette: one byte or less per pixel, no filter;
// * flat ones with more colours: RGB, no filter, since what repeats would not after one;
// * others, photographs above all: RGB, the filter by which neighbours tell most.
#include <algorithm>
#include <cstring>
#include <memory>
#include <new>

#include "bytes.h"
#include "checksums.h"
#include "deflate.h"
#include "../processor.h"

namespace millijoule {
namespace {

constexpr size_t CHANNELS = 3;
constexpr uint8_t SIGNATURE[8] = {0x89, 'P', 'N', 'G', '\r', '\n', 0x1A, '\n'};
constexpr uint8_t TRUECOLOUR = 2, INDEXED = 3;
constexpr uint8_t PERCEPTUAL = 0;  // rendering intent, of sRGB
constexpr int MOST_COLOURS = 256;
constexpr size_t CHUNK_FRAME = 12;

struct Image {
  const uint8_t* pixels;  // [height, width, 3]
  size_t height, width;

  size_t stride() const { return CHANNELS * width; }
  const uint8_t* row(size_t y) const { return pixels + y * stride(); }
};

class Buffer {
 public:
  // At least `size` bytes, and DEFLATE_SLACK that are 0 behind them; what was in it before is lost.
  uint8_t* hold(size_t size) {
    if (size + DEFLATE_SLACK > capacity_) {
      bytes_.reset();
      capacity_ = 0;
      bytes_.reset(new uint8_t[size + DEFLATE_SLACK]);
      capacity_ = size + DEFLATE_SLACK;
    }
    std::memset(bytes_.get() + size, 0, DEFLATE_SLACK);
    return bytes_.get();
  }

 private:
  std::unique_ptr<uint8_t[]> bytes_;
  size_t capacity_ = 0;
};

struct Memory {
  Buffer indices, rows, zeros;
  DeflateMemory deflate;
};

inline uint32_t colour_at(const uint8_t* pixel) {
  return static_cast<uint32_t>(pixel[0]) | static_cast<uint32_t>(pixel[1]) << 8 | static_cast<uint32_t>(pixel[2]) << 16;
}

// ---- where a row changes ----

constexpr size_t GROUP = 21;  // pixels, whose 63 bytes two registers of 32 hold
constexpr uint64_t EVERY_THIRD = 0x1249249249249249u;

// Bit 3 k is set where pixel k of `count`, at most GROUP, differs from the one before, which must exist.
uint64_t changes_plain(const uint8_t* pixel, size_t count) {
  uint64_t found = 0;
  for (size_t k = 0; k < count; ++k, pixel += CHANNELS)
    if (colour_at(pixel) != colour_at(pixel - CHANNELS)) found |= uint64_t{1} << (3 * k);
  return found;
}

inline uint64_t changes_of_equal_bytes(uint64_t equal) { return ~(equal & equal >> 1 & equal >> 2) & EVERY_THIRD; }

}  // namespace

#if defined(MILLIJOULE_X86)
}  // namespace millijoule
#include <immintrin.h>
namespace millijoule {
MILLIJOULE_TARGET_AVX2
namespace {
inline __m256i load(const uint8_t* at) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)); }

// Of GROUP pixels; reads a byte behind them.
uint64_t changes_avx2(const uint8_t* pixel) {
  const __m256i low = _mm256_cmpeq_epi8(load(pixel), load(pixel - CHANNELS));
  const __m256i high = _mm256_cmpeq_epi8(load(pixel + 32), load(pixel + 32 - CHANNELS));
  return changes_of_equal_bytes(static_cast<uint32_t>(_mm256_movemask_epi8(low)) |
                                static_cast<uint64_t>(static_cast<uint32_t>(_mm256_movemask_epi8(high))) << 32);
}
}  // namespace
MILLIJOULE_TARGET_END
MILLIJOULE_TARGET_AVX512_VNNI
namespace {
uint64_t changes_avx512(const uint8_t* pixel) {
  return changes_of_equal_bytes(_mm512_cmpeq_epi8_mask(_mm512_loadu_si512(pixel), _mm512_loadu_si512(pixel - CHANNELS)));
}
}  // namespace
MILLIJOULE_TARGET_END
#endif

namespace {

// Bits 3 k of the pixels x to x + count, at most GROUP, of row y that differ from the one before; x > 0.
inline uint64_t changes(Form form, const Image& image, size_t y, size_t x, size_t count) {
  const uint8_t* const pixel = image.row(y) + CHANNELS * x;
#if defined(MILLIJOULE_X86)
  if (form != PLAIN && (image.height - y) * image.width - x > GROUP) {  // a byte behind the group is read, too
    const uint64_t found = form == AVX2 ? changes_avx2(pixel) : changes_avx512(pixel);
    return found & ((uint64_t{1} << (3 * count)) - 1);
  }
#endif
  (void)form;
  return changes_plain(pixel, count);
}

// ---- palettes ----

struct Palette {
  uint32_t colours[MOST_COLOURS];
  uint32_t uses[MOST_COLOURS];  // pixels that are neither that to the left nor that above
  int count = 0;
  uint64_t edges = 0;  // sum of `uses`

  Palette() { std::memset(table_, 0, sizeof table_); }

  // The index of `colour`, -1 where there are 256 others.
  int find(uint32_t colour) {
    for (uint32_t at = (colour * 0x9E3779B1u) >> 22;; at = (at + 1) & 1023) {
      if (!table_[at]) {
        if (count == MOST_COLOURS) return -1;
        colours[count] = colour;
        uses[count] = 0;
        table_[at] = static_cast<uint16_t>(++count);
        return count - 1;
      }
      if (colours[table_[at] - 1] == colour) return table_[at] - 1;
    }
  }

 private:
  uint16_t table_[1024];  // index and 1
};

inline void fill(uint8_t* from, const uint8_t* to, uint32_t index) {
  const uint64_t eight = index * 0x0101010101010101u;
  store64(from, eight);  // most runs are short; what is behind is written later, or slack
  store64(from + 8, eight);
  for (from += 16; from < to; from += 8) store64(from, eight);
}

// `indices` [height, width] of `image` in order of appearance; false where it has too many colours.
bool find_palette(Form form, const Image& image, Palette& palette, uint8_t* indices) {
  for (size_t y = 0; y < image.height; ++y) {
    const uint8_t* const row = image.row(y);
    const uint8_t* const above = y ? row - image.stride() : row;
    uint8_t* const out = indices + y * image.width;
    if (y && !std::memcmp(row, above, image.stride())) {
      std::memcpy(out, out - image.width, image.width);
      continue;
    }
    const auto index_at = [&](size_t x) {
      const uint32_t colour = colour_at(row + CHANNELS * x);
      const int index = palette.find(colour);
      if (index >= 0) palette.uses[index] += !y | (colour != colour_at(above + CHANNELS * x));  // no branch: nothing foretells it
      return index;
    };
    size_t begun = 0;
    int index = index_at(0);
    if (index < 0) return false;
    for (size_t x = 1; x < image.width; x += GROUP) {
      uint64_t left = changes(form, image, y, x, std::min(GROUP, image.width - x));
      for (; left; left &= left - 1) {
        const size_t at = x + static_cast<size_t>(__builtin_ctzll(left)) / 3;
        fill(out + begun, out + at, static_cast<uint32_t>(index));
        begun = at;
        index = index_at(at);
        if (index < 0) return false;
      }
    }
    fill(out + begun, out + image.width, static_cast<uint32_t>(index));
  }
  for (int i = 0; i < palette.count; ++i) palette.edges += palette.uses[i];
  return true;
}

// Whether the palette takes fewer bits than it saves, about, by each pixel that neither its neighbour nor the row above foretells.
bool is_worth_it(const Palette& palette) {
  constexpr uint64_t SAVED = 18;
  return SAVED * palette.edges > 8 * (CHUNK_FRAME + CHANNELS * static_cast<uint64_t>(palette.count));
}

// Often used colours first, so that lengths of codes rise and take few bits to say; the first pixel's stays 0, since the bytes
// that name rows' filters are 0 and its runs go on through them. Returns the new index of each.
void order_palette(Palette& palette, uint8_t* new_index) {
  constexpr uint32_t SMALL = 32;  // most colours are used a few times: they are counted off, the others sorted
  uint8_t order[MOST_COLOURS];
  uint32_t at[SMALL + 1] = {};
  for (int i = 1; i < palette.count; ++i) ++at[std::min(palette.uses[i], SMALL)];
  uint32_t before = 1;
  for (uint32_t uses = SMALL + 1; uses-- > 0;) {
    const uint32_t many = at[uses];
    at[uses] = before;
    before += many;
  }
  for (int i = 1; i < palette.count; ++i) order[at[std::min(palette.uses[i], SMALL)]++] = static_cast<uint8_t>(i);
  std::sort(order + 1, order + at[SMALL], [&palette](uint8_t x, uint8_t y) {
    return palette.uses[x] != palette.uses[y] ? palette.uses[x] > palette.uses[y] : x < y;
  });
  uint32_t colours[MOST_COLOURS];
  colours[0] = palette.colours[0];
  new_index[0] = 0;
  for (int i = 1; i < palette.count; ++i) {
    const int old = order[i];
    new_index[old] = static_cast<uint8_t>(i);
    colours[i] = palette.colours[old];
  }
  std::memcpy(palette.colours, colours, sizeof(uint32_t) * static_cast<size_t>(palette.count));
}

int index_bits(int colours) { return colours <= 2 ? 1 : colours <= 4 ? 2 : colours <= 16 ? 4 : 8; }

// Rows of `indices` as they are compressed; `row_bytes` each, the filter's included.
void pack_rows(const Image& image, const uint8_t* __restrict indices, const uint8_t* __restrict new_index, int bits,
               size_t row_bytes, uint8_t* __restrict out) {
  for (size_t y = 0; y < image.height; ++y, indices += image.width, out += row_bytes) {
    out[0] = 0;
    if (bits == 8) {
      for (size_t x = 0, width = image.width; x < width; ++x) out[1 + x] = new_index[indices[x]];
      continue;
    }
    const size_t per_byte = 8 / static_cast<size_t>(bits);
    for (size_t x = 0, at = 1; x < image.width; x += per_byte, ++at) {
      uint32_t byte = 0;
      for (size_t k = 0; k < per_byte; ++k)
        byte = byte << bits | (x + k < image.width ? new_index[indices[x + k]] : 0u);
      out[at] = static_cast<uint8_t>(byte);
    }
  }
}

// ---- filters (section 9) ----

enum Filter : int { SUB = 1, UP = 2, AVERAGE = 3, PAETH = 4, FILTERS = 5 };

template <int KIND>
inline __attribute__((always_inline)) uint8_t difference(int x, int left, int above, int above_left) {
  if (KIND == SUB) return static_cast<uint8_t>(x - left);
  if (KIND == UP) return static_cast<uint8_t>(x - above);
  if (KIND == AVERAGE) return static_cast<uint8_t>(x - ((left + above) >> 1));
  const int to_left = above - above_left, to_above = left - above_left;
  const int from_left = to_left < 0 ? -to_left : to_left;
  const int from_above = to_above < 0 ? -to_above : to_above;
  const int both = to_left + to_above;
  const int from_above_left = both < 0 ? -both : both;
  const int nearer = from_left <= from_above ? left : above;
  const int least = from_left <= from_above ? from_left : from_above;
  return static_cast<uint8_t>(x - (least <= from_above_left ? nearer : above_left));
}

template <int KIND>
inline __attribute__((always_inline)) void filter_row(const uint8_t* __restrict row, const uint8_t* __restrict above, size_t size,
                                                      uint8_t* __restrict out) {
  for (size_t i = 0; i < CHANNELS; ++i) out[i] = difference<KIND>(row[i], 0, above[i], 0);
  for (size_t i = CHANNELS; i < size; ++i)
    out[i] = difference<KIND>(row[i], row[i - CHANNELS], above[i], above[i - CHANNELS]);
}

// The sum of differences' magnitudes: what the specification says to choose a filter by (section 12.7).
inline __attribute__((always_inline)) uint64_t magnitude(const uint8_t* differences, size_t size) {
  uint64_t total = 0;
  while (size) {
    const size_t part = std::min<size_t>(size, 1 << 16);
    uint32_t sum = 0;
    for (size_t i = 0; i < part; ++i) {
      const uint8_t x = differences[i], opposite = static_cast<uint8_t>(-x);
      sum += x < opposite ? x : opposite;
    }
    total += sum;
    differences += part;
    size -= part;
  }
  return total;
}

inline __attribute__((always_inline)) void apply(int filter, const uint8_t* row, const uint8_t* above, size_t size, uint8_t* out) {
  switch (filter) {
    case SUB: return filter_row<SUB>(row, above, size, out);
    case UP: return filter_row<UP>(row, above, size, out);
    case AVERAGE: return filter_row<AVERAGE>(row, above, size, out);
    default: return filter_row<PAETH>(row, above, size, out);
  }
}

constexpr size_t ROWS_PER_FILTER = 4;  // a filter is chosen for so many rows, by the first of them

inline __attribute__((always_inline)) void filter_rows(const Image& image, const uint8_t* zeros, uint8_t* out) {
  const size_t size = image.stride();
  int chosen = PAETH;
  for (size_t y = 0; y < image.height; ++y, out += 1 + size) {
    const uint8_t* const row = image.row(y);
    const uint8_t* const above = y ? row - size : zeros;
    if (y % ROWS_PER_FILTER == 0) {
      uint64_t least = ~uint64_t{0};
      for (int filter = SUB; filter < FILTERS; ++filter) {
        apply(filter, row, above, size, out + 1);
        const uint64_t found = magnitude(out + 1, size);
        if (found < least) {
          least = found;
          chosen = filter;
        }
      }
    }
    if (y % ROWS_PER_FILTER != 0 || chosen != PAETH) apply(chosen, row, above, size, out + 1);
    out[0] = static_cast<uint8_t>(chosen);
  }
}

void filter_plain(const Image& image, const uint8_t* zeros, uint8_t* out) { filter_rows(image, zeros, out); }

}  // namespace

#if defined(MILLIJOULE_X86)
MILLIJOULE_TARGET_AVX2
namespace {
void filter_avx2(const Image& image, const uint8_t* zeros, uint8_t* out) { filter_rows(image, zeros, out); }
}  // namespace
MILLIJOULE_TARGET_END
MILLIJOULE_TARGET_AVX512_VNNI
namespace {
void filter_avx512(const Image& image, const uint8_t* zeros, uint8_t* out) { filter_rows(image, zeros, out); }
}  // namespace
MILLIJOULE_TARGET_END
#endif

namespace {

void filter(Form form, const Image& image, const uint8_t* zeros, uint8_t* out) {
#if defined(MILLIJOULE_X86)
  if (form == AVX512_VNNI) return filter_avx512(image, zeros, out);
  if (form == AVX2) return filter_avx2(image, zeros, out);
#endif
  (void)form;
  filter_plain(image, zeros, out);
}

// Whether a quarter of the pixels are that to their left, by every eighth row.
bool is_flat(Form form, const Image& image) {
  uint64_t changed = 0, seen = 0;
  for (size_t y = 0; y < image.height; y += 8) {
    seen += image.width - 1;
    for (size_t x = 1; x < image.width; x += GROUP)
      changed += static_cast<uint64_t>(
          __builtin_popcountll(changes(form, image, y, x, std::min(GROUP, image.width - x))));
  }
  return 4 * changed <= 3 * seen;
}

// ---- the file ----

class Writer {
 public:
  Writer(Form form, uint8_t* out) : form_(form), out_(out) {}

  void put(const uint8_t* data, size_t size) {
    std::memcpy(out_, data, size);
    out_ += size;
  }

  // A chunk; `data` is its type and what it holds.
  void chunk(const uint8_t* data, size_t size) {
    uint8_t* const begun = begin(size);
    std::memcpy(begun, data, size);
    end(begun, begun + size);
  }

  // Where the type of a chunk goes, of whose size nothing but `size` or later `end` knows.
  uint8_t* begin(size_t size) {
    store_network32(out_, static_cast<uint32_t>(size - 4));
    return out_ + 4;
  }

  void end(uint8_t* begun, uint8_t* ended) {
    store_network32(begun - 4, static_cast<uint32_t>(ended - begun - 4));
    store_network32(ended, crc32(form_, 0, begun, static_cast<size_t>(ended - begun)));
    out_ = ended + 4;
  }

  uint8_t* at() const { return out_; }

 private:
  Form form_;
  uint8_t* out_;
};

void put_header(Writer& out, const Image& image, int bits, uint8_t colour_type) {
  uint8_t header[17] = {'I', 'H', 'D', 'R'};
  store_network32(header + 4, static_cast<uint32_t>(image.width));
  store_network32(header + 8, static_cast<uint32_t>(image.height));
  header[12] = static_cast<uint8_t>(bits);
  header[13] = colour_type;
  out.chunk(header, sizeof header);
}

struct Texts {
  const uint8_t* bytes;
  const int64_t* offsets;
  int64_t count;
};

void put_before_pixels(Writer& out, const Image& image, int bits, uint8_t colour_type, const Texts& texts) {
  out.put(SIGNATURE, sizeof SIGNATURE);
  put_header(out, image, bits, colour_type);
  const uint8_t srgb[5] = {'s', 'R', 'G', 'B', PERCEPTUAL};
  out.chunk(srgb, sizeof srgb);
  for (int64_t k = 0; k < texts.count; ++k)
    out.chunk(texts.bytes + texts.offsets[k], static_cast<size_t>(texts.offsets[k + 1] - texts.offsets[k]));
}

void put_pixels(Writer& out, Form form, Matching matching, const uint8_t* rows, size_t size, size_t pixel, size_t row,
                Memory& memory) {
  uint8_t* const begun = out.begin(4);
  std::memcpy(begun, "IDAT", 4);
  out.end(begun, compress(form, matching, rows, size, pixel, row, begun + 4, memory.deflate));
  const uint8_t last[4] = {'I', 'E', 'N', 'D'};
  out.chunk(last, sizeof last);
}

uint8_t* encode(Form form, const Image& image, const Texts& texts, uint8_t* at, Memory& memory) {
  Writer out(form, at);
  Palette palette;
  uint8_t* const indices = memory.indices.hold(image.height * image.width);
  if (find_palette(form, image, palette, indices) && is_worth_it(palette)) {
    uint8_t new_index[MOST_COLOURS];
    order_palette(palette, new_index);
    const int bits = index_bits(palette.count);
    const size_t row = 1 + (image.width * static_cast<size_t>(bits) + 7) / 8;
    uint8_t* const rows = memory.rows.hold(image.height * row);
    pack_rows(image, indices, new_index, bits, row, rows);
    put_before_pixels(out, image, bits, INDEXED, texts);
    uint8_t colours[4 + CHANNELS * MOST_COLOURS] = {'P', 'L', 'T', 'E'};
    for (int i = 0; i < palette.count; ++i)
      for (int c = 0; c < 3; ++c) colours[4 + 3 * i + c] = static_cast<uint8_t>(palette.colours[i] >> (8 * c));
    out.chunk(colours, 4 + CHANNELS * static_cast<size_t>(palette.count));
    put_pixels(out, form, Matching::REPEATS, rows, image.height * row, 1, row, memory);
    return out.at();
  }
  const size_t row = 1 + image.stride();
  uint8_t* const rows = memory.rows.hold(image.height * row);
  put_before_pixels(out, image, 8, TRUECOLOUR, texts);
  if (is_flat(form, image)) {
    for (size_t y = 0; y < image.height; ++y) {
      rows[y * row] = 0;
      std::memcpy(rows + y * row + 1, image.row(y), image.stride());
    }
    put_pixels(out, form, Matching::REPEATS, rows, image.height * row, CHANNELS, row, memory);
  } else {
    uint8_t* const zeros = memory.zeros.hold(image.stride());
    std::memset(zeros, 0, image.stride());
    filter(form, image, zeros, rows);
    put_pixels(out, form, Matching::RUNS, rows, image.height * row, CHANNELS, row, memory);
  }
  return out.at();
}

}  // namespace
}  // namespace millijoule

// Most bytes of a PNG of that size without its texts, and what is written behind it on the way.
MILLIJOULE_API int64_t millijoule_png_bound(int64_t height, int64_t width) {
  using namespace millijoule;
  const size_t rows = static_cast<size_t>(height) * (1 + CHANNELS * static_cast<size_t>(width));
  const size_t frames = sizeof SIGNATURE + 5 * CHUNK_FRAME + 13 + 1 + CHANNELS * MOST_COLOURS;
  return static_cast<int64_t>(frames + compressed_bound(rows) + DEFLATE_SLACK);
}

// `count` images as PNG files, one behind the other at `out`, each from `out_offsets[i]` to `out_offsets[i + 1]`.
//
// images: where each is, uint8 [height, width, 3]; sizes: [count, 2], height and width, at least 1 each.
// texts: chunks that go before the pixels, type and content of each; image i has `texts_per_image` of them from
// `text_offsets[i * texts_per_image]` on; there is an offset more, the end.
// out: as many bytes as the bounds of all, their texts, and 12 for each of these.
//
// Returns 0, or -1 where there is no memory.
MILLIJOULE_API int64_t millijoule_encode_pngs(int32_t form, int64_t count, const uint8_t* const* images, const int64_t* sizes,
                                              const uint8_t* texts, const int64_t* text_offsets, int64_t texts_per_image,
                                              uint8_t* out, int64_t* out_offsets) {
  using namespace millijoule;
  try {
    Memory memory;
    uint8_t* at = out;
    out_offsets[0] = 0;
    for (int64_t i = 0; i < count; ++i) {
      const Image image{images[i], static_cast<size_t>(sizes[2 * i]), static_cast<size_t>(sizes[2 * i + 1])};
      const Texts mine{texts, text_offsets + i * texts_per_image, texts_per_image};
      at = encode(static_cast<Form>(form), image, mine, at, memory);
      out_offsets[i + 1] = at - out;
    }
    return 0;
  } catch (...) {
    return -1;
  }
}
