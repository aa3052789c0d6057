// tokexport-run: classes or features of photos, the speed and the proof of a bundle, the rungs of a ladder, without Python.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <iostream>
#include <numeric>
#include <optional>
#include <sstream>
#include <thread>

#include "tokexport/ladder.hpp"
#include "tokexport/tokexport.hpp"

namespace {

using namespace tokexport;

const char kHelp[] =
    "tokexport-run COMMAND FOLDER [PHOTOS...] [options]\n"
    "\n"
    "FOLDER is a bundle (`tokexport bundle`) or a ladder (`tokexport ladder`). Of a ladder one rung runs: the one with the most\n"
    "tokens whose run is within --budget-ms, or the fastest where none is. Which one that was is told on stderr.\n"
    "\n"
    "  classify FOLDER PHOTOS...   the likeliest classes of each photo (JPEG, PNG)\n"
    "  features FOLDER PHOTOS...   the feature of each photo\n"
    "  bench    FOLDER             milliseconds a run, on the inputs of the proof; of a ladder on noise\n"
    "  verify   BUNDLE             run the bundle's proof: exit 0 passed, 1 failed\n"
    "  rungs    LADDER             times and errors of its rungs, and which one runs\n"
    "  input    FOLDER PHOTOS...   the prepared input as raw values on stdout, [B, C, H, W] float32 (or the uint8 it takes)\n"
    "  output   FOLDER PHOTOS...   every output as JSON\n"
    "\n"
    "  --runtime NAME        what runs it; default: the first built in that can; of a ladder the one it was timed in\n"
    "  --library PATH        the runtime's shared library (ONNX Runtime, TensorRT)\n"
    "  --threads N           of the processor for one run; default: the runtime's choice; of a ladder those it was timed with\n"
    "  --runtime-precision   let OpenVINO choose what it computes in (bf16 on some processors)\n"
    "  --share-weights       ONNX Runtime: read weights where their file is mapped; all rungs of a ladder then share them\n"
    "  --allow-host-code     load an engine that carries native code of a plugin\n"
    "  --budget-ms MS        ladder: time for all photos together, or for a run of bench; default: any\n"
    "  --times NAME          ladder: stored, measured (here, when it is opened), or auto (measured where the stored ones are of\n"
    "                        another runtime, thread count or processor)\n"
    "  --top N               classes to show (5)\n"
    "  --batch N             bench: images a run (1); rungs: images that share the budget (1)\n"
    "  --runs N, --warmup N  bench: runs that are timed (100), and before them (10)\n"
    "  --concurrency N       bench: threads that run at the same time (1)\n"
    "  --json                JSON on stdout\n";

struct Arguments {
  std::string command, folder;
  std::vector<std::string> photos;
  Options options;
  std::optional<double> budget_ms;
  std::optional<Times> times;
  std::string rung;  // the label of the one that runs; empty for a bundle
  int top = 5, batch = 1, runs = 100, warmup = 10, concurrency = 1;
  bool json = false;
};

int number(const std::string& option, const std::string& text, int least) {
  std::size_t used = 0;
  int value = least - 1;
  try {
    value = std::stoi(text, &used);
  } catch (const std::exception&) {
  }
  if (value < least || used != text.size() || value > 1000000) throw Error(Fault::usage, option + " " + text + ": wanted a whole number from " + std::to_string(least) + " on");
  return value;
}

double milliseconds(const std::string& option, const std::string& text) {
  std::size_t used = 0;
  double value = -1;
  try {
    value = std::stod(text, &used);
  } catch (const std::exception&) {
  }
  if (!(value > 0) || used != text.size()) throw Error(Fault::usage, option + " " + text + ": wanted milliseconds, above 0");
  return value;
}

Times times_of(const std::string& option, const std::string& text) {
  if (text == "auto") return Times::automatic;
  if (text == "stored") return Times::stored;
  if (text == "measured") return Times::measured;
  throw Error(Fault::usage, option + " " + text + ": wanted auto, stored or measured");
}

Arguments parse(int argc, char** argv) {
  Arguments a;
  std::vector<std::string> plain;
  for (int i = 1; i < argc; ++i) {
    std::string word = argv[i];
    auto value = [&] {
      if (i + 1 >= argc) throw Error(Fault::usage, word + ": wanted a value");
      return std::string(argv[++i]);
    };
    if (word == "--runtime") a.options.runtime = value();
    else if (word == "--library") a.options.library = value();
    else if (word == "--threads") a.options.threads = number(word, value(), 1);
    else if (word == "--runtime-precision") a.options.runtime_precision = true;
    else if (word == "--allow-host-code") a.options.allow_host_code = true;
    else if (word == "--share-weights") a.options.share_weights = true;
    else if (word == "--budget-ms") a.budget_ms = milliseconds(word, value());
    else if (word == "--times") a.times = times_of(word, value());
    else if (word == "--top") a.top = number(word, value(), 1);
    else if (word == "--batch") a.batch = number(word, value(), 1);
    else if (word == "--runs") a.runs = number(word, value(), 1);
    else if (word == "--warmup") a.warmup = number(word, value(), 0);
    else if (word == "--concurrency") a.concurrency = number(word, value(), 1);
    else if (word == "--json") a.json = true;
    else if (word.rfind("--", 0) == 0) throw Error(Fault::usage, "no option " + word + ": tokexport-run --help lists them");
    else plain.push_back(word);
  }
  if (plain.size() < 2) throw Error(Fault::usage, "wanted a command and the folder of a bundle or a ladder: tokexport-run --help");
  a.command = plain[0];
  a.folder = plain[1];
  a.photos.assign(plain.begin() + 2, plain.end());
  const bool wants_photos = a.command != "bench" && a.command != "verify" && a.command != "rungs";
  if (wants_photos == a.photos.empty()) throw Error(Fault::usage, a.command + (wants_photos ? ": wanted photos" : ": takes no photos"));
  a.options.decisions = a.command == "verify";
  if (a.command == "input") a.options.runtime = "none";
  if (a.command == "bench") {
    a.options.batch = a.batch;
    a.options.streams = a.concurrency;
  }
  return a;
}

std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (unsigned char c : text) {
    if (c == '"' || c == '\\') out += '\\', out += static_cast<char>(c);
    else if (c < 0x20) { char code[8]; std::snprintf(code, sizeof code, "\\u%04x", c); out += code; }
    else out += static_cast<char>(c);
  }
  return out + "\"";
}

