// Lossy WebP, many images in one call, by the libwebp that the caller has loaded: its functions come as pointers, nothing is linked.
// What they take is declared as libwebp's encoder does in its second ABI; the library says itself whether it has that one.
//
// Source: libwebp's src/webp/encode.h.

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "processor.h"

namespace millijoule {
namespace {

constexpr int ABI = 0x0200;  // libraries compare its upper byte alone

// WebPConfig: what is set here, and room for what a library knows beside it.
struct Config {
  int lossless;
  float quality;
  int method;
  int others[125];
};

struct Picture {
  int use_argb, colorspace, width, height;
  uint8_t *y, *u, *v;
  int y_stride, uv_stride;
  uint8_t* a;
  int a_stride;
  uint32_t pad1[2];
  uint32_t* argb;
  int argb_stride;
  uint32_t pad2[3];
  int (*writer)(const uint8_t* data, size_t size, const Picture* picture);
  void* custom;
  int extra_info_type;
  uint8_t* extra_info;
  void* stats;
  int error_code;
  int (*progress)(int percent, const Picture* picture);
  void* user_data;
  uint32_t pad3[3];
  uint8_t *pad4, *pad5;
  uint32_t pad6[8];
  void *memory, *memory_argb, *pad7[2];
  uint64_t more[32];  // of libraries to come
};

struct Library {
  int (*init_config)(Config*, int preset, float quality, int abi);
  int (*validate)(const Config*);
  int (*init_picture)(Picture*, int abi);
  int (*import_rgb)(Picture*, const uint8_t* rgb, int stride);
  int (*encode)(const Config*, Picture*);
  void (*free_picture)(Picture*);
};

int append(const uint8_t* data, size_t size, const Picture* picture) {
  auto& out = *static_cast<std::vector<uint8_t>*>(picture->custom);
  try {
    out.insert(out.end(), data, data + size);
    return 1;
  } catch (...) {
    return 0;
  }
}

constexpr int NO_MEMORY = -1, NOT_THIS_LIBRARY = -2;
constexpr int LIBRARY_NO_MEMORY = 1, LIBRARY_NO_MEMORY_FOR_BITS = 2;  // WebPEncodingError

}  // namespace
}  // namespace millijoule

// `count` images as WebP files without metadata, one behind the other, each from `out_offsets[i]` to `out_offsets[i + 1]` of `*out`, which
// is to be given back by `millijoule_free_webps`.
//
// functions: WebPConfigInitInternal, WebPValidateConfig, WebPPictureInitInternal, WebPPictureImportRGB, WebPEncode, WebPPictureFree.
// images: where each is, uint8 [height, width, 3]; sizes: [count, 2], height and width.
// quality, method: as libwebp has them.
//
// Returns 0; -1 where there is no memory; -2 where the library is another or refuses; then there is no `*out`.
MILLIJOULE_API int64_t millijoule_encode_webps(void* const* functions, int64_t count, const uint8_t* const* images,
                                               const int64_t* sizes, float quality, int32_t method, uint8_t** out,
                                               int64_t* out_offsets) {
  using namespace millijoule;
  Library lib;
  static_assert(sizeof lib == 6 * sizeof(void*), "pointers alone");
  std::memcpy(&lib, functions, sizeof lib);
  *out = nullptr;
  try {
    std::vector<uint8_t> files;
    Config config{};
    if (!lib.init_config(&config, 0, 75.0f, ABI)) return NOT_THIS_LIBRARY;
    config.lossless = 0;
    config.quality = quality;
    config.method = method;
    if (!lib.validate(&config)) return NOT_THIS_LIBRARY;
    out_offsets[0] = 0;
    for (int64_t i = 0; i < count; ++i) {
      Picture picture{};
      if (!lib.init_picture(&picture, ABI)) return NOT_THIS_LIBRARY;
      picture.use_argb = 1;
      picture.height = static_cast<int>(sizes[2 * i]);
      picture.width = static_cast<int>(sizes[2 * i + 1]);
      picture.writer = append;
      picture.custom = &files;
      const bool done = lib.import_rgb(&picture, images[i], 3 * picture.width) && lib.encode(&config, &picture);
      const int error = picture.error_code;
      lib.free_picture(&picture);
      if (!done) return error == LIBRARY_NO_MEMORY || error == LIBRARY_NO_MEMORY_FOR_BITS ? NO_MEMORY : NOT_THIS_LIBRARY;
      out_offsets[i + 1] = static_cast<int64_t>(files.size());
    }
    *out = static_cast<uint8_t*>(std::malloc(files.size() + 1));
    if (!*out) return NO_MEMORY;
    if (!files.empty()) std::memcpy(*out, files.data(), files.size());
    return 0;
  } catch (...) {
    return NO_MEMORY;
  }
}

MILLIJOULE_API void millijoule_free_webps(uint8_t* out) { std::free(out); }
