"""Tensors of one element, or of none: torch calls them contiguous, whatever their strides."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedkd_fast import Compressor, ErrorFeedback, aggregate, decompress, decompress_from
from fedkd_fast.codec.message import CODECS
from fedkd_fast.integrations.link import Broadcaster, Receiver
from fedkd_fast.tensors import digest_of
from fedkd_fast.trees import read_tree, write_tree

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool]
SHAPES = [(1,), (1, 1), (0,), (0, 1)]


def strided(shape: tuple[int, ...], dtype: torch.dtype, value: int) -> Tensor:
    """Return the first column or so of more."""
    whole = torch.full((2, 3, 5), 9).to(dtype)
    found = whole[1:, 1:2, 3] if len(shape) == 2 else whole[1, 1:2, 3]
    found = found.as_strided(shape, (15, 3)[: len(shape)], found.storage_offset())
    found.fill_(value)
    assert found.is_contiguous() and found.stride(-1) != 1
    return found


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("codec", CODECS)
def test_every_codec_takes_any_strides(
    codec: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    update, base = ({"gate": strided(shape, dtype, value)} for value in (1, 0))
    plain = {"gate": torch.ones(shape, dtype=dtype)}
    compressor = Compressor(codec=codec)
    assert compressor.compress(update) == compressor.compress(plain)
    assert torch.equal(decompress(compressor.compress(update))["gate"], plain["gate"])

    frame = compressor.compress(update, base=base)
    assert frame == compressor.compress(plain, base={"gate": torch.zeros(shape, dtype=dtype)})
    assert torch.equal(decompress(frame, base=base)["gate"], plain["gate"])
    assert torch.equal(aggregate([frame] * 3, schema=base)["gate"], plain["gate"])

    file = io.BytesIO()
    Compressor(codec=codec, feedback=ErrorFeedback()).compress_to(file, update, base=base)
    file.seek(0)
    assert torch.equal(dict(decompress_from(file, base=base))["gate"], plain["gate"])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_digests_and_files_do_not_depend_on_strides(
    dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path
) -> None:
    odd, plain = strided(shape, dtype, 1), torch.ones(shape, dtype=dtype)
    assert digest_of({"gate": odd}) == digest_of({"gate": plain})
    write_tree(tmp_path / "tree", {"gate": odd})
    assert torch.equal(read_tree(tmp_path / "tree")["gate"], plain)


@pytest.mark.parametrize("dtype", DTYPES[:4], ids=str)
def test_links_carry_any_strides(dtype: torch.dtype) -> None:
    weights: dict[str, object] = {
        "gate": strided((1,), dtype, 1),
        "head": strided((1, 1), dtype, 2),
    }
    server, client = Broadcaster(), Receiver()
    for _ in range(2):
        server.publish(weights)
        received = client.receive(server.letter("a"))
        assert received["gate"].tolist() == [1] and received["head"].tolist() == [[2]]
        assert server.weights(client.reply(weights))["head"].tolist() == [[2]]