std::string figure(double value) {
  if (!std::isfinite(value)) return "null";
  std::ostringstream out;
  out.precision(9);
  out << value;
  return out.str();
}

template <class T>
std::string list(const std::vector<T>& values) {
  std::string out = "[";
  for (std::size_t i = 0; i < values.size(); ++i) out += (i ? ", " : "") + figure(static_cast<double>(values[i]));
  return out + "]";
}

// What a JSON answer begins with: the rung that ran, of a ladder.
std::string opening(const Arguments& a) { return a.rung.empty() ? "{" : "{\"rung\": " + quoted(a.rung) + ", "; }

std::vector<Image> read(const Arguments& a, const Engine& engine) {
  std::vector<Image> images;
  for (const std::string& path : a.photos) images.push_back(Image::read(path, engine.channels()));
  return images;
}

int classify(const Arguments& a, const Engine& engine) {
  auto results = engine.classify(read(a, engine), a.top);
  std::string json;
  for (std::size_t i = 0; i < results.size(); ++i) {
    std::string rows;
    if (!a.json) std::cout << a.photos[i] << "\n";
    for (const Class& c : results[i]) {
      if (!a.json) std::printf("  %8.4f  %s\n", c.score, c.label.c_str()), std::fflush(stdout);
      rows += (rows.empty() ? "" : ", ") + ("{\"class\": " + std::to_string(c.index)) + ", \"label\": " + quoted(c.label) + ", \"logit\": " + figure(c.logit) + ", \"score\": " + figure(c.score) + "}";
    }
    json += (i ? ", " : "") + ("{\"image\": " + quoted(a.photos[i])) + ", \"top\": [" + rows + "]}";
  }
  if (a.json) std::cout << opening(a) << "\"images\": [" << json << "]}\n";
  return 0;
}

int features(const Arguments& a, const Engine& engine) {
  auto results = engine.features(read(a, engine));
  std::string json;
  for (std::size_t i = 0; i < results.size(); ++i) {
    double length = std::sqrt(std::inner_product(results[i].begin(), results[i].end(), results[i].begin(), 0.0));
    if (!a.json) std::cout << a.photos[i] << "\n  " << results[i].size() << " features, length " << figure(length) << "\n";
    json += (i ? ", " : "") + ("{\"image\": " + quoted(a.photos[i])) + ", \"features\": " + list(results[i]) + "}";
  }
  if (a.json) std::cout << opening(a) << "\"images\": [" << json << "]}\n";
  return 0;
}

int output(const Arguments& a, const Engine& engine) {
  std::string json;
  for (const auto& [name, value] : engine.run(read(a, engine)))
    json += (json.empty() ? "" : ", ") + quoted(name) + ": {\"shape\": " + list(value.shape) + ", \"values\": " + std::visit([](const auto& v) { return list(v); }, value.values) + "}";
  std::cout << "{" << json << "}\n";
  return 0;
}

