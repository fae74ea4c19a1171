#include "deflate.h"

#include <algorithm>
#include <cstring>

#include "bytes.h"
#include "checksums.h"

namespace millijoule {
namespace {

constexpr size_t WINDOW = 32768;
constexpr size_t SHORTEST = 3, LONGEST = 258;
constexpr int END_OF_BLOCK = 256;
constexpr int LITERALS = 286, DISTANCES = 30, MOST_BITS = 15;
constexpr size_t MOST_STORED = 65535;

// Bytes of data per block. Pictures change from top to bottom, and so do the best codes.
constexpr size_t BLOCK = size_t{1} << 16;

// What a match saves is guessed in bits: so many for each byte that it stands for, less what its length and distance cost.
constexpr int BITS_OF_LITERAL = 7, COST_OF_PIXEL = 9, COST_OF_ROW = 20, COST_OF_OTHER = 10;
// A match as long as this is taken without a look at what the next byte would begin.
constexpr size_t LONG_ENOUGH = 16;
// A match as long as this is taken without a look at other places.
constexpr size_t NEAR_ENOUGH = 32;
// Indices of fewer bytes than this repeat in the pixel before and the row above, or not at all worth the search.
constexpr size_t WORTH_A_SEARCH = 16384;

// ---- symbols of lengths and distances (RFC 1951, section 3.2.5) ----

struct Symbols {
  uint8_t of_length[LONGEST + 1];
  uint16_t length_base[29];
  uint8_t length_bits[29];
  uint16_t distance_base[DISTANCES];
  uint8_t distance_bits[DISTANCES];

  Symbols() {
    int base = 3;
    for (int s = 0; s < 28; ++s) {
      length_bits[s] = static_cast<uint8_t>(s < 8 ? 0 : s / 4 - 1);
      length_base[s] = static_cast<uint16_t>(base);
      for (int k = 0; k < 1 << length_bits[s] && base <= 257; ++k) of_length[base++] = static_cast<uint8_t>(s);
    }
    length_base[28] = 258;
    length_bits[28] = 0;
    of_length[0] = of_length[1] = of_length[2] = 0;
    of_length[258] = 28;
    base = 1;
    for (int s = 0; s < DISTANCES; ++s) {
      distance_bits[s] = static_cast<uint8_t>(s < 4 ? 0 : s / 2 - 1);
      distance_base[s] = static_cast<uint16_t>(base);
      base += 1 << distance_bits[s];
    }
  }
};

const Symbols& symbols() {
  static const Symbols found;
  return found;
}

inline int highest_bit(uint32_t x) { return 31 - __builtin_clz(x); }

inline int symbol_of_distance(uint32_t distance) {
  const uint32_t d = distance - 1;
  if (d < 4) return static_cast<int>(d);
  const int bits = highest_bit(d);
  return 2 * bits + static_cast<int>((d >> (bits - 1)) & 1);
}

// ---- bits, lowest first ----

class BitWriter {
 public:
  explicit BitWriter(uint8_t* out) : out_(out) {}

  // At most 57 bits between two calls of `flush`.
  void put(uint64_t value, int bits) {
    pending_ |= value << count_;
    count_ += bits;
  }

  void flush() {
    store64(out_, pending_);
    out_ += count_ >> 3;
    pending_ >>= count_ & ~7;
    count_ &= 7;
  }

  // The next byte that nothing is in; what is left of the last one is 0.
  uint8_t* align() {
    if (count_ & 7) count_ += 8 - (count_ & 7);
    flush();
    return out_;
  }

  void skip_to(uint8_t* out) { out_ = out; }

  int bits_begun() const { return count_ & 7; }

