#include "block_io_probe.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <system_error>

#include "fd.hpp"
#include "uring_file.hpp"

namespace impala {
namespace {

// From the smallest disk sector to the largest page and file system block in use.
constexpr std::size_t kSmallestAlignment = 512;
constexpr std::size_t kLargestAlignment = 64 * 1024;
// For a byte that is there already: it is called back after the first, and given up after the second.
constexpr double kDeadline_s = 2, kPatience_s = 3;

struct Free {
    void operator()(char* p) const { std::free(p); }
};

// Signals do not end it: their handlers run once it is over.
bool is_done_in_time(UringFile& file) {
    using Clock = std::chrono::steady_clock;
    const auto until = Clock::now() + std::chrono::duration<double>(kPatience_s);
    for (;;) {
        const double left_s = std::chrono::duration<double>(until - Clock::now()).count();
        const Wait ended = file.wait(left_s);
        if (ended == Wait::done) return true;
        if (ended == Wait::timed_out) return false;
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

bool can_use_io_uring() {
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) != 0) return false;
    const Fd out(ends[0]), in(ends[1]);
    auto byte = std::make_unique<char>();
    if (write(in.get(), byte.get(), 1) != 1) return false;
    try {
        auto file = std::make_unique<UringFile>(out.get(), 1, 1, kDeadline_s);
        const Transfer transfer{0, {false, 0, byte.get(), 1}};
        file->submit({transfer});
        if (is_done_in_time(*file)) return file->take().front().error == 0;
        // The kernel may still write there, and to close the file would wait for that.
        (void)byte.release();
        (void)file.release();
        return false;
    } catch (const std::system_error&) {
        return false;
    }
}

BlockIo probe_block_io(const std::string& directory) {
    std::string path = directory + "/.impala-probe-XXXXXX";
    const Fd plain(mkostemp(path.data(), O_CLOEXEC));
    if (!plain) throw std::system_error(errno, std::generic_category(), directory);
    const Fd direct(open(path.c_str(), O_RDWR | O_DIRECT | O_CLOEXEC));
    unlink(path.c_str());

    BlockIo answer;
    answer.io_uring = can_use_io_uring();
    if (direct) answer.direct_alignment_bytes = direct_alignment(direct.get());
    return answer;
}

}  // namespace impala