int input(const Arguments& a, const Engine& engine) {
  Tensor tensor = engine.prepare(read(a, engine));
  std::visit([](const auto& v) { std::fwrite(v.data(), sizeof v[0], v.size(), stdout); }, tensor.values);
  return std::fflush(stdout) == 0 ? 0 : 3;
}

// Some inputs, repeated until there are n.
Tensor batch_of(const Tensor& some, int n) {
  Tensor out;
  out.shape = some.shape;
  out.shape[0] = n;
  const std::size_t row = some.size() / static_cast<std::size_t>(some.shape[0]);
  std::visit([&](const auto& v) {
    std::decay_t<decltype(v)> values(row * n);
    for (std::size_t i = 0; i < values.size(); ++i) values[i] = v[i % v.size()];
    out.values = std::move(values);
  }, some.values);
  return out;
}

int bench(const Arguments& a, const Engine& engine) {
  using Clock = std::chrono::steady_clock;
  Tensor input = batch_of(engine.sample_inputs(), a.batch);
  std::vector<double> times(a.runs);
  std::atomic<int> next{0};
  std::vector<std::thread> threads;
  std::vector<std::string> errors(a.concurrency);
  for (int i = 0; i < a.warmup; ++i) engine.run(input);
  auto start = Clock::now();
  for (int t = 0; t < a.concurrency; ++t)
    threads.emplace_back([&, t] {
      try {
        for (int i; (i = next++) < a.runs;) {
          auto before = Clock::now();
          engine.run(input);
          times[i] = std::chrono::duration<double, std::milli>(Clock::now() - before).count();
        }
      } catch (const std::exception& e) {
        errors[t] = e.what();
        next = a.runs;
      }
    });
  for (std::thread& thread : threads) thread.join();
  for (const std::string& error : errors)
    if (!error.empty()) throw Error(Fault::failure, error);
  double seconds = std::chrono::duration<double>(Clock::now() - start).count();
  std::sort(times.begin(), times.end());
  auto percentile = [&](double share) { return times[static_cast<std::size_t>(std::ceil(share * a.runs)) - 1]; };
  double mean = std::accumulate(times.begin(), times.end(), 0.0) / a.runs, rate = a.runs * a.batch / seconds;
  if (a.json) {
    std::cout << opening(a) << "\"runtime\": " << quoted(engine.runtime()) << ", \"batch\": " << a.batch << ", \"concurrency\": " << a.concurrency << ", \"runs\": " << a.runs
              << ", \"mean\": " << figure(mean) << ", \"p50\": " << figure(percentile(.5)) << ", \"p90\": " << figure(percentile(.9)) << ", \"p95\": " << figure(percentile(.95))
              << ", \"p99\": " << figure(percentile(.99)) << ", \"images_per_second\": " << figure(rate) << "}\n";
  } else {
    std::printf("%s\nbatch %d, %d at a time, %d runs: mean %.3f ms, p50 %.3f, p90 %.3f, p95 %.3f, p99 %.3f; %.1f images a second\n", engine.summary().c_str(), a.batch, a.concurrency,
                a.runs, mean, percentile(.5), percentile(.9), percentile(.95), percentile(.99), rate);
  }
  return 0;
}

int verify(const Arguments& a, const Engine& engine) {
  Proof proof = engine.verify();
  if (a.json) {
    std::string outputs, images;
    for (const auto& o : proof.outputs)
      outputs += (outputs.empty() ? "" : ", ") + ("{\"name\": " + quoted(o.name)) + ", \"error\": " + figure(o.error) + ", \"limit\": " + figure(o.limit) + ", \"own_error\": " + figure(o.own_error) +
                 ", \"own_limit\": " + figure(o.own_limit) + ", \"n_judged\": " + std::to_string(o.n_judged) + "}";
    for (const auto& i : proof.images)
      images += (images.empty() ? "" : ", ") + ("{\"verdict\": " + quoted(i.verdict)) + ", \"pixels\": " + figure(i.pixels) + ", \"block\": " + std::to_string(i.block) + ", \"margin\": " + figure(i.margin) + "}";
    std::cout << "{\"passed\": " << (proof.passed() ? "true" : "false") << ", \"runtime\": " << quoted(engine.runtime()) << ", \"outputs\": [" << outputs << "], \"images\": [" << images << "]}\n";
  } else {
    std::cout << engine.summary() << ": " << proof.summary() << "\n";
  }
  return proof.passed() ? 0 : 1;
}

