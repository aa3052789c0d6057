#include "library.hpp"

#include <dlfcn.h>

#include <cstdlib>

#include "tokexport/tokexport.hpp"

namespace tokexport {

Library::Library(const std::string& asked, const char* variable, const std::vector<std::string>& names, const std::string& words) {
  const char* set = std::getenv(variable);
  std::vector<std::string> paths = !asked.empty() ? std::vector<std::string>{asked} : set && *set ? std::vector<std::string>{set} : names;
  std::string reason;
  for (const std::string& path : paths) {
    handle_ = ::dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    path_ = path;
    if (handle_) return;
    if (const char* error = ::dlerror()) reason = error;
  }
  throw Error(Fault::usage, words + " cannot be loaded (" + reason + "): name its library with the option `library` or in " + variable);
}

void* Library::symbol(const char* name) const {
  void* address = ::dlsym(handle_, name);
  if (!address) throw Error(Fault::usage, path_ + " has no " + name + ": it is another library, or of another version");
  return address;
}

}  // namespace tokexport
