// The part of module _C that splits and builds entropy-coded payloads, without their streams.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>
#include <deque>
#include <string>
#include <vector>

#include "bind_wire_records.h"
#include "common/levels.h"
#include "common/rans.h"
#include "wire/coded.h"

namespace fedkd_fast::bind {
namespace {

constexpr std::uint16_t kGaussianTables[kRansTables][kRansStored] = {
#include "common/gaussian_tables.inc"
};
static_assert(kMaxLevel == kRansMostLevel, "the format admits the levels that the coder takes");

template <typename Integer>
py::bytes to_bytes(const std::vector<Integer>& numbers) {
  return py::bytes(reinterpret_cast<const char*>(numbers.data()), sizeof(Integer) * numbers.size());
}

py::tuple split_coded(const py::tuple& record) {
  std::deque<Bytes> payloads;
  std::vector<wire::Entry> entries = {to_entry(record, 0, &payloads)};
  raise_unless_ok(wire::check_directory(&entries, wire::kMaxSize));
  const wire::Entry& entry = entries[0];
  const std::uint64_t numel = entry.dense_bytes / wire::kDTypes[entry.dtype].itemsize;
  wire::Coded coded;
  raise_unless_ok(wire::read_coded("\"" + entry.name + "\"", entry, numel, &coded));
  std::vector<std::int16_t> sigmas(coded.rank);
  std::vector<std::uint8_t> codes(coded.rows);
  std::vector<std::int16_t> levels(2 * coded.rank + coded.rows);
  wire::unpack_sigmas(coded, sigmas.data());
  wire::unpack_codes(coded, codes.data());
  wire::unpack_levels(coded, sigmas.data(), codes.data(), levels.data());
  return py::make_tuple(py::int_(coded.step), py::int_(coded.top), to_bytes(sigmas),
                        py::int_(coded.base), py::int_(coded.width), to_bytes(codes),
                        to_bytes(levels), py::int_(coded.head_bytes));
}

py::bytes pack_gaps(const py::object& sigmas) {
  const Bytes bytes(sigmas, "sigmas");
  std::vector<std::int16_t> numbers(bytes.size() / sizeof(std::int16_t));
  if (!numbers.empty()) std::memcpy(numbers.data(), bytes.data(), 2 * numbers.size());
  std::string out;
  raise_unless_ok(wire::pack_gaps(numbers.data(), numbers.size(), &out));
  return py::bytes(out);
}

py::bytes pack_codes(const py::object& codes, unsigned width) {
  const Bytes bytes(codes, "codes");
  std::string out;
  raise_unless_ok(wire::pack_codes(bytes.data(), bytes.size(), width, &out));
  return py::bytes(out);
}

int half_log2(std::uint64_t count) {
  if (count == 0) raise(PyExc_ValueError, "half_log2 needs a number of at least 1, got 0");
  return fedkd_fast::half_log2(count);
}

}  // namespace

void define_coded(py::module_* module) {
  py::tuple tables(kRansTables);
  for (std::size_t index = 0; index < tables.size(); ++index) {
    py::tuple stored(kRansStored);
    for (std::size_t i = 0; i < stored.size(); ++i) stored[i] = py::int_(kGaussianTables[index][i]);
    tables[index] = stored;
  }
  module->attr("gaussian_tables") = tables;

  module->def("split_coded", &split_coded, py::arg("record"),
              "Split an entropy-coded payload: (step, top, sigmas, base, width, codes, levels, "
              "where the stream begins); sigmas and levels as int16, codes as uint8.");
  module->def("pack_gaps", &pack_gaps, py::arg("sigmas"), "Encode falling int16 numbers.");
  module->def("pack_codes", &pack_codes, py::arg("codes"), py::arg("width"),
              "Encode uint8 row codes of `width` bits.");
  module->def("half_log2", &half_log2, py::arg("count"),
              "128 * log2(count) to the nearest integer, by integers alone.");
  module->def("exp2_fixed", py::vectorize(&exp2_fixed), py::arg("exponent"),
              "2 ** (exponent / 256), the same bits on every machine.");
}

}  // namespace fedkd_fast::bind
