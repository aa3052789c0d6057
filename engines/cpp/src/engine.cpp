#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

#include "backend.hpp"
#include "files.hpp"
#include "onnx_files.hpp"
#include "prepare.hpp"
#include "proof.hpp"
#include "tokexport/tokexport.hpp"

namespace tokexport {
namespace {

constexpr std::int64_t kAtOnce = 16;  // images in one run of a file that takes any number

// Rows [first, first + n) of the batch; the last row again where there are no more.
Tensor rows(const Tensor& tensor, std::int64_t first, std::int64_t n) {
  Tensor out;
  out.shape = tensor.shape;
  out.shape[0] = n;
  const std::int64_t count = tensor.shape[0];
  const std::size_t row = tensor.size() / static_cast<std::size_t>(count);
  std::visit(
      [&](const auto& v) {
        std::decay_t<decltype(v)> part;
        part.reserve(row * n);
        for (std::int64_t i = first; i < first + n; ++i) {
          auto start = v.begin() + static_cast<std::ptrdiff_t>(row * std::min(i, count - 1));
          part.insert(part.end(), start, start + static_cast<std::ptrdiff_t>(row));
        }
        out.values = std::move(part);
      },
      tensor.values);
  return out;
}

void append(Tensor& whole, const Tensor& part) {
  if (whole.shape.empty()) {
    whole = part;
    return;
  }
  whole.shape[0] += part.shape[0];
  std::visit(
      [&](auto& v) {
        const auto& more = std::get<std::decay_t<decltype(v)>>(part.values);
        v.insert(v.end(), more.begin(), more.end());
      },
      whole.values);
}

// Values for one run that no photo has, the same each time. shape: of the input, with one image where it takes any number.
Tensor noise(std::vector<std::int64_t> shape, bool normalised) {
  if (shape[0] == kAny) shape[0] = 1;
  const std::size_t n = static_cast<std::size_t>(std::accumulate(shape.begin(), shape.end(), std::int64_t(1), std::multiplies<>()));
  std::mt19937 random(0);
  Tensor out;
  out.shape = std::move(shape);
  if (normalised) {
    std::normal_distribution<float> values;
    std::vector<float> floats(n);
    for (float& v : floats) v = values(random);
    out.values = std::move(floats);
  } else {
    std::vector<std::uint8_t> pixels(n);
    for (std::uint8_t& v : pixels) v = static_cast<std::uint8_t>(random());
    out.values = std::move(pixels);
  }
  return out;
}

// Runtimes have exception types of their own; what comes out is always an Error.
template <class F>
auto in_words(const std::string& doing, F&& call) {
  try {
    return call();
  } catch (const Error&) {
    throw;
  } catch (const std::bad_alloc&) {
    throw Error(Fault::failure, doing + ": out of memory");
  } catch (const std::exception& e) {
    throw Error(Fault::failure, doing + ": " + std::string(e.what()).substr(0, 400));
  }
}

std::vector<float> scores_of(const float* logits, std::size_t n, const std::string& activation) {
  std::vector<float> scores(logits, logits + n);
  if (activation == "sigmoid") {
    for (float& s : scores) s = static_cast<float>(1 / (1 + std::exp(-double(s))));
  } else if (activation == "softmax") {
    double top = *std::max_element(scores.begin(), scores.end()), sum = 0;
    for (float s : scores) sum += std::exp(double(s) - top);
    for (float& s : scores) s = static_cast<float>(std::exp(double(s) - top) / sum);
  }
  return scores;
}

}  // namespace

namespace {

// Throws Error when an ONNX file reads files that are not the bundle's.
void check_weights(const Manifest& m) {
  const std::string path = plain_file(m.folder, m.file.name);
  for (const std::string& name : external_files(read_file(path), path)) {
    auto own = [&](const FileEntry& entry) { return entry.name == name; };
    if (std::none_of(m.beside.begin(), m.beside.end(), own)) throw Error(Fault::usage, path + " reads " + name.substr(0, 80) + ", which is no file that its manifest names: do not trust it");
  }
}

}  // namespace

struct Engine::State {
  Manifest manifest;
  Options options;
  const Runtime* runtime = nullptr;
  std::string words;
  std::unique_ptr<Session> session;
};

Engine::Engine(std::unique_ptr<State> state) : state_(std::move(state)) {}
Engine::Engine(Engine&&) noexcept = default;
Engine& Engine::operator=(Engine&&) noexcept = default;
Engine::~Engine() = default;

Engine Engine::open(const std::string& folder, const Options& options) {
  const Manifest manifest = Manifest::read(folder);
  manifest.check_files(options.check_hashes);
  return of(manifest, options);
}

Engine Engine::of(const Manifest& manifest, const Options& options) {
  auto state = std::make_unique<State>();
  state->manifest = manifest;
  state->options = options;
  const Manifest& m = state->manifest;
  const std::string& folder = m.folder;
  if (m.builder.host_code && !options.allow_host_code)
    throw Error(Fault::usage, folder + ": the engine carries native code of a plugin, which would run here: if you trust who made it, allow it (allow_host_code)");
  if (m.kind == "onnx") check_weights(m);
  if (options.runtime == "none") {
    state->words = "nothing";
    return Engine(std::move(state));
  }
  std::string known;
  for (const Runtime& runtime : runtime_table()) {
    known += (known.empty() ? "" : ", ") + std::string(runtime.name);
    if (options.runtime.empty() ? m.kind == runtime.kind : options.runtime == runtime.name) {
      state->runtime = &runtime;
      break;
    }
  }
  if (!state->runtime)
    throw Error(Fault::usage, options.runtime.empty() ? folder + ": nothing that was built in (" + known + ") runs an " + (m.kind == "onnx" ? "ONNX file" : "engine")
                                                      : "runtime '" + options.runtime + "': wanted one of " + known);
  if (m.kind != state->runtime->kind) throw Error(Fault::usage, m.file.name + " is an " + (m.kind == "onnx" ? "ONNX file" : "engine") + ", which " + state->runtime->words + " does not run");
  state->words = state->runtime->words;
  if (options.share_weights && std::string(state->runtime->name) != "onnxruntime")
    throw Error(Fault::usage, "share_weights: " + state->words + " packs or copies weights for each file; only runtime onnxruntime shares them");
  state->session = in_words(m.file.name + ": " + state->words + " cannot load it", [&] { return state->runtime->open(m, options); });
  return Engine(std::move(state));
}

Tensors Engine::run(const Tensor& input) const {
  const Manifest& m = state_->manifest;
  if (!state_->session) throw Error(Fault::usage, m.folder + " was opened with runtime none, which prepares photos and runs nothing");
  std::vector<std::int64_t> wanted = m.input.shape;
  bool fits = input.shape.size() == wanted.size() && input.shape[0] > 0 && std::equal(wanted.begin() + 1, wanted.end(), input.shape.begin() + 1) &&
              input.values.index() == (m.preprocessing.normalised ? 0u : 2u);
  const std::int64_t values = std::accumulate(input.shape.begin(), input.shape.end(), std::int64_t(1), std::multiplies<>());
  if (!fits || static_cast<std::int64_t>(input.size()) != values) throw Error(Fault::usage, "input " + m.input.name + ": wanted " + m.input.type + " of the bundle's shape, a batch first");
  if (m.preprocessing.normalised)
    for (float v : input.floats())
      if (!std::isfinite(v)) throw Error(Fault::usage, "input " + m.input.name + " has values that are not finite");
  const std::int64_t n = input.shape[0], step = batch() ? batch() : std::min(n, kAtOnce);
  Tensors out;
  for (std::int64_t first = 0; first < n; first += step) {
    const std::int64_t some = std::min(step, n - first), full = batch() ? step : some;
    auto part = in_words(state_->words + " failed while running the file", [&] {
      return state_->session->run(first == 0 && full == n ? input : rows(input, first, full));
    });
    for (auto& [name, value] : part) {
      if (m.input.shape[0] == 1 && name.find('.') != std::string::npos) value.shape.insert(value.shape.begin(), 1);  // decisions of one image have no batch axis
      append(out[name], some == full ? value : rows(value, 0, some));
    }
  }
  return out;
}

Tensors Engine::run(const std::vector<Image>& images) const { return run(prepare(images)); }

Tensor Engine::prepare(const std::vector<Image>& images) const {
  if (images.empty()) throw Error(Fault::usage, "images: none were given");
  return in_words("images", [&] { return tokexport::prepare(images, state_->manifest.preprocessing); });
}

std::vector<std::vector<Class>> Engine::classify(const std::vector<Image>& images, int top) const {
  const Manifest& m = state_->manifest;
  auto output = std::find_if(m.outputs.begin(), m.outputs.end(), [](const OutputEntry& o) { return o.kind == "logits"; });
  if (output == m.outputs.end()) throw Error(Fault::usage, m.folder + " has no classes: ask for its features");
  Tensors values = run(images);
  const auto& logits = values.at(output->name).floats();
  const std::size_t n = static_cast<std::size_t>(m.classes);
  if (logits.size() != n * images.size())
    throw Error(Fault::usage, m.file.name + " gives " + std::to_string(logits.size() / images.size()) + " logits for an image, its manifest says " + std::to_string(n) + " classes: they do not belong together");
  std::vector<std::vector<Class>> out(images.size());
  for (std::size_t i = 0; i < images.size(); ++i) {
    const float* row = logits.data() + i * n;
    for (std::size_t k = 0; k < n; ++k)
      if (!std::isfinite(row[k])) throw Error(Fault::failure, "image " + std::to_string(i) + ": the file gives values that are not finite");
    auto scores = scores_of(row, n, m.activation);
    std::vector<int> order(n);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return row[a] > row[b]; });
    for (int k = 0; k < std::min<int>(top, static_cast<int>(n)); ++k) {
      int c = order[k];
      out[i].push_back({c, m.labels.empty() ? "class " + std::to_string(c) : m.labels[c], row[c], scores[c]});
    }
  }
  return out;
}

