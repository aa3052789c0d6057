// Which files an ONNX file reads beside itself, found without a runtime: they must be the bundle's before a runtime opens them.
#pragma once

#include <set>
#include <string>

namespace tokexport {

// The locations of external data of every tensor in the model, wherever it is nested. Throws Error for what is no ONNX file.
std::set<std::string> external_files(const std::string& model, const std::string& path);

}  // namespace tokexport
