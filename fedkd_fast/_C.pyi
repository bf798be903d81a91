"""The wire codec on byte buffers, and the facts of this build (csrc/bind_wire*.cpp)."""

from typing import Any, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

version: str
has_cuda: bool
cuda_archs: str
cuda_version: str
compiler: str
dtypes: tuple[str, ...]
codecs: tuple[str, ...]
# Of each table of the rANS coder: the frequencies of 0, ±1, …, ±31 and of the escape.
gaussian_tables: tuple[tuple[int, ...], ...]

class WireError(ValueError): ...

_Tensor: TypeAlias = tuple[str, str, tuple[int, ...]]
_Sent: TypeAlias = tuple[str, str, tuple[int, ...], int, int, Buffer]
_Facts: TypeAlias = tuple[int, tuple[int, int] | None, bytes | None, bool]
_Header: TypeAlias = tuple[
    int, tuple[int, int] | None, bytes | None, bool, bool, int, int, int, int
]
_Record: TypeAlias = tuple[str, str, tuple[int, ...], int, int, int, int]

def encode(records: list[_Sent], facts: _Facts) -> bytes: ...
def decode(
    frame: Buffer, schema: list[_Tensor] | None, max_bytes: int
) -> tuple[_Header, list[_Record]]: ...
def read_header(front: Buffer, frame_bytes: int) -> _Header: ...
def read_directory(
    front: Buffer,
    frame_bytes: int,
    directory: Buffer,
    schema: list[_Tensor] | None,
    max_bytes: int,
) -> list[_Record]: ...
def check_payload(record: _Sent, index: int) -> bool: ...
def finish(
    records: list[tuple[str, str, tuple[int, ...], int, int, int]],
    facts: _Facts,
    needs_tables: bool,
    crc: int,
) -> tuple[bytes, bytes]: ...
def schema_hash(schema: list[_Tensor]) -> int: ...
def split_coded(record: _Sent) -> tuple[int, int, bytes, int, int, bytes, bytes, int]: ...
def pack_gaps(sigmas: Buffer) -> bytes: ...
def pack_codes(codes: Buffer, width: int) -> bytes: ...
def half_log2(count: int) -> int: ...
@overload
def exp2_fixed(exponent: int) -> float: ...
@overload
def exp2_fixed(exponent: NDArray[np.integer[Any]]) -> NDArray[np.float64]: ...
def crc32c(data: Buffer, value: int = 0, *, portable: bool = False) -> int: ...
