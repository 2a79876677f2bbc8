// impala_vllm._native: Python's view of the block I/O code. Translation only.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <cerrno>
#include <system_error>

#include "block_io_probe.hpp"
#include "checksum.hpp"
#include "python_uring_file.hpp"

namespace nb = nanobind;

namespace {

impala::BlockIo probe_block_io(const std::string& directory) {
    nb::gil_scoped_release unlocked;
    return impala::probe_block_io(directory);
}

bool can_use_io_uring() {
    nb::gil_scoped_release unlocked;
    return impala::can_use_io_uring();
}

// OSError(errno, text), which Python turns into the class for that errno.
void translate(const std::exception_ptr& thrown, void*) {
    try {
        std::rethrow_exception(thrown);
    } catch (const std::system_error& e) {
        nb::object error = nb::handle(PyExc_OSError)(e.code().value(), e.what());
        PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error.ptr())), error.ptr());
    }
}

}  // namespace

NB_MODULE(_native, m) {
    nb::register_exception_translator(translate);
    nb::class_<impala::BlockIo>(m, "BlockIo")
        .def_ro("io_uring", &impala::BlockIo::io_uring)
        .def_ro("direct_alignment_bytes", &impala::BlockIo::direct_alignment_bytes);
    m.def("probe_block_io", &probe_block_io, nb::arg("directory"));
    m.def("can_use_io_uring", &can_use_io_uring);

    m.attr("HAS_CHECKSUM") = impala::has_checksum();
    nb::class_<PythonUringFile>(m, "UringFile")
        .def(nb::init<int, unsigned, std::size_t, std::optional<double>>(), nb::arg("fd"), nb::arg("depth"),
             nb::arg("alignment_bytes"), nb::arg("deadline_s").none())
        .def_prop_ro("num_in_flight", &PythonUringFile::num_in_flight)
        .def("register_region", &PythonUringFile::register_region, nb::arg("region"))
        .def("submit", &PythonUringFile::submit, nb::arg("ops"))
        .def("poll", &PythonUringFile::poll, nb::arg("timeout_s"))
        .def("cancel", &PythonUringFile::cancel, nb::arg("token"))
        .def("wake", &PythonUringFile::wake)
        .def("close", &PythonUringFile::close);
}
