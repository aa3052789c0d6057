// tokexport: run a bundle (`tokexport bundle`) from C++, photos to classes or features, and prove it. ladder.hpp runs ladders.
//
//   auto engine = tokexport::Engine::open("vit-bundle");
//   for (auto& c : engine.classify({tokexport::Image::read("cat.jpg", engine.channels())})[0])
//     std::cout << c.label << ' ' << c.score << '\n';
//
// One engine may be used by many threads at once. Everything that fails throws `tokexport::Error`, with a text for a person.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <variant>
#include <vector>

namespace tokexport {

struct Manifest;

// What failed: the arguments or the bundle (a program exits with 2), or a runtime, a GPU or the disk (3).
enum class Fault { usage = 2, failure = 3 };

class Error : public std::runtime_error {
 public:
  Error(Fault fault, const std::string& text) : std::runtime_error(text), fault_(fault) {}
  Fault fault() const noexcept { return fault_; }

 private:
  Fault fault_;
};

// A photo, upright, 8 bits a channel: RGB, or grey with one channel.
struct Image {
  int height = 0;
  int width = 0;
  int channels = 3;
  std::vector<std::uint8_t> pixels;  // [height, width, channels]

  // A JPEG or PNG file as Pillow reads it: turned as its EXIF data says, what is transparent on white, 16 bits scaled to 8.
  // channels: of the model, 3 or 1. Throws Error when it cannot be read or is cut short.
  static Image read(const std::string& path, int channels = 3);
};

// Values in row-major order: float32, int64 (indices) or uint8 (pixels).
struct Tensor {
  std::vector<std::int64_t> shape;
  std::variant<std::vector<float>, std::vector<std::int64_t>, std::vector<std::uint8_t>> values;

  std::size_t size() const;
  const std::vector<float>& floats() const { return std::get<std::vector<float>>(values); }
  const std::vector<std::int64_t>& indices() const { return std::get<std::vector<std::int64_t>>(values); }
};

using Tensors = std::map<std::string, Tensor>;

struct Class {
  int index = 0;
  std::string label;  // "class 7" where the bundle has no labels
  float logit = 0;
  float score = 0;  // a probability by the bundle's activation; the logit where it has none
};

struct Options {
  std::string runtime;           // "openvino", "onnxruntime" or "tensorrt"; empty: the first that was built in and can run the file;
                                 // "none": photos are prepared, nothing is run
  std::string library;           // the runtime's shared library, of those that are loaded when they are used; empty: searched for
  int threads = 0;               // of the processor for one run; 0: the runtime's own choice
  int batch = 0;                 // images in every run of a file that takes any number, if that is known: OpenVINO is then faster
  int streams = 1;               // runs that OpenVINO does at the same time, each with its share of the threads
  bool runtime_precision = false;  // let OpenVINO compute in what it finds fastest (bf16 on some processors) instead of float32
  bool decisions = false;        // give the file's merge decisions too, as `verify` needs them
  bool share_weights = false;    // of ONNX Runtime: read weights where their file is mapped, instead of packing them for every session
  bool check_hashes = true;      // of the file that is run and of those beside it
  bool allow_host_code = false;  // load an engine that carries native code of a plugin
};

// What proving a bundle found.
struct Proof {
  struct Output {
    std::string name;
    double error = 0, limit = 0;          // to the reference, over the image's scale
    double own_error = 0, own_limit = 0;  // to what the file gave when it was bundled
    int n_judged = 0;
  };
  struct Photo {
    std::string verdict;  // "equal", "flipped" (a near-tie, after which nothing is judged) or "failed"
    double pixels = -1;   // largest difference of the preprocessed photo, in 255ths; -1 without the photo
    int block = -1;       // of the first decision that differs
    double margin = 0, limit = 0;
  };
  std::vector<Output> outputs;
  std::vector<Photo> images;
  bool decisions = true;  // the file gives them; else it is judged by its outputs alone
  std::vector<std::string> faults;
  bool passed() const;
  std::string summary() const;
};

class Engine {
 public:
  // Opens a bundle. Throws Error when it is damaged, newer, for another machine, or nothing here can run it.
  static Engine open(const std::string& folder, const Options& options = {});

  // Prepares photos, runs them, and gives the file's outputs by name, [B, ...]. Any number of photos, whatever batch the file takes.
  Tensors run(const std::vector<Image>& images) const;
  // The same of prepared input, [B, C, H, W] float32 (or the uint8 the bundle's input takes).
  Tensors run(const Tensor& input) const;

  // The likeliest classes of each photo, the likeliest first. Throws Error for a model without classes.
  std::vector<std::vector<Class>> classify(const std::vector<Image>& images, int top = 5) const;
  // The feature of each photo. Throws Error for a classifier.
  std::vector<std::vector<float>> features(const std::vector<Image>& images) const;

  // Photos as the file takes them.
  Tensor prepare(const std::vector<Image>& images) const;
  // The proof of the bundle, as `tokexport verify` runs it. Wants an engine that was opened with `decisions`.
  Proof verify() const;
  // Prepared inputs to time with: those of the proof; of a rung of a ladder, which has none, noise for one run.
  Tensor sample_inputs() const;

  int channels() const;         // of photos
  std::int64_t batch() const;   // of a run, 0 for any
  const std::string& runtime() const;  // what runs the file, in words
  std::string content() const;  // precision, pixels and what comes out, in words
  std::string summary() const;  // what the bundle is, in a line

  Engine(Engine&&) noexcept;
  Engine& operator=(Engine&&) noexcept;
  ~Engine();

 private:
  friend class Ladder;
  struct State;
  // A file whose manifest and bytes have been checked.
  static Engine of(const Manifest& manifest, const Options& options);
  explicit Engine(std::unique_ptr<State>);
  std::unique_ptr<State> state_;
};

// The runtimes that were built in, by name.
std::vector<std::string> runtimes();

}  // namespace tokexport
