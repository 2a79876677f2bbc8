#include "checksum.hpp"

#ifdef IMPALA_HAS_XXHASH
// In the header alone: a wheel then needs no libxxhash where it runs.
#define XXH_INLINE_ALL
#include <xxhash.h>
#endif

namespace impala {

#ifdef IMPALA_HAS_XXHASH
bool has_checksum() { return true; }
std::optional<std::uint64_t> checksum(const char* data, std::size_t length) { return XXH3_64bits(data, length); }
#else
bool has_checksum() { return false; }
std::optional<std::uint64_t> checksum(const char*, std::size_t) { return std::nullopt; }
#endif

}  // namespace impala
