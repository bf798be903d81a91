// Python module _C: the wire codec on byte buffers, and the facts of this build. It needs no torch
// and may be imported before it.
//
// Bytes are taken with PyObject_GetBuffer(PyBUF_SIMPLE): pybind11's own buffer request also accepts
// strided views, whose memory is not the bytes they stand for.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>
#include <deque>
#include <string>
#include <utility>

#include "common/rans.h"
#include "wire/crc32c.h"
#include "wire/entry.h"
#include "wire/frame.h"

#if !defined(FEDKD_FAST_VERSION) || !defined(FEDKD_FAST_HAS_CUDA) || \
    !defined(FEDKD_FAST_CUDA_ARCHS) || !defined(FEDKD_FAST_COMPILER)
#error "the build facts come from CMakeLists.txt"
#endif

namespace py = pybind11;
namespace wire = fedkd_fast::wire;

namespace {

constexpr std::uint16_t kGaussianTables[fedkd_fast::kRansTables][fedkd_fast::kRansStored] = {
#include "common/gaussian_tables.inc"
};

// fedkd_fast.wire.WireError; owned by the module for the life of the process.
PyObject* wire_error = nullptr;

[[noreturn]] void raise(PyObject* type, const std::string& message) {
  PyErr_SetString(type, message.c_str());
  throw py::error_already_set();
}

void raise_unless_ok(const wire::Status& status) {
  if (status.code == wire::Status::Code::kNoMemory) raise(PyExc_MemoryError, status.message);
  if (!status.ok()) raise(wire_error, status.message);
}

// The contiguous bytes of an object, held for as long as this lives.
class Bytes {
 public:
  Bytes(py::handle object, const std::string& what) {
    if (PyObject_GetBuffer(object.ptr(), &view_, PyBUF_SIMPLE) == 0) return;
    PyErr_Clear();
    raise(PyExc_TypeError, what + " must be a contiguous bytes-like object, got " +
                               std::string(py::str(py::type::handle_of(object).attr("__name__"))) +
                               (PyObject_CheckBuffer(object.ptr()) ? " with strides" : ""));
  }
  ~Bytes() { PyBuffer_Release(&view_); }
  Bytes(const Bytes&) = delete;
  Bytes& operator=(const Bytes&) = delete;

  const std::uint8_t* data() const { return static_cast<const std::uint8_t*>(view_.buf); }
  std::size_t size() const { return static_cast<std::size_t>(view_.len); }

 private:
  Py_buffer view_{};
};

std::string in_entry(std::size_t index, const char* field) {
  return "entry " + std::to_string(index) + ": " + field;
}

// An integer of [0, 2^63), by __index__ so that numpy's integers serve as well.
std::uint64_t to_size(py::handle object, std::size_t index, const char* field) {
  const auto number = py::reinterpret_steal<py::object>(PyNumber_Index(object.ptr()));
  if (!number) throw py::error_already_set();
  int overflow = 0;
  const long long value = PyLong_AsLongLongAndOverflow(number.ptr(), &overflow);
  if (overflow != 0 || value < 0) {
    raise(wire_error,
          in_entry(index, field) + " must lie in [0, 2**63), got " + std::string(py::str(number)));
  }
  return static_cast<std::uint64_t>(value);
}

std::string to_utf8(py::handle object, std::size_t index, const char* field) {
  if (!PyUnicode_Check(object.ptr())) {
    raise(PyExc_TypeError, in_entry(index, field) + " must be a str, got " +
                               std::string(py::str(py::type::handle_of(object).attr("__name__"))));
  }
  Py_ssize_t size = 0;
  const char* text = PyUnicode_AsUTF8AndSize(object.ptr(), &size);
  if (text == nullptr) {  // lone surrogates
    PyErr_Clear();
    raise(wire_error, in_entry(index, field) + " must be utf-8 without control characters");
  }
  return std::string(text, static_cast<std::size_t>(size));
}

std::uint8_t to_dtype(const std::string& name, std::size_t index) {
  for (std::size_t code = 0; code < wire::kDTypes.size(); ++code) {
    if (wire::kDTypes[code].name == name) return static_cast<std::uint8_t>(code);
  }
  raise(wire_error, in_entry(index, "unknown dtype \"") + name + "\"");
}

// A record is (name, dtype, shape, mode, rank, payload), as in encode() of the stub.
wire::Entry to_entry(const py::tuple& record, std::size_t index, std::deque<Bytes>* payloads) {
  if (record.size() != 6) raise(PyExc_TypeError, in_entry(index, "record must have 6 fields"));
  wire::Entry entry;
  entry.name = to_utf8(record[0], index, "name");
  entry.dtype = to_dtype(to_utf8(record[1], index, "dtype"), index);
  const auto shape = py::reinterpret_borrow<py::object>(record[2]).cast<py::tuple>();
  if (shape.size() > wire::kMaxDims) {
    raise(wire_error, in_entry(index, "shape must have at most 16 dimensions, got ") +
                          std::to_string(shape.size()));
  }
  entry.ndim = static_cast<std::uint8_t>(shape.size());
  for (std::size_t dim = 0; dim < shape.size(); ++dim) {
    entry.shape[dim] = to_size(shape[dim], index, "shape");
  }
  const std::uint64_t mode = to_size(record[3], index, "mode");
  if (mode > UINT8_MAX) {
    raise(wire_error, in_entry(index, "unknown mode ") + std::to_string(mode));
  }
  entry.mode = static_cast<std::uint8_t>(mode);
  entry.rank = to_size(record[4], index, "rank");
  payloads->emplace_back(record[5], in_entry(index, "payload"));
  entry.payload = payloads->back().data();
  entry.payload_bytes = payloads->back().size();
  return entry;
}

py::bytes encode(const py::list& records, const py::object& base_digest) {
  wire::Frame frame;
  std::deque<Bytes> payloads;  // a deque never moves them: a Py_buffer may point into itself
  frame.entries.reserve(records.size());
  for (std::size_t index = 0; index < records.size(); ++index) {
    const auto record = py::reinterpret_borrow<py::object>(records[index]).cast<py::tuple>();
    frame.entries.push_back(to_entry(record, index, &payloads));
  }
  if (!base_digest.is_none()) {
    const Bytes digest(base_digest, "base_digest");
    if (digest.size() != wire::kDigestBytes) {
      raise(wire_error, "base_digest must have 16 bytes, got " + std::to_string(digest.size()));
    }
    frame.has_digest = true;
    std::memcpy(frame.digest.data(), digest.data(), wire::kDigestBytes);
  }
  std::string head;
  std::uint64_t frame_bytes = 0;
  wire::Status status;
  {
    const py::gil_scoped_release unlocked;
    status = wire::plan_encode(&frame, &head, &frame_bytes);
  }
  raise_unless_ok(status);
  const auto out = py::reinterpret_steal<py::object>(
      PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(frame_bytes)));
  if (!out) throw py::error_already_set();
  auto* bytes = reinterpret_cast<std::uint8_t*>(PyBytes_AS_STRING(out.ptr()));
  {
    const py::gil_scoped_release unlocked;
    wire::write_frame(frame, head, bytes);
  }
  return py::reinterpret_borrow<py::bytes>(out);
}

