// What runs a bundle's file: one row of a table each (backend.cpp), one file each.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "manifest.hpp"
#include "tokexport/tokexport.hpp"

namespace tokexport {

// An opened file. `run` may be called by many threads at once.
class Session {
 public:
  virtual ~Session() = default;
  // input: of the file's own batch. Returns the file's outputs and, when they were asked for, its decisions.
  virtual Tensors run(const Tensor& input) const = 0;
};

struct Runtime {
  const char* name;   // as in Options
  const char* words;  // for people
  const char* kind;   // of the bundles it runs: "onnx" or "engine"
  std::unique_ptr<Session> (*open)(const Manifest&, const Options&);
};

// Those that were built in.
const std::vector<Runtime>& runtime_table();

std::unique_ptr<Session> open_openvino(const Manifest&, const Options&);
std::unique_ptr<Session> open_onnxruntime(const Manifest&, const Options&);
std::unique_ptr<Session> open_tensorrt(const Manifest&, const Options&);

// Names of the file's values that hold its decisions, in order; none unless they are asked for.
std::vector<std::string> decision_names(const Manifest&, const Options&);

}  // namespace tokexport
