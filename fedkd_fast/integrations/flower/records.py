"""Letters and weights as Flower's records, and back."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedkd_fast._extras import needed
from fedkd_fast.integrations.link import Letter

app = needed("flwr.app", "fedkd_fast.integrations.flower", "Flower", "flower")

CONTROL = "fedkd_fast"
"""Name of the config record that says what a message holds."""

STYPE = (
    "frames of fedkd_fast; compress_mod must be the first of the client's mods and "
    "CompressedStrategyMixin the first base of the server's strategy"
)
"""How arrays of frames say what they are. Flower quotes it when somebody takes them for numbers."""

_FRAMES = "frames"


def array_record(state: Mapping[str, Tensor]) -> Any:
    """Return weights as an ArrayRecord, those in bfloat16 and float8 as float32.

    numpy, and so Flower, has no such numbers. ``load_state_dict`` turns them back without loss.
    """
    narrow = (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
    return app.ArrayRecord(
        {name: value.float() if value.dtype in narrow else value for name, value in state.items()}
    )


def weights_of(record: Any) -> dict[str, np.ndarray[Any, Any]]:
    """Return the arrays of a record.

    Raises:
        TypeError: they are no numbers.
    """
    return {name: array.numpy() for name, array in record.items()}


def sealed(frames: tuple[bytes, ...]) -> Any:
    """Return frames as a record that nobody can take for weights."""
    data = b"".join(frames)
    return app.ArrayRecord({_FRAMES: app.Array("uint8", (len(data),), STYPE, data)})


def opened(record: Any, lengths: list[int]) -> tuple[bytes, ...]:
    """Return the frames of a record, which come from elsewhere.

    Raises:
        ValueError: it holds something else.
    """
    if list(record) != [_FRAMES] or record[_FRAMES].stype != STYPE:
        raise ValueError("the message holds plain arrays, not frames of fedkd_fast")
    data = memoryview(record[_FRAMES].data)
    if any(length < 0 for length in lengths) or sum(lengths) != len(data):
        raise ValueError(f"frames must have {len(data)} bytes in all, the message says {lengths}")
    ends = np.cumsum([0, *lengths]).tolist()
    return tuple(bytes(data[a:b]) for a, b in itertools.pairwise(ends))


def written(letter: Letter) -> tuple[Any, Any]:
    """Return a letter as an array record, and as the config record that belongs to it."""
    control = {"run": letter.run, "version": letter.version, "digest": letter.digest}
    control["replied"] = letter.replied
    control["lengths"] = [len(frame) for frame in letter.frames]
    return sealed(letter.frames), app.ConfigRecord(control)


def read(record: Any, control: Mapping[str, Any]) -> Letter:
    """Return the letter that `written` made records of.

    Raises:
        ValueError: something is missing or of another kind.
    """
    try:
        run, version, digest = (control[name] for name in ("run", "version", "digest"))
        lengths, replied = list(control["lengths"]), int(control["replied"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"the record {CONTROL!r} of the message lacks {error}") from error
    return Letter(int(run), int(version), opened(record, lengths), bytes(digest), replied)


def only(records: Mapping[str, Any], what: str) -> tuple[str, Any]:
    """Return name and value of the one array record.

    Raises:
        ValueError: there are several or none.
    """
    if len(records) != 1:
        raise ValueError(f"{what} must hold one ArrayRecord, got {len(records)}")
    return next(iter(records.items()))
