// UringFile for Python: holds the buffers of ops in flight, lets other threads run while it works.
#pragma once

#include <nanobind/nanobind.h>

#include <atomic>
#include <cstdint>
#include <optional>
#include <unordered_map>

#include "uring_file.hpp"

// A buffer that its exporter can neither free nor resize while this lives. Made and dropped with the GIL held.
class PythonBuffer {
  public:
    // Raises BufferError for a buffer with gaps, or a read-only one where a writable one is asked; TypeError for none.
    PythonBuffer(nanobind::handle exporter, bool is_writable);
    PythonBuffer(PythonBuffer&& other) noexcept : view_(other.view_) { other.view_.obj = nullptr; }
    PythonBuffer(const PythonBuffer&) = delete;
    ~PythonBuffer() { PyBuffer_Release(&view_); }
    char* address() const { return static_cast<char*>(view_.buf); }
    std::size_t length() const { return static_cast<std::size_t>(view_.len); }

  private:
    Py_buffer view_{};
};

// All but `wake` and `close` raise ValueError once it is closed; all but `wake` RuntimeError while a call is under way.
class PythonUringFile {
  public:
    PythonUringFile(int fd, unsigned depth, std::size_t alignment, std::optional<double> deadline_s);
    ~PythonUringFile();

    std::size_t num_in_flight() const { return buffers_.size(); }
    void register_region(nanobind::handle region);
    // Of objects with token, is_write, offset_bytes and buffer.
    void submit(nanobind::iterable ops);
    // (token, errno or 0, message, checksum or None, seconds) of each that is done.
    nanobind::list poll(double timeout_s);
    void cancel(std::int64_t token);
    void wake() { file_.wake(); }
    void close();

  private:
    class Turn;

    void check_open() const;

    impala::UringFile file_;
    std::unordered_map<std::int64_t, PythonBuffer> buffers_;  // by token
    std::optional<PythonBuffer> region_;
    std::atomic<bool> is_in_use_{false};
    bool is_closed_ = false;
};
