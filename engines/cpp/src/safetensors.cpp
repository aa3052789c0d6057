#include "safetensors.hpp"

#include <cstring>

#include "files.hpp"
#include "json.hpp"

namespace tokexport {
namespace {

[[noreturn]] void damaged(const std::string& path, const std::string& what) {
  throw Error(Fault::usage, path + " cannot be read (" + what + "): the bundle is damaged, copy it again");
}

template <class From, class To>
std::vector<To> values_of(const char* bytes, std::size_t n) {
  std::vector<From> raw(n);
  if (n) std::memcpy(raw.data(), bytes, n * sizeof(From));
  return std::vector<To>(raw.begin(), raw.end());
}

}  // namespace

Tensors read_safetensors(const std::string& path) {
  std::string file = read_file(path);
  std::uint64_t length = 0;
  if (file.size() < 8) damaged(path, "it is cut short");
  std::memcpy(&length, file.data(), 8);
  if (length > file.size() - 8) damaged(path, "its header is cut short");
  Json header = Json::parse(file.substr(8, length), path);
  const char* data = file.data() + 8 + length;
  const std::uint64_t size = file.size() - 8 - length;
  Tensors tensors;
  for (auto& [name, field] : Field(header, path).members()) {
    if (name == "__metadata__") continue;
    auto offsets = field["data_offsets"].list();
    std::string type = field["dtype"].text();
    Tensor tensor;
    std::uint64_t n = 1;
    for (const Field& axis : field["shape"].list()) {
      std::int64_t length_of_axis = axis.integer();
      if (length_of_axis < 0 || length_of_axis > 1 << 30 || (n && length_of_axis > (std::int64_t(1) << 40) / static_cast<std::int64_t>(n))) damaged(path, name + " has no shape");
      tensor.shape.push_back(length_of_axis);
      n *= static_cast<std::uint64_t>(length_of_axis);
    }
    std::uint64_t width = type == "F32" || type == "I32" ? 4 : type == "I64" ? 8 : type == "U8" ? 1 : 0;
    if (!width || offsets.size() != 2) damaged(path, name + " is of type " + type);
    std::int64_t start = offsets[0].integer(), end = offsets[1].integer();
    if (start < 0 || end < start || static_cast<std::uint64_t>(end) > size || static_cast<std::uint64_t>(end - start) != n * width) damaged(path, name + " is cut short");
    if (type == "F32") tensor.values = values_of<float, float>(data + start, n);
    else if (type == "I32") tensor.values = values_of<std::int32_t, std::int64_t>(data + start, n);
    else if (type == "I64") tensor.values = values_of<std::int64_t, std::int64_t>(data + start, n);
    else tensor.values = values_of<std::uint8_t, std::uint8_t>(data + start, n);
    tensors.emplace(name, std::move(tensor));
  }
  return tensors;
}

}  // namespace tokexport
