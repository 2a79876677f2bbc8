#include "uring_file.hpp"

#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <system_error>
#include <unordered_set>
#include <utility>

#include "checksum.hpp"

namespace impala {
namespace {

constexpr std::size_t kLongest = (std::size_t{1} << 31) - 4096;
// No transfer has this number.
constexpr std::uint64_t kCancel = ~std::uint64_t{0};

[[noreturn]] void fail(const char* what) { throw std::system_error(errno, std::generic_category(), what); }

Fd duplicate(int fd) {
    Fd copy(fcntl(fd, F_DUPFD_CLOEXEC, 0));
    if (!copy) fail("dup");
    return copy;
}

Fd new_eventfd() {
    Fd fd(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
    if (!fd) fail("eventfd");
    return fd;
}

std::chrono::nanoseconds seconds(double value) {
    // A century at most: the clock's ticks overflow beyond three.
    const std::chrono::duration<double> bounded(value > 0 ? std::min(value, 3e9) : 0.0);
    return std::chrono::duration_cast<std::chrono::nanoseconds>(bounded);
}

std::string short_of(const Span& span, std::size_t num_moved) {
    return std::string("short ") + (span.is_write ? "write: " : "read: ") + std::to_string(num_moved) + " of " +
           std::to_string(span.length) + " bytes at " + std::to_string(span.offset);
}

}  // namespace

UringFile::UringFile(int fd, unsigned depth, std::size_t alignment, std::optional<double> deadline_s)
    : file_(duplicate(fd)),
      event_(new_eventfd()),
      ring_(std::make_unique<Ring>(depth)),
      depth_(depth),
      alignment_(alignment),
      deadline_(deadline_s ? std::optional(Clock::duration(seconds(*deadline_s))) : std::nullopt) {
    ring_->register_file(file_.get());
    ring_->register_eventfd(event_.get());
}

UringFile::~UringFile() { close(); }

void UringFile::register_region(char* address, std::size_t length) { ring_->register_memory(address, length); }

void UringFile::submit(const std::vector<Transfer>& transfers) {
    check(transfers);
    const auto now = Clock::now();
    for (const Transfer& transfer : transfers) {
        const std::uint64_t number = next_number_++;
        flights_.emplace(number, Flight{transfer, now});
        numbers_.emplace(transfer.token, number);
        waiting_.push_back(number);
        if (deadline_) by_age_.push_back(number);
    }
    reap();
    fill();
}

Wait UringFile::wait(double timeout_s) {
    const auto until = Clock::now() + seconds(timeout_s);
    for (;;) {
        advance();
        // A call that does not wait leaves the wake-up to the one that does.
        const bool is_woken = timeout_s > 0 && is_woken_.exchange(false);
        if (!done_.empty()) return Wait::done;
        if (is_woken) return Wait::woken;
        if (Clock::now() >= until) return Wait::timed_out;
        if (!sleep(std::min(until, next_deadline()))) return Wait::interrupted;
    }
}

std::vector<Done> UringFile::take(std::size_t most) {
    std::vector<Done> taken;
    for (; taken.size() < most && !done_.empty(); done_.pop_front()) taken.push_back(std::move(done_.front()));
    for (Done& done : taken) {
        if (done.error == 0) done.checksum = checksum(done.transfer.span.address, done.transfer.span.length);
    }
    return taken;
}

void UringFile::cancel(std::int64_t token) {
    const auto found = numbers_.find(token);
    if (found == numbers_.end()) return;
    const std::uint64_t number = found->second;
    if (flights_.at(number).is_with_kernel) {
        to_cancel_.push_back(number);
        send_cancels();
    } else {
        finish(number, ECANCELED, 0);
    }
}

void UringFile::wake() {
    is_woken_ = true;
    // Fails only when the counter is full, and then the sleeper is awake anyhow.
    (void)!eventfd_write(event_.get(), 1);
}

void UringFile::close() {
    if (!ring_) return;
    for (advance(); !flights_.empty(); advance()) sleep(next_deadline());
    done_.clear();
    ring_.reset();
    file_ = Fd();
}

void UringFile::check(const std::vector<Transfer>& transfers) const {
    std::unordered_set<std::int64_t> tokens;
    for (const auto& [token, span] : transfers) {
        const auto refuse = [token = token](const std::string& why) {
            throw std::invalid_argument("op " + std::to_string(token) + ": " + why);
        };
        const auto address = reinterpret_cast<std::uintptr_t>(span.address);
        if ((address | span.offset | span.length) & (alignment_ - 1)) {
            refuse("address " + std::to_string(address) + ", offset " + std::to_string(span.offset) + " and length " +
                   std::to_string(span.length) + " must be multiples of " + std::to_string(alignment_));
        }
        if (span.length == 0 || span.length > kLongest) {
            refuse("a length of " + std::to_string(span.length) + " is not between 1 and " + std::to_string(kLongest));
        }
        if (span.offset > static_cast<std::uint64_t>(INT64_MAX) - kLongest) refuse("no file has such an offset");
        if (numbers_.count(token) || !tokens.insert(token).second) refuse("another op in flight has this token");
    }
}

// Everything but waiting: what the kernel has done, what is late, what has room to start.
void UringFile::advance() {
    reap();
    call_back_late();
    fill();
    send_cancels();
}

void UringFile::reap() {
    while (const auto event = ring_->next()) {
        if (event->tag == kCancel) {
            --num_cancels_;
        } else {
            --num_with_kernel_;
            finish(event->tag, std::max(-event->result, 0), static_cast<std::size_t>(std::max(event->result, 0)));
        }
    }
}

void UringFile::call_back_late() {
    if (by_age_.empty()) return;
    const auto now = Clock::now();
    for (; !by_age_.empty(); by_age_.pop_front()) {
        const auto found = flights_.find(by_age_.front());
        if (found == flights_.end()) continue;
        Flight& flight = found->second;
        if (now < flight.start + *deadline_) return;
        flight.is_late = true;
        if (flight.is_with_kernel) {
            to_cancel_.push_back(found->first);
        } else {
            finish(found->first, ETIMEDOUT, 0);
        }
    }
}

void UringFile::fill() {
    while (num_with_kernel_ < depth_ && !waiting_.empty()) {
        const auto found = flights_.find(waiting_.front());
        waiting_.pop_front();
        if (found == flights_.end()) continue;
        found->second.is_with_kernel = true;
        ++num_with_kernel_;
        ring_->prepare(found->first, found->second.transfer.span);
    }
    start();
}

// At most `depth_` at a time, so that their events have room beside those of as many transfers.
void UringFile::send_cancels() {
    for (; num_cancels_ < depth_ && !to_cancel_.empty(); to_cancel_.pop_front()) {
        if (flights_.count(to_cancel_.front()) == 0) continue;
        ++num_cancels_;
        ring_->prepare_cancel(kCancel, to_cancel_.front());
    }
    start();
}

void UringFile::start() {
    const Refusal refusal = ring_->start();
    for (const std::uint64_t tag : refusal.tags) {
        if (tag == kCancel) {
            --num_cancels_;  // its victim is done when the kernel says so
        } else {
            --num_with_kernel_;
            finish(tag, refusal.error, 0);
        }
    }
}

void UringFile::finish(std::uint64_t number, int error, std::size_t num_moved) {
    const auto found = flights_.find(number);
    const Flight& flight = found->second;
    const Span& span = flight.transfer.span;
    if (flight.is_late) error = ETIMEDOUT;
    const bool is_short = error == 0 && num_moved != span.length;
    const std::string message =
        is_short ? short_of(span, num_moved) : (error == 0 ? "" : std::generic_category().message(error));
    const double elapsed_s = std::chrono::duration<double>(Clock::now() - flight.start).count();
    done_.push_back({flight.transfer, is_short ? EIO : error, message, std::nullopt, elapsed_s});
    numbers_.erase(flight.transfer.token);
    flights_.erase(found);
}

// Until the eventfd counts something or `until`. False: a signal ended it.
bool UringFile::sleep(Clock::time_point until) {
    const auto now = Clock::now();
    const auto left = until > now ? until - now : Clock::duration::zero();
    const auto whole = std::chrono::duration_cast<std::chrono::seconds>(left);
    const timespec timeout{static_cast<time_t>(whole.count()), static_cast<long>((left - whole).count())};
    pollfd waited{event_.get(), POLLIN, 0};
    const int num_ready = ppoll(&waited, 1, &timeout, nullptr);
    eventfd_t count;
    if (num_ready > 0) (void)!eventfd_read(event_.get(), &count);
    return num_ready >= 0;
}

UringFile::Clock::time_point UringFile::next_deadline() const {
    if (by_age_.empty()) return Clock::time_point::max();
    const auto found = flights_.find(by_age_.front());
    // Done since `call_back_late` looked: look again at once.
    return found == flights_.end() ? Clock::time_point::min() : found->second.start + *deadline_;
}

}  // namespace impala
