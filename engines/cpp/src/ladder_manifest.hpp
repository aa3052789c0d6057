// What a ladder is: `ladder.json`, validated (docs/ladder.md).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "document.hpp"
#include "manifest.hpp"
#include "tokexport/ladder.hpp"

namespace tokexport {

constexpr int kMostThreads = 1024;

struct LadderManifest {
  std::string folder, version, runtime, processor, measure;
  int threads = 0;
  std::int64_t batch = kAny, images = 0;
  FileEntry weights;
  std::vector<FileEntry> files;  // of the rungs
  std::vector<Rung> rungs;
  Manifest file;  // what every rung takes and gives; its own file and its decisions are left out

  // Whether a path is a folder with a ladder's manifest, or that manifest.
  static bool is_at(const std::string& path);
  // Reads folder/ladder.json. Throws Error when it is none, newer, needs what is not understood here, or contradicts itself.
  static LadderManifest read(const std::string& path);
  // Throws Error when a file is missing, no plain file, or has other bytes than the manifest says. hashes: compare those too.
  void check_files(bool hashes) const;
  // What a bundle of one rung would say.
  Manifest of_rung(std::size_t place) const;
};

}  // namespace tokexport
