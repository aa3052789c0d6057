// The processor of this machine, by the name that Python stores with times (engines/measure/environment.py).
#pragma once

#include <string>

namespace tokexport {

// As Linux names it in /proc/cpuinfo; the kind of machine ("aarch64") where it gives no name.
std::string processor_name();

}  // namespace tokexport
