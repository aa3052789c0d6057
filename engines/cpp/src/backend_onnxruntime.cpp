// ONNX Runtime on the processor. The library is loaded when it is used, and asked for the interface these headers know.
#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>

#include <mutex>

#include "backend.hpp"
#include "files.hpp"
#include "library.hpp"

namespace tokexport {
namespace {

const std::vector<std::string> kNames = {"libonnxruntime.so.1", "libonnxruntime.so"};

// The interface is one for the whole program: the first library that is opened stays.
Ort::Env& environment(const Options& options) {
  static std::mutex lock;
  static std::unique_ptr<Library> library;
  static std::unique_ptr<Ort::Env> env;
  std::lock_guard<std::mutex> guard(lock);
  if (env) {
    if (!options.library.empty() && options.library != library->path())
      throw Error(Fault::usage, "library " + options.library + ": this program has already opened " + library->path());
    return *env;
  }
  auto opened = std::make_unique<Library>(options.library, "TOKEXPORT_ONNXRUNTIME", kNames, "ONNX Runtime");
  const OrtApiBase* base = opened->function<const OrtApiBase* (*)()>("OrtGetApiBase")();
  const OrtApi* api = base->GetApi(ORT_API_VERSION);
  if (!api) throw Error(Fault::usage, opened->path() + " is ONNX Runtime " + base->GetVersionString() + ": wanted 1." + std::to_string(ORT_API_VERSION) + " or newer");
  Ort::InitApi(api);
  env = std::make_unique<Ort::Env>(ORT_LOGGING_LEVEL_ERROR, "tokexport");
  library = std::move(opened);
  return *env;
}

void append_field(std::string& out, int number, const std::string& bytes) {
  auto varint = [&](std::uint64_t n) {
    for (; n > 127; n >>= 7) out += static_cast<char>((n & 127) | 128);
    out += static_cast<char>(n);
  };
  varint(std::uint64_t(number) << 3 | 2);
  varint(bytes.size());
  out += bytes;
}

// What makes outputs of inner int64 values when it is put behind a model: protobuf merges a message field that stands twice, so a
// second ModelProto.graph (7) adds its GraphProto.output (12), each a ValueInfoProto of a name (1) and a tensor type (2, 1) of int64.
std::string more_outputs(const std::vector<std::string>& names) {
  std::string graph, model;
  for (const std::string& name : names) {
    std::string type, value;
    append_field(type, 1, std::string("\x08\x07", 2));  // elem_type (1) = INT64 (7)
    append_field(value, 1, name);
    append_field(value, 2, type);
    append_field(graph, 12, value);
  }
  append_field(model, 7, graph);
  return model;
}

ONNXTensorElementDataType element_of(const Tensor& tensor) {
  return std::holds_alternative<std::vector<float>>(tensor.values)          ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT
         : std::holds_alternative<std::vector<std::int64_t>>(tensor.values) ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64
                                                                            : ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
}

Tensor copied(const Ort::Value& value, const std::string& name) {
  auto info = value.GetTensorTypeAndShapeInfo();
  std::size_t n = info.GetElementCount();
  Tensor out;
  out.shape = info.GetShape();
  if (info.GetElementType() == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) {
    const float* data = value.GetTensorData<float>();
    out.values = std::vector<float>(data, data + n);
  } else if (info.GetElementType() == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64) {
    const std::int64_t* data = value.GetTensorData<std::int64_t>();
    out.values = std::vector<std::int64_t>(data, data + n);
  } else {
    throw Error(Fault::usage, "output " + name + ": wanted float32 or int64");
  }
  return out;
}

class OrtSession : public Session {
 public:
  OrtSession(const Manifest& manifest, const Options& options) : input_(manifest.input.name) {
    Ort::Env& env = environment(options);
    Ort::SessionOptions settings;
    settings.SetLogSeverityLevel(3);
    if (options.threads) settings.SetIntraOpNumThreads(options.threads);
    if (options.share_weights) settings.AddConfigEntry("session.disable_prepacking", "1");  // packed weights are copies
    for (const OutputEntry& output : manifest.outputs) names_.push_back(output.name);
    auto inner = decision_names(manifest, options);
    names_.insert(names_.end(), inner.begin(), inner.end());
    std::string path = plain_file(manifest.folder, manifest.file.name);
    if (inner.empty()) {
      session_ = std::make_unique<Ort::Session>(env, path.c_str(), settings);
      return;
    }
    if (!manifest.beside.empty()) settings.AddConfigEntry("session.model_external_initializers_file_folder_path", manifest.folder.c_str());
    std::string model = read_file(path) + more_outputs(inner);
    session_ = std::make_unique<Ort::Session>(env, model.data(), model.size(), settings);
  }

  Tensors run(const Tensor& input) const override {
    auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    auto value = std::visit(
        [&](const auto& v) {
          using T = typename std::decay_t<decltype(v)>::value_type;
          auto* data = const_cast<T*>(v.data());  // the interface takes no const; inputs are only read
          return Ort::Value::CreateTensor(memory, data, v.size() * sizeof(T), input.shape.data(), input.shape.size(), element_of(input));
        },
        input.values);
    const char* name = input_.c_str();
    std::vector<const char*> names;
    for (const std::string& n : names_) names.push_back(n.c_str());
    auto values = session_->Run(Ort::RunOptions{nullptr}, &name, &value, 1, names.data(), names.size());
    Tensors out;
    for (std::size_t i = 0; i < names_.size(); ++i) out[names_[i]] = copied(values[i], names_[i]);
    return out;
  }

 private:
  std::string input_;
  std::vector<std::string> names_;
  mutable std::unique_ptr<Ort::Session> session_;  // its Run is safe for many threads, and not const
};

}  // namespace

std::unique_ptr<Session> open_onnxruntime(const Manifest& manifest, const Options& options) {
  return std::make_unique<OrtSession>(manifest, options);
}

}  // namespace tokexport