using Command = int (*)(const Arguments&, const Engine&);

int rungs(const Arguments& a, const Ladder& ladder) {
  const std::size_t place = ladder.pick(a.budget_ms, a.batch);
  std::string json;
  if (!a.json) std::printf("%s; times %s\n", ladder.summary().c_str(), ladder.measured() ? "measured here" : "as stored");
  for (std::size_t i = 0; i < ladder.rungs().size(); ++i) {
    const Rung& r = ladder.rungs()[i];
    const long long tokens = r.tokens.empty() ? 0 : r.tokens.back();
    if (!a.json) std::printf("%s %-16s %5lld tokens at the end, %9.3f ms, error %.4g\n", i == place ? ">" : " ", r.label.c_str(), tokens, r.ms, r.error);
    json += (i ? ", " : "") + ("{\"label\": " + quoted(r.label)) + ", \"method\": " + quoted(r.method) + ", \"tokens\": " + list(r.tokens) + ", \"macs\": " + std::to_string(r.macs) +
            ", \"ms\": " + figure(r.ms) + ", \"error\": " + figure(r.error) + "}";
  }
  if (a.json) std::cout << "{\"runtime\": " << quoted(ladder.engine(0).runtime()) << ", \"measured\": " << (ladder.measured() ? "true" : "false") << ", \"picked\": " << quoted(ladder.rungs()[place].label) << ", \"rungs\": [" << json << "]}\n";
  return 0;
}

LadderOptions ladder_options(const Arguments& a) {
  LadderOptions options;
  options.runtime = a.options.runtime;
  options.library = a.options.library;
  if (a.options.threads) options.threads = a.options.threads;
  options.streams = a.options.streams;
  options.share_weights = a.options.share_weights;
  options.runtime_precision = a.options.runtime_precision;
  options.times = a.times.value_or(Times::automatic);
  return options;
}

// A command on the rung that the budget allows.
int run_ladder(Arguments a, Command command) {
  if (a.command == "verify") throw Error(Fault::usage, a.folder + " is a ladder, which has no proof to run here: `tokexport verify " + a.folder + "` judges every rung against PyTorch");
  const Ladder ladder = Ladder::open(a.folder, ladder_options(a));
  if (a.command == "rungs") return rungs(a, ladder);
  const std::int64_t images = a.command == "bench" ? a.batch : static_cast<std::int64_t>(a.photos.size());
  const std::size_t place = ladder.pick(a.budget_ms, images);
  const Rung& rung = ladder.rungs()[place];
  a.rung = rung.label;
  if (a.command != "input") {
    const std::int64_t runs = (images - 1) / std::max<std::int64_t>(ladder.batch(), 1) + 1;
    const bool late = a.budget_ms && rung.ms * static_cast<double>(runs) > *a.budget_ms;
    std::fprintf(stderr, "rung %s: %.3f ms a run%s%s\n", rung.label.c_str(), rung.ms, ladder.measured() ? ", measured here" : "", late ? "; none is within the budget, this is the fastest" : "");
  }
  return command(a, ladder.engine(place));
}

int run_bundle(const Arguments& a, Command command) {
  if (a.command == "rungs" || a.budget_ms || a.times) throw Error(Fault::usage, a.folder + " is no ladder: rungs, --budget-ms and --times want one, which `tokexport ladder` makes");
  return command(a, Engine::open(a.folder, a.options));
}

}  // namespace

int main(int argc, char** argv) {
  try {
    for (int i = 1; i < argc; ++i)
      if (std::string(argv[i]) == "--help" || std::string(argv[i]) == "-h") {
        std::cout << kHelp << "\nruntimes that are built in:";
        for (const std::string& name : runtimes()) std::cout << ' ' << name;
        std::cout << "\n";
        return 0;
      }
    const Arguments a = parse(argc, argv);
    const std::vector<std::pair<std::string, Command>> commands = {{"classify", classify}, {"features", features}, {"bench", bench}, {"verify", verify}, {"input", input}, {"output", output}, {"rungs", nullptr}};
    for (const auto& [name, command] : commands)
      if (a.command == name) return Ladder::is_at(a.folder) ? run_ladder(a, command) : run_bundle(a, command);
    throw Error(Fault::usage, "no command " + a.command + ": tokexport-run --help");
  } catch (const Error& e) {
    std::cerr << "Error: " << e.what() << "\n";
    return static_cast<int>(e.fault());
  } catch (const std::exception& e) {
    std::cerr << "Error: " << e.what() << "\n";
    return 3;
  }
}
