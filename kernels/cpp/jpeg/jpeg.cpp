// Baseline JPEG, many images in one call: the files that libjpeg writes with its accurate integer transform and the usual Huffman
// tables, byte for byte. Headers come from the caller, what is between them and the end is made here.
//
// Source: ITU-T T.81 (1992), annexes A, F and K; JFIF 1.02; libjpeg's ways where those leave a choice: rounding, edges, blocks beyond them.

#include <algorithm>
#include <cstring>
#include <vector>

#include "../png/bytes.h"
#include "../processor.h"

namespace millijoule {
namespace {

// Most bytes of a block: 63 coefficients of 26 bits and one of 22, each byte followed by a zero.
constexpr size_t MOST_BLOCK_BYTES = 416;

constexpr uint8_t ZIGZAG[64] = {0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,  12, 19, 26, 33, 40, 48,
                                41, 34, 27, 20, 13, 6,  7,  14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23,
                                30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63};

// Divides by eight times a table's entries d, rounding halves away from zero: floor((|x| + 4d) / 8d). |x| + 4d is a whole number below
// 2^17, so that half more is at least 1 / 16d from the next multiple: a float's error, 2^-23 of less than 2^15, is less than that.
struct Quantizer {
  uint32_t half[64];
  float inverse[64];

  explicit Quantizer(const uint8_t* table) {
    for (int k = 0; k < 64; ++k) {
      half[k] = 4u * table[k];
      inverse[k] = 1.0f / static_cast<float>(8 * table[k]);
    }
  }
};

// Huffman codes of T.81, annex K.3, by symbol: code and length.
struct Codes {
  uint16_t code[256] = {};
  uint8_t length[256] = {};

  // counts: of codes by length, 1 to 16, then symbols in order, as a DHT segment has them.
  explicit Codes(const uint8_t* counts) {
    const uint8_t* symbol = counts + 16;
    uint32_t next = 0;
    for (int n = 1; n <= 16; ++n, next <<= 1)
      for (int i = 0; i < counts[n - 1]; ++i, ++symbol) {
        code[*symbol] = static_cast<uint16_t>(next++);
        length[*symbol] = static_cast<uint8_t>(n);
      }
  }
};

class Bits {
 public:
  explicit Bits(uint8_t* out) : out_(out) {}

  // `count` bits, at most 32; `value` has no others.
  void put(uint32_t value, int count) {
    held_ = held_ << count | value;
    count_ += count;
    if (count_ < 32) return;
    count_ -= 32;
    const uint32_t whole = static_cast<uint32_t>(held_ >> count_);
    if (whole & ~(whole + 0x01010101u) & 0x80808080u) {  // a byte of ones is followed by a zero
      for (int k = 24; k >= 0; k -= 8) byte(static_cast<uint8_t>(whole >> k));
    } else {
      store_network32(out_, whole);
      out_ += 4;
    }
  }

  // Fills the last byte with ones.
  uint8_t* end() {
    if (const int open = -count_ & 7) put((1u << open) - 1, open);
    while (count_) byte(static_cast<uint8_t>(held_ >> (count_ -= 8)));
    return out_;
  }

 private:
  void byte(uint8_t value) {
    *out_++ = value;
    if (value == 0xFF) *out_++ = 0;
  }

