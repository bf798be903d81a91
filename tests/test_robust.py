"""robust: each rule against numpy, what hostile clients can do to it, and what it refuses."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from decoded import LIKE, Array, as_vector, in_numpy, random_updates

from fedkd_fast import Compressor, aggregate, ops, robust
from fedkd_fast.decompression import decode_frame_parts
from fedkd_fast.robust import check_rule, robust_mean
from fedkd_fast.updates import Client, Update

RULES = ("mean", "clip:3.5", "clip", "median", "trimmed:0.25", "krum:2")
# Of a sum of a few numbers, in steps of what the result's dtype can tell apart.
STEPS = 2


def assert_rounds_to(
    found: Mapping[str, torch.Tensor],
    wanted: Mapping[str, Array],
    like: Mapping[str, torch.Tensor] = LIKE,
) -> None:
    assert list(found) == list(like)
    for name, one in like.items():
        assert found[name].dtype == one.dtype and found[name].shape == one.shape
        error = np.abs(found[name].double().numpy() - wanted[name])
        most = STEPS * torch.finfo(one.dtype).eps * np.abs(wanted[name])
        assert (error <= most + torch.finfo(one.dtype).tiny).all(), name


def numpy_mean(
    updates: Mapping[Client, Update], factors: Mapping[Client, float], total: float
) -> dict[str, Array]:
    dense = {client: in_numpy(update) for client, update in updates.items()}
    return {
        name: sum((factors[one] * dense[one][name] for one in factors), np.zeros(())) / total
        for name in LIKE
    }


def numpy_krum(updates: Mapping[Client, Update], hostile: int) -> set[Client]:
    vectors = {client: as_vector(in_numpy(update)) for client, update in updates.items()}
    scores = {}
    for one, vector in vectors.items():
        away = sorted(
            float(((vector - other) ** 2).sum()) for key, other in vectors.items() if key != one
        )
        scores[one] = sum(away[: len(vectors) - hostile - 2])
    return set(sorted(scores, key=scores.__getitem__)[: len(vectors) - hostile])


@pytest.mark.parametrize("weights", [None, {one: 1.0 + one % 3 for one in range(9)}])
def test_mean(weights: dict[Client, float] | None) -> None:
    updates = random_updates(9)
    factors = weights or dict.fromkeys(updates, 1.0)
    found = robust_mean(updates, "mean", like=LIKE, weights=weights)
    assert_rounds_to(found.values, numpy_mean(updates, factors, sum(factors.values())))
    assert not found.left_out and not found.clipped


@pytest.mark.parametrize("rule", ["clip:22", "clip"])
@pytest.mark.parametrize("weights", [None, {one: float(one) for one in range(9)}])
def test_clip(rule: str, weights: dict[Client, float] | None) -> None:
    updates = random_updates(9)
    norms = {one: np.linalg.norm(as_vector(in_numpy(update))) for one, update in updates.items()}
    most = 22.0 if rule == "clip:22" else float(np.median(list(norms.values())))
    scales = {one: min(1.0, most / norm) for one, norm in norms.items()}
    found = robust_mean(updates, rule, like=LIKE, weights=weights)
    given = weights or dict.fromkeys(updates, 1.0)
    factors = {one: given[one] * scales[one] for one in updates}
    assert_rounds_to(found.values, numpy_mean(updates, factors, sum(given.values())))
    assert found.clipped == pytest.approx({one: s for one, s in scales.items() if s < 1.0})
    assert 0 < len(found.clipped) < 9


@pytest.mark.parametrize("clients", [1, 2, 5, 8])
def test_median(clients: int) -> None:
    updates = random_updates(clients)
    dense = [in_numpy(update) for update in updates.values()]
    wanted = {name: np.median([one[name] for one in dense], axis=0) for name in LIKE}
    assert_rounds_to(robust_mean(updates, "median", like=LIKE).values, wanted)


@pytest.mark.parametrize(
    ("share", "clients", "cut"), [("0.2", 5, 1), ("0.29", 100, 29), ("4e-1", 8, 3)]
)
def test_trimmed(share: str, clients: int, cut: int) -> None:
    updates = random_updates(clients)
    dense = [in_numpy(update) for update in updates.values()]
    wanted = {
        name: np.sort([one[name] for one in dense], axis=0)[cut : clients - cut].mean(axis=0)
        for name in LIKE
    }
    assert_rounds_to(robust_mean(updates, f"trimmed:{share}", like=LIKE).values, wanted)


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    updates = random_updates(5)
    whole = robust_mean(updates, "median", like=LIKE).values
    monkeypatch.setattr(robust, "_BLOCK", 5 * 3 * 10)  # three rows of `w`
    assert_rounds_to(
        robust_mean(updates, "median", like=LIKE).values,
        {name: value.double().numpy() for name, value in whole.items()},
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("hostile", [1, 2, 3])
def test_krum(seed: int, hostile: int) -> None:
    updates = random_updates(9, seed)
    chosen = numpy_krum(updates, hostile)
    found = robust_mean(updates, f"krum:{hostile}", like=LIKE)
    assert set(found.left_out) == set(updates) - chosen and len(found.left_out) == hostile
    ones = dict.fromkeys(sorted(chosen, key=str), 1.0)
    assert_rounds_to(found.values, numpy_mean(updates, ones, len(chosen)))
    weights = {one: 1.0 + int(one) for one in updates}
    weighted = robust_mean(updates, f"krum:{hostile}", like=LIKE, weights=weights)
    assert weighted.left_out == found.left_out
    factors = {one: weights[one] for one in ones}
    assert_rounds_to(weighted.values, numpy_mean(updates, factors, sum(factors.values())))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("mixed", [True, False])
def test_krum_tells_apart_what_nearly_cancels(offset: float, mixed: bool, seed: int) -> None:
    """All share a large part; what they differ in is lost in float64's squared norms."""
    generator = torch.Generator().manual_seed(seed)
    shape, ranks = (30, 20), 2
    common = [torch.randn(ranks, side, generator=generator) for side in shape]
    common[0] *= offset
    updates: dict[Client, Update] = {}
    for client in range(7):
        own = [torch.randn(1, side, generator=generator) for side in shape]
        own[0] *= 1e-5 * (3.0 if client in (1, 4) else 1.0)
        left, right = (torch.cat(both) for both in zip(common, own, strict=True))
        dense = mixed and client % 2
        updates[client] = {"w": left.double().T @ right.double() if dense else (left, right)}
    like = {"w": torch.zeros(shape)}
    assert robust_mean(updates, "krum:2", like=like).left_out == (1, 4)


