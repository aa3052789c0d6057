// classify BUNDLE PHOTOS...: the likeliest class of each photo, all photos at once.
#include <tokexport/tokexport.hpp>

#include <iostream>

int main(int argc, char** argv) {
  if (argc < 3) {
    std::cerr << "usage: classify BUNDLE PHOTOS...\n";
    return 2;
  }
  try {
    const auto engine = tokexport::Engine::open(argv[1]);
    std::cout << engine.summary() << "\n";
    std::vector<tokexport::Image> photos;
    for (int i = 2; i < argc; ++i) photos.push_back(tokexport::Image::read(argv[i], engine.channels()));
    const auto classes = engine.classify(photos, 1);
    for (int i = 2; i < argc; ++i) std::cout << argv[i] << ": " << classes[i - 2][0].label << " " << classes[i - 2][0].score << "\n";
  } catch (const tokexport::Error& e) {
    std::cerr << "Error: " << e.what() << "\n";
    return static_cast<int>(e.fault());
  }
}
