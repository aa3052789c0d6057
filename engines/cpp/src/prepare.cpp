#include "prepare.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace tokexport {
namespace {

constexpr double kPi = 3.14159265358979323846;

double sinc(double x) { return x == 0 ? 1 : std::sin(x * kPi) / (x * kPi); }

double box(double x) { return x > -0.5 && x <= 0.5 ? 1 : 0; }

double triangle(double x) { return std::max(0.0, 1 - std::abs(x)); }

double hamming(double x) {
  x = std::abs(x);
  if (x == 0) return 1;
  if (x >= 1) return 0;
  x *= kPi;
  return std::sin(x) / x * (0.54 + 0.46 * std::cos(x));
}

double cubic(double x) {  // Keys 1981 with a = -0.5
  constexpr double a = -0.5;
  x = std::abs(x);
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  if (x < 2) return (((x - 5) * x + 8) * x - 4) * a;
  return 0;
}

double lanczos(double x) { return x >= -3 && x < 3 ? sinc(x) * sinc(x / 3) : 0; }

struct Filter {
  const char* name;
  double (*weight)(double);
  double support;
};

constexpr Filter kFilters[] = {{"box", box, 0.5}, {"bilinear", triangle, 1}, {"hamming", hamming, 1}, {"bicubic", cubic, 2}, {"lanczos", lanczos, 3}};

constexpr int kBits = 32 - 8 - 2;  // of a weight's fraction: eight bits of pixel and two of headroom beside it

struct Taps {
  int first = 0;
  std::vector<int> weights;
};

// For every output pixel the input pixels it is made of: the filter is as wide as the output's pixels when the image gets smaller.
std::vector<Taps> taps_of(int n_in, int n_out, const Filter& filter) {
  double scale = static_cast<double>(n_in) / n_out, stretch = std::max(scale, 1.0), reach = filter.support * stretch;
  std::vector<Taps> taps(n_out);
  for (int i = 0; i < n_out; ++i) {
    double center = (i + 0.5) * scale, sum = 0;
    int first = std::max(static_cast<int>(center - reach + 0.5), 0), last = std::min(static_cast<int>(center + reach + 0.5), n_in);
    std::vector<double> weights;
    for (int x = first; x < last; ++x) {
      weights.push_back(filter.weight((x - center + 0.5) * (1 / stretch)));
      sum += weights.back();
    }
    taps[i].first = first;
    for (double w : weights) {
      w = (sum != 0 ? w / sum : w) * (1 << kBits);
      taps[i].weights.push_back(static_cast<int>(w < 0 ? w - 0.5 : w + 0.5));
    }
  }
  return taps;
}

std::uint8_t rounded(int sum) { return static_cast<std::uint8_t>(std::clamp(sum >> kBits, 0, 255)); }

Image across(const Image& image, int width, const Filter& filter) {
  Image out{image.height, width, image.channels, std::vector<std::uint8_t>(std::size_t(image.height) * width * image.channels)};
  auto taps = taps_of(image.width, width, filter);
  const int c = image.channels;
  for (int y = 0; y < image.height; ++y) {
    const std::uint8_t* row = image.pixels.data() + std::size_t(y) * image.width * c;
    std::uint8_t* place = out.pixels.data() + std::size_t(y) * width * c;
    for (const Taps& t : taps)
      for (int k = 0; k < c; ++k) {
        int sum = 1 << (kBits - 1);
        const std::uint8_t* pixel = row + std::size_t(t.first) * c + k;
        for (int w : t.weights) sum += *pixel * w, pixel += c;
        *place++ = rounded(sum);
      }
  }
  return out;
}

Image down(const Image& image, int height, const Filter& filter) {
  Image out{height, image.width, image.channels, std::vector<std::uint8_t>(std::size_t(height) * image.width * image.channels)};
  auto taps = taps_of(image.height, height, filter);
  const std::size_t stride = std::size_t(image.width) * image.channels;
  std::vector<int> sums(stride);
  for (int y = 0; y < height; ++y) {
    std::fill(sums.begin(), sums.end(), 1 << (kBits - 1));
    const std::uint8_t* row = image.pixels.data() + taps[y].first * stride;
    for (int w : taps[y].weights) {
      for (std::size_t x = 0; x < stride; ++x) sums[x] += row[x] * w;
      row += stride;
    }
    std::transform(sums.begin(), sums.end(), out.pixels.begin() + y * stride, rounded);
  }
  return out;
}

Image nearest(const Image& image, int height, int width) {
  Image out{height, width, image.channels, std::vector<std::uint8_t>(std::size_t(height) * width * image.channels)};
  auto places = [](int n_in, int n_out) {  // the position is added up, as Pillow does
    std::vector<int> at;
    double step = static_cast<double>(n_in) / n_out, x = step * 0.5;
    for (int i = 0; i < n_out; ++i, x += step) at.push_back(std::min(static_cast<int>(x), n_in - 1));
    return at;
  };
  auto rows = places(image.height, height), columns = places(image.width, width);
  std::uint8_t* place = out.pixels.data();
  for (int y : rows)
    for (int x : columns) {
      const std::uint8_t* pixel = image.pixels.data() + (std::size_t(y) * image.width + x) * image.channels;
      place = std::copy(pixel, pixel + image.channels, place);
    }
  return out;
}

int to_even(double x) { return static_cast<int>(std::nearbyint(x)); }  // as Python rounds

// The middle of an image; what is smaller lies on a field of `fill`.
Image center(const Image& image, int height, int width, const std::vector<int>& fill) {
  const int c = image.channels, field_h = std::max(image.height, height), field_w = std::max(image.width, width);
  int from_top = to_even((field_h - height) / 2.0), from_left = to_even((field_w - width) / 2.0);
  int pad_top = (field_h - image.height) / 2, pad_left = (field_w - image.width) / 2;
  Image out{height, width, c, {}};
  out.pixels.reserve(std::size_t(height) * width * c);
  for (int y = 0; y < height; ++y)
    for (int x = 0; x < width; ++x) {
      int row = y + from_top - pad_top, column = x + from_left - pad_left;
      bool inside = row >= 0 && row < image.height && column >= 0 && column < image.width;
      for (int k = 0; k < c; ++k)
        out.pixels.push_back(inside ? image.pixels[(std::size_t(row) * image.width + column) * c + k] : static_cast<std::uint8_t>(fill[k]));
    }
  return out;
}

}  // namespace

