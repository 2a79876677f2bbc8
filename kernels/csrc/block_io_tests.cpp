// Tests of UringFile without Python, to be run under sanitizers: `block_io_tests DIRECTORY`.
// Pipes stand in for a disk that does not answer. Exit code 77: the kernel offers no io_uring.
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "block_io_probe.hpp"
#include "checksum.hpp"
#include "uring_file.hpp"

using namespace impala;

namespace {

constexpr std::size_t kBlock = 4096;
constexpr std::size_t kFileBytes = 8 << 20;
// Longer than any test may take: a wait that runs into it has failed.
constexpr double kLong_s = 600;

#define CHECK(condition) check(condition, __LINE__, #condition)

void check(bool is_so, int line, const char* what) {
    if (is_so) return;
    std::fprintf(stderr, "line %d: not so: %s\n", line, what);
    std::abort();
}

// Page-aligned memory with a page before and after it that may not be touched.
class Memory {
  public:
    explicit Memory(std::size_t length, unsigned seed = 0) : length_(length) {
        void* found = mmap(nullptr, length + 2 * kBlock, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        CHECK(found != MAP_FAILED);
        base_ = static_cast<char*>(found);
        CHECK(mprotect(data(), length, PROT_READ | PROT_WRITE) == 0);
        std::mt19937 random(seed);
        if (seed != 0) std::generate(data(), data() + length, [&] { return static_cast<char>(random()); });
    }
    Memory(Memory&& other) noexcept : base_(std::exchange(other.base_, nullptr)), length_(other.length_) {}
    ~Memory() {
        if (base_ != nullptr) munmap(base_, length_ + 2 * kBlock);
    }
    char* data() const { return base_ + kBlock; }
    std::size_t size() const { return length_; }
    bool operator==(const Memory& other) const {
        return length_ == other.length_ && std::memcmp(data(), other.data(), length_) == 0;
    }

  private:
    char* base_;
    std::size_t length_;
};

struct Pipe {
    Fd out, in;
    Pipe() {
        int ends[2];
        CHECK(pipe2(ends, O_CLOEXEC) == 0);
        out = Fd(ends[0]);
        in = Fd(ends[1]);
    }
    void feed(const Memory& bytes) const {
        CHECK(write(in.get(), bytes.data(), bytes.size()) == static_cast<ssize_t>(bytes.size()));
    }
};

Fd open_direct(const std::string& directory) {
    std::string path = directory + "/block-io-XXXXXX";
    Fd plain(mkostemp(path.data(), O_CLOEXEC));
    CHECK(plain.get() >= 0);
    CHECK(posix_fallocate(plain.get(), 0, kFileBytes) == 0);
    Fd direct(open(path.c_str(), O_RDWR | O_DIRECT | O_CLOEXEC));
    unlink(path.c_str());
    return direct ? std::move(direct) : std::move(plain);
}

Transfer a_write(std::int64_t token, std::size_t block, const Memory& from) {
    return {token, {true, block * kBlock, from.data(), from.size()}};
}

Transfer a_read(std::int64_t token, std::size_t block, const Memory& to) {
    return {token, {false, block * kBlock, to.data(), to.size()}};
}

// Waits for that many; a token that comes twice is an error.
std::map<std::int64_t, Done> collect(UringFile& file, std::size_t count) {
    std::map<std::int64_t, Done> found;
    while (found.size() < count) {
        CHECK(file.wait(kLong_s) != Wait::timed_out);
        for (const Done& done : file.take()) CHECK(found.emplace(done.transfer.token, done).second);
    }
    return found;
}

bool refuses(UringFile& file, const std::vector<Transfer>& transfers) {
    try {
        file.submit(transfers);
        return false;
    } catch (const std::invalid_argument&) {
        return true;
    }
}

void more_transfers_than_the_ring_holds_come_back(int fd, unsigned depth) {
    UringFile file(fd, depth, kBlock, std::nullopt);
    std::vector<Memory> sent, received;
    std::vector<Transfer> writes, reads;
    for (unsigned i = 0; i < 500; ++i) {
        sent.emplace_back(kBlock * (1 + i % 3), i + 1);
        received.emplace_back(sent[i].size());
        writes.push_back(a_write(i, 4 * i, sent[i]));
        reads.push_back(a_read(i, 4 * i, received[i]));
    }
    for (const auto& batch : {writes, reads}) {
        file.submit(batch);
        for (const auto& [token, done] : collect(file, batch.size())) {
            CHECK(done.error == 0 && done.message.empty() && done.seconds >= 0);
            CHECK(done.checksum == checksum(sent[token].data(), sent[token].size()));
            CHECK(done.checksum.has_value() == has_checksum());
        }
    }
    CHECK(sent == received);
}

void what_is_done_can_be_taken_in_parts(int fd) {
    UringFile file(fd, 8, kBlock, std::nullopt);
    const Memory into(6 * kBlock);
    std::vector<Transfer> reads;
    for (std::size_t i = 0; i < 6; ++i) {
        reads.push_back({static_cast<std::int64_t>(i), {false, i * kBlock, into.data() + i * kBlock, kBlock}});
    }
    file.submit(reads);
    std::map<std::int64_t, Done> found;
    while (found.size() < 6) {
        CHECK(file.wait(kLong_s) == Wait::done);
        const auto some = file.take(2);
        CHECK(!some.empty() && some.size() <= 2);
        for (const Done& done : some) CHECK(done.error == 0 && found.emplace(done.transfer.token, done).second);
    }
    CHECK(file.wait(0) == Wait::timed_out && file.take(2).empty());
}

// Events that wait for a system call must not wait for one that sleeps.
void whoever_only_looks_sees_what_is_done(int fd) {
    UringFile file(fd, 4, kBlock, std::nullopt);
    const Memory into(kBlock);
    for (std::int64_t i = 0; i < 100; ++i) {
        file.submit({a_read(i, 0, into)});
        while (file.wait(0) != Wait::done) continue;
        CHECK(file.take().size() == 1);
    }
}

void spans_in_and_around_a_registered_region_come_back(int fd) {
    const Memory region(64 * kBlock, 1), outside(kBlock, 2);
    UringFile file(fd, 8, kBlock, std::nullopt);
    try {
        file.register_region(region.data() + 16 * kBlock, 32 * kBlock);
    } catch (const std::system_error& e) {
        std::printf("not registered: %s\n", e.what());
    }
    std::vector<Transfer> writes, reads;
    const Memory received(64 * kBlock);
    for (std::size_t start : {0, 12, 16, 20, 40, 44, 48}) {  // before, across, inside and behind
        const Span span{true, start * kBlock, region.data() + start * kBlock, 8 * kBlock};
        writes.push_back({static_cast<std::int64_t>(start), span});
    }
    writes.push_back(a_write(100, 100, outside));
    file.submit(writes);
    for (const auto& [token, done] : collect(file, writes.size())) CHECK(done.error == 0);
    file.submit({{1, {false, 0, received.data(), 8 * kBlock}},
                 {2, {false, 12 * kBlock, received.data() + 12 * kBlock, 16 * kBlock}},
                 {3, {false, 40 * kBlock, region.data() + 20 * kBlock, 16 * kBlock}}});
    for (const auto& [token, done] : collect(file, 3)) CHECK(done.error == 0);
    CHECK(std::memcmp(received.data(), region.data(), 8 * kBlock) == 0);
    CHECK(std::memcmp(region.data() + 20 * kBlock, region.data() + 40 * kBlock, 16 * kBlock) == 0);
}

void garbage_is_refused_and_starts_nothing(int fd) {
    UringFile file(fd, 4, kBlock, std::nullopt);
    const Memory room(2 * kBlock, 1);
    char* const at = room.data();
    const Transfer good{1, {true, 0, at, kBlock}};
    CHECK(refuses(file, {good, {2, {true, 1, at, kBlock}}}));
    CHECK(refuses(file, {good, {2, {true, 0, at + 1, kBlock}}}));
    CHECK(refuses(file, {good, {2, {true, 0, at, kBlock - 1}}}));
    CHECK(refuses(file, {good, {2, {true, 0, at, 0}}}));
    CHECK(refuses(file, {good, {2, {true, 0, at, std::size_t{1} << 32}}}));
    CHECK(refuses(file, {good, {2, {true, ~std::uint64_t{0} - kBlock + 1, at, kBlock}}}));
    CHECK(refuses(file, {good, good}));
    file.cancel(1);
    CHECK(file.wait(0) == Wait::timed_out && file.take().empty());
}

void a_short_read_is_an_error(int fd) {
    UringFile file(fd, 4, kBlock, std::nullopt);
    const Memory one(kBlock), two(2 * kBlock);
    const std::size_t last = kFileBytes / kBlock - 1;
    file.submit({a_read(1, last, two), a_read(2, last + 5, one), a_read(3, last, one)});
    const auto found = collect(file, 3);
    CHECK(found.at(1).error == EIO && !found.at(1).checksum);
    CHECK(found.at(1).message == "short read: 4096 of 8192 bytes at " + std::to_string(last * kBlock));
    CHECK(found.at(2).error == EIO && found.at(3).error == 0);
}

void what_was_called_back_touches_no_memory() {
    const Pipe pipe;
    UringFile file(pipe.out.get(), 2, 1, std::nullopt);
    const Memory with_kernel(kBlock), kept(kBlock), waiting(kBlock), behind(kBlock), sent(kBlock, 1), untouched(kBlock);
    file.submit({a_read(1, 0, with_kernel), a_read(2, 0, kept), a_read(3, 0, waiting), a_read(4, 0, behind)});
    CHECK(file.wait(0) == Wait::timed_out);
    CHECK(refuses(file, {a_read(4, 0, behind)}));
    for (const std::int64_t token : {3, 1, 1, 99}) file.cancel(token);
    const auto gone = collect(file, 2);
    CHECK(gone.at(1).error == ECANCELED && gone.at(3).error == ECANCELED);
    pipe.feed(sent);
    pipe.feed(sent);
    CHECK(collect(file, 2).at(4).error == 0);
    CHECK(kept == sent && behind == sent);
    CHECK(with_kernel == untouched && waiting == untouched);
}

void late_transfers_are_called_back() {
    const Pipe pipe;
    UringFile file(pipe.out.get(), 1, 1, 0.02);
    const Memory first(kBlock), second(kBlock), sent(kBlock, 1), untouched(kBlock);
    file.submit({a_read(1, 0, first), a_read(2, 0, second)});
    for (const auto& [token, done] : collect(file, 2)) {
        CHECK(done.error == ETIMEDOUT && !done.message.empty() && done.seconds >= 0.02);
    }
    pipe.feed(sent);
    CHECK(file.wait(0.001) == Wait::timed_out);
    CHECK(first == untouched && second == untouched);
}

void closing_calls_back_what_is_late() {
    const Pipe pipe;
    const Memory into(kBlock);
    UringFile file(pipe.out.get(), 1, 1, 0.01);
    file.submit({a_read(1, 0, into), a_read(2, 0, into)});
    file.close();
    file.close();
    file.wake();
}

void closing_waits_for_the_memory() {
    const Pipe pipe;
    const Memory first(kBlock), second(kBlock), sent(kBlock, 1);
    UringFile file(pipe.out.get(), 1, 1, std::nullopt);
    file.submit({a_read(1, 0, first), a_read(2, 0, second)});
    std::thread feeder([&] {
        pipe.feed(sent);
        pipe.feed(sent);
    });
    file.close();
    CHECK(first == sent && second == sent);
    feeder.join();
}

void a_wake_ends_one_wait() {
    const Pipe pipe;
    UringFile file(pipe.out.get(), 1, 1, std::nullopt);
    std::thread other([&] { file.wake(); });
    CHECK(file.wait(kLong_s) == Wait::woken);
    other.join();
    CHECK(file.wait(0.001) == Wait::timed_out);
    file.wake();
    CHECK(file.wait(0) == Wait::timed_out);  // does not wait, so the wake-up is not for it
    CHECK(file.wait(kLong_s) == Wait::woken);
}

void a_signal_ends_a_wait() {
    const Pipe pipe;
    UringFile file(pipe.out.get(), 1, 1, std::nullopt);
    struct sigaction action{}, before{};
    action.sa_handler = [](int) {};
    CHECK(sigaction(SIGALRM, &action, &before) == 0);
    const itimerval often{{0, 1000}, {0, 1000}}, never{};
    CHECK(setitimer(ITIMER_REAL, &often, nullptr) == 0);
    CHECK(file.wait(kLong_s) == Wait::interrupted);
    CHECK(setitimer(ITIMER_REAL, &never, nullptr) == 0);
    CHECK(sigaction(SIGALRM, &before, nullptr) == 0);
}

// Deadlines, cancels and a disk race each other: whoever wins, each transfer is done once, and from then on its memory
// stays as it is.
void memory_is_still_once_its_transfer_is_done(int fd) {
    std::mt19937 random(1);
    constexpr std::size_t kLength = 32 * kBlock, kNumRooms = 24, kNumRounds = 40;
    std::vector<Memory> rooms;
    for (std::size_t i = 0; i < kNumRooms; ++i) rooms.emplace_back(kLength);
    for (std::size_t round = 0; round < kNumRounds; ++round) {
        const std::optional<double> none, brief_s = 1e-5 * static_cast<double>(random() % 100);
        UringFile file(fd, 1 + round % 9, kBlock, round % 2 ? brief_s : none);
        std::vector<Transfer> reads;
        for (std::size_t i = 0; i < kNumRooms; ++i) {
            std::memset(rooms[i].data(), 0x5a, kLength);
            reads.push_back(a_read(static_cast<std::int64_t>(i), 8 * (random() % 100), rooms[i]));
        }
        file.submit(reads);
        for (int i = 0; i < 6; ++i) file.cancel(random() % kNumRooms);
        std::map<std::int64_t, std::vector<char>> snapshots;
        while (snapshots.size() < kNumRooms) {
            file.wait(kLong_s);
            for (const Done& done : file.take()) {
                CHECK(done.error == 0 || done.error == ECANCELED || (done.error == ETIMEDOUT && round % 2));
                const char* const at = done.transfer.span.address;
                CHECK(snapshots.emplace(done.transfer.token, std::vector<char>(at, at + kLength)).second);
            }
        }
        for (const auto& [i, was] : snapshots) CHECK(std::memcmp(was.data(), rooms[i].data(), kLength) == 0);
    }
}

void an_impossible_depth_or_file_is_refused(int fd) {
    for (const auto& [file, depth, error] : {std::tuple(fd, 0U, EINVAL), {fd, 1U << 20, EINVAL}, {-1, 8U, EBADF}}) {
        try {
            UringFile(file, depth, 1, std::nullopt);
            CHECK(!"made");
        } catch (const std::system_error& e) {
            CHECK(e.code().value() == error);
        }
    }
}

std::size_t num_open_files() {
    const std::filesystem::directory_iterator all("/proc/self/fd");
    return static_cast<std::size_t>(std::distance(begin(all), end(all)));
}

}  // namespace

int main(int argc, char** argv) {
    CHECK(argc == 2);
    try {
        Ring(1);
    } catch (const std::system_error& e) {
        std::printf("no io_uring: %s\n", e.what());
        return 77;
    }
    if (!probe_block_io(argv[1]).io_uring) {
        std::puts("no io_uring: a ring can be made, what it is asked for is refused");
        return 77;
    }
    const Fd file = open_direct(argv[1]);
    const std::size_t before = num_open_files();
    for (const unsigned depth : {1U, 3U, 64U, 1000U}) more_transfers_than_the_ring_holds_come_back(file.get(), depth);
    what_is_done_can_be_taken_in_parts(file.get());
    whoever_only_looks_sees_what_is_done(file.get());
    spans_in_and_around_a_registered_region_come_back(file.get());
    garbage_is_refused_and_starts_nothing(file.get());
    a_short_read_is_an_error(file.get());
    what_was_called_back_touches_no_memory();
    late_transfers_are_called_back();
    closing_calls_back_what_is_late();
    closing_waits_for_the_memory();
    a_wake_ends_one_wait();
    a_signal_ends_a_wait();
    memory_is_still_once_its_transfer_is_done(file.get());
    an_impossible_depth_or_file_is_refused(file.get());
    CHECK(probe_block_io(argv[1]).io_uring);
    CHECK(num_open_files() == before);
    std::puts("ok");
}
