// XXH3, 64 bit, seed 0, where the build found the header of libxxhash 0.8 or later.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

namespace impala {

// Whether this build can take checksums.
bool has_checksum();

// Empty exactly where `has_checksum` is false.
std::optional<std::uint64_t> checksum(const char* data, std::size_t length);

}  // namespace impala
