// Batched I/O on one open file by io_uring: more transfers than the ring holds, deadlines, cancellation, wake-ups.
// Owned by one thread at a time; only `wake` may be called by others.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "ring.hpp"

namespace impala {

// One span to move. The memory belongs to the file from `submit` until `take` returns the token.
struct Transfer {
    std::int64_t token;
    Span span;
};

struct Done {
    Transfer transfer;
    // 0, or an errno: EIO also for a short transfer, ETIMEDOUT for one that was in flight at its deadline.
    int error;
    // Why; empty without an error.
    std::string message;
    // Of the bytes moved; empty with an error or where the build has none.
    std::optional<std::uint64_t> checksum;
    // From `submit` to done.
    double seconds;
};

// What ended a wait.
enum class Wait { done, woken, timed_out, interrupted };

class UringFile {
  public:
    // On a duplicate of `fd`. At most `depth` transfers are with the kernel at a time, the others wait their turn.
    // Addresses, offsets and lengths are multiples of `alignment`, a power of two. Without a deadline transfers take
    // what they take. Throws std::system_error where the kernel offers no io_uring (see Ring).
    UringFile(int fd, unsigned depth, std::size_t alignment, std::optional<double> deadline_s);
    UringFile(const UringFile&) = delete;
    UringFile& operator=(const UringFile&) = delete;
    ~UringFile();

    // Pin a region that most buffers will lie in. Once, with nothing in flight. It must stay mapped until `close`.
    // Throws std::system_error where the kernel will not have it; everything works without.
    void register_region(char* address, std::size_t length);

    // Start the transfers. Never waits for the disk. Throws std::invalid_argument, starting none, where one is
    // misaligned, empty, longer than a system call moves (2 GiB - 4 KiB), before the start of the file or named like
    // another in flight.
    void submit(const std::vector<Transfer>& transfers);

    // Until something is done, `wake` is called or the time is over: at once where that is so already. A signal ends it
    // too. Deadlines are kept here: a transfer that is late is called back, and done once the kernel has let go of it.
    Wait wait(double timeout_s);

    // What is done and was not taken yet, the first ones of it where that is more than `most`. Takes the checksums, so it
    // costs a pass over the memory.
    std::vector<Done> take(std::size_t most = SIZE_MAX);

    // Call the transfer back. It is done with ECANCELED if it had not begun, else with what became of it; an unknown
    // token is no error, it may just have been done.
    void cancel(std::int64_t token);

    // End the wait under way, or the next one that would have to wait. From any thread, at any time.
    void wake();

    // Wait until the kernel has let go of all memory, then let go of the file; what was not taken is lost.
    // Idempotent. After it only `wake` may be called.
    void close();

  private:
    using Clock = std::chrono::steady_clock;

    struct Flight {
        Transfer transfer;
        Clock::time_point start;
        bool is_with_kernel = false;
        bool is_late = false;
    };

    void check(const std::vector<Transfer>& transfers) const;
    void advance();
    void reap();
    void call_back_late();
    void fill();
    void send_cancels();
    void start();
    void finish(std::uint64_t number, int error, std::size_t num_moved);
    bool sleep(Clock::time_point until);
    Clock::time_point next_deadline() const;

    Fd file_, event_;
    std::unique_ptr<Ring> ring_;
    const unsigned depth_;
    const std::size_t alignment_;
    const std::optional<Clock::duration> deadline_;
    std::atomic<bool> is_woken_{false};

    // Transfers by number; numbers are never used again, so an event or a cancel that comes late meets no other.
    std::unordered_map<std::uint64_t, Flight> flights_;
    std::unordered_map<std::int64_t, std::uint64_t> numbers_;  // by token
    std::uint64_t next_number_ = 0;
    // Queues of numbers; those of transfers that are done meanwhile are skipped.
    std::deque<std::uint64_t> waiting_, by_age_, to_cancel_;
    unsigned num_with_kernel_ = 0, num_cancels_ = 0;
    std::deque<Done> done_;
};

}  // namespace impala