def hostile_updates(kind: str, count: int) -> list[Update]:
    far = random_updates(count, seed=99, size=1e30)
    if kind == "random":
        return list(far.values())
    value = 1e30 if kind == "far above" else -1e30
    same = {name: torch.full((one.numel(),), value) for name, one in LIKE.items()}
    return [{**same, "h": torch.full((6,), -6e4, dtype=torch.float16)}] * count


@pytest.mark.parametrize("kind", ["random", "far above", "far below"])
@pytest.mark.parametrize(("rule", "hostile"), [("median", 4), ("trimmed:0.34", 3), ("krum:3", 3)])
def test_hostile_clients_stay_without_influence(rule: str, hostile: int, kind: str) -> None:
    honest = random_updates(9 - hostile)
    attackers = dict(enumerate(hostile_updates(kind, hostile), 20))
    found = robust_mean({**honest, **attackers}, rule, like=LIKE)
    dense = [in_numpy(update) for update in honest.values()]
    for name, one in LIKE.items():
        values = np.stack([update[name] for update in dense])
        slack = torch.finfo(one.dtype).eps * np.abs(values).max(axis=0)
        result = found.values[name].double().numpy()
        assert (result >= values.min(axis=0) - slack).all(), name
        assert (result <= values.max(axis=0) + slack).all(), name
    assert set(found.left_out) == (set(attackers) if rule == "krum:3" else set())