py::tuple from_entry(const wire::Entry& entry, const std::uint8_t* frame) {
  py::tuple shape(entry.ndim);
  for (std::size_t dim = 0; dim < entry.ndim; ++dim) shape[dim] = py::int_(entry.shape[dim]);
  const std::string_view dtype = wire::kDTypes[entry.dtype].name;
  return py::make_tuple(py::str(entry.name), py::str(dtype.data(), dtype.size()), shape,
                        py::int_(entry.mode), py::int_(entry.rank),
                        py::int_(static_cast<std::uint64_t>(entry.payload - frame)),
                        py::int_(entry.payload_bytes), py::int_(entry.dense_bytes));
}

py::tuple decode(const py::object& buffer, std::uint64_t max_bytes) {
  const Bytes bytes(buffer, "frame");
  wire::Frame frame;
  wire::Status status;
  {
    const py::gil_scoped_release unlocked;
    status = wire::decode(bytes.data(), bytes.size(), max_bytes, &frame);
  }
  raise_unless_ok(status);
  py::list records;
  for (const wire::Entry& entry : frame.entries) records.append(from_entry(entry, bytes.data()));
  py::object digest = py::none();
  if (frame.has_digest) {
    digest = py::bytes(reinterpret_cast<const char*>(frame.digest.data()), frame.digest.size());
  }
  return py::make_tuple(digest, records);
}

std::uint32_t crc32c(const py::object& buffer, std::uint32_t value, bool portable) {
  const Bytes bytes(buffer, "data");
  const py::gil_scoped_release unlocked;
  return portable ? wire::crc32c_portable(bytes.data(), bytes.size(), value)
                  : wire::crc32c(bytes.data(), bytes.size(), value);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Wire codec on byte buffers, and build facts; see fedkd_fast.wire.";

  // Under the name by which people import it, so that it pickles and prints as one would look for.
  wire_error = PyErr_NewExceptionWithDoc(
      "fedkd_fast.wire.WireError", "A frame, or what should become one, breaks the wire format.",
      PyExc_ValueError, nullptr);
  if (wire_error == nullptr) throw py::error_already_set();
  module.add_object("WireError", wire_error);

  module.def("encode", &encode, py::arg("records"), py::arg("base_digest") = py::none(),
             "Check the records and return the bytes of their frame.");
  module.def("decode", &decode, py::arg("frame"), py::arg("max_bytes"),
             "Check a frame and return (base digest or None, records).");
  module.def("crc32c", &crc32c, py::arg("data"), py::arg("value") = 0, py::kw_only(),
             py::arg("portable") = false,
             "CRC-32C of the bytes, continued from `value`; `portable` uses tables alone.");

  py::tuple dtypes(wire::kDTypes.size());
  for (std::size_t code = 0; code < wire::kDTypes.size(); ++code) {
    const std::string_view name = wire::kDTypes[code].name;
    dtypes[code] = py::str(name.data(), name.size());
  }
  module.attr("dtypes") = dtypes;

  py::tuple tables(fedkd_fast::kRansTables);
  for (std::size_t index = 0; index < tables.size(); ++index) {
    py::tuple stored(fedkd_fast::kRansStored);
    for (std::size_t i = 0; i < stored.size(); ++i) stored[i] = py::int_(kGaussianTables[index][i]);
    tables[index] = stored;
  }
  module.attr("gaussian_tables") = tables;

  module.attr("version") = FEDKD_FAST_VERSION;
  module.attr("has_cuda") = py::bool_(FEDKD_FAST_HAS_CUDA != 0);
  module.attr("cuda_archs") = FEDKD_FAST_CUDA_ARCHS;
  module.attr("cuda_version") = FEDKD_FAST_CUDA_VERSION;
  module.attr("compiler") = FEDKD_FAST_COMPILER;
}
