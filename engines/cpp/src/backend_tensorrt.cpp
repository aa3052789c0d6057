// TensorRT engines, or TensorRT-RTX ones when it was built with RTX's own headers. Both libraries, and CUDA, are loaded when used.
#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include <cstring>
#include <mutex>

#include "backend.hpp"
#include "files.hpp"
#include "library.hpp"

namespace tokexport {
namespace {

constexpr bool kRtx = NV_TENSORRT_MAJOR < 8;  // TensorRT-RTX counts its versions from 1
const char* const kWords = kRtx ? "TensorRT-RTX" : "TensorRT";

class Logger : public nvinfer1::ILogger {
 public:
  void log(Severity severity, const char* text) noexcept override {
    if (severity > Severity::kERROR) return;
    std::lock_guard<std::mutex> guard(lock_);
    last_ = text;
  }
  std::string last() const {
    std::lock_guard<std::mutex> guard(lock_);
    return last_.empty() ? "" : " (" + last_ + ")";
  }

 private:
  mutable std::mutex lock_;
  std::string last_;
};

// The few functions of CUDA's runtime that are needed.
class Cuda {
 public:
  Cuda() : library_("", "TOKEXPORT_CUDART", {"libcudart.so.13", "libcudart.so.12", "libcudart.so"}, "CUDA's runtime") {
    allocate_ = library_.function<decltype(&cuda_malloc)>("cudaMalloc");
    release = library_.function<decltype(&::cudaFree)>("cudaFree");
    copy_ = library_.function<decltype(&::cudaMemcpyAsync)>("cudaMemcpyAsync");
    create_ = library_.function<decltype(&::cudaStreamCreate)>("cudaStreamCreate");
    destroy = library_.function<decltype(&::cudaStreamDestroy)>("cudaStreamDestroy");
    wait_ = library_.function<decltype(&::cudaStreamSynchronize)>("cudaStreamSynchronize");
    words_ = library_.function<decltype(&::cudaGetErrorString)>("cudaGetErrorString");
  }

  void* allocate(std::size_t bytes) const {
    void* place = nullptr;
    check(allocate_(&place, bytes), "allocating memory");
    return place;
  }
  cudaStream_t stream() const {
    cudaStream_t stream = nullptr;
    check(create_(&stream), "making a stream");
    return stream;
  }
  void copy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) const {
    check(copy_(to, from, bytes, kind, stream), "copying");
  }
  void wait(cudaStream_t stream) const { check(wait_(stream), "running"); }

  decltype(&::cudaFree) release;
  decltype(&::cudaStreamDestroy) destroy;

 private:
  static cudaError_t cuda_malloc(void**, std::size_t);  // the header overloads cudaMalloc, this is the C function's type
  void check(cudaError_t error, const char* doing) const {
    if (error != cudaSuccess) throw Error(Fault::failure, std::string("the GPU failed while ") + doing + ": " + words_(error));
  }

  Library library_;
  decltype(&cuda_malloc) allocate_;
  decltype(&::cudaMemcpyAsync) copy_;
  decltype(&::cudaStreamCreate) create_;
  decltype(&::cudaStreamSynchronize) wait_;
  decltype(&::cudaGetErrorString) words_;
};

std::size_t width_of(nvinfer1::DataType type, const std::string& name) {
  switch (type) {
    case nvinfer1::DataType::kFLOAT: return 4;
    case nvinfer1::DataType::kINT64: return 8;
    case nvinfer1::DataType::kUINT8: return 1;
    default: throw Error(Fault::usage, "tensor " + name + ": wanted float32, int64 or uint8");
  }
}

// An execution context with a stream and memory of its own: what one thread needs.
class Lane {
 public:
  Lane(nvinfer1::ICudaEngine& engine, const Cuda& cuda) : cuda_(cuda), context_(engine.createExecutionContext()) {
    if (!context_) throw Error(Fault::failure, "no execution context: the GPU is out of memory");
    stream_ = cuda_.stream();
  }
  ~Lane() {
    context_.reset();
    for (auto& buffer : buffers_) cuda_.release(buffer.second.first);
    if (stream_) cuda_.destroy(stream_);
  }
  Lane(const Lane&) = delete;
  Lane& operator=(const Lane&) = delete;

  void* buffer(const std::string& name, std::size_t bytes) {
    auto& [place, size] = buffers_[name];
    if (size < bytes) {
      if (place) cuda_.release(place);
      place = nullptr;
      size = 0;
      place = cuda_.allocate(bytes);
      size = bytes;
    }
    return place;
  }
  nvinfer1::IExecutionContext& context() { return *context_; }
  cudaStream_t stream() const { return stream_; }

 private:
  const Cuda& cuda_;
  std::unique_ptr<nvinfer1::IExecutionContext> context_;
  cudaStream_t stream_ = nullptr;
  std::map<std::string, std::pair<void*, std::size_t>> buffers_;
};

class TensorRtSession : public Session {
 public:
  TensorRtSession(const Manifest& manifest, const Options& options)
      : library_(options.library, kRtx ? "TOKEXPORT_TENSORRT_RTX" : "TOKEXPORT_TENSORRT", names_of_library(), kWords), input_(manifest.input.name) {
    check_version(manifest);
    cuda_ = std::make_unique<Cuda>();
    using Create = void* (*)(void*, std::int32_t);
    runtime_.reset(static_cast<nvinfer1::IRuntime*>(library_.function<Create>("createInferRuntime_INTERNAL")(&logger_, NV_TENSORRT_VERSION)));
    if (!runtime_) throw Error(Fault::failure, std::string(kWords) + " does not start: there is no NVIDIA GPU or driver here" + logger_.last());
    runtime_->setEngineHostCodeAllowed(options.allow_host_code);
    std::string plan = read_file(plain_file(manifest.folder, manifest.file.name));
    engine_.reset(runtime_->deserializeCudaEngine(plan.data(), plan.size()));
    if (!engine_) throw Error(Fault::usage, manifest.file.name + " does not load: it is for another GPU or another version" + logger_.last());
    for (const OutputEntry& output : manifest.outputs) names_.push_back(output.name);
    for (const std::string& name : decision_names(manifest, options)) names_.push_back(name);
    for (const std::string& name : names_)
      if (engine_->getTensorIOMode(name.c_str()) != nvinfer1::TensorIOMode::kOUTPUT) throw Error(Fault::usage, manifest.file.name + " has no output " + name);
  }

