// What block I/O a directory's file system and this kernel offer. Answers only; keeps nothing open.
#pragma once

#include <cstddef>
#include <optional>
#include <string>

namespace impala {

struct BlockIo {
    bool io_uring = false;
    // Smallest alignment of address, offset and length that an O_DIRECT write and read back accept;
    // empty where the file system refuses O_DIRECT.
    std::optional<std::size_t> direct_alignment_bytes;
};

// Whether this build can make an io_uring, the kernel lets this process, and an op on it is done: containers often forbid
// the making, some only the ops. A byte of a pipe is read as a slab's blocks are; never takes longer than a few seconds.
bool can_use_io_uring();

// Probe with a temporary file in `directory` that is unlinked before this returns.
// Throws std::system_error with the errno when the directory cannot be written.
BlockIo probe_block_io(const std::string& directory);

}  // namespace impala
