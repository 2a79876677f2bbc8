#include "ring.hpp"

#include <linux/io_uring.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cassert>
#include <cerrno>
#include <system_error>

// Of Linux 5.19; the oldest header that we build with does not have them.
#ifndef IORING_SETUP_COOP_TASKRUN
#define IORING_SETUP_COOP_TASKRUN (1U << 8)
#endif
#ifndef IORING_SETUP_TASKRUN_FLAG
#define IORING_SETUP_TASKRUN_FLAG (1U << 9)
#endif
#ifndef IORING_SQ_TASKRUN
#define IORING_SQ_TASKRUN (1U << 2)
#endif

namespace impala {
namespace {

// The kernel does not interrupt a thread to tell it of an event: it leaves a mark, and the event comes with the thread's
// next system call.
constexpr unsigned kCalm = IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG;
// The kernel's limit for one registered buffer.
constexpr std::size_t kPieceBytes = std::size_t{1} << 30;

[[noreturn]] void fail(int error, const char* what) { throw std::system_error(error, std::generic_category(), what); }

// The kernel reads and writes head and tail at the same time as we do.
unsigned load(const unsigned* from) { return __atomic_load_n(from, __ATOMIC_ACQUIRE); }
void store(unsigned* to, unsigned value) { __atomic_store_n(to, value, __ATOMIC_RELEASE); }

Fd set_up(unsigned depth, io_uring_params& params) {
    params.flags = kCalm;
    Fd fd(static_cast<int>(syscall(__NR_io_uring_setup, depth, &params)));
    if (!fd && errno == EINVAL) {  // before 5.19, or a depth that no kernel has
        params = io_uring_params{};
        fd = Fd(static_cast<int>(syscall(__NR_io_uring_setup, depth, &params)));
    }
    if (!fd) fail(errno, "io_uring_setup");
    // The last came with 5.6, as did the plain read and write entries.
    constexpr unsigned needed = IORING_FEAT_SINGLE_MMAP | IORING_FEAT_NODROP | IORING_FEAT_RW_CUR_POS;
    if ((params.features & needed) != needed) fail(ENOSYS, "io_uring before Linux 5.6");
    return fd;
}

}  // namespace

Ring::Ring(unsigned depth) {
    io_uring_params params{};
    fd_ = set_up(depth, params);
    const auto& submit = params.sq_off;
    const auto& events = params.cq_off;
    rings_.map(fd_.get(), IORING_OFF_SQ_RING,
               std::max(submit.array + params.sq_entries * sizeof(unsigned),
                        events.cqes + params.cq_entries * sizeof(io_uring_cqe)));
    entries_.map(fd_.get(), IORING_OFF_SQES, params.sq_entries * sizeof(io_uring_sqe));
    submit_head_ = rings_.at<unsigned>(submit.head);
    submit_tail_ = rings_.at<unsigned>(submit.tail);
    submit_flags_ = rings_.at<unsigned>(submit.flags);
    submit_mask_ = params.sq_entries - 1;
    event_head_ = rings_.at<unsigned>(events.head);
    event_tail_ = rings_.at<unsigned>(events.tail);
    event_mask_ = params.cq_entries - 1;
    entry_ = entries_.at<io_uring_sqe>(0);
    event_ = rings_.at<io_uring_cqe>(events.cqes);
    for (unsigned i = 0; i < params.sq_entries; ++i) rings_.at<unsigned>(submit.array)[i] = i;
}

Ring::~Ring() = default;

void Ring::register_file(int fd) { enroll(IORING_REGISTER_FILES, &fd, 1); }

void Ring::register_eventfd(int fd) { enroll(IORING_REGISTER_EVENTFD, &fd, 1); }

void Ring::register_memory(char* address, std::size_t length) {
    std::vector<iovec> pieces;
    for (std::size_t start = 0; start < length; start += kPieceBytes) {
        pieces.push_back({address + start, std::min(kPieceBytes, length - start)});
    }
    enroll(IORING_REGISTER_BUFFERS, pieces.data(), static_cast<unsigned>(pieces.size()));
    pinned_ = address;
    pinned_length_ = length;
}

void Ring::prepare(std::uint64_t tag, const Span& span) {
    io_uring_sqe& entry = new_entry();
    const auto piece = piece_of(span);
    if (piece) {
        entry.opcode = span.is_write ? IORING_OP_WRITE_FIXED : IORING_OP_READ_FIXED;
        entry.buf_index = static_cast<std::uint16_t>(*piece);
    } else {
        entry.opcode = span.is_write ? IORING_OP_WRITE : IORING_OP_READ;
    }
    entry.flags = IOSQE_FIXED_FILE;
    entry.fd = 0;  // an index of the registered files
    entry.off = span.offset;
    entry.addr = reinterpret_cast<std::uint64_t>(span.address);
    entry.len = static_cast<std::uint32_t>(span.length);
    entry.user_data = tag;
}

void Ring::prepare_cancel(std::uint64_t tag, std::uint64_t victim) {
    io_uring_sqe& entry = new_entry();
    entry.opcode = IORING_OP_ASYNC_CANCEL;
    entry.fd = -1;
    entry.addr = victim;
    entry.user_data = tag;
}

Refusal Ring::start() {
    store(submit_tail_, prepared_tail_);
    for (unsigned left; (left = prepared_tail_ - load(submit_head_)) > 0;) {
        const long num_taken = syscall(__NR_io_uring_enter, fd_.get(), left, 0, 0, nullptr, 0);
        if (num_taken > 0 || (num_taken < 0 && errno == EINTR)) continue;
        Refusal refusal{num_taken < 0 ? errno : EAGAIN, {}};
        const unsigned head = load(submit_head_);
        for (unsigned i = head; i != prepared_tail_; ++i) refusal.tags.push_back(entry_[i & submit_mask_].user_data);
        // Nobody reads the entries outside of io_uring_enter, so the tail may go back.
        prepared_tail_ = head;
        store(submit_tail_, head);
        return refusal;
    }
    return {};
}

std::optional<Event> Ring::next() {
    const unsigned head = *event_head_;  // only we write it
    if (head == load(event_tail_) && (load(submit_flags_) & IORING_SQ_TASKRUN)) {
        syscall(__NR_io_uring_enter, fd_.get(), 0, 0, IORING_ENTER_GETEVENTS, nullptr, 0);
    }
    if (head == load(event_tail_)) return std::nullopt;
    const io_uring_cqe& event = event_[head & event_mask_];
    const Event taken{event.user_data, event.res};
    store(event_head_, head + 1);
    return taken;
}

void Ring::enroll(unsigned what, const void* argument, unsigned count) {
    if (syscall(__NR_io_uring_register, fd_.get(), what, argument, count) < 0) fail(errno, "io_uring_register");
}

std::optional<unsigned> Ring::piece_of(const Span& span) const {
    const auto start = reinterpret_cast<std::uintptr_t>(span.address) - reinterpret_cast<std::uintptr_t>(pinned_);
    // Below the pinned memory the difference wraps round to a large one.
    if (start >= pinned_length_ || span.length > pinned_length_ - start) return std::nullopt;
    if (start / kPieceBytes != (start + span.length - 1) / kPieceBytes) return std::nullopt;
    return static_cast<unsigned>(start / kPieceBytes);
}

io_uring_sqe& Ring::new_entry() {
    assert(prepared_tail_ - load(submit_head_) <= submit_mask_);
    io_uring_sqe& entry = entry_[prepared_tail_++ & submit_mask_];
    entry = {};
    return entry;
}

Ring::Mapping::~Mapping() {
    if (address != nullptr) munmap(address, length);
}

void Ring::Mapping::map(int fd, std::uint64_t offset, std::size_t bytes) {
    void* const found =
        mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, static_cast<off_t>(offset));
    if (found == MAP_FAILED) fail(errno, "mmap of an io_uring");
    address = found;
    length = bytes;
}

}  // namespace impala
