#include "document.hpp"

#include <set>

#include "files.hpp"
#include "tokexport/tokexport.hpp"

namespace tokexport {
namespace {

constexpr int kMajor = 1;
const std::set<std::string> kUnderstood = {"uint8_input", "class_tail", "activation"};

std::vector<double> numbers(const Field& field) {
  std::vector<double> values;
  for (const Field& item : field.list()) values.push_back(item.number());
  return values;
}

}  // namespace

void refuse(const std::string& where, const std::string& what) { throw Error(Fault::usage, where + ": " + what); }

void check_format(const Field& root) {
  auto format = root["format"].list();
  if (format.size() != 2) refuse(root.where(), "format: wanted two numbers");
  if (format[0].integer() != kMajor)
    refuse(root.where(), "it has format " + std::to_string(format[0].integer()) + ", this program reads format " + std::to_string(kMajor) + ": use another version");
  for (const Field& need : root["needs"].list())
    if (!kUnderstood.count(need.text())) refuse(root.where(), "it needs " + need.text() + ", which this program does not understand: use a newer one");
}

FileEntry file_entry(const Field& field) { return {field["name"].text(), field["sha256"].text(), field["size"].integer()}; }

void check_file(const std::string& folder, const FileEntry& entry, const std::string& document, const std::string& kind, bool hashes) {
  const std::string path = plain_file(folder, entry.name, kind);
  if (size_of(path) != entry.size)
    throw Error(Fault::usage, path + " has " + std::to_string(size_of(path)) + " bytes, wanted " + std::to_string(entry.size) + ": it was truncated or replaced, copy the " + kind + " again");
  if (hashes && sha256_of(path) != entry.sha256) throw Error(Fault::usage, path + " is not the file that " + document + " speaks of (SHA-256 differs): it was changed or replaced");
}

Preprocessing preprocessing_of(const Field& field) {
  Preprocessing p;
  auto size = field["size"].list();
  if (size.size() != 2) refuse(field.where(), "size: wanted height and width");
  const std::int64_t height = size[0].integer(), width = size[1].integer();
  p.mean = numbers(field["mean"]);
  p.std = numbers(field["std"]);
  p.interpolation = field["interpolation"].text();
  p.crop_mode = field["crop_mode"].text();
  p.crop = field["crop"].number();
  static const std::set<std::string> filters = {"nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"}, modes = {"center", "squash", "border"};
  if (!filters.count(p.interpolation)) refuse(field.where(), "interpolation '" + p.interpolation + "' is not known");
  if (!modes.count(p.crop_mode)) refuse(field.where(), "crop_mode '" + p.crop_mode + "' is not known");
  if (height < 1 || width < 1 || height > 1 << 16 || width > 1 << 16 || !(p.crop > 0 && p.crop <= 8)) refuse(field.where(), "size and crop must be above 0");
  p.height = static_cast<int>(height);
  p.width = static_cast<int>(width);
  return p;
}

void check_preprocessing(const Preprocessing& p, const TensorEntry& input, const std::string& where) {
  const std::size_t n = static_cast<std::size_t>(p.channels);
  if ((n != 1 && n != 3) || p.mean.size() != n || p.std.size() != n) refuse(where, "wanted mean and std of 1 or 3 channels");
  for (double s : p.std)
    if (s == 0) refuse(where, "std: wanted no 0");
  const std::vector<std::int64_t> axes = p.nhwc ? std::vector<std::int64_t>{p.height, p.width, p.channels} : std::vector<std::int64_t>{p.channels, p.height, p.width};
  if (std::vector<std::int64_t>(input.shape.begin() + 1, input.shape.end()) != axes) refuse(where, "it does not give what the input takes");
}

}  // namespace tokexport