def test_mean_goes_where_one_hostile_client_wants() -> None:
    updates = random_updates(9) | {20: hostile_updates("far above", 1)[0]}
    assert float(robust_mean(updates, "mean", like=LIKE).values["w"].min()) > 1e28


@pytest.mark.parametrize("hostile", [1, 3])
def test_clipped_clients_move_the_mean_by_their_share_of_the_norm(hostile: int) -> None:
    """Replacing F of n updates moves the mean by at most 2·NORM·F/n."""
    like = {name: torch.zeros(one.shape, dtype=torch.float64) for name, one in LIKE.items()}
    honest = random_updates(9)
    attacked = {**honest, **dict(enumerate(hostile_updates("random", hostile)))}
    both = [robust_mean(one, "clip:2.5", like=like).values for one in (honest, attacked)]
    moved = sum(float((both[0][name] - both[1][name]).square().sum()) for name in like)
    assert math.sqrt(moved) <= 2 * 2.5 * hostile / 9 * (1 + 1e-9)


@pytest.mark.parametrize("rule", RULES)
def test_order_of_clients_and_names_changes_no_bit(rule: str) -> None:
    updates = {(one if one % 2 else f"site {one}"): u for one, u in random_updates(9).items()}
    wanted = robust_mean(updates, rule, like=LIKE)
    shuffled = random.Random(0)
    for _ in range(5):
        items = [
            (one, dict(shuffled.sample(list(update.items()), len(update))))
            for one, update in updates.items()
        ]
        shuffled.shuffle(items)
        found = robust_mean(dict(items), rule, like=LIKE)
        assert all(torch.equal(found.values[name], wanted.values[name]) for name in LIKE)
        assert found.left_out == wanted.left_out and found.clipped == wanted.clipped


@pytest.mark.parametrize("rule", ["mean", "clip:1e6", "clip", "median", "trimmed:0.25", "krum:2"])
@pytest.mark.parametrize("client", [0, 2])
def test_equal_updates_give_that_update(rule: str, client: int) -> None:
    update = random_updates(3)[client]
    found = robust_mean(dict.fromkeys(range(7), update), rule, like=LIKE)
    for name, values in in_numpy(update).items():
        wanted = torch.from_numpy(values.copy()).to(LIKE[name].dtype)
        assert torch.equal(found.values[name], wanted), name


def test_ties_of_krum_go_by_client() -> None:
    updates = dict.fromkeys(["b", 10, "a", 9, 2, 1, 3], random_updates(1)[0])
    assert robust_mean(updates, "krum:2", like=LIKE).left_out == ("a", "b")


INTEGERS = {"n": torch.zeros(2, dtype=torch.int64), "f": torch.zeros(2, dtype=torch.bool)}


@pytest.mark.parametrize(
    ("rule", "numbers"),
    [("mean", [20, 2]), ("clip:0.5", [20, 2]), ("median", [1, 2]), ("trimmed:0.25", [1, 2])],
)
def test_integers_and_booleans(rule: str, numbers: list[int]) -> None:
    """Rounded, true from one half on, and not scaled where updates are clipped."""
    columns = [0, 1, 1, 80], [2, 2, 2, 3], [True, False, False, True], [False, False, True, False]
    updates: dict[Client, Update] = {
        client: {"n": torch.tensor([a, b]), "f": torch.tensor([c, d]), "w": torch.ones(1)}
        for client, (a, b, c, d) in enumerate(zip(*columns, strict=True))
    }
    found = robust_mean(updates, rule, like={**INTEGERS, "w": torch.zeros(1)}).values
    assert found["n"].dtype == torch.int64 and found["f"].dtype == torch.bool
    assert found["n"].tolist() == numbers
    assert found["f"].tolist() == [True, False]


def test_tied_tensors_stay_tied_and_count_once() -> None:
    one = torch.zeros(2)
    like = {"a": one, "b": one, "c": torch.zeros(2)}
    updates: dict[Client, Update] = {
        0: {
            "a": torch.tensor([3.0, 0.0]),
            "b": torch.full((2,), 9.0),
            "c": torch.tensor([0.0, 4.0]),
        }
    }
    found = robust_mean(updates, "clip:2.5", like=like)
    assert found.values["a"] is found.values["b"] and found.clipped == {0: 0.5}
    assert found.values["a"].tolist() == [1.5, 0.0]