  uint8_t* out_;
  uint64_t held_ = 0;
  int count_ = 0;
};

inline int bits_of(int32_t size) { return size ? 32 - __builtin_clz(static_cast<uint32_t>(size)) : 0; }

// `value` in `size` bits, as T.81 F.1.2 has it: of a negative number the bits of one less.
inline uint32_t extra(int32_t value, int size) {
  return static_cast<uint32_t>(value < 0 ? value - 1 : value) & ((1u << size) - 1);
}

void put_block(Bits& bits, const int16_t* coefficients, uint64_t present, int32_t& last, const Codes& dc, const Codes& ac) {
  const int32_t step = coefficients[0] - last;
  last = coefficients[0];
  const int size = bits_of(step < 0 ? -step : step);
  bits.put(dc.code[size], dc.length[size]);
  if (size) bits.put(extra(step, size), size);
  int at = 0;
  for (present &= ~1ull; present; present &= present - 1) {
    const int k = __builtin_ctzll(present);
    int run = k - at - 1;
    for (; run > 15; run -= 16) bits.put(ac.code[0xF0], ac.length[0xF0]);
    const int32_t value = coefficients[k];
    const int n = bits_of(value < 0 ? -value : value), symbol = run << 4 | n;
    bits.put(static_cast<uint32_t>(ac.code[symbol]) << n | extra(value, n), ac.length[symbol] + n);
    at = k;
  }
  if (at < 63) bits.put(ac.code[0], ac.length[0]);
}

#define MILLIJOULE_BODY "jpeg/jpeg_blocks.inc"
#include "../all_forms.inc"

using Quantize = uint64_t (*)(const uint8_t*, size_t, const Quantizer&, int16_t*);
using Convert = void (*)(const uint8_t*, size_t, uint8_t*, uint8_t*, uint8_t*);

struct Functions {
  Quantize quantize = plain::quantized;
  Convert convert = plain::convert;

  explicit Functions(Form form) {
#if defined(MILLIJOULE_X86)
    if (form == AVX2) quantize = avx2::quantized, convert = avx2::convert;
    if (form == AVX512_VNNI) quantize = avx512_vnni::quantized, convert = avx512_vnni::convert;
#endif
    (void)form;
  }
};

struct Settings {
  Functions run;
  Quantizer quantizers[2];  // of luminance, of colour
  Codes dc[2], ac[2];
  int halved;               // 1: half the colour's rows and columns
};

size_t blocks(size_t pixels) { return (pixels + 7) / 8; }

// Two rows of differences as one of half as many: means of four, rounded up and down in turn.
void halve(const uint8_t* upper, const uint8_t* lower, size_t columns, uint8_t* out) {
  for (size_t x = 0; x < columns; ++x)
    out[x] = static_cast<uint8_t>((upper[2 * x] + upper[2 * x + 1] + lower[2 * x] + lower[2 * x + 1] + 1 + (x & 1)) >> 2);
}

// One image: rows of blocks of 8 or, with halved colour, 16 rows of pixels, what lies beyond an edge like the last there is.
class Scan {
 public:
  Scan(const Settings& settings, const uint8_t* image, size_t height, size_t width)
      : settings_(settings), image_(image), height_(height), width_(width), side_(settings.halved ? 16 : 8),
        across_((width + side_ - 1) / side_), stride_(across_ * side_) {
    for (auto& plane : planes_) plane.resize(side_ * stride_);
    if (settings.halved)
      for (auto& plane : halves_) plane.resize(8 * stride_ / 2);
  }

  uint8_t* write(uint8_t* out) {
    Bits bits(out);
    int32_t last[3] = {};
    for (size_t y = 0; y < height_; y += side_) {
      read(y);
      for (size_t x = 0; x < across_; ++x) {
        if (!settings_.halved) {
          for (int c = 0; c < 3; ++c) put(bits, planes_[c].data() + 8 * x, stride_, c, last[c]);
          continue;
        }
        put_luminance(bits, x, y, last[0]);
        for (int c = 1; c < 3; ++c) put(bits, halves_[c - 1].data() + 8 * x, stride_ / 2, c, last[c]);
      }
    }
    return bits.end();
  }

 private:
  void read(size_t y) {
    const size_t rows = std::min(side_, height_ - y);
    for (size_t k = 0; k < side_; ++k) {
      uint8_t* row[3];
      for (int c = 0; c < 3; ++c) row[c] = planes_[c].data() + k * stride_;
      if (k < rows) {
        settings_.run.convert(image_ + 3 * width_ * (y + k), width_, row[0], row[1], row[2]);
        for (uint8_t* one : row) std::memset(one + width_, one[width_ - 1], stride_ - width_);
      } else {
        for (uint8_t* one : row) std::memcpy(one, one - stride_, stride_);
      }
    }
    if (!settings_.halved) return;
    for (int c = 0; c < 2; ++c)
      for (size_t k = 0; k < 8; ++k) {
        uint8_t* const out = halves_[c].data() + k * stride_ / 2;
        const uint8_t* const upper = planes_[c + 1].data() + 2 * k * stride_;
        if (2 * k < rows) halve(upper, upper + stride_, stride_ / 2, out);
        else std::memcpy(out, out - stride_ / 2, stride_ / 2);
      }
  }

