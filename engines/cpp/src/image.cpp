// Photos as Pillow reads them: JPEG by libjpeg, PNG by libpng, EXIF orientation, transparency on white, CMYK, 16 bits.
#include <cstdio>  // jpeglib.h wants it first

#include <jpeglib.h>
#include <jerror.h>
#include <png.h>

#include <algorithm>
#include <csetjmp>
#include <cstring>

#include "files.hpp"
#include "tokexport/tokexport.hpp"

namespace tokexport {
namespace {

constexpr std::int64_t kLargest = 178956970;  // pixels: twice what Pillow warns of

using Bytes = std::vector<std::uint8_t>;

// Decoded pixels before they are turned and brought to the model's channels.
struct Raw {
  int height = 0, width = 0, channels = 0;  // 1 grey, 2 grey with alpha, 3 RGB, 4 RGB with alpha
  Bytes pixels;
  int orientation = 1;
};

[[noreturn]] void refuse(const std::string& path, const std::string& what) {
  throw Error(Fault::usage, "images: " + path + " cannot be read as an image (" + what + ")");
}

unsigned over_255(unsigned value) { return ((value >> 8) + value) >> 8; }  // value / 255, rounded with 128 added before

// Orientation in a TIFF header with its first directory (tag 0x0112), 1 to 8; 1 where there is none.
int orientation_of(const std::uint8_t* bytes, std::size_t n) {
  if (n < 8) return 1;
  bool little = bytes[0] == 'I';
  auto read = [&](std::size_t at, int width) {
    std::uint32_t value = 0;
    for (int i = 0; i < width; ++i) value |= std::uint32_t(bytes[at + i]) << 8 * (little ? i : width - 1 - i);
    return value;
  };
  std::size_t at = read(4, 4);
  if (read(2, 2) != 42 || at > n - 2) return 1;
  std::size_t count = read(at, 2);
  for (std::size_t i = 0; i < count && at + 2 + 12 * (i + 1) <= n; ++i) {
    std::size_t entry = at + 2 + 12 * i;
    if (read(entry, 2) == 0x0112 && read(entry + 2, 2) == 3) {
      int value = static_cast<int>(read(entry + 8, 2));
      return value >= 1 && value <= 8 ? value : 1;
    }
  }
  return 1;
}

struct JpegErrors {
  jpeg_error_mgr base;
  std::jmp_buf back;
  char text[JMSG_LENGTH_MAX];
};

[[noreturn]] void jpeg_failed(j_common_ptr info) {
  auto* errors = reinterpret_cast<JpegErrors*>(info->err);
  errors->base.format_message(info, errors->text);
  std::longjmp(errors->back, 1);
}

void jpeg_message(j_common_ptr info, int level) {
  if (level < 0 && info->err->msg_code == JWRN_JPEG_EOF) jpeg_failed(info);  // a file that is cut short is no image
}

// No object with a destructor may be made here: an error jumps out. What is filled belongs to the caller.
bool decode_jpeg(const std::string& file, Raw& raw, JpegErrors& errors, jpeg_decompress_struct& info) {
  info.err = jpeg_std_error(&errors.base);
  errors.base.error_exit = jpeg_failed;
  errors.base.emit_message = jpeg_message;
  if (setjmp(errors.back)) return false;
  jpeg_create_decompress(&info);
  jpeg_mem_src(&info, reinterpret_cast<const unsigned char*>(file.data()), file.size());
  jpeg_save_markers(&info, JPEG_APP0 + 1, 0xFFFF);
  jpeg_read_header(&info, TRUE);
  if (std::int64_t(info.image_width) * info.image_height > kLargest) {
    std::strcpy(errors.text, "too many pixels");
    return false;
  }
  if (info.num_components == 4) info.out_color_space = JCS_CMYK;
  jpeg_start_decompress(&info);
  raw.height = static_cast<int>(info.output_height);
  raw.width = static_cast<int>(info.output_width);
  raw.channels = info.output_components;
  raw.pixels.resize(std::size_t(raw.height) * raw.width * raw.channels);
  while (info.output_scanline < info.output_height) {
    JSAMPROW row = raw.pixels.data() + std::size_t(info.output_scanline) * raw.width * raw.channels;
    jpeg_read_scanlines(&info, &row, 1);
  }
  for (jpeg_saved_marker_ptr m = info.marker_list; m; m = m->next)
    if (m->data_length > 6 && std::memcmp(m->data, "Exif\0\0", 6) == 0) {
      raw.orientation = orientation_of(m->data + 6, m->data_length - 6);
      break;
    }
  jpeg_finish_decompress(&info);
  return true;
}

Raw read_jpeg(const std::string& file, const std::string& path) {
  Raw raw;
  JpegErrors errors{};
  jpeg_decompress_struct info{};
  bool decoded = decode_jpeg(file, raw, errors, info);
  jpeg_destroy_decompress(&info);
  if (!decoded) refuse(path, errors.text);
  if (raw.channels == 4) {  // CMYK, stored inverted as Adobe does
    std::size_t n = raw.pixels.size() / 4;
    for (std::size_t i = 0; i < n; ++i) {
      unsigned white = raw.pixels[4 * i + 3];
      for (int k = 0; k < 3; ++k) raw.pixels[3 * i + k] = static_cast<std::uint8_t>(white - over_255((255u - raw.pixels[4 * i + k]) * white + 128));
    }
    raw.pixels.resize(3 * n);
    raw.channels = 3;
  } else if (raw.channels != 1 && raw.channels != 3) {
    refuse(path, std::to_string(raw.channels) + " channels");
  }
  return raw;
}

struct PngSource {
  const std::string* file;
  std::size_t at;
  std::jmp_buf back;
  char text[200];
};

[[noreturn]] void png_failed(png_structp png, png_const_charp text) {
  auto* source = static_cast<PngSource*>(png_get_error_ptr(png));
  std::strncpy(source->text, text, sizeof source->text - 1);
  std::longjmp(source->back, 1);
}

void png_no_warning(png_structp, png_const_charp) {}

void png_more(png_structp png, png_bytep place, png_size_t n) {
  auto* source = static_cast<PngSource*>(png_get_io_ptr(png));
  if (n > source->file->size() - source->at) png_failed(png, "the file is cut short");
  std::memcpy(place, source->file->data() + source->at, n);
  source->at += n;
}

// As decode_jpeg: no destructors in here. deep: grey of 16 bits, in two bytes a pixel.
bool decode_png(png_structp png, png_infop info, PngSource& source, Raw& raw, std::vector<png_bytep>& rows, bool& deep) {
  if (setjmp(source.back)) return false;
  png_set_read_fn(png, &source, png_more);
  png_read_info(png, info);
  int type = png_get_color_type(png, info), depth = png_get_bit_depth(png, info);
  if (std::int64_t(png_get_image_width(png, info)) * png_get_image_height(png, info) > kLargest) png_failed(png, "too many pixels");
  deep = depth == 16 && type == PNG_COLOR_TYPE_GRAY;
  if (type == PNG_COLOR_TYPE_PALETTE) png_set_palette_to_rgb(png);
  if (type == PNG_COLOR_TYPE_GRAY && depth < 8) png_set_expand_gray_1_2_4_to_8(png);
  if (!deep && png_get_valid(png, info, PNG_INFO_tRNS)) png_set_tRNS_to_alpha(png);
  if (!deep && depth == 16) png_set_strip_16(png);
  png_set_interlace_handling(png);
  png_read_update_info(png, info);
  raw.height = static_cast<int>(png_get_image_height(png, info));
  raw.width = static_cast<int>(png_get_image_width(png, info));
  raw.channels = png_get_channels(png, info);
  std::size_t stride = png_get_rowbytes(png, info);
  raw.pixels.resize(stride * raw.height);
  rows.resize(raw.height);
  for (int y = 0; y < raw.height; ++y) rows[y] = raw.pixels.data() + y * stride;
  png_read_image(png, rows.data());
  png_read_end(png, info);
#ifdef PNG_eXIf_SUPPORTED
  png_uint_32 n_exif = 0;
  png_bytep exif = nullptr;
  if (png_get_eXIf_1(png, info, &n_exif, &exif) && exif) raw.orientation = orientation_of(exif, n_exif);
#endif
  return true;
}

Raw read_png(const std::string& file, const std::string& path) {
  Raw raw;
  PngSource source{&file, 0, {}, {}};
  std::vector<png_bytep> rows;
  bool deep = false, decoded = false;
  png_structp png = png_create_read_struct(PNG_LIBPNG_VER_STRING, &source, png_failed, png_no_warning);
  png_infop info = png ? png_create_info_struct(png) : nullptr;
  if (info) decoded = decode_png(png, info, source, raw, rows, deep);
  png_destroy_read_struct(&png, &info, nullptr);
  if (!decoded) refuse(path, source.text[0] ? source.text : "libpng of another version");
  if (deep) {
    std::size_t n = raw.pixels.size() / 2;
    for (std::size_t i = 0; i < n; ++i) {
      std::uint32_t value = std::uint32_t(raw.pixels[2 * i]) << 8 | raw.pixels[2 * i + 1];
      raw.pixels[i] = static_cast<std::uint8_t>((value * 255 + 32767) / 65535);
    }
    raw.pixels.resize(n);
  }
  return raw;
}

// What is transparent lies on white; alpha is gone afterwards. The arithmetic is Pillow's alpha_composite on an opaque field.
void flatten(Raw& raw) {
  const int c = raw.channels - 1;
  const std::size_t n = raw.pixels.size() / raw.channels;
  for (std::size_t i = 0; i < n; ++i) {
    unsigned alpha = raw.pixels[i * (c + 1) + c];
    for (int k = 0; k < c; ++k) {
      unsigned value = raw.pixels[i * (c + 1) + k], out = 255;
      if (alpha) {
        unsigned own = alpha * 255u * 255u * 128u / (alpha * 255u + 255u * (255u - alpha)), rest = 255u * 128u - own;
        out = over_255(value * own + 255u * rest + (0x80u << 7)) >> 7;
      }
      raw.pixels[i * c + k] = static_cast<std::uint8_t>(out);
    }
  }
  raw.pixels.resize(n * c);
  raw.channels = c;
}

// As EXIF's orientation says: 2 to 4 mirrored and turned in place, 5 to 8 with sides exchanged.
Raw upright(Raw raw) {
  const int o = raw.orientation;
  if (o == 1) return raw;
  const bool exchanged = o >= 5, flip_x = o == 2 || o == 3 || o == 7 || o == 8, flip_y = o == 3 || o == 4 || o == 6 || o == 7;
  Raw out{exchanged ? raw.width : raw.height, exchanged ? raw.height : raw.width, raw.channels, Bytes(raw.pixels.size()), 1};
  for (int y = 0; y < out.height; ++y)
    for (int x = 0; x < out.width; ++x) {
      int row = exchanged ? x : y, column = exchanged ? y : x;
      if (flip_y) row = raw.height - 1 - row;
      if (flip_x) column = raw.width - 1 - column;
      std::copy_n(raw.pixels.data() + (std::size_t(row) * raw.width + column) * raw.channels, raw.channels, out.pixels.data() + (std::size_t(y) * out.width + x) * raw.channels);
    }
  return out;
}

Bytes in_channels(const Raw& raw, int channels) {
  if (raw.channels == channels) return raw.pixels;
  const std::size_t n = std::size_t(raw.height) * raw.width;
  Bytes out(n * channels);
  for (std::size_t i = 0; i < n; ++i) {
    if (channels == 3) {
      std::fill_n(out.data() + 3 * i, 3, raw.pixels[i]);
    } else {  // ITU-R 601-2, in sixteen bits
      const std::uint8_t* p = raw.pixels.data() + 3 * i;
      out[i] = static_cast<std::uint8_t>((p[0] * 19595u + p[1] * 38470u + p[2] * 7471u + 0x8000u) >> 16);
    }
  }
  return out;
}

}  // namespace

Image Image::read(const std::string& path, int channels) {
  if (channels != 1 && channels != 3) throw Error(Fault::usage, "images: wanted 3 channels or 1, got " + std::to_string(channels));
  std::string file = read_file(path);
  Raw raw;
  if (file.size() > 3 && std::memcmp(file.data(), "\xff\xd8\xff", 3) == 0)
    raw = read_jpeg(file, path);
  else if (file.size() > 8 && std::memcmp(file.data(), "\x89PNG\r\n\x1a\n", 8) == 0)
    raw = read_png(file, path);
  else
    refuse(path, "wanted JPEG or PNG");
  raw = upright(std::move(raw));
  if (raw.channels == 2 || raw.channels == 4) flatten(raw);
  return Image{raw.height, raw.width, channels, in_channels(raw, channels)};
}

}  // namespace tokexport