@pytest.mark.parametrize("codec", ["wf1", "dense", "wf0", "factors-fp32", "raw"])
def test_frames_are_averaged_as_they_decode(codec: str) -> None:
    """What decoders deliver, in any mode, is what the rules take."""
    like = {**LIKE, "n": torch.zeros(2, dtype=torch.int64), "empty": torch.zeros(0, 3)}
    updates: dict[Client, Update] = {}
    frames = []
    for client, update in random_updates(5).items():
        dense = {
            name: torch.from_numpy(one).to(like[name].dtype)
            for name, one in in_numpy(update).items()
        }
        rest = {"n": torch.tensor([client, 0]), "empty": torch.zeros(0, 3)}
        frames.append(Compressor(0.9, codec=codec).compress({**dense, **rest}))
        found, _ = decode_frame_parts(
            frames[-1], like, schema_name="like", max_bytes=2**20, module=ops
        )
        updates[client] = {entry.name: parts for entry, parts in found}
    wanted = {name: one.double().numpy() for name, one in aggregate(frames).items()}
    slack = max(float(np.abs(one).max(initial=0.0)) for one in wanted.values())
    for name, one in robust_mean(updates, "mean", like=like).values.items():
        assert one.dtype == like[name].dtype and one.shape == like[name].shape
        error = np.abs(one.double().numpy() - wanted[name]).max(initial=0.0)
        eps = torch.finfo(one.dtype).eps if one.is_floating_point() else 0.0
        assert error <= 8 * eps * slack, name
    for rule in RULES[1:-1]:
        robust_mean(updates, rule, like=like)
    robust_mean(updates, "krum:1", like=like)


def test_rules_are_read() -> None:
    assert [check_rule(text).kind for text in RULES] == [
        "mean",
        "clip",
        "clip",
        "median",
        "trimmed",
        "krum",
    ]
    assert [check_rule(text).least for text in RULES] == [1, 1, 1, 1, 4, 7]
    assert check_rule("clip:1e-3").value == 0.001 and check_rule("clip").value is None
    updates = random_updates(5)
    read = robust_mean(updates, check_rule("krum:1"), like=LIKE)
    assert read.left_out == robust_mean(updates, "krum:1", like=LIKE).left_out


@pytest.mark.parametrize(
    "rule",
    [
        *("", "Mean", "mean:1", "clip:", "clip:0", "clip:nan", "clip:1e999", "clip:-1", "median:2"),
        *("trimmed", "trimmed:0", "trimmed:0.5", "trimmed:x", "krum", "krum:0", "krum:1.5"),
        *("krum: 1", None, 3),
    ],
)
def test_wrong_rules(rule: object) -> None:
    with pytest.raises(ValueError, match=r"aggregation must be mean, clip, .*, got ") as caught:
        check_rule(rule, "aggregation")
    assert str(caught.value).endswith(repr(rule))


@pytest.mark.parametrize(("rule", "least"), [("krum:2", 7), ("trimmed:0.2", 5), ("mean", 1)])
def test_too_few_updates(rule: str, least: int) -> None:
    message = f"rule {rule} needs at least {least} updates, got {least - 1}"
    with pytest.raises(ValueError, match=message):
        robust_mean(random_updates(least - 1), rule, like=LIKE)
    robust_mean(random_updates(least), rule, like=LIKE)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_updates_that_are_not_finite_are_refused(rule: str, value: float) -> None:
    for name in ("b", "w"):
        updates = random_updates(9)
        update = dict(updates[4])
        if name == "b":
            update["b"] = torch.tensor([value] + [0.0] * 6)
        else:
            update["w"] = (torch.full((1, 12), value), torch.zeros(1, 10))
        updates[4] = update
        with pytest.raises(ValueError, match=f"update of client 4: tensor '{name}' holds NaN, Inf"):
            robust_mean(updates, rule, like=LIKE)


