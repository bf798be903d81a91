"""Memory that a process has no use for, given back to the system."""

from __future__ import annotations

import ctypes


def give_back() -> None:
    """Return free pages of the heap to the system, where the C library can do so (glibc).

    Of many tensors that come and go, the allocator keeps the holes between those that stay, and
    takes new pages beside them: the heap of a process that holds the same amount of data all the
    time grows for hours. Takes milliseconds.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))
