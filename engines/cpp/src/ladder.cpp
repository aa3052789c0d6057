#include "tokexport/ladder.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <utility>

#include "ladder_manifest.hpp"
#include "processor.hpp"

namespace tokexport {
namespace {

constexpr int kWarmUp = 2, kRounds = 7;  // of timing, as in Python

// Names of one runtime in Python's table and in this program's.
std::string runtime_of(const LadderManifest& m) { return m.runtime == "ort" ? "onnxruntime" : m.runtime; }

bool is_built_in(const std::string& name) {
  const auto names = runtimes();
  return std::find(names.begin(), names.end(), name) != names.end();
}

Options options_of(const LadderManifest& m, const LadderOptions& asked) {
  if (asked.threads < -1 || asked.threads > kMostThreads)
    throw Error(Fault::usage, "threads " + std::to_string(asked.threads) + ": wanted 1 to " + std::to_string(kMostThreads) + ", 0 for the runtime's own choice, or -1 for those of the times");
  Options options;
  options.runtime = !asked.runtime.empty() ? asked.runtime : is_built_in(runtime_of(m)) ? runtime_of(m) : "";
  options.library = asked.library;
  options.threads = asked.threads < 0 ? m.threads : asked.threads;
  options.streams = asked.streams;
  options.share_weights = asked.share_weights;
  options.runtime_precision = asked.runtime_precision;
  return options;
}

// Whether the stored times are of other runs than those that will be made here.
bool is_foreign(const LadderManifest& m, const LadderOptions& asked, const Options& options) {
  return asked.share_weights || asked.runtime_precision || asked.streams > 1 || options.runtime != runtime_of(m) || options.threads != m.threads ||
         processor_name() != m.processor;
}

// Milliseconds of a run of each engine: medians of rounds in turns, so that a change of the machine's speed meets all alike.
std::vector<double> measured_times(const std::vector<Engine>& engines) {
  using Clock = std::chrono::steady_clock;
  const Tensor input = engines[0].sample_inputs();
  std::vector<std::vector<double>> rounds(engines.size());
  for (int i = 0; i < kWarmUp + kRounds; ++i)
    for (std::size_t k = 0; k < engines.size(); ++k) {
      const auto start = Clock::now();
      engines[k].run(input);
      if (i >= kWarmUp) rounds[k].push_back(std::chrono::duration<double, std::milli>(Clock::now() - start).count());
    }
  std::vector<double> medians;
  for (auto& times : rounds) {
    std::nth_element(times.begin(), times.begin() + kRounds / 2, times.end());
    medians.push_back(times[kRounds / 2]);
  }
  return medians;
}

}  // namespace

struct Ladder::State {
  LadderManifest manifest;
  std::vector<Engine> engines;
  bool measured = false;
};

Ladder::Ladder(std::unique_ptr<State> state) : state_(std::move(state)) {}
Ladder::Ladder(Ladder&&) noexcept = default;
Ladder& Ladder::operator=(Ladder&&) noexcept = default;
Ladder::~Ladder() = default;

bool Ladder::is_at(const std::string& path) { return LadderManifest::is_at(path); }

Ladder Ladder::open(const std::string& folder, const LadderOptions& asked) {
  auto state = std::make_unique<State>();
  state->manifest = LadderManifest::read(folder);
  LadderManifest& m = state->manifest;
  m.check_files(asked.check_hashes);
  const Options options = options_of(m, asked);
  for (std::size_t i = 0; i < m.rungs.size(); ++i) state->engines.push_back(Engine::of(m.of_rung(i), options));
  const bool runs = options.runtime != "none";
  state->measured = runs && (asked.times == Times::automatic ? is_foreign(m, asked, options) : asked.times == Times::measured);
  if (state->measured) {
    const std::vector<double> times = measured_times(state->engines);
    for (std::size_t i = 0; i < times.size(); ++i) m.rungs[i].ms = times[i];
  }
  return Ladder(std::move(state));
}

const std::vector<Rung>& Ladder::rungs() const { return state_->manifest.rungs; }

std::size_t Ladder::pick(Budget budget_ms, std::int64_t images) const {
  if (images < 1) throw Error(Fault::usage, std::to_string(images) + " images: wanted 1 or more");
  if (!budget_ms) return 0;
  if (std::isnan(*budget_ms)) throw Error(Fault::usage, "budget_ms nan: wanted a number of milliseconds");
  const std::int64_t size = std::max<std::int64_t>(batch(), 1), runs = (images - 1) / size + 1;
  const std::vector<Rung>& all = rungs();
  const auto within = std::find_if(all.begin(), all.end(), [&](const Rung& rung) { return rung.ms <= *budget_ms / static_cast<double>(runs); });
  const auto fastest = std::min_element(all.begin(), all.end(), [](const Rung& a, const Rung& b) { return a.ms < b.ms; });
  return static_cast<std::size_t>((within != all.end() ? within : fastest) - all.begin());
}

const Engine& Ladder::engine(std::size_t place) const {
  if (place >= state_->engines.size()) throw Error(Fault::usage, "rung " + std::to_string(place) + ": there are " + std::to_string(state_->engines.size()) + ", from 0 on");
  return state_->engines[place];
}

Tensors Ladder::run(const std::vector<Image>& images, Budget budget_ms) const {
  const Tensor input = engine(0).prepare(images);
  return run(input, budget_ms);
}

Tensors Ladder::run(const Tensor& input, Budget budget_ms) const {
  const std::int64_t images = input.shape.empty() ? 1 : std::max<std::int64_t>(input.shape[0], 1);  // a wrong shape is the engine's to refuse
  return engine(pick(budget_ms, images)).run(input);
}

std::vector<std::vector<Class>> Ladder::classify(const std::vector<Image>& images, Budget budget_ms, int top) const {
  return engine(pick(budget_ms, static_cast<std::int64_t>(images.size()))).classify(images, top);
}

std::vector<std::vector<float>> Ladder::features(const std::vector<Image>& images, Budget budget_ms) const {
  return engine(pick(budget_ms, static_cast<std::int64_t>(images.size()))).features(images);
}

bool Ladder::measured() const { return state_->measured; }
int Ladder::channels() const { return engine(0).channels(); }
std::int64_t Ladder::batch() const { return state_->manifest.batch == kAny ? 0 : state_->manifest.batch; }

std::string Ladder::summary() const {
  const std::string n = std::to_string(rungs().size());
  return state_->manifest.folder + ": " + n + (n == "1" ? " rung, " : " rungs, ") + engine(0).content() + ", on " + engine(0).runtime();
}

}  // namespace tokexport
