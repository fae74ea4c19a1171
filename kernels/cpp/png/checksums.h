// The two checksums of a PNG file.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../processor.h"

namespace millijoule {

// CRC-32 of ISO 3309 (PNG specification, annex D) over what `crc` covers already, 0 at first, and `size` bytes more.
uint32_t crc32(Form form, uint32_t crc, const uint8_t* data, size_t size);

// Adler-32 (RFC 1950, section 8.2) of `size` bytes.
uint32_t adler32(Form form, const uint8_t* data, size_t size);

}  // namespace millijoule
