// Records, the tuples that fedkd_fast.wire hands to _C, as entries of the wire codec.
//
// Bytes are taken with PyObject_GetBuffer(PyBUF_SIMPLE): pybind11's own buffer request also accepts
// strided views, whose memory is not the bytes they stand for.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <deque>
#include <string>

#include "wire/entry.h"

namespace fedkd_fast::bind {

namespace py = pybind11;

// fedkd_fast.wire.WireError; owned by the module for the life of the process.
inline PyObject* wire_error = nullptr;

[[noreturn]] inline void raise(PyObject* type, const std::string& message) {
  PyErr_SetString(type, message.c_str());
  throw py::error_already_set();
}

inline void raise_unless_ok(const wire::Status& status) {
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

inline std::string in_entry(std::size_t index, const char* field) {
  return "entry " + std::to_string(index) + ": " + field;
}

// An integer of [0, 2^63), by __index__ so that numpy's integers serve as well.
inline std::uint64_t to_size(py::handle object, std::size_t index, const char* field) {
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

inline std::string to_utf8(py::handle object, std::size_t index, const char* field) {
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

inline std::uint8_t to_dtype(const std::string& name, std::size_t index) {
  for (std::size_t code = 0; code < wire::kDTypes.size(); ++code) {
    if (wire::kDTypes[code].name == name) return static_cast<std::uint8_t>(code);
  }
  raise(wire_error, in_entry(index, "unknown dtype \"") + name + "\"");
}

// What a tensor is: the first three fields of a record.
inline void set_tensor(const py::tuple& record, std::size_t index, wire::Entry* entry) {
  entry->name = to_utf8(record[0], index, "name");
  entry->dtype = to_dtype(to_utf8(record[1], index, "dtype"), index);
  const auto shape = py::reinterpret_borrow<py::object>(record[2]).cast<py::tuple>();
  if (shape.size() > wire::kMaxDims) {
    raise(wire_error, in_entry(index, "shape must have at most 16 dimensions, got ") +
                          std::to_string(shape.size()));
  }
  entry->ndim = static_cast<std::uint8_t>(shape.size());
  for (std::size_t dim = 0; dim < shape.size(); ++dim) {
    entry->shape[dim] = to_size(shape[dim], index, "shape");
  }
}

// How it travels: mode and rank.
inline void set_mode(const py::tuple& record, std::size_t index, wire::Entry* entry) {
  const std::uint64_t mode = to_size(record[3], index, "mode");
  if (mode > UINT8_MAX) {
    raise(wire_error, in_entry(index, "unknown mode ") + std::to_string(mode));
  }
  entry->mode = static_cast<std::uint8_t>(mode);
  entry->rank = to_size(record[4], index, "rank");
}

// A record is (name, dtype, shape, mode, rank, payload). Payloads are held in a deque, which never
// moves them: a Py_buffer may point into itself.
inline wire::Entry to_entry(const py::tuple& record, std::size_t index,
                            std::deque<Bytes>* payloads) {
  if (record.size() != 6) raise(PyExc_TypeError, in_entry(index, "record must have 6 fields"));
  wire::Entry entry;
  set_tensor(record, index, &entry);
  set_mode(record, index, &entry);
  payloads->emplace_back(record[5], in_entry(index, "payload"));
  entry.payload = payloads->back().data();
  entry.payload_bytes = payloads->back().size();
  return entry;
}

// Adds what splits and builds entropy-coded payloads (bind_wire_coded.cpp).
void define_coded(py::module_* module);

}  // namespace fedkd_fast::bind
