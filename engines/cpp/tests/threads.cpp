// threads BUNDLE THREADS RUNS [RUNTIME [LIBRARY]]: many threads on one engine give what one gives, bit for bit.
#include <atomic>
#include <cstdlib>
#include <iostream>
#include <thread>

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

}  // namespace

int main(int argc, char** argv) try {
  if (argc < 4) return 2;
  tokexport::Options options;
  if (argc > 4) options.runtime = argv[4];
  if (argc > 5) options.library = argv[5];
  options.threads = 1;
  auto engine = tokexport::Engine::open(argv[1], options);
  tokexport::Tensor inputs = engine.proof_inputs();
  std::vector<tokexport::Tensors> wanted;
  for (std::int64_t i = 0; i < inputs.shape[0]; ++i) wanted.push_back(engine.run(row(inputs, i)));
  std::atomic<int> wrong{0}, done{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < std::atoi(argv[2]); ++t)
    threads.emplace_back([&, t] {
      for (int i = 0; i < std::atoi(argv[3]); ++i) {
        std::int64_t which = (i + t) % inputs.shape[0];
        try {
          wrong += !equal(engine.run(row(inputs, which)), wanted[which]);
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
