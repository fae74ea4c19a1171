// A DEFLATE encoder (RFC 1951) for rows of filtered pixels, in a zlib stream (RFC 1950).
//
// A general encoder looks for earlier text anywhere; in an image what repeats is the pixel before or the row above, so these are
// tried first, and beside them one earlier place that began with the same four bytes. Photographs repeat nothing: of them only
// runs of one byte are matched. Every block gets its own Huffman codes, or the fixed ones, or none, whichever is least.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "../processor.h"

namespace millijoule {

// How many bytes behind its end data handed to `compress` must be readable, and how many beyond its bound output writable.
constexpr size_t DEFLATE_SLACK = 64;

enum class Matching { REPEATS, RUNS };

// `literals` bytes as they are, then `length` bytes (0: none, at the end) that stand `distance` before.
struct Sequence {
  uint32_t literals;
  uint16_t length;
  uint16_t distance;
};

// Kept from image to image.
class DeflateMemory {
 public:
  DeflateMemory();
  Sequence* sequences() { return sequences_.get(); }  // room for those of a block

  std::vector<uint32_t> last_seen;  // by hash of three or four bytes: the last place that began with them, and 1

 private:
  std::unique_ptr<Sequence[]> sequences_;
};

// Most bytes that `compress` makes of `size`.
size_t compressed_bound(size_t size);

// `size` bytes as a zlib stream at `out`; returns its end. The bytes are the same for every form.
//
// pixel, row: the distances in bytes to the pixel before and to the row above.
uint8_t* compress(Form form, Matching matching, const uint8_t* data, size_t size, size_t pixel, size_t row, uint8_t* out,
                  DeflateMemory& memory);

}  // namespace millijoule
