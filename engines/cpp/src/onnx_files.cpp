#include "onnx_files.hpp"

#include <cstdint>
#include <map>

#include "tokexport/tokexport.hpp"

namespace tokexport {
namespace {

// The messages of onnx.proto that hold tensors, and by field number what is nested in them.
enum Message { kModel, kGraph, kNode, kAttribute, kFunction, kTensor, kSparse, kTraining, kEntry };

const std::map<Message, std::map<std::uint64_t, Message>> kNested = {
    {kModel, {{7, kGraph}, {20, kTraining}, {25, kFunction}}},
    {kTraining, {{1, kGraph}, {2, kGraph}}},
    {kGraph, {{1, kNode}, {5, kTensor}, {15, kSparse}}},
    {kNode, {{5, kAttribute}}},
    {kFunction, {{7, kNode}, {11, kAttribute}}},
    {kAttribute, {{5, kTensor}, {6, kGraph}, {10, kTensor}, {11, kGraph}, {22, kSparse}, {23, kSparse}}},
    {kSparse, {{1, kTensor}, {2, kTensor}}},
    {kTensor, {{13, kEntry}}},
    {kEntry, {}},
};
constexpr int kDeepest = 64;

class Scanner {
 public:
  Scanner(const std::string& bytes, const std::string& path) : bytes_(bytes), path_(path) {}

  void scan(Message message, std::size_t at, std::size_t end, int depth) {
    if (depth > kDeepest) fail();
    const auto& nested = kNested.at(message);
    std::string key, value;
    while (at < end) {
      std::uint64_t tag = varint(at, end), field = tag >> 3;
      if ((tag & 7) == 0) varint(at, end);
      else if ((tag & 7) == 1) at = skipped(at, end, 8);
      else if ((tag & 7) == 5) at = skipped(at, end, 4);
      else if ((tag & 7) == 2) {
        std::uint64_t length = varint(at, end);
        std::size_t next = skipped(at, end, length);
        auto inner = nested.find(field);
        if (inner != nested.end()) scan(inner->second, at, next, depth + 1);
        if (message == kEntry && field == 1) key = bytes_.substr(at, length);
        if (message == kEntry && field == 2) value = bytes_.substr(at, length);
        at = next;
      } else {
        fail();
      }
    }
    if (key == "location") files.insert(value);
  }

  std::set<std::string> files;

 private:
  [[noreturn]] void fail() const { throw Error(Fault::usage, path_ + " is not an ONNX file, or is damaged"); }

  std::size_t skipped(std::size_t at, std::size_t end, std::uint64_t n) const {
    if (n > end - at) fail();
    return at + n;
  }

  std::uint64_t varint(std::size_t& at, std::size_t end) const {
    std::uint64_t value = 0;
    for (int shift = 0; shift < 64; shift += 7) {
      if (at >= end) fail();
      unsigned char byte = bytes_[at++];
      value |= std::uint64_t(byte & 127) << shift;
      if (byte < 128) return value;
    }
    fail();
  }

  const std::string& bytes_;
  const std::string& path_;
};

}  // namespace

std::set<std::string> external_files(const std::string& model, const std::string& path) {
  Scanner scanner(model, path);
  scanner.scan(kModel, 0, model.size(), 0);
  return scanner.files;
}

}  // namespace tokexport