 private:
  uint8_t* out_;
  uint64_t pending_ = 0;
  int count_ = 0;
};

// ---- Huffman codes ----

struct Code {
  uint16_t bits[LITERALS + 2];  // as they are written: first bit lowest
  uint8_t lengths[LITERALS + 2];
};

uint16_t reversed(uint32_t code, int length) {
  code = (code & 0x5555) << 1 | (code >> 1 & 0x5555);
  code = (code & 0x3333) << 2 | (code >> 2 & 0x3333);
  code = (code & 0x0F0F) << 4 | (code >> 4 & 0x0F0F);
  code = (code & 0x00FF) << 8 | (code >> 8 & 0x00FF);
  return static_cast<uint16_t>(code >> (16 - length));
}

// `code.bits` of `code.lengths` (RFC 1951, section 3.2.2).
void assign_bits(Code& code, int symbols) {
  uint32_t of_length[MOST_BITS + 2] = {}, next[MOST_BITS + 2] = {};
  for (int s = 0; s < symbols; ++s) ++of_length[code.lengths[s]];
  of_length[0] = 0;
  for (int length = 1; length <= MOST_BITS; ++length) next[length + 1] = (next[length] + of_length[length]) << 1;
  for (int s = 0; s < symbols; ++s) {
    const int length = code.lengths[s];
    code.bits[s] = length ? reversed(next[length]++, length) : uint16_t{0};
  }
}

// Lengths of at most `most_bits` for symbols that occur `counts` times: Huffman's where none is longer, else near them. At least
// two symbols get a code, as some decoders want it.
void assign_lengths(const uint32_t* counts, int symbols, int most_bits, uint8_t* lengths) {
  // symbols by count, rare ones first: most counts are small, so they are counted off, and the others sorted
  constexpr uint32_t SMALL = 64;
  uint16_t order[LITERALS + 2];
  uint32_t weights[LITERALS + 2];
  uint32_t at[SMALL + 1] = {};
  for (int s = 0; s < symbols; ++s) ++at[std::min(counts[s], SMALL)];
  at[0] = 0;
  uint32_t used = 0;
  for (uint32_t c = 1; c <= SMALL; ++c) {
    const uint32_t many = at[c];
    at[c] = used;
    used += many;
  }
  const uint32_t first_large = at[SMALL];
  std::memset(lengths, 0, static_cast<size_t>(symbols));
  for (int s = 0; s < symbols; ++s)
    if (counts[s]) order[at[std::min(counts[s], SMALL)]++] = static_cast<uint16_t>(s);
  std::sort(order + first_large, order + used, [counts](uint16_t x, uint16_t y) {
    return counts[x] != counts[y] ? counts[x] < counts[y] : x < y;
  });
  if (used < 2) {
    const int only = used ? order[0] : 0;
    lengths[only] = 1;
    lengths[only ? 0 : 1] = 1;
    return;
  }
  // Huffman's lengths in place: Moffat and Katajainen, "In-place calculation of minimum-redundancy codes", 1995
  const int n = static_cast<int>(used);
  for (int i = 0; i < n; ++i) weights[i] = counts[order[i]];
  weights[0] += weights[1];
  int root = 0, leaf = 2;
  for (int next = 1; next < n - 1; ++next) {
    if (leaf >= n || weights[root] < weights[leaf]) {
      weights[next] = weights[root];
      weights[root++] = static_cast<uint32_t>(next);
    } else {
      weights[next] = weights[leaf++];
    }
    if (leaf >= n || (root < next && weights[root] < weights[leaf])) {
      weights[next] += weights[root];
      weights[root++] = static_cast<uint32_t>(next);
    } else {
      weights[next] += weights[leaf++];
    }
  }
  uint32_t of_length[64] = {};  // how many codes have that length
  weights[n - 2] = 0;
  for (int next = n - 3; next >= 0; --next) weights[next] = weights[weights[next]] + 1;
  int available = 1, inner = n - 2, length = 0;
  for (int left = n; available > 0; ++length) {
    int taken = 0;
    while (inner >= 0 && weights[inner] == static_cast<uint32_t>(length)) {
      ++taken;
      --inner;
    }
    const int leaves = available - taken;
    of_length[std::min(length, most_bits)] += static_cast<uint32_t>(leaves);
    left -= leaves;
    available = 2 * taken;
  }
  // codes that were too long took more than there is: lengthen the longest shorter ones until all fit
  uint32_t space = 0;  // in units of the longest code
  for (int l = 1; l <= most_bits; ++l) space += of_length[l] << (most_bits - l);
  while (space > 1u << most_bits) {
    int l = most_bits - 1;
    while (!of_length[l]) --l;
    --of_length[l];
    of_length[l + 1] += 2;
    --of_length[most_bits];
    --space;
  }
  int i = 0;
  for (int l = most_bits; l >= 1; --l)
    for (uint32_t k = 0; k < of_length[l]; ++k) lengths[order[i++]] = static_cast<uint8_t>(l);
}

// ---- a block ----

struct Counts {
  uint32_t literals[LITERALS];
  uint32_t distances[DISTANCES];
  uint64_t extra_bits;
};

// A dynamic block's codes, and the lengths of them as they are written: symbols of 0 to 18 with their extra bits.
struct BlockCodes {
  Code literals, distances;
  Code lengths;
  uint8_t symbols[LITERALS + DISTANCES];
  uint8_t extras[LITERALS + DISTANCES];
  int runs;
  int literal_count, distance_count, length_count;
};

constexpr uint8_t LENGTH_ORDER[19] = {16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15};

int extra_of(int symbol) { return symbol == 16 ? 2 : symbol == 17 ? 3 : symbol == 18 ? 7 : 0; }

// The runs of a block's code lengths (section 3.2.7); returns the bits that its head takes.
size_t describe_codes(BlockCodes& codes) {
  uint8_t all[LITERALS + DISTANCES];
  codes.literal_count = LITERALS;
  while (codes.literal_count > 257 && !codes.literals.lengths[codes.literal_count - 1]) --codes.literal_count;
  codes.distance_count = DISTANCES;
  while (codes.distance_count > 1 && !codes.distances.lengths[codes.distance_count - 1]) --codes.distance_count;
  std::memcpy(all, codes.literals.lengths, static_cast<size_t>(codes.literal_count));
  std::memcpy(all + codes.literal_count, codes.distances.lengths, static_cast<size_t>(codes.distance_count));
  const int n = codes.literal_count + codes.distance_count;
  uint32_t counts[19] = {};
  codes.runs = 0;
  const auto put = [&](int symbol, int extra) {
    codes.symbols[codes.runs] = static_cast<uint8_t>(symbol);
    codes.extras[codes.runs++] = static_cast<uint8_t>(extra);
    ++counts[symbol];
  };
  for (int i = 0; i < n;) {
    const uint8_t length = all[i];
    int run = 1;
    while (i + run < n && all[i + run] == length) ++run;
    i += run;
    if (length == 0) {
      for (; run >= 11; run -= std::min(run, 138)) put(18, std::min(run, 138) - 11);
      if (run >= 3) {
        put(17, run - 3);
        run = 0;
      }
    } else {
      put(length, 0);
      for (--run; run >= 3; run -= std::min(run, 6)) put(16, std::min(run, 6) - 3);
    }
    for (; run > 0; --run) put(length, 0);
  }
  assign_lengths(counts, 19, 7, codes.lengths.lengths);
  assign_bits(codes.lengths, 19);
  codes.length_count = 19;
  while (codes.length_count > 4 && !codes.lengths.lengths[LENGTH_ORDER[codes.length_count - 1]]) --codes.length_count;
  size_t bits = 5 + 5 + 4 + 3 * static_cast<size_t>(codes.length_count);
  for (int s = 0; s < 19; ++s) bits += counts[s] * (codes.lengths.lengths[s] + static_cast<size_t>(extra_of(s)));
  return bits;
}

void write_codes(BitWriter& out, const BlockCodes& codes) {
  out.put(static_cast<uint64_t>(codes.literal_count - 257), 5);
  out.put(static_cast<uint64_t>(codes.distance_count - 1), 5);
  out.put(static_cast<uint64_t>(codes.length_count - 4), 4);
  out.flush();
  for (int i = 0; i < codes.length_count; ++i) {
    out.put(codes.lengths.lengths[LENGTH_ORDER[i]], 3);
    out.flush();
  }
  for (int i = 0; i < codes.runs; ++i) {
    const int symbol = codes.symbols[i];
    out.put(codes.lengths.bits[symbol], codes.lengths.lengths[symbol]);
    out.put(codes.extras[i], extra_of(symbol));
    out.flush();
  }
}

const BlockCodes& fixed_codes() {
  static const BlockCodes found = [] {
    BlockCodes codes{};
    for (int s = 0; s < 288; ++s) codes.literals.lengths[s] = s < 144 ? 8 : s < 256 ? 9 : s < 280 ? 7 : 8;
    for (int s = 0; s < DISTANCES; ++s) codes.distances.lengths[s] = 5;
    assign_bits(codes.literals, 288);
    assign_bits(codes.distances, DISTANCES);
    return codes;
  }();
  return found;
}

size_t coded_bits(const Counts& counts, const BlockCodes& codes) {
  size_t bits = counts.extra_bits;
  for (int s = 0; s < LITERALS; ++s) bits += static_cast<size_t>(counts.literals[s]) * codes.literals.lengths[s];
  for (int s = 0; s < DISTANCES; ++s) bits += static_cast<size_t>(counts.distances[s]) * codes.distances.lengths[s];
  return bits;
}

Counts count(const uint8_t* data, const Sequence* sequences) {
  Counts counts{};
  uint32_t others[3][256] = {};  // equal bytes follow each other, and would wait for one counter
  for (;; ++sequences) {
    const Sequence sequence = *sequences;
    const uint8_t* const end = data + sequence.literals;
    for (; end - data >= 4; data += 4) {
      ++counts.literals[data[0]];
      ++others[0][data[1]];
      ++others[1][data[2]];
      ++others[2][data[3]];
    }
    for (; data < end; ++data) ++counts.literals[*data];
    if (!sequence.length) break;
    const int length = symbols().of_length[sequence.length];
    const int distance = symbol_of_distance(sequence.distance);
    ++counts.literals[257 + length];
    ++counts.distances[distance];
    counts.extra_bits += symbols().length_bits[length] + symbols().distance_bits[distance];
    data += sequence.length;
  }
  for (int b = 0; b < 256; ++b) counts.literals[b] += others[0][b] + others[1][b] + others[2][b];
  counts.literals[END_OF_BLOCK] = 1;
  return counts;
}

void write_sequences(BitWriter& out, const BlockCodes& codes, const uint8_t* data, const Sequence* sequences) {
  const Code& literals = codes.literals;
  const Code& distances = codes.distances;
  const Symbols& of = symbols();
  for (;; ++sequences) {
    const Sequence sequence = *sequences;
    const uint8_t* const end = data + sequence.literals;
    for (; end - data >= 3; data += 3) {
      out.put(literals.bits[data[0]], literals.lengths[data[0]]);
      out.put(literals.bits[data[1]], literals.lengths[data[1]]);
      out.put(literals.bits[data[2]], literals.lengths[data[2]]);
      out.flush();
    }
    for (; data < end; ++data) out.put(literals.bits[*data], literals.lengths[*data]);
    out.flush();
    if (!sequence.length) break;
    const int length = of.of_length[sequence.length];
    const int distance = symbol_of_distance(sequence.distance);
    out.put(literals.bits[257 + length], literals.lengths[257 + length]);
    out.put(static_cast<uint64_t>(sequence.length - of.length_base[length]), of.length_bits[length]);
    out.put(distances.bits[distance], distances.lengths[distance]);
    out.put(static_cast<uint64_t>(sequence.distance - of.distance_base[distance]), of.distance_bits[distance]);
    out.flush();
    data += sequence.length;
  }
  out.put(literals.bits[END_OF_BLOCK], literals.lengths[END_OF_BLOCK]);
  out.flush();
}

void write_stored(BitWriter& out, const uint8_t* data, size_t size, bool is_last) {
  do {
    const size_t part = std::min(size, MOST_STORED);
    out.put(is_last && part == size, 3);
    uint8_t* at = out.align();
    at[0] = static_cast<uint8_t>(part);
    at[1] = static_cast<uint8_t>(part >> 8);
    at[2] = static_cast<uint8_t>(~at[0]);
    at[3] = static_cast<uint8_t>(~at[1]);
    std::memcpy(at + 4, data, part);
    out.skip_to(at + 4 + part);
    data += part;
    size -= part;
  } while (size);
}

size_t stored_bits(size_t size, int begun) {
  const size_t parts = std::max<size_t>((size + MOST_STORED - 1) / MOST_STORED, 1);
  return 8 * (size + 4 * parts) + 8 * (parts - 1) + static_cast<size_t>((8 - (begun + 3) % 8) % 8) + 3;
}

void write_block(BitWriter& out, const uint8_t* data, size_t size, const Sequence* sequences, bool is_last) {
  const Counts counts = count(data, sequences);
  BlockCodes codes;
  assign_lengths(counts.literals, LITERALS, MOST_BITS, codes.literals.lengths);
  assign_lengths(counts.distances, DISTANCES, MOST_BITS, codes.distances.lengths);
  const size_t dynamic = 3 + describe_codes(codes) + coded_bits(counts, codes);
  const size_t fixed = 3 + coded_bits(counts, fixed_codes());
  if (stored_bits(size, out.bits_begun()) <= std::min(dynamic, fixed)) {
    write_stored(out, data, size, is_last);
    return;
  }
  out.put(is_last, 1);
  if (fixed <= dynamic) {
    out.put(1, 2);
    out.flush();
    write_sequences(out, fixed_codes(), data, sequences);
    return;
  }
  out.put(2, 2);
  assign_bits(codes.literals, LITERALS);
  assign_bits(codes.distances, DISTANCES);
  write_codes(out, codes);
  write_sequences(out, codes, data, sequences);
}

// ---- what repeats ----

// How many bytes from `at` are those from `before`, at most `most`. Reads up to seven bytes behind them.
inline size_t equal_bytes(const uint8_t* at, const uint8_t* before, size_t most) {
  for (size_t n = 0; n < most; n += 8) {
    const uint64_t differ = load64(at + n) ^ load64(before + n);
    if (differ) return std::min(most, n + static_cast<size_t>(__builtin_ctzll(differ) >> 3));
  }
  return most;
}

// Writes the sequences of `data[from:]` up to about `to`; returns where they end.
size_t find_runs(const uint8_t* data, size_t size, size_t from, size_t to, Sequence* sequences) {
  size_t literals = from, i = std::max<size_t>(from, 1);
  while (i + 8 <= to) {
    if (load64(data + i) != load64(data + i - 1)) {
      i += 8;
      continue;
    }
    const size_t length = equal_bytes(data + i, data + i - 1, std::min(LONGEST, size - i));
    *sequences++ = {static_cast<uint32_t>(i - literals), static_cast<uint16_t>(length), 1};
    i += length;
    literals = i;
  }
  const size_t end = std::max(i, to);
  *sequences++ = {static_cast<uint32_t>(end - literals), 0, 0};
  return end;
}

class RepeatFinder {
 public:
  RepeatFinder(const uint8_t* data, size_t size, size_t pixel, size_t row, std::vector<uint32_t>& last_seen)
      : data_(data), size_(size), pixel_(pixel), row_(row), last_seen_(last_seen) {
    hashed_ = pixel == 3 ? 0xFFFFFF : 0xFFFFFFFF;  // a pixel, or four
    begun_ = row <= WINDOW ? row : size;
    looks_back_ = pixel > 1 || size > WORTH_A_SEARCH;
    if (!looks_back_) return;
    int bits = 10;
    while (bits < 14 && size >> bits > 4) ++bits;
    shift_ = 32 - bits;
    last_seen_.assign(size_t{1} << bits, 0);
  }

