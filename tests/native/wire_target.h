// One input of the wire codec's fuzzers. Whatever it holds, the codec refuses it with a message, or
// gives it back byte for byte; every byte that an entry points to is read, and every coded payload
// is split and its stream decoded.
//
// The first byte says how the rest is treated; flips of a few bits would otherwise end at checksums
// nearly always:
//   bit 0  mend magic, version, length, schema hash and checksums of a copy
//   bit 1  pass the schema of the golden frames that carry none
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "stream_target.h"
#include "wire/coded.h"
#include "wire/crc32c.h"
#include "wire/cursor.h"
#include "wire/directory.h"
#include "wire/frame.h"

namespace fedkd_fast::wire {

inline constexpr std::uint8_t kMend = 1, kWithSchema = 2, kControls = 4;

template <typename Integer>
void put(Bytes* bytes, std::size_t at, Integer value) {
  std::memcpy(bytes->data() + at, &value, sizeof(value));
}

inline Entry tensor(const char* name, std::uint8_t dtype, const std::vector<std::uint64_t>& shape) {
  Entry entry;
  entry.name = name;
  entry.dtype = dtype;
  entry.ndim = static_cast<std::uint8_t>(shape.size());
  std::copy(shape.begin(), shape.end(), entry.shape.begin());
  return entry;
}

// The schema of `no-schema.fkd`.
inline const Schema& known_schema() {
  static const Schema schema = {
      tensor("encoder.layer.0.weight", 0, {2, 3}),
      tensor("encoder.layer.0.bias", 0, {300}),
      tensor("encoder.layer.1.weight", 0, {2, 3}),
      tensor("pooler.weight", 3, {2, 2, 1}),
      tensor("décodeur", 2, {3, 5}),
      tensor("emb", 1, {3, 4}),
      tensor("mask", kBool, {2}),
      tensor("empty", 7, {0, 7}),
      tensor("step", 7, {}),
  };
  return schema;
}

inline void mend_checksums(Bytes* frame) {
  put(frame, 56, crc32c(frame->data() + kHeaderBytes, frame->size() - kHeaderBytes));
  put(frame, 60, crc32c(frame->data(), 60));
}

// Lets the checks behind the checksums be reached. The hash is that of the schema that was read, so
// that frames with any schema come through; one that cannot be read keeps its hash.
inline void mend(Bytes* frame, const Schema* schema) {
  if (frame->size() < kHeaderBytes) return;
  std::memcpy(frame->data(), "FKD1\1\0", 6);
  put(frame, 8, std::uint64_t{frame->size()});
  mend_checksums(frame);
  Header header;
  if (!read_header(frame->data(), frame->size(), frame->size(), &header).ok()) return;
  std::uint64_t hash = 0;
  if (header.has_schema) {
    // Entries are read before their hash is compared, and stay where only that is wrong.
    const std::uint8_t* directory = frame->data() + (frame->size() - header.directory_bytes);
    Schema found;
    if (parse_directory(header, directory, 0, nullptr, &found).ok()) return;
    if (found.size() != header.entry_count) return;
    hash = schema_hash(found);
  } else if (schema != nullptr) {
    hash = schema_hash(*schema);
  }
  put(frame, 16, hash);
  mend_checksums(frame);
}

// The rows that an accepted entry of mode ROWS sends; any other entry as it is.
inline Entry sent(const Entry& entry) {
  if (static_cast<Mode>(entry.mode) != Mode::kRows) return entry;
  Entry rows = entry;
  rows.shape[0] = entry.rank;
  rows.dense_bytes = entry.dense_bytes / entry.shape[0] * entry.rank;
  Cursor cursor(entry.payload, entry.payload_bytes);
  std::uint64_t id_bytes = 0;
  if (!cursor.take_byte(&rows.mode) || !cursor.take_varint(&rows.rank) ||
      !cursor.take_varint(&id_bytes) || !cursor.skip_bytes(id_bytes)) {
    broken("accepted rows do not split");
  }
  rows.payload = cursor.data();
  rows.payload_bytes = cursor.left();
  return rows;
}

inline std::uint64_t touch_coded(const Entry& entry) {
  const auto mode = static_cast<Mode>(entry.mode);
  if (mode != Mode::kCodedFactors && mode != Mode::kCodedDense && mode != Mode::kCodedHybrid) {
    return 0;
  }
  Coded coded;
  const std::uint64_t numel = entry.dense_bytes / kDTypes[entry.dtype].itemsize;
  if (!read_coded("entry", entry, numel, &coded).ok()) broken("an accepted payload does not split");
  std::vector<std::int16_t> sigmas(coded.rank);
  std::vector<std::uint8_t> codes(coded.rows);
  std::vector<std::int16_t> levels(2 * coded.rank + coded.rows);
  unpack_sigmas(coded, sigmas.data());
  unpack_codes(coded, codes.data());
  unpack_levels(coded, sigmas.data(), codes.data(), levels.data());
  const auto at = [](const std::string& packed, const std::uint8_t* place) {
    return packed.empty() || std::memcmp(packed.data(), place, packed.size()) == 0;
  };
  std::string packed;
  if (!pack_gaps(sigmas.data(), sigmas.size(), &packed).ok() || !at(packed, coded.gaps)) {
    broken("gaps have another encoding");
  }
  packed.clear();
  if (!pack_codes(codes.data(), codes.size(), coded.width, &packed).ok() ||
      !at(packed, coded.codes)) {
    broken("row codes have another encoding");
  }
  Stream(coded, levels, entry.payload + coded.head_bytes,
         static_cast<std::int64_t>(entry.payload_bytes - coded.head_bytes))
      .exercise();
  std::uint64_t sum = coded.head_bytes;
  for (const std::int16_t level : levels) sum += static_cast<std::uint64_t>(level);
  return sum;
}

// Returns whether the codec accepts the input.
inline bool exercise(const std::uint8_t* data, std::size_t size) {
  // What is decoded to at most; splits of rows without a payload take as much.
  constexpr std::uint64_t kMaxBytes = 1 << 20;
  if (size == 0) return false;
  const Schema* schema = (data[0] & kWithSchema) != 0 ? &known_schema() : nullptr;
  // Exactly as large as it is: the red zone begins behind the last byte.
  Bytes bytes(data + 1, data + size);
  if ((data[0] & kMend) != 0) mend(&bytes, schema);
  Frame frame;
  const Status status = decode(bytes.data(), bytes.size(), schema, kMaxBytes, &frame);
  if (!status.ok()) {
    if (status.message.empty()) broken("a refusal without a message");
    return false;
  }
  std::uint64_t sum = 0;
  for (const Entry& entry : frame.entries) {
    for (std::uint64_t i = 0; i < entry.payload_bytes; ++i) sum += entry.payload[i];
    sum += touch_coded(sent(entry));
  }
  static volatile std::uint64_t sink = 0;
  sink = sink + sum;
  std::string directory;
  if (!plan_encode(&frame, &directory).ok() || frame.header.frame_bytes != bytes.size()) {
    broken("an accepted frame is refused by the encoder");
  }
  Bytes again(bytes.size());
  write_frame(&frame, directory, again.data());
  if (again != bytes) broken("an accepted frame has another encoding");
  return true;
}

}  // namespace fedkd_fast::wire
