// The tensors of a proof (safetensors: a length, a JSON header, the bytes). Everything is checked before it is read.
#pragma once

#include <map>
#include <string>

#include "tokexport/tokexport.hpp"

namespace tokexport {

// float32 stays; int32 and int64 are indices; uint8 are pixels. Throws Error for a damaged file.
Tensors read_safetensors(const std::string& path);

}  // namespace tokexport
