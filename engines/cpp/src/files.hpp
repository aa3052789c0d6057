// Files of a bundle or a ladder: plain names in its folder, read whole, with their SHA-256.
#pragma once

#include <cstdint>
#include <string>

namespace tokexport {

// The bytes of a file. Throws Error when it cannot be read.
std::string read_file(const std::string& path);

// Where a file of a folder is. Throws Error for a name that is not plain, and for what is missing, a link or no regular file.
// kind: what the folder is, the name of the command that makes it.
std::string plain_file(const std::string& folder, const std::string& name, const std::string& kind = "bundle");

// SHA-256 of a file's bytes in hexadecimal (FIPS 180-4).
std::string sha256_of(const std::string& path);

std::int64_t size_of(const std::string& path);

}  // namespace tokexport
