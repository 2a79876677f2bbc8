#include "python_uring_file.hpp"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <chrono>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace nb = nanobind;

namespace {

// Of one poll: whoever looks at a few and submits as many lets the disk go on sooner than one who looks at a whole ring
// of them, each with a checksum, while nothing is in flight.
constexpr std::size_t kMostAtOnce = 4;

std::int64_t integer(nb::handle value) {
    int overflow = 0;
    const long long number = PyLong_AsLongLongAndOverflow(value.ptr(), &overflow);
    if (overflow != 0) throw std::invalid_argument("a token or offset has more than 64 bits");
    if (number == -1 && PyErr_Occurred()) nb::raise_python_error();
    return number;
}

bool truth(nb::handle value) {
    const int answer = PyObject_IsTrue(value.ptr());
    if (answer < 0) nb::raise_python_error();
    return answer != 0;
}

PythonBuffer buffer_of(nb::handle op, std::int64_t token, bool is_write) {
    try {
        return PythonBuffer(op.attr("buffer"), !is_write);
    } catch (nb::python_error& e) {
        if (!e.matches(PyExc_BufferError)) throw;
        nb::raise_from(e, PyExc_ValueError, "op %lld: its buffer must be contiguous%s", static_cast<long long>(token),
                       is_write ? "" : " and writable");
    }
}

}  // namespace

PythonBuffer::PythonBuffer(nb::handle exporter, bool is_writable) {
    const int flags = is_writable ? PyBUF_WRITABLE : PyBUF_SIMPLE;
    if (PyObject_GetBuffer(exporter.ptr(), &view_, flags) != 0) nb::raise_python_error();
}

// One call's time in the file: the GIL is released inside, and another thread could come.
class PythonUringFile::Turn {
  public:
    explicit Turn(PythonUringFile& owner) : is_in_use_(owner.is_in_use_) {
        if (is_in_use_.exchange(true)) throw std::runtime_error("a call of this block I/O engine is under way");
    }
    Turn(const Turn&) = delete;
    ~Turn() { is_in_use_ = false; }

  private:
    std::atomic<bool>& is_in_use_;
};

PythonUringFile::PythonUringFile(int fd, unsigned depth, std::size_t alignment, std::optional<double> deadline_s)
    : file_(fd, depth, alignment, deadline_s) {}

PythonUringFile::~PythonUringFile() { close(); }

void PythonUringFile::register_region(nb::handle region) {
    const Turn turn(*this);
    check_open();
    if (region_) throw std::invalid_argument("a region is registered already");
    PythonBuffer buffer(region, true);
    {
        nb::gil_scoped_release unlocked;
        file_.register_region(buffer.address(), buffer.length());
    }
    region_.emplace(std::move(buffer));
}

void PythonUringFile::submit(nb::iterable ops) {
    const Turn turn(*this);
    check_open();
    std::vector<impala::Transfer> transfers;
    std::vector<PythonBuffer> buffers;
    for (nb::handle op : ops) {
        const std::int64_t token = integer(op.attr("token"));
        const bool is_write = truth(op.attr("is_write"));
        const std::int64_t offset = integer(op.attr("offset_bytes"));
        if (offset < 0) {
            throw std::invalid_argument("op " + std::to_string(token) + ": its offset " + std::to_string(offset) +
                                        " is negative");
        }
        // One that is done and not polled yet is in flight for Python, no longer for the file.
        if (buffers_.count(token)) {
            throw std::invalid_argument("op " + std::to_string(token) + ": another op in flight has this token");
        }
        PythonBuffer buffer = buffer_of(op, token, is_write);
        transfers.push_back({token, {is_write, static_cast<std::uint64_t>(offset), buffer.address(), buffer.length()}});
        buffers.push_back(std::move(buffer));
    }
    {
        nb::gil_scoped_release unlocked;
        file_.submit(transfers);
    }
    for (std::size_t i = 0; i < transfers.size(); ++i) buffers_.emplace(transfers[i].token, std::move(buffers[i]));
}

nb::list PythonUringFile::poll(double timeout_s) {
    using Clock = std::chrono::steady_clock;
    const Turn turn(*this);
    check_open();
    const auto start = Clock::now();
    const auto wait = [&] {
        nb::gil_scoped_release unlocked;
        return file_.wait(timeout_s - std::chrono::duration<double>(Clock::now() - start).count());
    };
    while (wait() == impala::Wait::interrupted) {
        if (PyErr_CheckSignals() != 0) nb::raise_python_error();
    }
    std::vector<impala::Done> all;
    {
        nb::gil_scoped_release unlocked;
        all = file_.take(kMostAtOnce);
    }
    nb::list completions;
    for (const impala::Done& done : all) {
        buffers_.erase(done.transfer.token);
        completions.append(nb::make_tuple(done.transfer.token, done.error, done.message, done.checksum, done.seconds));
    }
    return completions;
}

void PythonUringFile::cancel(std::int64_t token) {
    const Turn turn(*this);
    check_open();
    nb::gil_scoped_release unlocked;
    file_.cancel(token);
}

void PythonUringFile::close() {
    const Turn turn(*this);
    is_closed_ = true;
    {
        nb::gil_scoped_release unlocked;
        file_.close();
    }
    buffers_.clear();
    region_.reset();
}

void PythonUringFile::check_open() const {
    if (is_closed_) throw std::invalid_argument("the block I/O engine is closed");
}