def test_values_beyond_the_dtype_are_refused() -> None:
    like = {"h": torch.zeros(2, 2, dtype=torch.float16)}
    good: Update = {"h": (torch.full((1, 2), 3e2), torch.full((1, 2), 2e2))}
    assert float(robust_mean({0: good}, "mean", like=like).values["h"].max()) == 6e4
    wide: Update = {"h": (torch.full((1, 2), 3e2), torch.full((1, 2), 3e2))}
    with pytest.raises(ValueError, match=r"client 1: tensor 'h' .* more than torch.float16 can"):
        robust_mean({0: good, 1: wide}, "median", like=like)
    # Large factors whose product is not.
    apart: Update = {"h": (torch.tensor([[1e5, 0.0]]), torch.tensor([[0.0, 0.5]]))}
    assert robust_mean({0: apart}, "mean", like=like).values["h"][0].tolist() == [0.0, 49984.0]


def test_integers_beyond_float64_are_refused() -> None:
    update = {"n": torch.tensor([2**53 + 1, 0]), "f": torch.tensor([True, False])}
    with pytest.raises(ValueError, match=r"client 0: tensor 'n' holds integers beyond 2\^53"):
        robust_mean({0: update}, "mean", like=INTEGERS)


def test_updates_that_do_not_fit() -> None:
    update = random_updates(1)[0]
    wrong: dict[str, object] = {
        r"client 7 does not match: 'b' not in it": None,
        r"tensor 'b' must have shape \(7,\), got \(8,\)": torch.zeros(8),
        r"tensor 'b' must have factors of a \(7,\) tensor": (torch.ones(1, 2), torch.ones(1, 2)),
        r"tensor 'b' must be of a kind with torch.float32, got torch.int64": torch.ones(
            7, dtype=torch.int64
        ),
    }
    for message, value in wrong.items():
        broken = {name: one for name, one in update.items() if name != "b"}
        with pytest.raises(ValueError, match=message):
            robust_mean(
                {7: broken if value is None else {**broken, "b": value}},  # type: ignore[dict-item]
                "mean",
                like=LIKE,
            )
    ranks = {**update, "w": (torch.ones(2, 12), torch.ones(3, 10))}
    with pytest.raises(ValueError, match=r"client 7: tensor 'w' must have factors of a \(12, 10\)"):
        robust_mean({7: ranks}, "mean", like=LIKE)


def test_weights() -> None:
    updates = random_updates(5)
    unequal = {one: 1.0 + one for one in range(5)}
    for rule in ("median", "trimmed:0.2"):
        with pytest.raises(ValueError, match=f"weights must be equal with rule {rule}, got"):
            robust_mean(updates, rule, like=LIKE, weights=unequal)
        equal = robust_mean(updates, rule, like=LIKE, weights=dict.fromkeys(range(5), 3.0)).values
        plain = robust_mean(updates, rule, like=LIKE).values
        assert all(torch.equal(equal[name], plain[name]) for name in LIKE)
    for weights, message in [
        ({0: 1.0}, r"weights must be of clients \[0, 1, 2, 3, 4\], got \[0\]"),
        ({**unequal, 3: -1.0}, "finite and >= 0, got -1.0 at 3"),
        ({**unequal, 3: math.nan}, "finite and >= 0, got nan at 3"),
        (dict.fromkeys(range(5), 0.0), "not all be zero"),
    ]:
        with pytest.raises(ValueError, match=message):
            robust_mean(updates, "mean", like=LIKE, weights=weights)
    huge = robust_mean(updates, "mean", like=LIKE, weights=dict.fromkeys(range(5), 1e308))
    assert all(bool(torch.isfinite(value).all()) for value in huge.values.values())
    (out,) = robust_mean(updates, "krum:1", like=LIKE).left_out
    with pytest.raises(ValueError, match="not all be zero where rule krum:1 chose"):
        robust_mean(
            updates, "krum:1", like=LIKE, weights={one: float(one == out) for one in updates}
        )
