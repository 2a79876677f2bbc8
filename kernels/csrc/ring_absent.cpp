// Stands in for ring.cpp where <linux/io_uring.h> is missing or too old: no Ring can be made.
#include <cerrno>
#include <system_error>

#include "ring.hpp"

namespace impala {

Ring::Ring(unsigned) {
    throw std::system_error(ENOSYS, std::generic_category(), "built without <linux/io_uring.h> of Linux 5.6 or later");
}

Ring::~Ring() = default;
void Ring::register_file(int) {}
void Ring::register_eventfd(int) {}
void Ring::register_memory(char*, std::size_t) {}
void Ring::prepare(std::uint64_t, const Span&) {}
void Ring::prepare_cancel(std::uint64_t, std::uint64_t) {}
Refusal Ring::start() { return {}; }
std::optional<Event> Ring::next() { return std::nullopt; }

Ring::Mapping::~Mapping() = default;

}  // namespace impala
