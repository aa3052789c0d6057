#include "processor.hpp"

#include <sys/utsname.h>

#include <fstream>

namespace tokexport {
namespace {

std::string stripped(const std::string& text) {
  const char* space = " \t\r";
  const std::size_t first = text.find_first_not_of(space);
  return first == std::string::npos ? "" : text.substr(first, text.find_last_not_of(space) - first + 1);
}

}  // namespace

std::string processor_name() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    const std::size_t colon = line.find(':');
    if (colon != std::string::npos && stripped(line.substr(0, colon)) == "model name") return stripped(line.substr(colon + 1));
  }
  utsname system{};
  return ::uname(&system) == 0 ? system.machine : "unknown";
}

}  // namespace tokexport