  // Writes the sequences of `data[from:]` up to about `to`; returns where they end.
  size_t find(size_t from, size_t to, Sequence* sequences) {
    size_t literals = from, i = from;
    while (i < to) {
      Match match = best(i);
      if (match.gain <= 0) {
        ++i;
        continue;
      }
      while (match.length < LONG_ENOUGH && i + 1 < to) {  // the next place may begin a longer one
        const Match next = best(i + 1);
        if (next.gain <= match.gain + BITS_OF_LITERAL - 1) break;
        match = next;
        ++i;
      }
      *sequences++ = {static_cast<uint32_t>(i - literals), static_cast<uint16_t>(match.length),
                           static_cast<uint16_t>(match.distance)};
      i += match.length;
      literals = i;
    }
    *sequences++ = {static_cast<uint32_t>(i - literals), 0, 0};
    return i;
  }

 private:
  struct Match {
    size_t length = 0, distance = 0;
    int gain = 0;
  };

  void consider(Match& match, size_t i, size_t distance, size_t most) const {
    const size_t length = equal_bytes(data_ + i, data_ + i - distance, most);
    if (length < SHORTEST) return;
    const int cost = distance == pixel_ ? COST_OF_PIXEL
                     : distance == row_ ? COST_OF_ROW
                                        : COST_OF_OTHER + std::max(0, highest_bit(static_cast<uint32_t>(distance)) - 1);
    const int gain = static_cast<int>(length) * BITS_OF_LITERAL - cost;
    if (gain > match.gain) match = {length, distance, gain};
  }

