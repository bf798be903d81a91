"""Named tensors as bytes: the frame that clients and servers exchange.

A frame is a 64-byte header, the payloads and a directory; `docs/wire-format.md` specifies every
byte. This module knows neither torch nor numpy: an entry's payload is bytes, and what its codes
mean is the business of `compress`. Nothing here unpickles or evaluates anything. The payloads of a
decoded frame are views into it, without alignment, so a reader that needs aligned numbers copies
them.
"""

from fedkd_fast.wire._coded import ZERO_ROW as ZERO_ROW
from fedkd_fast.wire._coded import CodedDenseParts as CodedDenseParts
from fedkd_fast.wire._coded import CodedFactorsParts as CodedFactorsParts
from fedkd_fast.wire._coded import CodedHybridParts as CodedHybridParts
from fedkd_fast.wire._coded import HalfParts as HalfParts
from fedkd_fast.wire._coded import coded_dense_parts as coded_dense_parts
from fedkd_fast.wire._coded import coded_dense_payload as coded_dense_payload
from fedkd_fast.wire._coded import coded_factors_parts as coded_factors_parts
from fedkd_fast.wire._coded import coded_factors_payload as coded_factors_payload
from fedkd_fast.wire._coded import coded_hybrid_parts as coded_hybrid_parts
from fedkd_fast.wire._coded import coded_hybrid_payload as coded_hybrid_payload
from fedkd_fast.wire._coded import half_parts as half_parts
from fedkd_fast.wire._coded import half_payload as half_payload
from fedkd_fast.wire._entries import CODECS as CODECS
from fedkd_fast.wire._entries import DEFAULT_MAX_BYTES as DEFAULT_MAX_BYTES
from fedkd_fast.wire._entries import DTYPES as DTYPES
from fedkd_fast.wire._entries import FACTORED as FACTORED
from fedkd_fast.wire._entries import Base as Base
from fedkd_fast.wire._entries import Described as Described
from fedkd_fast.wire._entries import Entry as Entry
from fedkd_fast.wire._entries import EntryInfo as EntryInfo
from fedkd_fast.wire._entries import Frame as Frame
from fedkd_fast.wire._entries import Header as Header
from fedkd_fast.wire._entries import Mode as Mode
from fedkd_fast.wire._entries import TensorSpec as TensorSpec
from fedkd_fast.wire._entries import WireError as WireError
from fedkd_fast.wire._entries import schema_hash as schema_hash
from fedkd_fast.wire._frame import decode as decode
from fedkd_fast.wire._frame import encode as encode
from fedkd_fast.wire._frame import header as header
from fedkd_fast.wire._frame import inspect as inspect
from fedkd_fast.wire._parts import FactorsParts as FactorsParts
from fedkd_fast.wire._parts import PackedDenseParts as PackedDenseParts
from fedkd_fast.wire._parts import PackedFactorsParts as PackedFactorsParts
from fedkd_fast.wire._parts import RowsParts as RowsParts
from fedkd_fast.wire._parts import factors_parts as factors_parts
from fedkd_fast.wire._parts import packed_dense_parts as packed_dense_parts
from fedkd_fast.wire._parts import packed_factors_parts as packed_factors_parts
from fedkd_fast.wire._parts import rows_entry as rows_entry
from fedkd_fast.wire._parts import rows_parts as rows_parts
from fedkd_fast.wire._stream import FrameReader as FrameReader
from fedkd_fast.wire._stream import FrameWriter as FrameWriter
from fedkd_fast.wire._stream import file_header as file_header
