"""State between rounds: error-feedback residuals and warm subspaces."""

from __future__ import annotations

import itertools
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from updates import model, powerlaw, relative_error

import fedkd_fast.compress as compress_module
from fedkd_fast import (
    EF21,
    Compressor,
    ErrorFeedback,
    SubspaceCache,
    decompress,
    inspect,
    ops,
    reference,
)


def test_feedback_residual_is_exactly_what_was_left_out() -> None:
    compressor = Compressor(0.8, feedback=True)
    residual = {name: torch.zeros_like(value) for name, value in model().items()}
    for seed in range(3):
        update = {"w": powerlaw(40, 30, seed=seed), "b": powerlaw(30, 1, seed=seed)[:, 0]}
        decoded = decompress(compressor.compress(update))
        for name, value in update.items():
            sent = value + residual.get(name, torch.zeros_like(value))
            residual[name] = sent - decoded[name]
            assert torch.equal(compressor.state_dict()[f"feedback.{name}"], residual[name])


def test_feedback_recovers_a_constant_update() -> None:
    update = {"w": powerlaw(40, 30, 0.3)}
    plain, fed = Compressor(0.5), Compressor(0.5, feedback=True)
    rounds = 12
    sums = [
        sum(decompress(compressor.compress(update))["w"] for _ in range(rounds)) / rounds
        for compressor in (plain, fed)
    ]
    assert relative_error(update["w"], sums[1]) < relative_error(update["w"], sums[0]) / 4


def test_state_dict_round_trip() -> None:
    first, second = Compressor(0.7, feedback=True), Compressor(0.7, feedback=True)
    first.compress({"w": powerlaw(30, 20)})
    second.load_state_dict(first.state_dict())
    update = {"w": powerlaw(30, 20, seed=5)}
    assert first.compress(update) == second.compress(update)
    with pytest.raises(ValueError, match=r"state holds feedback\.\* tensors"):
        Compressor().load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match=r"state must hold only feedback\., cache\. tensors"):
        second.load_state_dict({"w": torch.zeros(1)})
    with pytest.raises(TypeError, match="must be a floating tensor"):
        second.load_state_dict({"feedback.w": torch.zeros(1, dtype=torch.int64)})
    with pytest.raises(ValueError, match="use a fresh Compressor"):
        second.compress({"w": powerlaw(20, 20)})


def test_a_refused_update_leaves_the_state_alone() -> None:
    compressor = Compressor(0.7, feedback=True)
    compressor.compress({"a": powerlaw(30, 20), "b": powerlaw(30, 20)})
    before = compressor.state_dict()
    with pytest.raises(ValueError, match=r"update\['b'\] holds NaN"):
        compressor.compress({"a": powerlaw(30, 20), "b": torch.full((30, 20), torch.nan)})
    after = compressor.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_feedback_never_sends_what_cannot_be_decoded() -> None:
    compressor = Compressor(0.5, feedback=True)
    state = {"feedback.w": torch.full((300,), 3e38)}
    compressor.load_state_dict(state)
    with pytest.raises(ValueError, match=r"update\['w'\].*overflows float32"):
        compressor.compress({"w": torch.full((300,), 2e38)})
    assert torch.equal(compressor.state_dict()["feedback.w"], state["feedback.w"])
    with pytest.raises(ValueError, match="residual 'w' holds NaN or Inf"):
        compressor.load_state_dict({"feedback.w": torch.tensor([torch.nan])})


def test_a_tensor_with_a_residual_is_not_tied() -> None:
    compressor = Compressor(0.5, feedback=True)
    compressor.compress({"a": powerlaw(20, 30), "b": powerlaw(20, 30, seed=1)})
    residual = compressor.state_dict()["feedback.b"]
    both = powerlaw(20, 30, seed=2)
    decoded = decompress(compressor.compress({"a": both, "b": both}))
    kept = compressor.state_dict()["feedback.b"]
    assert torch.equal(kept, both + residual - decoded["b"])


# ---- warm subspaces ------------------------------------------------------------------------------


def drifting(steps: int, rows: int = 96, cols: int = 80) -> list[torch.Tensor]:
    """Updates of one layer in consecutive rounds: each a fifth new."""
    updates = [powerlaw(rows, cols, 0.9)]
    for step in range(1, steps):
        updates.append(updates[-1] + 0.2 * powerlaw(rows, cols, 0.9, seed=step))
    return updates


