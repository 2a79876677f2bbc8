#include "block_io_probe.hpp"

#include <fcntl.h>
#include <linux/io_uring.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <system_error>

namespace impala {
namespace {

// From the smallest disk sector to the largest page and file system block in use.
constexpr std::size_t kSmallestAlignment = 512;
constexpr std::size_t kLargestAlignment = 64 * 1024;

class Fd {
  public:
    explicit Fd(int fd) : fd_(fd) {}
    Fd(const Fd&) = delete;
    Fd& operator=(const Fd&) = delete;
    ~Fd() {
        if (fd_ >= 0) close(fd_);
    }
    explicit operator bool() const { return fd_ >= 0; }
    int get() const { return fd_; }

  private:
    int fd_;
};

struct Free {
    void operator()(char* p) const { std::free(p); }
};

bool can_make_io_uring() {
    io_uring_params params{};
    return static_cast<bool>(Fd(static_cast<int>(syscall(__NR_io_uring_setup, 1, &params))));
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
