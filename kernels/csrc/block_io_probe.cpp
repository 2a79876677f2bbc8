#include "block_io_probe.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <system_error>

#include "fd.hpp"
#include "ring.hpp"

namespace impala {
namespace {

// From the smallest disk sector to the largest page and file system block in use.
constexpr std::size_t kSmallestAlignment = 512;
constexpr std::size_t kLargestAlignment = 64 * 1024;

struct Free {
    void operator()(char* p) const { std::free(p); }
};

bool can_make_io_uring() {
    try {
        Ring(1);
        return true;
    } catch (const std::system_error&) {
        return false;
    }
}

// Write and read one run of `alignment` bytes at an address, offset and length that are multiples of it and no more.
bool round_trips(int fd, char* base, std::size_t alignment) {
    char* const sent = base + alignment;
    char* const received = base + 3 * alignment;
    std::memset(sent, 0x5a, alignment);
    std::memset(received, 0, alignment);
    const auto offset = static_cast<off_t>(alignment);
    return pwrite(fd, sent, alignment, offset) == static_cast<ssize_t>(alignment) &&
           pread(fd, received, alignment, offset) == static_cast<ssize_t>(alignment) &&
           std::memcmp(sent, received, alignment) == 0;
}

std::optional<std::size_t> direct_alignment(int fd) {
    void* memory = nullptr;
    if (posix_memalign(&memory, kLargestAlignment, 4 * kLargestAlignment) != 0) return std::nullopt;
    const std::unique_ptr<char, Free> buffer(static_cast<char*>(memory));
    for (std::size_t alignment = kSmallestAlignment; alignment <= kLargestAlignment; alignment *= 2) {
        if (round_trips(fd, buffer.get(), alignment)) return alignment;
    }
    return std::nullopt;
}

}  // namespace

BlockIo probe_block_io(const std::string& directory) {
    std::string path = directory + "/.impala-probe-XXXXXX";
    const Fd plain(mkostemp(path.data(), O_CLOEXEC));
    if (!plain) throw std::system_error(errno, std::generic_category(), directory);
    const Fd direct(open(path.c_str(), O_RDWR | O_DIRECT | O_CLOEXEC));
    unlink(path.c_str());

    BlockIo answer;
    answer.io_uring = can_make_io_uring();
    if (direct) answer.direct_alignment_bytes = direct_alignment(direct.get());
    return answer;
}

}  // namespace impala
