// An io_uring by raw system calls: entries go in, events come out. Knows nothing of batches, deadlines or checksums.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "fd.hpp"

struct io_uring_cqe;
struct io_uring_sqe;

namespace impala {

// Bytes of a file to move to or from memory.
struct Span {
    bool is_write;
    std::uint64_t offset;
    char* address;
    std::size_t length;
};

// What became of the entry with this tag: bytes moved, or an errno below zero.
struct Event {
    std::uint64_t tag;
    std::int32_t result;
};

// Entries that the kernel did not take, and why.
struct Refusal {
    int error = 0;
    std::vector<std::uint64_t> tags;
};

class Ring {
  public:
    // Room for `depth` entries prepared and twice as many events not taken yet; the caller keeps to both.
    // Throws std::system_error: ENOSYS where the kernel (before 5.6) or this build has no io_uring, EPERM where it is
    // forbidden, EINVAL for a depth of 0 or above 32,768.
    explicit Ring(unsigned depth);
    Ring(const Ring&) = delete;
    Ring& operator=(const Ring&) = delete;
    // Every entry must have had its event: the kernel would go on writing to its memory.
    ~Ring();

    // The file that spans are of. Once. Throws std::system_error.
    void register_file(int fd);
    // Counts up with every event. Once. Throws std::system_error.
    void register_eventfd(int fd);
    // Pin memory until the ring is gone: spans inside it cost less. Once.
    // Throws std::system_error: ENOMEM above the limit of locked memory, EFAULT for memory that cannot be pinned.
    void register_memory(char* address, std::size_t length);

    void prepare(std::uint64_t tag, const Span& span);
    // Ask for the end of the entry tagged `victim`. Both have an event; the victim's says whether it was moved.
    void prepare_cancel(std::uint64_t tag, std::uint64_t victim);
    // Hand what was prepared to the kernel, and forget what it refuses.
    Refusal start();
    // Take the oldest event.
    std::optional<Event> next();

  private:
    // Memory shared with the kernel.
    struct Mapping {
        void* address = nullptr;
        std::size_t length = 0;
        ~Mapping();
        void map(int fd, std::uint64_t offset, std::size_t length);
        template <typename T>
        T* at(std::size_t offset) const {
            return reinterpret_cast<T*>(static_cast<char*>(address) + offset);
        }
    };

    void enroll(unsigned what, const void* argument, unsigned count);
    std::optional<unsigned> piece_of(const Span& span) const;
    io_uring_sqe& new_entry();

    Fd fd_;
    Mapping rings_, entries_;
    unsigned *submit_head_, *submit_tail_, *submit_flags_, submit_mask_, *event_head_, *event_tail_, event_mask_;
    unsigned prepared_tail_ = 0;
    io_uring_sqe* entry_;
    io_uring_cqe* event_;
    char* pinned_ = nullptr;
    std::size_t pinned_length_ = 0;
};

}  // namespace impala
