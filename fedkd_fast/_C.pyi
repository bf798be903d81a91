"""The wire codec on byte buffers, and the facts of this build (csrc/bind_wire.cpp)."""

from typing_extensions import Buffer

version: str
has_cuda: bool
cuda_archs: str
cuda_version: str
compiler: str
dtypes: tuple[str, ...]
# Of each table of the rANS coder: the frequencies of 0, ±1, …, ±31 and of the escape.
gaussian_tables: tuple[tuple[int, ...], ...]

class WireError(ValueError): ...

def encode(
    records: list[tuple[str, str, tuple[int, ...], int, int, Buffer]],
    base_digest: Buffer | None = None,
) -> bytes: ...
def decode(
    frame: Buffer, max_bytes: int
) -> tuple[bytes | None, list[tuple[str, str, tuple[int, ...], int, int, int, int, int]]]: ...
def crc32c(data: Buffer, value: int = 0, *, portable: bool = False) -> int: ...
