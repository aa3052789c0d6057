#include "backend.hpp"

namespace tokexport {

// To add a runtime: a file with its `open_...`, a row here, and the lines that build it in CMakeLists.txt.
const std::vector<Runtime>& runtime_table() {
  static const std::vector<Runtime> table = {
#ifdef TOKEXPORT_OPENVINO
      {"openvino", "OpenVINO", "onnx", open_openvino},
#endif
#ifdef TOKEXPORT_ONNXRUNTIME
      {"onnxruntime", "ONNX Runtime", "onnx", open_onnxruntime},
#endif
#ifdef TOKEXPORT_TENSORRT
      {"tensorrt", "TensorRT", "engine", open_tensorrt},
#endif
  };
  return table;
}

std::vector<std::string> decision_names(const Manifest& manifest, const Options& options) {
  std::vector<std::string> names;
  if (options.decisions)
    for (const Decision& decision : manifest.decisions)
      for (const auto& part : decision.parts) names.push_back(part.second);
  return names;
}

}  // namespace tokexport