@pytest.mark.parametrize("shape", [(96, 80), (80, 96)])
def test_warm_rounds_keep_energy_and_nearly_the_smallest_rank(shape: tuple[int, int]) -> None:
    cold = Compressor(0.9, "factors-fp32")
    warm = Compressor(0.9, "factors-fp32", cache=SubspaceCache())
    unlike = 0
    for update in drifting(5, *shape):
        frames = [compressor.compress({"w": update}) for compressor in (cold, warm)]
        unlike += frames[0] != frames[1]
        best, found = (inspect(frame)[0].rank for frame in frames)
        assert best <= found <= best + max(1, 0.05 * best)
        # Strictly more than the energy: the paper's rule.
        assert relative_error(update, decompress(frames[1])["w"]) < 0.1
    # Another algorithm leaves other last bits: all rounds but the first were warm.
    assert unlike == 4
    subspace = cache_of(warm).get("w", shape)
    assert subspace is not None and subspace.basis.shape[1] == max(shape)
    assert torch.equal(warm.state_dict()["cache.basis.w"].float(), subspace.basis)


def cache_of(compressor: Compressor) -> SubspaceCache:
    cache = SubspaceCache()
    cache.load_state_dict(
        {name.removeprefix("cache."): v for name, v in compressor.state_dict().items()}
    )
    return cache


def test_warm_state_survives_a_file(tmp_path: Path) -> None:
    updates = drifting(3)
    first = Compressor(0.9, "factors-fp32", cache=SubspaceCache(), feedback=True)
    for update in updates[:2]:
        first.compress({"w": update})
    save_file(first.state_dict(), tmp_path / "state.safetensors")
    second = Compressor(0.9, "factors-fp32", cache=SubspaceCache(), feedback=True)
    second.load_state_dict(load_file(tmp_path / "state.safetensors"))
    assert first.compress({"w": updates[2]}) == second.compress({"w": updates[2]})
    with pytest.raises(ValueError, match=r"state holds cache\.\* tensors"):
        Compressor(feedback=True).load_state_dict(first.state_dict())


def test_shapes_may_change_and_rounds_be_skipped() -> None:
    compressor = Compressor(0.9, "factors-fp32", cache=SubspaceCache())
    compressor.compress({"w": powerlaw(60, 40), "v": powerlaw(60, 40)})
    for update in ({"v": powerlaw(40, 60)}, {"w": powerlaw(30, 50)}, {"w": powerlaw(50, 30)}):
        ((name, exact),) = update.items()
        assert relative_error(exact, decompress(compressor.compress(update))[name]) < 0.1


@pytest.mark.parametrize("energy", [0.3, 0.9])
def test_a_misleading_cache_costs_no_accuracy(energy: float) -> None:
    warm = Compressor(energy, "factors-fp32", cache=SubspaceCache())
    warm.compress({"w": powerlaw(96, 90, 0.4)})
    other = powerlaw(96, 90, 0.2, seed=9)
    assert relative_error(other, decompress(warm.compress({"w": other}))["w"]) < 1 - energy


def factors_of(matrix: torch.Tensor, rank: int) -> reference.Factors:
    return ops.truncated_svd_list([matrix], rank=rank)[0]


def test_cache_is_bounded_and_forgets_the_oldest() -> None:
    factors = factors_of(powerlaw(30, 20), 4)
    one = 2 * 4 * 30 + 8 * 20  # vectors of the long side, and the spectrum
    cache = SubspaceCache(max_bytes=2 * one)
    for name in ("a", "b", "a", "c"):
        cache.keep(name, factors)
        assert cache.nbytes <= 2 * one
    assert list(cache.state_dict()) == ["basis.a", "shares.a", "basis.c", "shares.c"]
    # Too many vectors to start from: the spectrum stays.
    cache.keep("a", factors_of(powerlaw(30, 20), 20))
    assert len(cache.state_dict()["basis.a"]) == 0 and len(cache.state_dict()["shares.a"]) == 20
    assert SubspaceCache(max_bytes=0).nbytes == 0
    with pytest.raises(ValueError, match="max_bytes must be at least 0, got -1"):
        SubspaceCache(-1)


def test_cache_is_of_one_shape() -> None:
    cache = SubspaceCache()
    cache.keep("w", factors_of(powerlaw(30, 20), 4))
    assert cache.get("w", (30, 20)) is not None and cache.get("w", (20, 30)) is not None
    for shape in ((30, 3), (31, 20), (20, 20)):
        assert cache.get("w", shape) is None
    assert cache.get("v", (30, 20)) is None


def half_state(**halves: torch.Tensor) -> dict[str, torch.Tensor]:
    whole = {"basis": torch.eye(2, 4).bfloat16(), "shares": torch.tensor([0.6, 0.3]).double()}
    return {f"{kind}.w": value for kind, value in (whole | halves).items()}


