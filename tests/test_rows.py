"""Matrices most of whose rows are zero: found, sent without them, decoded with them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from updates import powerlaw, relative_error
from wire_frames import varint

from fedkd_fast import (
    Compressor,
    SubspaceCache,
    WireError,
    aggregate,
    decompress,
    inspect,
    ops,
    wire,
)
from fedkd_fast.codec import rows
from fedkd_fast.codec.common import DTYPES
from fedkd_fast.codec.message import CODECS
from fedkd_fast.records import frame_layers
from fedkd_fast.tensors import digest_of
from fedkd_fast.wire import Base, Mode

HEIGHT, WIDTH = 700, 48
IDS = torch.tensor([*range(3, 400, 5), 650, HEIGHT - 1])
LOSSY = ("wf1", "dense", "wf0", "factors-fp32")


def embedding(
    power: float = 1.2, ids: torch.Tensor = IDS, seed: int = 0, width: int = WIDTH
) -> torch.Tensor:
    whole = torch.zeros(HEIGHT, width)
    whole[ids] = powerlaw(len(ids), width, power, seed)
    return whole


def sparse(whole: torch.Tensor) -> torch.Tensor:
    """As the gradient of nn.Embedding(sparse=True): not coalesced, an id may come twice."""
    ids = whole.flatten(1).any(1).nonzero()[:, 0].flip(0)
    half = whole[ids] / 2
    return torch.sparse_coo_tensor(
        torch.cat([ids, ids])[None], torch.cat([half, half]), whole.shape, check_invariants=True
    )


# ---- finding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_found_in_any_dtype(dtype: torch.dtype) -> None:
    whole = torch.zeros(10, 4, 5, dtype=dtype)
    whole[2, 3, 4], whole[7, 0, 0] = 1, 1
    for exactly in (True, False):
        found = rows.touched(whole, exactly=exactly, backend=ops)
        assert found.ids is not None and found.ids.tolist() == [2, 7]
        assert torch.equal(rows.placed(found.values, found.ids, (10, 4, 5)), whole)


@pytest.mark.parametrize("value", [1e-45, -1e-45, -3.0, torch.inf])
def test_any_number_makes_a_row(value: float) -> None:
    whole = torch.zeros(4, 16)
    whole[1, 9] = value
    for exactly in (True, False):
        found = rows.touched(whole.T.contiguous().T, exactly=exactly, backend=ops)
        assert found.ids is not None and found.ids.tolist() == [1]


@pytest.mark.parametrize("kind", ["whole", "strided", "sparse", "short rows", "vector"])
def test_squares_are_those_of_the_rows_that_are_kept(kind: str) -> None:
    whole = torch.randn(64, 48, generator=torch.Generator().manual_seed(1))
    if kind == "strided":
        whole = whole.T.contiguous().T
    elif kind == "sparse":
        whole = whole * (torch.arange(64) % 3 == 1)[:, None]
    elif kind == "short rows":
        whole = whole.reshape(384, 8)
    elif kind == "vector":
        whole = whole.reshape(-1)
    found = rows.touched(whole, exactly=False, backend=ops)
    assert (found.ids is not None) == (kind == "sparse")
    assert found.squares is not None
    squares = found.values.reshape(len(found.squares), -1).double().square().sum(1)
    torch.testing.assert_close(found.squares, squares, rtol=1e-6, atol=0)
    assert found.largest == float(whole.abs().max())


def test_negative_zeros_are_rows_only_where_bits_count() -> None:
    whole = torch.zeros(4, 16)
    whole[1], whole[2] = 1.0, -0.0
    exact, lossy = (
        rows.touched(whole, exactly=exactly, backend=ops).ids for exactly in (True, False)
    )
    assert exact is not None and exact.tolist() == [1, 2]
    assert lossy is not None and lossy.tolist() == [1]


@pytest.mark.parametrize(
    ("shape", "count"),
    [((40,), 1), ((1, 40), 1), ((5, 40), 3), ((5, 40), 0), ((40, 15), 1), ((0, 40), 0)],
)
def test_other_tensors_stay_whole(shape: tuple[int, ...], count: int) -> None:
    whole = torch.zeros(shape)
    whole[:count] = 1
    found = rows.touched(whole, exactly=False, backend=ops)
    assert found.ids is None and found.values is whole


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=300))
def test_ids_survive_the_wire(gaps: list[int]) -> None:
    ids = torch.tensor(gaps).add(1).cumsum(0) - 1
    whole = rows.whole_entry(
        (int(ids[-1]) + 2, 1),
        ids,
        wire.Entry("w", "uint8", (len(gaps), 1), Mode.RAW, 0, bytes(len(gaps))),
    )
    assert wire.rows_parts(whole).gaps == b"".join(map(varint, gaps))
    (decoded,) = wire.decode(wire.encode([whole]), max_bytes=2**62).entries
    assert torch.equal(rows.split(decoded)[0], ids)


# ---- compressing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("energy", [0.5, 0.95, 0.999])
@pytest.mark.parametrize("codec", LOSSY)
def test_energy_is_kept_and_other_rows_are_zero(codec: str, energy: float) -> None:
    exact = embedding()
    frame = Compressor(energy, codec).compress({"w": exact})
    (info,) = inspect(frame)
    assert (info.mode, info.rank, info.dense_bytes) == (Mode.ROWS, len(IDS), 4 * exact.numel())
    for backend in ("native", "reference"):
        decoded = decompress(frame, backend=backend)["w"]
        assert relative_error(exact, decoded) <= 1 - energy
        # A row that is worth less than its bits may be zeros, but no other one is anything else.
        sent, touched = decoded.any(1), exact.any(1)
        assert not bool((sent & ~touched).any())
        assert codec in ("wf1", "dense") or torch.equal(sent, touched)


def test_every_payload_of_rows() -> None:
    smooth, noise = embedding(2.0), torch.zeros(HEIGHT, WIDTH)
    noise[IDS] = torch.randn(len(IDS), WIDTH, generator=torch.Generator().manual_seed(0))
    for whole, codec, mode in (
        (smooth, "wf0", Mode.PACKED_FACTORS),
        (noise, "wf0", Mode.PACKED_DENSE),
        (smooth, "factors-fp32", Mode.FACTORS),
        (noise, "factors-fp32", Mode.RAW),
        (smooth, "raw", Mode.RAW),
    ):
        (info,) = inspect(Compressor(0.95, codec).compress({"w": whole}))
        assert info.rows_mode is mode
        same = Compressor(0.95, codec).compress({"w": whole[IDS]})
        # Nothing but the ids is added to what the rows alone would take.
        assert info.payload_bytes - inspect(same)[0].payload_bytes <= 2 * len(IDS)


def test_ranks_break_even_with_the_rows_that_are_sent() -> None:
    whole = embedding(0.0)
    (info,) = inspect(Compressor(0.8, "factors-fp32").compress({"w": whole}))
    rank = int(0.8 * WIDTH) + 1
    assert 4 * rank * (1 + HEIGHT + WIDTH) < info.dense_bytes  # of the whole, it would pay
    assert info.numbers == (Mode.RAW, 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_must_not_change_does_not(dtype: torch.dtype) -> None:
    exact = torch.zeros(100, 16, dtype=dtype)
    exact[10:40] = torch.arange(480).reshape(30, 16).to(dtype)
    if dtype.is_floating_point:
        exact[60, 3] = -0.0
    for codec, energy in (*((codec, 1.0) for codec in CODECS), ("raw", 0.5)):
        frame = Compressor(energy, codec).compress({"w": exact})
        assert inspect(frame)[0].rows_mode is Mode.RAW
        decoded = decompress(frame)["w"]
        assert torch.equal(decoded.view(torch.uint8), exact.view(torch.uint8))


def test_a_sign_of_zero_is_no_reason_to_send_a_row() -> None:
    exact = embedding()
    for codec in LOSSY:
        assert inspect(Compressor(codec=codec).compress({"w": -exact}))[0].rank == len(IDS)


def test_a_lone_row_may_lose_what_its_matrix_may() -> None:
    exact = torch.zeros(HEIGHT, 400)
    exact[5] = torch.randn(400, generator=torch.Generator().manual_seed(0))
    frame = Compressor(0.9).compress({"w": exact})
    assert 0.1 / 16 < relative_error(exact, decompress(frame)["w"]) <= 0.1


def test_kernels_and_tied_tables() -> None:
    kernel = torch.zeros(64, 3, 5, 5)
    kernel[:20] = powerlaw(20, 75).reshape(20, 3, 5, 5)
    frame = Compressor(0.9).compress({"a": kernel, "b": kernel})
    assert [info.mode for info in inspect(frame)] == [Mode.ROWS, Mode.ALIAS]
    decoded = decompress(frame)
    assert relative_error(kernel, decoded["a"]) <= 0.1 and decoded["b"] is decoded["a"]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(2, 40),
    st.integers(1, 40),
    st.floats(0, 0.6),
    st.sampled_from(CODECS),
    st.floats(0.05, 1.0),
    st.integers(0, 2**31),
)
def test_any_pattern(
    height: int, width: int, share: float, codec: str, energy: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    exact = torch.randn(height, width, generator=generator)
    exact[torch.rand(height, generator=generator) >= share] = 0
    frame = Compressor(energy, codec).compress({"w": exact})
    (info,) = inspect(frame)
    assert info.payload_bytes <= info.dense_bytes
    decoded = decompress(frame)["w"]
    assert float((exact - decoded).square().sum()) <= (1 - energy) * float(exact.square().sum())
    if info.mode is Mode.ROWS:
        assert torch.equal(decoded.any(1) | exact.any(1), exact.any(1))
    assert decompress(Compressor(energy, codec).compress({"w": sparse(exact)}))["w"].equal(decoded)


# ---- state, bases, means -------------------------------------------------------------------------


def test_a_base_is_taken_away_first() -> None:
    base = {"w": powerlaw(HEIGHT, WIDTH, seed=7)}
    update = base["w"] + embedding()
    frame = Compressor(0.95).compress({"w": update}, base)
    assert inspect(frame)[0].rank == len(IDS)
    decoded = decompress(frame, base=base)["w"]
    assert torch.equal(decoded[0], base["w"][0])
    assert relative_error(update - base["w"], decoded - base["w"]) <= 0.0501
    # A sparse update is like its dense twin.
    frames = [Compressor().compress({"w": one}, base) for one in (sparse(update), update)]
    assert frames[0] == frames[1]


@pytest.mark.parametrize("codec", CODECS)
def test_feedback_remembers_rows_that_do_not_come_again(codec: str) -> None:
    compressor = Compressor(0.6, codec, feedback=True)
    residual = torch.zeros(HEIGHT, WIDTH)
    for step, ids in enumerate((IDS, IDS[:40] + 1, IDS[::2])):
        update = embedding(0.8, ids, seed=step)
        decoded = decompress(compressor.compress({"w": update if step else sparse(update)}))["w"]
        residual = update + residual - decoded
        assert torch.equal(compressor.state_dict()["feedback.w"], residual)


@pytest.mark.parametrize("width", [WIDTH, 200])
def test_a_cache_keeps_only_what_fits_other_rows(width: int) -> None:
    cold = Compressor(0.9, "factors-fp32")
    warm = Compressor(0.9, "factors-fp32", cache=SubspaceCache())
    for step in range(4):
        update = embedding(0.9, IDS[step:] - step, seed=step, width=width)
        frames = [compressor.compress({"w": update}) for compressor in (cold, warm)]
        assert relative_error(update, decompress(frames[1])["w"]) <= 0.1
        best, found = (inspect(frame)[0].rows_rank for frame in frames)
        assert best <= found <= best + max(1, 0.05 * best)
        state = warm.state_dict()
        # Vectors along the rows mean nothing next time; those along the columns stay.
        assert state["cache.basis.w"].shape[1] == (0 if width == WIDTH else width)
        assert len(state["cache.shares.w"])
    again = SubspaceCache()
    again.load_state_dict({key.removeprefix("cache."): value for key, value in state.items()})
    assert again.get("w", (50, width)) is not None
    assert again.get("w", (50, width + 100)) is None or width == WIDTH


def test_means_of_different_rows() -> None:
    updates = [embedding(seed=1), embedding(ids=IDS[10:30] + 2, seed=2)]
    frames = [Compressor(codec="raw").compress({"w": update}) for update in updates]
    mean = aggregate(frames)["w"]
    assert torch.equal(mean, (updates[0].double() + updates[1]).div(2).float())


def test_max_bytes_counts_the_rows_that_are_left_out() -> None:
    whole = embedding()
    frame = Compressor().compress({"w": whole})
    assert len(frame) < whole.nbytes // 10
    decompress(frame, max_bytes=whole.nbytes)
    with pytest.raises(WireError, match=f"at most max_bytes = {whole.nbytes - 1} bytes"):
        decompress(frame, max_bytes=whole.nbytes - 1)


def test_nan_in_a_row_is_refused_by_the_receiver() -> None:
    raw = np.full(16, np.nan, np.float32).tobytes()
    inner = wire.Entry("w", "float32", (1, 16), Mode.RAW, 0, raw)
    frame = wire.encode([rows.whole_entry((9, 16), torch.tensor([4]), inner)])
    with pytest.raises(WireError, match="'w' decodes to NaN or Inf"):
        decompress(frame)


def test_records_tell_how_rows_travel() -> None:
    frame = Compressor(0.95, "factors-fp32").compress({"w": embedding(2.0)})
    (layer,), (info,) = frame_layers(frame), inspect(frame)
    assert layer["mode"] == "ROWS_FACTORS"
    assert (layer["rank"], layer["full_rank"]) == (info.rows_rank, WIDTH)


# ---- sparse tensors ------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", CODECS)
def test_sparse_and_dense_updates_give_the_same_bytes(codec: str) -> None:
    most = embedding(ids=torch.arange(HEIGHT // 2 + 1))
    explicit = sparse(embedding()).coalesce()
    explicit.values()[5] = 0  # a row that is listed, and zero
    for thin in (sparse(embedding()), sparse(most), explicit, sparse(torch.zeros(50, 60))):
        frames = [
            Compressor(0.9, codec).compress({"w": update}) for update in (thin, thin.to_dense())
        ]
        assert frames[0] == frames[1]


def test_the_gradient_of_a_sparse_embedding() -> None:
    table = torch.nn.Embedding(HEIGHT, WIDTH, sparse=True)
    table(torch.tensor([[5, 9, 5], [600, 9, 9]])).square().sum().backward()
    gradient = table.weight.grad
    assert gradient is not None and gradient.is_sparse
    decoded = decompress(Compressor(codec="raw").compress({"w": gradient}))["w"]
    assert torch.equal(decoded, gradient.to_dense())


def test_a_sparse_update_takes_no_memory_of_its_shape() -> None:
    huge = torch.sparse_coo_tensor(
        torch.tensor([[7, 2**40]]), torch.ones(2, 20), (2**45, 20), check_invariants=True
    )
    (info,) = inspect(Compressor().compress({"w": huge}, relative_to=Base(digest=digest_of({}))))
    assert info.shape == (2**45, 20) and info.rank == 2
    with pytest.raises(WireError, match="max_bytes"):
        decompress(Compressor().compress({"w": huge}))


@pytest.mark.parametrize(
    "value",
    [
        torch.eye(30).to_sparse(),
        torch.ones(30).to_sparse(),
        torch.ones(9, 9, 9).to_sparse(2),
    ],
)
def test_other_sparse_tensors_are_refused(value: torch.Tensor) -> None:
    with pytest.raises(TypeError, match=r"update\['w'\] has layout torch\.sparse_.*to_dense\(\)"):
        Compressor().compress({"w": value})


def test_sparse_tensors_are_updates_alone_and_finite() -> None:
    update = sparse(embedding())
    with pytest.raises(TypeError, match=r"base\['w'\] has layout torch\.sparse_coo"):
        Compressor().compress({"w": embedding()}, {"w": update})
    with pytest.raises(ValueError, match=r"update\['w'\] holds NaN or Inf"):
        Compressor().compress({"w": update * torch.inf})


def test_a_false_mark_of_order_is_refused() -> None:
    values = torch.ones(2, 16)
    for ids in ([[50, 3]], [[3, 3]]):
        update = torch.sparse_coo_tensor(ids, values, (400, 16), is_coalesced=True)
        with pytest.raises(ValueError, match="indices of a sparse tensor must ascend"):
            Compressor(codec="raw").compress({"w": update})