  Tensors run(const Tensor& input) const override {
    std::unique_ptr<Lane> lane = take();
    auto& context = lane->context();
    nvinfer1::Dims dims{};
    dims.nbDims = static_cast<std::int32_t>(input.shape.size());
    std::copy(input.shape.begin(), input.shape.end(), dims.d);
    if (!context.setInputShape(input_.c_str(), dims)) throw Error(Fault::usage, "the engine takes no batch of " + std::to_string(input.shape[0]) + logger_.last());
    std::visit(
        [&](const auto& v) {
          std::size_t bytes = v.size() * sizeof(v[0]);
          void* place = lane->buffer(input_, bytes);
          cuda_->copy(place, v.data(), bytes, cudaMemcpyHostToDevice, lane->stream());
          context.setTensorAddress(input_.c_str(), place);
        },
        input.values);
    Tensors out;
    std::vector<std::pair<Tensor*, std::string>> places;
    for (const std::string& name : names_) {
      out[name] = empty(context.getTensorShape(name.c_str()), engine_->getTensorDataType(name.c_str()), name);
      std::size_t bytes = out[name].size() * width_of(engine_->getTensorDataType(name.c_str()), name);
      context.setTensorAddress(name.c_str(), lane->buffer(name, bytes));
    }
    if (!context.enqueueV3(lane->stream())) throw Error(Fault::failure, std::string(kWords) + " failed while running the engine" + logger_.last());
    for (auto& [name, tensor] : out)
      std::visit([&, key = name](auto& v) { cuda_->copy(v.data(), lane->buffer(key, 0), v.size() * sizeof(v[0]), cudaMemcpyDeviceToHost, lane->stream()); }, tensor.values);
    cuda_->wait(lane->stream());
    give(std::move(lane));
    return out;
  }

 private:
  static std::vector<std::string> names_of_library() {
    std::string stem = kRtx ? "libtensorrt_rtx.so" : "libnvinfer.so";
    return {stem + "." + std::to_string(NV_TENSORRT_MAJOR), stem};
  }

  // The interface is one of virtual functions: with a library of another family or major version they are other functions. TensorRT-RTX
  // answers to any version that it is asked for, so the library's own number decides (10.14.1 is 101401, RTX 1.7.1 is 10701).
  void check_version(const Manifest& manifest) const {
    std::int32_t number = library_.function<std::int32_t (*)()>("getInferLibVersion")();
    std::int32_t major = number / (number < 10000 ? 1000 : 10000);
    if (major != NV_TENSORRT_MAJOR)
      throw Error(Fault::usage, library_.path() + (major < 8 ? " is TensorRT-RTX " : " is TensorRT ") + std::to_string(major) + ", this program was built with the headers of " + kWords + " " + std::to_string(NV_TENSORRT_MAJOR) + ": build it with those of the library");
    if ((manifest.builder.name == "rtx") != kRtx)
      throw Error(Fault::usage, manifest.file.name + " was built by " + (kRtx ? "TensorRT" : "TensorRT-RTX") + ", this program runs engines of " + kWords);
  }

  static Tensor empty(const nvinfer1::Dims& dims, nvinfer1::DataType type, const std::string& name) {
    Tensor tensor;
    tensor.shape.assign(dims.d, dims.d + dims.nbDims);
    std::size_t n = 1;
    for (std::int64_t axis : tensor.shape) n *= static_cast<std::size_t>(axis);
    if (type == nvinfer1::DataType::kFLOAT) tensor.values = std::vector<float>(n);
    else if (type == nvinfer1::DataType::kINT64) tensor.values = std::vector<std::int64_t>(n);
    else throw Error(Fault::usage, "output " + name + ": wanted float32 or int64");
    return tensor;
  }

  std::unique_ptr<Lane> take() const {
    std::lock_guard<std::mutex> guard(lock_);
    if (free_.empty()) return std::make_unique<Lane>(*engine_, *cuda_);
    auto lane = std::move(free_.back());
    free_.pop_back();
    return lane;
  }
  void give(std::unique_ptr<Lane> lane) const {
    std::lock_guard<std::mutex> guard(lock_);
    free_.push_back(std::move(lane));
  }

  Library library_;
  Logger logger_;
  std::string input_;
  std::vector<std::string> names_;
  std::unique_ptr<Cuda> cuda_;
  std::unique_ptr<nvinfer1::IRuntime> runtime_;
  std::unique_ptr<nvinfer1::ICudaEngine> engine_;
  mutable std::mutex lock_;
  mutable std::vector<std::unique_ptr<Lane>> free_;
};

}  // namespace

std::unique_ptr<Session> open_tensorrt(const Manifest& manifest, const Options& options) {
  return std::make_unique<TensorRtSession>(manifest, options);
}

}  // namespace tokexport
