// The manifest of a bundle (docs/bundle.md), validated.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "document.hpp"

namespace tokexport {

struct OutputEntry : TensorEntry {
  std::string kind;
  bool exact = false, by_row = false;
  double limit = 0, own_limit = 0;
};

struct Decision {
  int block = 0;
  std::int64_t n_in = 0, n_kept = 0, n_out = 0, n_folded = 0;
  double near_tie = 0;
  std::map<std::string, std::string> parts;
  std::vector<std::int64_t> row_labels;
};

struct Builder {
  std::string name, version;
  bool host_code = false;
};

struct Manifest {
  std::string folder, version, kind, activation, precision;
  FileEntry file, proof;
  std::vector<FileEntry> beside;
  TensorEntry input;
  std::vector<OutputEntry> outputs;
  Preprocessing preprocessing;
  std::int64_t classes = 0, tokens = 0, proof_images = 0;
  bool ordered = false, photos = false, reduces = false;
  std::vector<std::string> labels;
  std::vector<Decision> decisions;
  Builder builder;

  // Reads folder/tokexport.json. Throws Error when it is none, newer, needs what is not understood here, or contradicts itself.
  static Manifest read(const std::string& folder);
  // Throws Error when a file is missing, no plain file, or has other bytes than the manifest says. hashes: compare those too.
  void check_files(bool hashes) const;
};

// Throws Error for an activation that is not known. where: it stands, for the message.
void check_activation(const std::string& activation, const std::string& where);

}  // namespace tokexport
