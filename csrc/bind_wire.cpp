// Python module _C: the wire codec on byte buffers, and the facts of this build. It needs no torch
// and may be imported before it.
#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <deque>
#include <string>
#include <utility>

#include "bind_wire_records.h"
#include "wire/crc32c.h"
#include "wire/frame.h"

#if !defined(FEDKD_FAST_VERSION) || !defined(FEDKD_FAST_HAS_CUDA) || \
    !defined(FEDKD_FAST_CUDA_ARCHS) || !defined(FEDKD_FAST_COMPILER)
#error "the build facts come from CMakeLists.txt"
#endif

namespace fedkd_fast::bind {
namespace {

// What the caller decides of a header: (codec, (run, round) or None, digest or None, schema).
wire::Header to_header(const py::tuple& facts) {
  wire::Header header;
  header.codec = facts[0].cast<std::uint8_t>();
  if (!facts[1].is_none()) {
    const auto version = facts[1].cast<std::pair<std::uint64_t, std::uint32_t>>();
    header.base.has_version = true;
    header.base.run = version.first;
    header.base.round = version.second;
  }
  if (!facts[2].is_none()) {
    const Bytes digest(facts[2], "digest of the base");
    if (digest.size() != wire::kDigestBytes) {
      raise(wire_error,
            "digest of the base must have 16 bytes, got " + std::to_string(digest.size()));
    }
    header.base.has_digest = true;
    std::memcpy(header.base.digest.data(), digest.data(), wire::kDigestBytes);
  }
  header.has_schema = facts[3].cast<bool>();
  return header;
}

py::tuple from_header(const wire::Header& header) {
  const wire::Base& base = header.base;
  py::object version = py::none();
  py::object digest = py::none();
  if (base.has_version) version = py::make_tuple(base.run, base.round);
  if (base.has_digest) {
    digest = py::bytes(reinterpret_cast<const char*>(base.digest.data()), base.digest.size());
  }
  return py::make_tuple(py::int_(header.codec), version, digest, header.has_schema,
                        header.needs_tables, header.frame_bytes, header.schema_hash,
                        header.directory_bytes, header.body_crc);
}

// (name, dtype, shape) of each tensor.
wire::Schema to_schema(const py::list& tensors) {
  wire::Schema schema;
  for (std::size_t index = 0; index < tensors.size(); ++index) {
    set_tensor(tensors[index].cast<py::tuple>(), index, &schema.emplace_back());
  }
  return schema;
}

py::tuple from_entry(const wire::Entry& entry) {
  py::tuple shape(entry.ndim);
  for (std::size_t dim = 0; dim < entry.ndim; ++dim) shape[dim] = py::int_(entry.shape[dim]);
  const std::string_view dtype = wire::kDTypes[entry.dtype].name;
  return py::make_tuple(py::str(entry.name), py::str(dtype.data(), dtype.size()), shape,
                        py::int_(entry.mode), py::int_(entry.rank), py::int_(entry.payload_bytes),
                        py::int_(entry.dense_bytes));
}

py::list from_entries(const std::vector<wire::Entry>& entries) {
  py::list records;
  for (const wire::Entry& entry : entries) records.append(from_entry(entry));
  return records;
}

py::bytes encode(const py::list& records, const py::tuple& facts) {
  wire::Frame frame;
  frame.header = to_header(facts);
  std::deque<Bytes> payloads;
  frame.entries.reserve(records.size());
  for (std::size_t index = 0; index < records.size(); ++index) {
    frame.entries.push_back(to_entry(records[index].cast<py::tuple>(), index, &payloads));
  }
  std::string directory;
  wire::Status status;
  {
    const py::gil_scoped_release unlocked;
    status = wire::plan_encode(&frame, &directory);
  }
  raise_unless_ok(status);
  const auto out = py::reinterpret_steal<py::object>(
      PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(frame.header.frame_bytes)));
  if (!out) throw py::error_already_set();
  auto* bytes = reinterpret_cast<std::uint8_t*>(PyBytes_AS_STRING(out.ptr()));
  {
    const py::gil_scoped_release unlocked;
    wire::write_frame(&frame, directory, bytes);
  }
  return py::reinterpret_borrow<py::bytes>(out);
}

py::tuple decode(const py::object& buffer, const py::object& tensors, std::uint64_t max_bytes) {
  const Bytes bytes(buffer, "frame");
  wire::Schema schema;
  if (!tensors.is_none()) schema = to_schema(tensors.cast<py::list>());
  const wire::Schema* wanted = tensors.is_none() ? nullptr : &schema;
  wire::Frame frame;
  wire::Status status;
  {
    const py::gil_scoped_release unlocked;
    status = wire::decode(bytes.data(), bytes.size(), wanted, max_bytes, &frame);
  }
  raise_unless_ok(status);
  return py::make_tuple(from_header(frame.header), from_entries(frame.entries));
}

// The header of a frame of which the front is here.
wire::Header front_header(const Bytes& front, std::uint64_t frame_bytes) {
  wire::Header header;
  raise_unless_ok(wire::read_header(front.data(), front.size(), frame_bytes, &header));
  if (header.base.has_digest) {
    if (front.size() < wire::kHeaderBytes + wire::kDigestBytes) {
      raise(wire_error, "frame is truncated: the digest of its base is missing");
    }
    std::memcpy(header.base.digest.data(), front.data() + wire::kHeaderBytes, wire::kDigestBytes);
  }
  return header;
}

py::tuple read_header(const py::object& front, std::uint64_t frame_bytes) {
  return from_header(front_header(Bytes(front, "frame"), frame_bytes));
}

py::list read_directory(const py::object& front, std::uint64_t frame_bytes,
                        const py::object& directory, const py::object& tensors,
                        std::uint64_t max_bytes) {
  const wire::Header header = front_header(Bytes(front, "frame"), frame_bytes);
  const Bytes bytes(directory, "directory");
  if (bytes.size() != header.directory_bytes) {
    raise(wire_error, "frame is truncated: its directory is cut short");
  }
  wire::Schema schema;
  if (!tensors.is_none()) schema = to_schema(tensors.cast<py::list>());
  std::vector<wire::Entry> entries;
  raise_unless_ok(wire::read_directory(header, bytes.data(), tensors.is_none() ? nullptr : &schema,
                                       max_bytes, &entries));
  return from_entries(entries);
}

// Returns whether the payload has an entropy-coded stream.
bool check_payload(const py::tuple& record, std::size_t index) {
  std::deque<Bytes> payloads;
  std::vector<wire::Entry> entries = {to_entry(record, index, &payloads)};
  const bool alias = entries[0].mode == static_cast<std::uint8_t>(wire::Mode::kAlias);
  // What an alias names is known to check_directory() alone, and it has no payload to check.
  if (!alias) raise_unless_ok(wire::check_directory(&entries, wire::kMaxSize));
  raise_unless_ok(wire::check_payload(&entries[0], index));
  return entries[0].coded;
}

// Header and directory of a frame whose payloads are written: records end with their lengths, and
// `crc` is the checksum of the body so far.
py::tuple finish(const py::list& records, const py::tuple& facts, bool needs_tables,
                 std::uint32_t crc) {
  wire::Frame frame;
  frame.header = to_header(facts);
  frame.header.needs_tables = needs_tables;
  for (std::size_t index = 0; index < records.size(); ++index) {
    const auto record = records[index].cast<py::tuple>();
    wire::Entry& entry = frame.entries.emplace_back();
    set_tensor(record, index, &entry);
    set_mode(record, index, &entry);
    entry.payload_bytes = to_size(record[5], index, "payload");
  }
  std::string directory;
  raise_unless_ok(wire::plan_directory(&frame, &directory));
  const auto* bytes = reinterpret_cast<const std::uint8_t*>(directory.data());
  frame.header.body_crc = wire::crc32c(bytes, directory.size(), crc);
  std::array<std::uint8_t, wire::kHeaderBytes> header{};
  wire::write_header(frame.header, header.data());
  return py::make_tuple(py::bytes(reinterpret_cast<const char*>(header.data()), header.size()),
                        py::bytes(directory));
}

std::uint64_t schema_hash(const py::list& tensors) {
  wire::Schema schema = to_schema(tensors);
  std::uint64_t hash = 0;
  raise_unless_ok(wire::hash_schema(&schema, &hash));
  return hash;
}

std::uint32_t crc32c(const py::object& buffer, std::uint32_t value, bool portable) {
  const Bytes bytes(buffer, "data");
  const py::gil_scoped_release unlocked;
  return portable ? wire::crc32c_portable(bytes.data(), bytes.size(), value)
                  : wire::crc32c(bytes.data(), bytes.size(), value);
}

template <typename Names>
py::tuple from_names(const Names& names) {
  py::tuple texts(names.size());
  for (std::size_t code = 0; code < names.size(); ++code) {
    std::string_view name;
    if constexpr (std::is_same_v<typename Names::value_type, wire::DType>) {
      name = names[code].name;
    } else {
      name = names[code];
    }
    texts[code] = py::str(name.data(), name.size());
  }
  return texts;
}

}  // namespace
}  // namespace fedkd_fast::bind

