// threads FOLDER THREADS RUNS [RUNTIME [LIBRARY]]: many threads on one engine or one ladder give what one gives, bit for bit.
#include <atomic>
#include <cstdlib>
#include <functional>
#include <iostream>
#include <memory>
#include <thread>

#include "tokexport/ladder.hpp"
#include "tokexport/tokexport.hpp"

namespace {

bool equal(const tokexport::Tensors& a, const tokexport::Tensors& b) {
  if (a.size() != b.size()) return false;
  for (const auto& [name, value] : a)
    if (value.shape != b.at(name).shape || value.values != b.at(name).values) return false;
  return true;
}

tokexport::Tensor row(const tokexport::Tensor& inputs, std::int64_t i) {
  tokexport::Tensor out;
  out.shape = inputs.shape;
  out.shape[0] = 1;
  const auto& all = inputs.floats();
  const std::size_t n = all.size() / inputs.shape[0];
  out.values = std::vector<float>(all.begin() + i * n, all.begin() + (i + 1) * n);
  return out;
}

// What the threads call, by number: of a bundle a row of its inputs; of a ladder each rung in turn, by a budget that allows it.
struct Work {
  std::int64_t n;
  std::function<tokexport::Tensors(std::int64_t)> run;
};

Work work_of(const std::string& folder, const std::string& runtime, const std::string& library) {
  if (tokexport::Ladder::is_at(folder)) {
    tokexport::LadderOptions options;
    options.runtime = runtime;
    options.library = library;
    options.threads = 1;
    options.times = tokexport::Times::stored;
    auto ladder = std::make_shared<tokexport::Ladder>(tokexport::Ladder::open(folder, options));
    const tokexport::Tensor input = ladder->engine(0).sample_inputs();
    return {static_cast<std::int64_t>(ladder->rungs().size()), [=](std::int64_t i) { return ladder->run(input, ladder->rungs()[i].ms); }};
  }
  tokexport::Options options;
  options.runtime = runtime;
  options.library = library;
  options.threads = 1;
  auto engine = std::make_shared<tokexport::Engine>(tokexport::Engine::open(folder, options));
  const tokexport::Tensor inputs = engine->sample_inputs();
  return {inputs.shape[0], [=](std::int64_t i) { return engine->run(row(inputs, i)); }};
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc < 4) return 2;
  const Work work = work_of(argv[1], argc > 4 ? argv[4] : "", argc > 5 ? argv[5] : "");
  std::vector<tokexport::Tensors> wanted;
  for (std::int64_t i = 0; i < work.n; ++i) wanted.push_back(work.run(i));
  std::atomic<int> wrong{0}, done{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < std::atoi(argv[2]); ++t)
    threads.emplace_back([&, t] {
      for (int i = 0; i < std::atoi(argv[3]); ++i) {
        const std::int64_t which = (i + t) % work.n;
        try {
          wrong += !equal(work.run(which), wanted[which]);
        } catch (const std::exception& e) {
          std::cerr << e.what() << "\n";
          ++wrong;
        }
        ++done;
      }
    });
  for (auto& thread : threads) thread.join();
  std::cout << done << " runs, " << wrong << " differ\n";
  return wrong ? 1 : 0;
} catch (const std::exception& e) {
  std::cerr << "Error: " << e.what() << "\n";
  return 2;
}
