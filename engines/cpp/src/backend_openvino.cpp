// OpenVINO on the processor. A compiled model is shared; each thread that runs takes a request of its own from a pool.
#include <openvino/openvino.hpp>

#include <cstring>
#include <mutex>

#include "backend.hpp"
#include "files.hpp"

namespace tokexport {
namespace {

ov::Tensor shared(const Tensor& tensor) {
  ov::Shape shape(tensor.shape.begin(), tensor.shape.end());
  return std::visit(
      [&](const auto& v) {
        using T = typename std::decay_t<decltype(v)>::value_type;
        return ov::Tensor(ov::element::from<T>(), shape, const_cast<T*>(v.data()));  // inputs are only read
      },
      tensor.values);
}

Tensor copied(const ov::Tensor& value, const std::string& name) {
  Tensor out;
  const ov::Shape shape = value.get_shape();
  out.shape.assign(shape.begin(), shape.end());
  if (value.get_element_type() == ov::element::f32) {
    const float* data = value.data<const float>();
    out.values = std::vector<float>(data, data + value.get_size());
  } else if (value.get_element_type() == ov::element::i64) {
    const std::int64_t* data = value.data<const std::int64_t>();
    out.values = std::vector<std::int64_t>(data, data + value.get_size());
  } else {
    throw Error(Fault::usage, "output " + name + ": wanted float32 or int64");
  }
  return out;
}

class OpenVinoSession : public Session {
 public:
  OpenVinoSession(const Manifest& manifest, const Options& options) : input_(manifest.input.name) {
    auto model = core_.read_model(plain_file(manifest.folder, manifest.file.name));
    for (const OutputEntry& output : manifest.outputs) names_.push_back(output.name);
    for (const std::string& name : decision_names(manifest, options)) {
      names_.push_back(name);
      bool known = false;
      for (const auto& output : model->outputs()) known = known || output.get_names().count(name);
      if (!known) model->add_output(name);
    }
    if (options.batch && model->input().get_partial_shape()[0].is_dynamic()) {
      ov::PartialShape shape = model->input().get_partial_shape();
      shape[0] = options.batch;
      model->reshape(shape);
    }
    ov::AnyMap settings = {ov::hint::performance_mode(ov::hint::PerformanceMode::LATENCY), ov::num_streams(options.streams)};
    if (!options.runtime_precision) settings.insert(ov::hint::inference_precision(ov::element::f32));
    if (options.threads) settings.insert(ov::inference_num_threads(options.threads));
    model_ = core_.compile_model(model, "CPU", settings);
  }

  Tensors run(const Tensor& input) const override {
    Loan request(*this);
    request->set_tensor(input_, shared(input));
    request->infer();
    Tensors out;
    for (const std::string& name : names_) out[name] = copied(request->get_tensor(name), name);
    return out;
  }

 private:
  // A request that goes back to the pool at the end, unless it failed.
  class Loan {
   public:
    explicit Loan(const OpenVinoSession& session) : session_(session), failures_(std::uncaught_exceptions()) {
      std::lock_guard<std::mutex> guard(session_.lock_);
      if (session_.free_.empty()) {
        request_ = session_.model_.create_infer_request();
      } else {
        request_ = std::move(session_.free_.back());
        session_.free_.pop_back();
      }
    }
    ~Loan() {
      if (std::uncaught_exceptions() > failures_) return;
      std::lock_guard<std::mutex> guard(session_.lock_);
      session_.free_.push_back(std::move(request_));
    }
    Loan(const Loan&) = delete;
    Loan& operator=(const Loan&) = delete;
    ov::InferRequest* operator->() { return &request_; }

   private:
    const OpenVinoSession& session_;
    int failures_;
    ov::InferRequest request_;
  };

  ov::Core core_;
  std::string input_;
  std::vector<std::string> names_;
  mutable ov::CompiledModel model_;
  mutable std::mutex lock_;
  mutable std::vector<ov::InferRequest> free_;
};

}  // namespace

std::unique_ptr<Session> open_openvino(const Manifest& manifest, const Options& options) {
  return std::make_unique<OpenVinoSession>(manifest, options);
}

}  // namespace tokexport