PYBIND11_MODULE(_C, module) {
  using namespace fedkd_fast::bind;
  namespace wire = fedkd_fast::wire;
  module.doc() = "Wire codec on byte buffers, and build facts; see fedkd_fast.wire.";

  // Under the name by which people import it, so that it pickles and prints as one would look for.
  wire_error = PyErr_NewExceptionWithDoc(
      "fedkd_fast.wire.WireError", "A frame, or what should become one, breaks the wire format.",
      PyExc_ValueError, nullptr);
  if (wire_error == nullptr) throw py::error_already_set();
  module.add_object("WireError", wire_error);

  module.def("encode", &encode, py::arg("records"), py::arg("facts"),
             "Check the records and return the bytes of their frame.");
  module.def("decode", &decode, py::arg("frame"), py::arg("schema"), py::arg("max_bytes"),
             "Check a frame and return (header, records).");
  module.def("read_header", &read_header, py::arg("front"), py::arg("frame_bytes"),
             "Check the header at the front of a frame of so many bytes.");
  module.def("read_directory", &read_directory, py::arg("front"), py::arg("frame_bytes"),
             py::arg("directory"), py::arg("schema"), py::arg("max_bytes"),
             "Check the directory of a frame and return its records.");
  module.def("check_payload", &check_payload, py::arg("record"), py::arg("index"),
             "Check an entry by itself; return whether it has an entropy-coded stream.");
  module.def("finish", &finish, py::arg("records"), py::arg("facts"), py::arg("needs_tables"),
             py::arg("crc"), "Return header and directory of payloads that are written already.");
  module.def("schema_hash", &schema_hash, py::arg("schema"),
             "Return the number that names the tensors of a schema.");
  module.def("crc32c", &crc32c, py::arg("data"), py::arg("value") = 0, py::kw_only(),
             py::arg("portable") = false,
             "CRC-32C of the bytes, continued from `value`; `portable` uses tables alone.");
  define_coded(&module);

  module.attr("dtypes") = from_names(wire::kDTypes);
  module.attr("codecs") = from_names(wire::kCodecs);

  module.attr("version") = FEDKD_FAST_VERSION;
  module.attr("has_cuda") = py::bool_(FEDKD_FAST_HAS_CUDA != 0);
  module.attr("cuda_archs") = FEDKD_FAST_CUDA_ARCHS;
  module.attr("cuda_version") = FEDKD_FAST_CUDA_VERSION;
  module.attr("compiler") = FEDKD_FAST_COMPILER;
}
