"""What data hold, as digests: runs on other data are neither one run nor seeds of one thing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import numpy as np


def content_digest(*parts: object) -> str:
    """Return 32 hex digits that identify data, the same in every process and on every machine.

    Args:
        parts: arrays, or what JSON can hold: lists of texts, of numbers, of lists.
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, np.ndarray):
            # What millions of numbers would take as text.
            little = np.ascontiguousarray(part, part.dtype.newbyteorder("<"))
            digest.update(f"{little.dtype.str}{little.shape}".encode())
            digest.update(little.data)
        else:
            digest.update(json.dumps(part).encode())
        digest.update(b"\0")
    return digest.hexdigest()


def changed_splits(began: object, now: object) -> list[str]:
    """Name the splits that hold other data than they did, or are there no more, or were not.

    Args:
        began: the fact ``content`` of a run. One that does not tell, as older ones do not, is held
            against nothing.
        now: `Task`'s attribute of that name; likewise.
    """
    if not isinstance(began, Mapping) or not isinstance(now, Mapping):
        return []
    return sorted(name for name in began.keys() | now.keys() if began.get(name) != now.get(name))
