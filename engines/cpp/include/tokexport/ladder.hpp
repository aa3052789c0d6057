// A ladder (`tokexport ladder`): several schedules of one model over one file of weights; each call is run by the rung that its time allows.
//
//   auto ladder = tokexport::Ladder::open("ladder");
//   auto classes = ladder.classify(photos, 20);  // by the rung with the most tokens whose run takes at most 20 ms
//
// One ladder may be used by many threads at once. Everything that fails throws `tokexport::Error`.
//
// Memory. On the disk the weights are one file. In memory every rung is a session of its own, and what they share is up to the runtime:
// - ONNX Runtime packs weights for each session, so four rungs take about four times the memory of one. With `share_weights` it reads
//   them where their file is mapped: they are there once for all rungs (and for other processes that do the same), and a run takes some
//   hundredths longer. What a session allocates for its own intermediate values is never shared.
// - OpenVINO packs weights for each rung and has no such choice; `share_weights` is refused.
// docs/ladder.md has figures, measured from Python with the same libraries.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "tokexport/tokexport.hpp"

namespace tokexport {

// Where the times come from that decide which rung runs.
enum class Times {
  automatic,  // those of ladder.json where they hold; else measured: on another runtime, thread count or processor, with shared weights
  stored,     // those of ladder.json
  measured    // measured when the ladder is opened
};

struct LadderOptions {
  std::string runtime;             // as in Options; empty: what the times were measured with where it is built in, else the first that is
  std::string library;             // as in Options
  int threads = -1;                // of the processor for one run; 0: the runtime's own choice; -1: those of the times
  int streams = 1;                 // as in Options
  bool share_weights = false;      // of ONNX Runtime, see above
  bool runtime_precision = false;  // as in Options
  bool check_hashes = true;        // of all files
  Times times = Times::automatic;
};

struct Rung {
  std::string label;   // what it is called, "r=13"
  std::string method;  // how it reduces tokens
  std::vector<std::int64_t> tokens;  // after each block
  std::int64_t macs = 0;  // multiply-accumulates of an image
  double macs_ratio = 1;  // the dense model's over them
  double ms = 0;          // of one run: as stored, or as measured here
  double speedup = 1;     // over the dense model, where the ladder was made
  double error = 0;       // mean over photos; 0 for the dense model
};

class Ladder {
 public:
  using Budget = std::optional<double>;  // milliseconds for all images of a call: of their runs, not of reading and preparing photos

  // Whether a path is a ladder's folder, or its ladder.json.
  static bool is_at(const std::string& path);
  // Opens every rung. Throws Error when the ladder is damaged, newer, or nothing here can run it.
  static Ladder open(const std::string& folder, const LadderOptions& options = {});

  // From the most tokens to the fewest.
  const std::vector<Rung>& rungs() const;
  // Place in `rungs` of the one that runs: the first whose run is within the budget, the fastest where none is, the first without a budget.
  // More images than the batch of the files share the budget among their runs.
  std::size_t pick(Budget budget_ms = std::nullopt, std::int64_t images = 1) const;
  // What runs a rung: everything that an engine of a bundle does, but for the proof, which a ladder does not have.
  const Engine& engine(std::size_t place) const;

  // As of an Engine, by the rung that the budget allows.
  Tensors run(const std::vector<Image>& images, Budget budget_ms = std::nullopt) const;
  Tensors run(const Tensor& input, Budget budget_ms = std::nullopt) const;
  std::vector<std::vector<Class>> classify(const std::vector<Image>& images, Budget budget_ms = std::nullopt, int top = 5) const;
  std::vector<std::vector<float>> features(const std::vector<Image>& images, Budget budget_ms = std::nullopt) const;

  bool measured() const;        // whether the times were measured here
  int channels() const;         // of photos
  std::int64_t batch() const;   // of a run, 0 for any: then times are of one image
  std::string summary() const;  // what the ladder is, in a line

  Ladder(Ladder&&) noexcept;
  Ladder& operator=(Ladder&&) noexcept;
  ~Ladder();

 private:
  struct State;
  explicit Ladder(std::unique_ptr<State>);
  std::unique_ptr<State> state_;
};

}  // namespace tokexport