std::vector<std::vector<float>> Engine::features(const std::vector<Image>& images) const {
  const Manifest& m = state_->manifest;
  auto output = std::find_if(m.outputs.begin(), m.outputs.end(), [](const OutputEntry& o) { return o.kind == "features"; });
  if (output == m.outputs.end()) throw Error(Fault::usage, m.folder + " has no features: it is a classifier");
  Tensors values = run(images);
  const auto& floats = values.at(output->name).floats();
  const std::size_t n = floats.size() / images.size();
  std::vector<std::vector<float>> out;
  for (std::size_t i = 0; i < images.size(); ++i) out.emplace_back(floats.begin() + i * n, floats.begin() + (i + 1) * n);
  return out;
}

Tensor Engine::sample_inputs() const {
  const Manifest& m = state_->manifest;
  return m.proof.name.empty() ? noise(m.input.shape, m.preprocessing.normalised) : read_proof(m).at("input");
}

Proof Engine::verify() const {
  const Manifest& m = state_->manifest;
  if (m.proof.name.empty()) throw Error(Fault::usage, m.file.name + " is a rung of a ladder, which has no proof: `tokexport verify` judges it");
  if (!m.decisions.empty() && !state_->options.decisions) throw Error(Fault::usage, "verify wants an engine that was opened with `decisions`");
  Tensors proof = read_proof(m);
  return judge(m, proof, run(proof.at("input")));
}

int Engine::channels() const { return state_->manifest.preprocessing.channels; }
std::int64_t Engine::batch() const {
  const std::int64_t fixed = state_->manifest.input.shape[0];
  return fixed == kAny ? state_->options.batch : fixed;
}
const std::string& Engine::runtime() const { return state_->words; }

std::string Engine::content() const {
  const Manifest& m = state_->manifest;
  return m.precision + ", " + std::to_string(m.preprocessing.height) + " x " + std::to_string(m.preprocessing.width) + " pixels, " +
         (m.classes ? std::to_string(m.classes) + " classes" : std::string("features"));
}

std::string Engine::summary() const { return state_->manifest.file.name + ", " + content() + ", on " + state_->words; }

std::vector<std::string> runtimes() {
  std::vector<std::string> names;
  for (const Runtime& runtime : runtime_table()) names.push_back(runtime.name);
  return names;
}

}  // namespace tokexport
