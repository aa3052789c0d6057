// What the documents of tokexport have in common (docs/format.md): their format, the files they name, the way from a photo to the input.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "json.hpp"

namespace tokexport {

constexpr std::int64_t kAny = -1;  // an axis of any length

struct FileEntry {
  std::string name, sha256;
  std::int64_t size = 0;
};

struct TensorEntry {
  std::string name, type;
  std::vector<std::int64_t> shape;
};

struct Preprocessing {
  int height = 0, width = 0, channels = 3;
  std::vector<double> mean, std;
  std::string interpolation, crop_mode;
  double crop = 1;
  bool nhwc = false, normalised = true;
};

// Throws the Error that says what is wrong with a document, and where.
[[noreturn]] void refuse(const std::string& where, const std::string& what);

// Throws Error for a document of another major format, or one that needs what is not understood here.
void check_format(const Field& root);

FileEntry file_entry(const Field& field);

// Throws Error when a file is missing, no plain file, or has other bytes than its document says. kind: what the folder is, "bundle";
// document: the name of the manifest, for the message; hashes: compare those too.
void check_file(const std::string& folder, const FileEntry& entry, const std::string& document, const std::string& kind, bool hashes);

// Resize, crop, mean and std, of a manifest or of a provenance; channels and layout are the caller's.
Preprocessing preprocessing_of(const Field& field);

// Throws Error unless it has a mean and a std for each channel and gives what the input takes. where: it stands, for the message.
void check_preprocessing(const Preprocessing& preprocessing, const TensorEntry& input, const std::string& where);

}  // namespace tokexport