@pytest.mark.parametrize(
    ("state", "error", "what"),
    [
        ({"w": torch.ones(1)}, ValueError, r"must hold only basis\.\* and shares\.\*, got 'w'"),
        ({"basis.w": torch.eye(2).bfloat16()}, ValueError, "subspace 'w' lacks its shares"),
        (half_state(basis=torch.eye(2)), TypeError, "must be a dense torch.bfloat16 tensor"),
        (half_state(basis=torch.eye(2).bfloat16().to_sparse()), TypeError, "must be a dense"),
        (half_state(shares=torch.ones(2).double().to("meta")), TypeError, "on the CPU"),
        (half_state(shares=torch.ones(2)), TypeError, "must be a dense torch.float64 tensor"),
        (half_state(basis=torch.zeros(3).bfloat16()), ValueError, "must be a finite matrix"),
        (half_state(basis=torch.full((2, 2), torch.nan).bfloat16()), ValueError, "finite matrix"),
        (half_state(shares=torch.tensor([0.1, 0.2]).double()), ValueError, "must descend"),
        (half_state(shares=torch.tensor([0.1, -0.2]).double()), ValueError, "must descend"),
        (half_state(shares=torch.tensor([3.0, 0.2]).double()), ValueError, "must descend"),
        (half_state(shares=torch.tensor([torch.nan]).double()), ValueError, "must descend"),
        (half_state(basis=torch.zeros(10, 100).bfloat16()), ValueError, "at most 1000 bytes"),
    ],
)
def test_bad_cache_states(
    state: dict[str, torch.Tensor], error: type[Exception], what: str
) -> None:
    cache = SubspaceCache(max_bytes=1000)
    with pytest.raises(error, match=what):
        cache.load_state_dict(state)
    assert cache.nbytes == 0


def test_a_refused_state_leaves_the_state_alone() -> None:
    compressor = Compressor(0.9, feedback=True, cache=SubspaceCache())
    compressor.compress({"w": powerlaw(60, 60, 1.5)})
    before = compressor.state_dict()
    assert set(before) == {"feedback.w", "cache.basis.w", "cache.shares.w"}
    bad = {f"cache.{key}": value for key, value in half_state(basis=torch.ones(3)).items()}
    with pytest.raises(TypeError, match="basis of subspace 'w' must be a dense torch.bfloat16"):
        compressor.load_state_dict({"feedback.w": torch.ones(3, 3), **bad})
    after = compressor.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_refused_update_leaves_the_cache_alone() -> None:
    compressor = Compressor(0.9, "factors-fp32", cache=SubspaceCache())
    compressor.compress({"a": powerlaw(30, 20)})
    before = compressor.state_dict()["cache.basis.a"].clone()
    with pytest.raises(ValueError, match="holds NaN"):
        compressor.compress({"a": powerlaw(30, 20, seed=1), "b": torch.tensor([torch.nan])})
    assert torch.equal(compressor.state_dict()["cache.basis.a"], before)


def test_a_state_of_one_component_comes_back() -> None:
    # Rounding takes its share of the energy a little above 1.
    first = Compressor(0.5, "factors-fp32", cache=SubspaceCache())
    first.compress({"w": torch.ones(400, 400)})
    second = Compressor(0.5, "factors-fp32", cache=SubspaceCache())
    second.load_state_dict(first.state_dict())
    assert second.compress({"w": torch.ones(400, 400)}) == first.compress(
        {"w": torch.ones(400, 400)}
    )


# ---- absences, EF21, owners ----------------------------------------------------------------------


def test_residuals_decay_while_a_client_is_away() -> None:
    feedback = ErrorFeedback(decay=0.5)
    compressor = Compressor(0.5, feedback=feedback)
    compressor.compress({"w": powerlaw(30, 20)})
    before = feedback.state_dict()["w"].clone()
    feedback.absent(3)
    assert torch.equal(feedback.state_dict()["w"], before * 0.125)
    feedback.absent(0)
    assert torch.equal(feedback.state_dict()["w"], before * 0.125)
    with pytest.raises(ValueError, match="rounds must be at least 0, got -1"):
        feedback.absent(-1)
    with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\], got 1.5"):
        ErrorFeedback(decay=1.5)


def test_ef21_brings_the_receiver_to_the_update() -> None:
    update = {"w": powerlaw(40, 30), "b": torch.linspace(-1, 1, 200), "n": torch.tensor([3])}
    sender, receiver = EF21(), EF21()
    compressor = Compressor(0.6, feedback=sender)
    errors = []
    for _ in range(12):
        estimates = receiver.receive(decompress(compressor.compress(update)))
        assert torch.equal(estimates["n"], update["n"])
        for name in ("w", "b"):
            # Both ends have the same, bit for bit.
            assert torch.equal(estimates[name], sender.state_dict()[name])
        errors.append(relative_error(update["w"], estimates["w"]))
    # Each message takes away six tenths of the squared distance, or more.
    for earlier, later in itertools.pairwise(errors):
        assert later <= 0.4 * earlier * (1 + 1e-3)
    with pytest.raises(ValueError, match="use a fresh Compressor"):
        compressor.compress({"w": torch.ones(3, 3)})


