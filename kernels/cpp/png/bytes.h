// Integers in memory, at any address and in a stated order of bytes. Compilers make one instruction of each.
#pragma once

#include <cstdint>

namespace millijoule {

inline uint64_t load64(const uint8_t* p) {  // little-endian
  return static_cast<uint64_t>(p[0]) | static_cast<uint64_t>(p[1]) << 8 | static_cast<uint64_t>(p[2]) << 16 |
         static_cast<uint64_t>(p[3]) << 24 | static_cast<uint64_t>(p[4]) << 32 | static_cast<uint64_t>(p[5]) << 40 |
         static_cast<uint64_t>(p[6]) << 48 | static_cast<uint64_t>(p[7]) << 56;
}

inline uint32_t load32(const uint8_t* p) {  // little-endian
  return static_cast<uint32_t>(p[0]) | static_cast<uint32_t>(p[1]) << 8 | static_cast<uint32_t>(p[2]) << 16 |
         static_cast<uint32_t>(p[3]) << 24;
}

inline void store64(uint8_t* p, uint64_t value) {  // little-endian
  for (int k = 0; k < 8; ++k) p[k] = static_cast<uint8_t>(value >> (8 * k));
}

inline void store_network32(uint8_t* p, uint32_t value) {  // big-endian, as PNG has it
  for (int k = 0; k < 4; ++k) p[k] = static_cast<uint8_t>(value >> (24 - 8 * k));
}

}  // namespace millijoule