Image resize(const Image& image, int height, int width, const std::string& name) {
  if (height == image.height && width == image.width) return image;
  if (name == "nearest") return nearest(image, height, width);
  auto filter = std::find_if(std::begin(kFilters), std::end(kFilters), [&](const Filter& f) { return name == f.name; });
  if (filter == std::end(kFilters)) throw Error(Fault::usage, "interpolation '" + name + "' is not known");
  // The pass between is rounded to 8 bits, so the order of the two shows. Pillow 13 begins with the rows where they get fewer by more
  // than twice what the columns do (found by trying 6,000 sizes; its documentation does not tell), and with the columns otherwise.
  const bool rows_first = height < image.height && image.height - height > 2 * (image.width - width);
  Image between = rows_first ? down(image, height, *filter) : width == image.width ? image : across(image, width, *filter);
  if (rows_first) return width == image.width ? between : across(between, width, *filter);
  return height == between.height ? between : down(between, height, *filter);
}

Image fit(const Image& image, const Preprocessing& p) {
  const int scaled_h = static_cast<int>(std::floor(p.height / p.crop)), scaled_w = static_cast<int>(std::floor(p.width / p.crop));
  int height = scaled_h, width = scaled_w;
  if (p.crop_mode == "center" && scaled_h == scaled_w) {
    bool upright = image.width < image.height;
    int& longer = upright ? height : width;
    longer = static_cast<int>(static_cast<double>(std::int64_t(scaled_h) * std::max(image.height, image.width)) / std::min(image.height, image.width));
  } else if (p.crop_mode != "squash") {
    double down_h = static_cast<double>(image.height) / scaled_h, down_w = static_cast<double>(image.width) / scaled_w;
    double ratio = p.crop_mode == "border" ? std::max(down_h, down_w) : std::min(down_h, down_w);
    height = to_even(image.height / ratio);
    width = to_even(image.width / ratio);
  }
  std::vector<int> fill(p.channels, 0);
  for (int k = 0; k < p.channels; ++k)
    if (p.crop_mode == "border") fill[k] = std::clamp(to_even(255 * p.mean[k]), 0, 255);
  return center(resize(image, std::max(height, 1), std::max(width, 1), p.interpolation), p.height, p.width, fill);
}

Tensor prepare(const std::vector<Image>& images, const Preprocessing& p) {
  const std::size_t plane = std::size_t(p.height) * p.width, n = plane * p.channels;
  Tensor out;
  out.shape = {static_cast<std::int64_t>(images.size()), p.nhwc ? p.height : p.channels, p.nhwc ? p.width : p.height, p.nhwc ? p.channels : p.width};
  std::vector<float> floats(p.normalised ? n * images.size() : 0);
  std::vector<std::uint8_t> bytes(p.normalised ? 0 : n * images.size());
  for (std::size_t i = 0; i < images.size(); ++i) {
    if (images[i].channels != p.channels || images[i].pixels.size() != std::size_t(images[i].height) * images[i].width * images[i].channels || images[i].pixels.empty())
      throw Error(Fault::usage, "image " + std::to_string(i) + ": wanted height x width x " + std::to_string(p.channels) + " pixels");
    Image cropped = fit(images[i], p);
    for (std::size_t at = 0; at < plane; ++at)
      for (int k = 0; k < p.channels; ++k) {
        std::uint8_t pixel = cropped.pixels[at * p.channels + k];
        std::size_t place = i * n + (p.nhwc ? at * p.channels + k : k * plane + at);
        if (p.normalised)
          floats[place] = (static_cast<float>(pixel) / 255.0f - static_cast<float>(p.mean[k])) / static_cast<float>(p.std[k]);
        else
          bytes[place] = pixel;
      }
  }
  if (p.normalised) out.values = std::move(floats); else out.values = std::move(bytes);
  return out;
}

std::size_t Tensor::size() const {
  return std::visit([](const auto& v) { return v.size(); }, values);
}

}  // namespace tokexport