def test_ef21_goes_on_from_its_state() -> None:
    update = {"w": powerlaw(40, 30)}
    first = Compressor(0.6, feedback=EF21())
    frames = [first.compress(update) for _ in range(2)]
    again = Compressor(0.6, feedback=EF21())
    again.load_state_dict(first.state_dict())
    assert again.compress(update) == first.compress(update)
    assert frames[0] != frames[1]


def test_state_has_one_owner() -> None:
    for state in (ErrorFeedback(), EF21()):
        owner = Compressor(feedback=state)
        with pytest.raises(ValueError, match=f"this {type(state).__name__} belongs to another"):
            Compressor(feedback=state)
        assert owner.compress({"w": torch.ones(3)})
    cache = SubspaceCache()
    owner = Compressor(cache=cache)
    with pytest.raises(ValueError, match="this SubspaceCache belongs to another Compressor"):
        Compressor(cache=cache)
    # Whoever is gone has nothing any more.
    del owner
    Compressor(cache=cache)


def test_two_calls_at_once_need_two_compressors(monkeypatch: pytest.MonkeyPatch) -> None:
    compressor = Compressor(0.9, feedback=True)
    update = {"w": powerlaw(20, 10)}
    entered, leave = threading.Event(), threading.Event()
    encode = compress_module.Message.encode_wf1

    def slowly(*args: Any, **options: Any) -> Any:
        entered.set()
        assert leave.wait(20)
        return encode(*args, **options)

    monkeypatch.setattr(compress_module.Message, "encode_wf1", slowly)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(compressor.compress, update)
        assert entered.wait(20)
        try:
            with pytest.raises(RuntimeError, match="give each sender a Compressor of its own"):
                compressor.compress(update)
        finally:
            leave.set()
        assert decompress(first.result())
    # And afterwards it goes on.
    assert compressor.compress(update)


@pytest.mark.parametrize("kind", [ErrorFeedback, EF21])
def test_ties_come_and_go(kind: type[ErrorFeedback] | type[EF21]) -> None:
    a, b = powerlaw(40, 30), powerlaw(40, 30, seed=9)
    rounds = [{"a": a}, {"a": a, "b": a}, {"a": a, "b": b}, {"a": a, "b": a}]
    if kind is EF21:
        sender, receiver = EF21(), EF21()
        compressor = Compressor(0.9999, feedback=sender)
        for update in rounds:
            estimates = receiver.receive(decompress(compressor.compress(update)))
            for name, exact in update.items():
                assert torch.equal(estimates[name], sender.state_dict()[name])
                assert relative_error(exact, estimates[name]) <= 1e-3
        return
    compressor = Compressor(0.3, feedback=ErrorFeedback())
    residual: dict[str, torch.Tensor] = {}
    for update in rounds:
        decoded = decompress(compressor.compress(update))
        for name, exact in update.items():
            residual[name] = exact + residual.get(name, torch.zeros_like(exact)) - decoded[name]
            kept = compressor.state_dict()[f"feedback.{name}"]
            assert relative_error(residual[name], kept) <= 1e-10


def test_ef21_takes_a_message_whole_or_not_at_all() -> None:
    receiver = EF21()
    first = receiver.receive({"a": torch.ones(3), "b": torch.ones(2)})
    first["a"].zero_()
    with pytest.raises(ValueError, match=r"update\['b'\]"):
        receiver.receive({"a": torch.ones(3), "b": torch.ones(5)})
    assert receiver.receive({"a": torch.zeros(3)})["a"].tolist() == [1.0] * 3


@pytest.mark.parametrize("name", ["energy", "error", "budget_bytes", "bits_per_param"])
@pytest.mark.parametrize("value", ["x", b"1", True, [0.5]])
def test_wishes_must_be_numbers(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=re.escape(f"{name} must be a number, got {value!r}")):
        Compressor(**{name: value})


def test_state_of_other_kinds_is_refused_by_name() -> None:
    wrong: dict[str, Any] = {"feedback": "yes", "cache": True}
    for name, value in wrong.items():
        with pytest.raises(TypeError, match=f"{name} must be .* or .*, got {value!r}"):
            Compressor(0.9, **{name: value})
