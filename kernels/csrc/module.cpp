// impala_vllm._native: Python's view of the block I/O code. Translation only.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <cerrno>
#include <system_error>

#include "block_io_probe.hpp"

namespace nb = nanobind;

namespace {

impala::BlockIo probe_block_io(const std::string& directory) {
    try {
        nb::gil_scoped_release unlocked;
        return impala::probe_block_io(directory);
    } catch (const std::system_error& e) {
        errno = e.code().value();
        PyErr_SetFromErrnoWithFilename(PyExc_OSError, directory.c_str());
        throw nb::python_error();
    }
}

}  // namespace

NB_MODULE(_native, m) {
    nb::class_<impala::BlockIo>(m, "BlockIo")
        .def_ro("io_uring", &impala::BlockIo::io_uring)
        .def_ro("direct_alignment_bytes", &impala::BlockIo::direct_alignment_bytes);
    m.def("probe_block_io", &probe_block_io, nb::arg("directory"));
}