  Match best(size_t i) {
    Match match;
    const size_t most = std::min(LONGEST, size_ - i);
    if (i >= begun_) {
      const uint32_t here = load32(data_ + i);
      const bool is_pixel = !((here ^ load32(data_ + i - pixel_)) & 0xFFFFFF);
      const bool is_row = !((here ^ load32(data_ + i - row_)) & 0xFFFFFF);
      if (is_pixel | is_row) {  // one branch, where most places repeat neither
        consider(match, i, pixel_, most);
        consider(match, i, row_, most);
      }
    } else if (i >= pixel_) {
      consider(match, i, pixel_, most);
    }
    if (most >= 4 && looks_back_ && match.length < NEAR_ENOUGH) {
      uint32_t& seen = last_seen_[((load32(data_ + i) & hashed_) * 0x9E3779B1u) >> shift_];
      if (seen && i + 1 - seen <= WINDOW) consider(match, i, i + 1 - seen, most);
      seen = static_cast<uint32_t>(i + 1);
    }
    return match;
  }

  const uint8_t* data_;
  size_t size_, pixel_, row_;
  size_t begun_;  // from where on there is a row above, within reach
  std::vector<uint32_t>& last_seen_;
  uint32_t hashed_;
  int shift_ = 0;
  bool looks_back_;
};

}  // namespace

DeflateMemory::DeflateMemory() : sequences_(new Sequence[(BLOCK + LONGEST) / SHORTEST + 2]) {}

size_t compressed_bound(size_t size) {
  // a block is never longer than stored, with three bits before it and its parts' heads
  const size_t blocks = size / BLOCK + 1;
  return 2 + size + 5 * (size / MOST_STORED + 1) + 6 * blocks + 4;
}

uint8_t* compress(Form form, Matching matching, const uint8_t* data, size_t size, size_t pixel, size_t row, uint8_t* out,
                  DeflateMemory& memory) {
  *out++ = 0x78;  // deflate, 32 KiB window
  *out++ = 0x01;  // least effort, by which nobody decides anything
  BitWriter bits(out);
  Sequence* const sequences = memory.sequences();
  size_t from = 0;
  const auto blocks = [&](auto&& find) {
    do {
      const size_t to = find(from, std::min(from + BLOCK, size));
      write_block(bits, data + from, to - from, sequences, to == size);
      from = to;
    } while (from < size);
  };
  if (matching == Matching::RUNS) {
    blocks([&](size_t begin, size_t to) { return find_runs(data, size, begin, to, sequences); });
  } else {
    RepeatFinder finder(data, size, pixel, row, memory.last_seen);
    blocks([&](size_t begin, size_t to) { return finder.find(begin, to, sequences); });
  }
  out = bits.align();
  store_network32(out, adler32(form, data, size));
  return out + 4;
}

}  // namespace millijoule
