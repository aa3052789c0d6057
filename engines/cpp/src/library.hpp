// A shared library that is loaded when it is used: a program then runs with any version that its headers fit, and starts without it.
#pragma once

#include <string>
#include <vector>

namespace tokexport {

class Library {
 public:
  // Opens the first that loads of: `asked` alone, when it is not empty; the value of the environment variable; the names.
  // words: what it is, for the message. It stays loaded to the end: runtimes keep threads of their own.
  Library(const std::string& asked, const char* variable, const std::vector<std::string>& names, const std::string& words);

  // A function of it. Throws Error when it has none of that name.
  template <class F>
  F function(const char* name) const {
    return reinterpret_cast<F>(symbol(name));
  }
  const std::string& path() const { return path_; }

 private:
  void* symbol(const char* name) const;
  void* handle_ = nullptr;
  std::string path_;
};

}  // namespace tokexport
