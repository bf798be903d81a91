"""rANS streams that no encoder makes: refused, or decoded as the specification does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from rans_cases import HOSTILE, LARGEST, Message, decode, refused, sample

from fedkd_fast import ops, reference_rans


def test_every_flipped_bit_is_refused_or_decodes_as_specified() -> None:
    message = HOSTILE[0]
    codes, _ = ops.rans_encode(*message)
    outcomes = []
    for bit in range(8 * len(codes)):
        flipped = codes.clone()
        flipped[bit // 8] ^= 1 << bit % 8
        outcomes.append(refused(message, flipped))
    assert not all(outcomes)  # low bits are not protected
    assert sum(outcomes) > len(outcomes) / 2


@pytest.mark.parametrize("message", HOSTILE, ids=["raw", "quiet", "loud"])
def test_shorter_and_longer_streams_are_refused(message: Message) -> None:
    codes, _ = ops.rans_encode(*message)
    for length in [0, 1, 5, len(codes) // 2, len(codes) - 2, len(codes) - 1]:
        assert refused(message, codes[:length])
    assert refused(message, torch.cat([codes, codes[:2]]))


def broken(place: int, *values: int) -> torch.Tensor:
    """Replace bytes of the code of sixty values of level 0."""
    codes, _ = ops.rans_encode(*PLAIN)
    for offset, value in enumerate(values):
        codes[place + offset] = value
    return codes


PLAIN = sample([(1, 60)], [0])
HEAD, STATES = 4, 16  # bytes


def test_each_rule_has_its_words(device: torch.device) -> None:
    def refuse(codes: torch.Tensor, words: str, message: Message = PLAIN) -> None:
        on_device = message.to(device)
        with pytest.raises(RuntimeError, match="stream 0 is corrupt: " + words):
            decode(on_device, codes.to(device), torch.tensor([len(codes)]))

    size = len(broken(0)) - HEAD
    refuse(broken(0)[:3], "it has 3 bytes, its low bits and chunk table take 4")
    refuse(
        torch.ones(2, dtype=torch.uint8), "it has no symbols, but 2 bytes", sample([(1, 9)], [-49])
    )
    refuse(broken(0, size + 2), "its chunk table does not add up to its size")
    refuse(broken(0, size - 2), "its chunk table does not add up to its size")
    refuse(broken(0, 255, 255, 255, 255), "its chunk table does not add up to its size")
    refuse(
        torch.cat([broken(0, size + 1), torch.zeros(1, dtype=torch.uint8)]),
        "a chunk must have an even size that holds its states",
    )
    refuse(broken(0, STATES - 2)[: HEAD + STATES - 2], "a chunk must have an even size that holds")
    refuse(broken(HEAD + 2, 0, 0), "a state must be at least 65536")
    refuse(broken(0, STATES)[: HEAD + STATES], "words are missing")
    quiet = sample([(1, 1)], [-48])  # of one symbol, which only the first lane has
    codes, _ = ops.rans_encode(*quiet)
    codes[-4] = 1
    refuse(codes, "states must end at 65536", quiet)
    more = torch.cat([broken(0, size + 2), torch.zeros(2, dtype=torch.uint8)])
    refuse(more, "words are left")


def escaped(device: torch.device, level: int, *words: int, count: int = 1) -> list[torch.Tensor]:
    """Decode a row of symbols that are all the escape, followed by these words."""
    table = reference_rans.table(level - 16 * reference_rans.raw_bits(level))
    low = (count * reference_rans.raw_bits(level) + 7) // 8
    state = 2**16
    full = state >= int(table.frequency[63]) << 20
    assert not full and count == 1
    quotient, rest = divmod(state, int(table.frequency[63]))
    states = [(quotient << 12) + int(table.before[63]) + rest, *[2**16] * 3]
    chunk = np.array(states, "<u4").tobytes() + np.array(words, "<u2").tobytes()
    code = bytes(low) + len(chunk).to_bytes(4, "little") + chunk
    codes = torch.tensor(list(code), dtype=torch.uint8)
    message = sample([(1, count)], [level])._replace(multiplier=torch.ones(1)).to(device)
    return decode(message, codes.to(device), torch.tensor([len(codes)]))


def test_escaped_symbols_are_refused_where_no_encoder_writes_them(device: torch.device) -> None:
    assert escaped(device, 0, 13)[0].item() == -7  # just outside of the support, ±6
    assert escaped(device, 0, 14)[0].item() == 7
    assert escaped(device, 0, 0x8001, 1)[0].item() == -(2**14 + 1)
    assert escaped(device, 0, 0xFFFE, 0xFF)[0].item() == LARGEST
    assert escaped(device, 0, 0xFFFD, 0xFF)[0].item() == -LARGEST
    outside = "stream 0 is corrupt: an escaped symbol must lie outside of its table"
    for words in [
        (12,),
        (11,),
        (0,),
        (0x8001, 0),
        (0x8001, 0x8001),
        (0x8000, 0x100),
        (0xFFFF, 0xFF),
    ]:
        with pytest.raises(RuntimeError, match=outside):
            escaped(device, 0, *words)
    for words in [(), (0x8001,)]:
        with pytest.raises(RuntimeError, match="stream 0 is corrupt: words are missing"):
            escaped(device, 0, *words)
    with pytest.raises(RuntimeError, match="stream 0 is corrupt: words are left"):
        escaped(device, 0, 13, 13)
    # One low bit of zero: q = 2·h - 1, of which the most negative is one too many.
    assert escaped(device, 48, 0xFFFE, 0x7F)[0].item() == 2 * (2**21 - 1) - 1
    assert escaped(device, 48, 0xFFFD, 0x7F)[0].item() == 2 * (1 - 2**21) - 1
    with pytest.raises(RuntimeError, match=outside):
        escaped(device, 48, 0xFFFF, 0x7F)


def test_padding_and_range_of_low_bits(device: torch.device) -> None:
    message = sample([(1, 3)], [48])
    codes, sizes = ops.rans_encode(*message)
    codes[0] |= 8
    on_device = message.to(device)
    with pytest.raises(RuntimeError, match="corrupt: bits behind low parts must be zero"):
        decode(on_device, codes.to(device), sizes)
    # 31 · 2^18 is beyond 2^22, and a symbol that has a frequency.
    edge = sample([(1, 1)], [335])._replace(multiplier=torch.ones(1))
    edge.values[0][0, 0] = LARGEST
    codes, sizes = ops.rans_encode(*edge)
    assert decode(edge.to(device), codes.to(device), sizes)[0].item() == LARGEST
    codes[:3] = 255
    codes[2] = 3
    with pytest.raises(RuntimeError, match="corrupt: an integer must be at most 4194303"):
        decode(edge.to(device), codes.to(device), sizes)


def test_the_first_corrupt_stream_is_named(device: torch.device) -> None:
    message = sample([(1, 9)] * 4, [0], [0, 1, 2, 3]).to(device)
    codes, sizes = ops.rans_encode(*message)
    for stream in (3, 1):
        codes[int(sizes[:stream].sum()) + HEAD + 2 :][:2] = 0
    with pytest.raises(RuntimeError, match="stream 1 is corrupt: a state must be at least 65536"):
        decode(message, codes, sizes)