  void put(Bits& bits, const uint8_t* samples, size_t stride, int component, int32_t& last) const {
    int16_t found[64];
    const int table = component > 0;
    const uint64_t present = settings_.run.quantize(samples, stride, settings_.quantizers[table], found);
    put_block(bits, found, present, last, settings_.dc[table], settings_.ac[table]);
  }

  // Four blocks; one that lies beyond the image has its neighbour's mean and nothing else.
  void put_luminance(Bits& bits, size_t x, size_t y, int32_t& last) const {
    for (size_t i = 0; i < 2; ++i)
      for (size_t j = 0; j < 2; ++j) {
        if (2 * x + j < blocks(width_) && y / 8 + i < blocks(height_)) {
          put(bits, planes_[0].data() + 8 * i * stride_ + 16 * x + 8 * j, stride_, 0, last);
        } else {
          int16_t mean[64] = {static_cast<int16_t>(last)};
          put_block(bits, mean, 0, last, settings_.dc[0], settings_.ac[0]);
        }
      }
  }

  const Settings& settings_;
  const uint8_t* image_;
  size_t height_, width_, side_, across_, stride_;
  std::vector<uint8_t> planes_[3], halves_[2];
};

}  // namespace
}  // namespace millijoule

// Most bytes of the scan of an image of that size and of its end.
MILLIJOULE_API int64_t millijoule_jpeg_bound(int64_t height, int64_t width) {
  using namespace millijoule;
  const size_t around = ((static_cast<size_t>(height) + 15) / 16) * ((static_cast<size_t>(width) + 15) / 16);
  return static_cast<int64_t>(12 * around * MOST_BLOCK_BYTES + 4);
}

// `count` images as JPEG files, one behind the other at `out`, each from `out_offsets[i]` to `out_offsets[i + 1]`.
//
// images: where each is, uint8 [height, width, 3]; sizes: [count, 2], height and width, at least 1 each.
// heads: what a file begins with, up to its scan, one behind the other; head_offsets: [count + 1].
// tables: of luminance and colour, uint8 [2, 64], in natural order, at least 1 each.
// codes: where each Huffman table is: of means and of others of luminance, then of colour; 16 counts and the symbols.
// halved: 1: half the colour's rows and columns (4:2:0), 0: all (4:4:4).
// out: as many bytes as the bounds of all and their heads.
//
// Returns 0, or -1 where there is no memory.
MILLIJOULE_API int64_t millijoule_encode_jpegs(int32_t form, int64_t count, const uint8_t* const* images, const int64_t* sizes,
                                               const uint8_t* heads, const int64_t* head_offsets, const uint8_t* tables,
                                               const uint8_t* const* codes, int32_t halved, uint8_t* out,
                                               int64_t* out_offsets) {
  using namespace millijoule;
  try {
    const Settings settings{Functions(static_cast<Form>(form)),
                            {Quantizer(tables), Quantizer(tables + 64)},
                            {Codes(codes[0]), Codes(codes[2])},
                            {Codes(codes[1]), Codes(codes[3])},
                            halved};
    uint8_t* at = out;
    out_offsets[0] = 0;
    for (int64_t i = 0; i < count; ++i) {
      const size_t head = static_cast<size_t>(head_offsets[i + 1] - head_offsets[i]);
      std::memcpy(at, heads + head_offsets[i], head);
      Scan scan(settings, images[i], static_cast<size_t>(sizes[2 * i]), static_cast<size_t>(sizes[2 * i + 1]));
      at = scan.write(at + head);
      *at++ = 0xFF;
      *at++ = 0xD9;
      out_offsets[i + 1] = at - out;
    }
    return 0;
  } catch (...) {
    return -1;
  }
}
