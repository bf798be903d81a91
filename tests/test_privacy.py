"""privacy: sensitivity, noise, and ε against what is known without the accountant."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest
import torch
from decoded import LIKE, in_numpy, random_updates
from scipy import optimize, stats

from fedkd_fast.privacy import (
    LEAST_NOISE,
    GaussianMean,
    epsilon,
    fresh_generator,
    noise_for,
    poisson_participants,
)
from fedkd_fast.updates import Client, Update

DELTA = 1e-5
# In float64, so that no cast hides a bound that is missed by a little.
WIDE = {name: torch.zeros(one.shape, dtype=torch.float64) for name, one in LIKE.items()}
# What the accountant may add to ε by rounding losses up.
ROUNDED_UP = 1.005


def mean_of(clip: float = 1.0, noise: float = 0.0, **options: float) -> GaussianMean:
    given = {"sampling": 0.5, "clients": 10, "delta": DELTA, "seed": 0, **options}
    return GaussianMean(clip, noise, **given)  # type: ignore[arg-type]


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float((one[name] - other[name]).square().sum()) for name in one))


def cancelling(seed: int) -> Update:
    """Factors a billion times as long as what they leave of each other."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(2, side, generator=generator) for side in (12, 10))
    rest = {name: torch.zeros(one.numel()) for name, one in WIDE.items()}
    short = torch.randn(2, 12, generator=generator)
    return {**rest, "w": (torch.cat([left * 1e9, -left * 1e9, short]), right.repeat(3, 1))}


@pytest.mark.parametrize("clip", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e30, "cancelling"])
def test_no_client_moves_the_sum_by_more_than_the_norm(clip: float, size: float | str) -> None:
    most = clip / (0.5 * 10)
    others = random_updates(6)
    before = mean_of(clip).mean(others, WIDE)
    for seed in range(5):
        own = cancelling(seed) if isinstance(size, str) else random_updates(3, seed, size)[seed % 3]
        after = mean_of(clip).mean({**others, 7: own}, WIDE)
        moved = distance(before, after)
        # The subtraction here rounds, too.
        assert moved <= most * (1 + 1e-12)
        if size == 1e30 or (size == 1.0 and clip == 1e-3):
            assert moved > most * (1 - 1e-4), "clipped, not cut further down"
        gone = mean_of(clip).mean({one: u for one, u in others.items() if one != seed}, WIDE)
        assert distance(before, gone) <= most * (1 + 1e-12)


def test_updates_below_the_norm_are_summed_and_divided_by_what_was_expected() -> None:
    updates = random_updates(4)
    found = mean_of(1e6).mean(updates, LIKE)
    for name, one in LIKE.items():
        wanted = sum(in_numpy(update)[name] for update in updates.values()) / 5.0
        assert found[name].dtype == one.dtype and found[name].shape == one.shape
        error = np.abs(found[name].double().numpy() - wanted)
        assert (error <= torch.finfo(one.dtype).eps * np.abs(wanted) + 1e-7).all()


def test_noise_has_its_deviation_and_is_normal() -> None:
    """At a fixed seed, so that the test either holds or does not."""
    like = {"w": torch.zeros(200, 300), "b": torch.zeros(40000, dtype=torch.float64)}
    private = mean_of(clip=3.0, noise=1.7, sampling=0.2, clients=50)
    wanted = 1.7 * 3.0 / (0.2 * 50)
    assert private.deviation == pytest.approx(wanted)
    released = private.mean({}, like)
    noise = np.concatenate([one.double().numpy().reshape(-1) for one in released.values()]) / wanted
    # n·s²/σ² has a χ² distribution, σ known; the mean a normal one; all of it the normal one.
    assert 0.001 < stats.chi2.cdf(float((noise**2).sum()), len(noise)) < 0.999
    assert abs(noise.mean()) * math.sqrt(len(noise)) < 3.3
    assert stats.kstest(noise, "norm").pvalue > 0.001
    again = private.mean({}, like)
    later = again["b"].numpy() / wanted
    assert abs(float(np.corrcoef(later, noise[-40000:])[0, 1])) * 200 < 3.3


def test_noise_is_added_to_the_mean_and_does_not_depend_on_it() -> None:
    updates = random_updates(4)
    plain, empty, both = (
        mean_of(noise=noise).mean(given, WIDE)
        for noise, given in ((0.0, updates), (2.0, {}), (2.0, updates))
    )
    for name in WIDE:
        assert torch.allclose(both[name], plain[name] + empty[name], rtol=1e-12, atol=1e-12)


def test_clients_in_any_order_give_the_same_bits() -> None:
    updates = random_updates(6)
    one, other = (
        mean_of(noise=1.0).mean(u, LIKE) for u in (updates, dict(reversed(updates.items())))
    )
    assert all(torch.equal(one[name], other[name]) for name in LIKE)


def test_state_of_the_noise_is_restored() -> None:
    private, other = mean_of(noise=1.0), mean_of(noise=1.0, seed=5)
    private.mean({}, LIKE)
    state = json.loads(json.dumps(private.state_dict()))
    wanted = [private.mean({}, LIKE) for _ in range(2)]
    other.load_state_dict(state)
    for one in wanted:
        found = other.mean({}, LIKE)
        assert all(torch.equal(found[name], one[name]) for name in LIKE)
    assert not torch.equal(wanted[0]["w"], wanted[1]["w"])
    for broken in ({}, {"bit_generator": "PCG64DXSM"}, {**state, "bit_generator": "MT19937"}):
        with pytest.raises(ValueError, match="state must be of a PCG64DXSM generator, got"):
            other.load_state_dict(broken)


def test_without_a_seed_the_noise_is_new_each_time() -> None:
    options = {"sampling": 1.0, "clients": 1, "delta": DELTA}
    one, other = (GaussianMean(1.0, 1.0, **options).mean({}, LIKE) for _ in range(2))  # type: ignore[arg-type]
    assert not torch.equal(one["w"], other["w"])


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e200])
def test_what_is_not_finite_counts_as_zero(value: float, caplog: pytest.LogCaptureFixture) -> None:
    updates = random_updates(3)
    broken = {**updates[0], "b": torch.full((7,), value, dtype=torch.float64)}
    found = mean_of().mean({**updates, "x": broken}, WIDE)
    assert all(torch.equal(one, found[name]) for name, one in mean_of().mean(updates, WIDE).items())
    assert "update of client x is not finite and counts as zero" in caplog.text


def test_tied_tensors_are_noised_once() -> None:
    one = torch.zeros(50)
    found = mean_of(noise=1.0).mean({}, {"a": one, "b": one})
    assert found["a"] is found["b"] and float(found["a"].abs().min()) > 0.0


def test_integers_are_not_released() -> None:
    like = {**LIKE, "steps": torch.zeros(1, dtype=torch.int64)}
    with pytest.raises(ValueError, match="floating tensors only, got 'steps' torch.int64"):
        mean_of().mean({}, like)
    update = {**random_updates(1)[0], "extra": torch.ones(1)}
    with pytest.raises(ValueError, match="update of client 3 does not match: 'extra' only in it"):
        mean_of().mean({3: update}, LIKE)


def exact_delta(eps: float, sigma: float, sampling: float) -> float:
    """Of one round, adding or removing a client: both integrals in closed form.

    P = (1-q)·N(0, σ²) + q·N(1, σ²) against Q = N(0, σ²). P/Q rises: it is above e^ε right of x.
    """

    def tail(x: float) -> tuple[float, float]:
        q = float(stats.norm.sf(x / sigma))
        return (1 - sampling) * q + sampling * float(stats.norm.sf((x - 1) / sigma)), q

    def crossing(ratio: float) -> float:
        return 0.5 + sigma**2 * math.log((ratio - 1 + sampling) / sampling)

    p, q = tail(crossing(math.exp(eps)))
    removed = p - math.exp(eps) * q
    # Q/P never reaches e^ε; or, where all take part, both directions are alike.
    if math.exp(-eps) <= 1 - sampling or sampling == 1.0:
        return removed
    p, q = tail(crossing(math.exp(-eps)))
    return max(removed, (1 - q) - math.exp(eps) * (1 - p))


def exact_epsilon(sigma: float, sampling: float) -> float:
    return float(optimize.brentq(lambda eps: exact_delta(eps, sigma, sampling) - DELTA, 1e-6, 50))


@pytest.mark.parametrize("sampling", [0.01, 0.3, 0.999])
@pytest.mark.parametrize("sigma", [0.7, 1.5, 4.0])
def test_one_round_against_the_closed_form(sigma: float, sampling: float) -> None:
    exact = exact_epsilon(sigma, sampling)
    found = epsilon(sigma, sampling, 1, DELTA)
    assert exact * (1 - 1e-6) <= found <= exact * ROUNDED_UP


@pytest.mark.parametrize(("sigma", "rounds"), [(1.0, 1), (5.0, 30), (20.0, 1000)])
def test_everybody_in_each_round_against_the_analytic_gaussian(sigma: float, rounds: int) -> None:
    """Rounds of noise z are one of z/√T (Balle and Wang 2018)."""
    exact = exact_epsilon(sigma / math.sqrt(rounds), 1.0)
    assert epsilon(sigma, 1.0, rounds, DELTA) == pytest.approx(exact, rel=1e-6)
    # The subsampled accountant agrees where nearly everybody comes.
    nearly = epsilon(sigma, 1 - 1e-9, rounds, DELTA)
    assert exact * (1 - 1e-6) <= nearly <= exact * ROUNDED_UP


def renyi_epsilon(sigma: float, sampling: float, rounds: int) -> float:
    """By Rényi divergences of integer orders (Mironov et al. 2019): ε(α) + ln(1/δ)/(α-1)."""
    best = math.inf
    for order in range(2, 129):
        terms = [
            math.lgamma(order + 1) - math.lgamma(k + 1) - math.lgamma(order - k + 1)
            + (order - k) * math.log1p(-sampling) + k * math.log(sampling)
            + k * (k - 1) / (2 * sigma**2)
            for k in range(order + 1)
        ]  # fmt: skip
        log_moment = float(np.logaddexp.reduce(terms))
        best = min(best, (rounds * log_moment + math.log(1 / DELTA)) / (order - 1))
    return best


@pytest.mark.parametrize(
    ("noise", "epochs", "published"), [(1.3, 15, 1.19), (1.1, 60, 3.01), (0.7, 45, 7.10)]
)
def test_published_figures(noise: float, epochs: int, published: float) -> None:
    """Of DP-SGD on MNIST in TensorFlow Privacy's tutorials, by Rényi divergences."""
    sampling, rounds = 256 / 60000, epochs * 60000 // 256
    assert renyi_epsilon(noise, sampling, rounds) == pytest.approx(published, rel=0.005)
    found = epsilon(noise, sampling, rounds, DELTA)
    assert 0.7 * published < found < published


def test_more_rounds_more_clients_and_less_noise_give_away_more() -> None:
    base = epsilon(1.0, 0.1, 20, DELTA)
    assert epsilon(1.0, 0.1, 21, DELTA) > base
    assert epsilon(1.0, 0.11, 20, DELTA) > base
    assert epsilon(0.95, 0.1, 20, DELTA) > base
    assert epsilon(1.0, 0.1, 20, DELTA / 10) > base
    rows = [epsilon(z, 0.2, 10, DELTA) for z in (0.1, 0.3, 0.6, 1.0, 2.0, 5.0, 20.0)]
    assert rows == sorted(rows, reverse=True)
    assert epsilon(1.0, 0.1, 0, DELTA) == 0.0 and epsilon(0.0, 0.1, 1, DELTA) == math.inf


@pytest.mark.parametrize(("target", "sampling"), [(2.0, 1.0), (8.0, 0.2)])
def test_calibration(target: float, sampling: float) -> None:
    noise = noise_for(target, sampling, 30, DELTA)
    assert (
        epsilon(noise, sampling, 30, DELTA) <= target < epsilon(noise / 1.002, sampling, 30, DELTA)
    )


def test_calibration_ends_at_the_least_noise() -> None:
    assert noise_for(1e7, 1.0, 1, DELTA) == LEAST_NOISE


def test_mean_knows_its_epsilon() -> None:
    private = mean_of(noise=1.2, sampling=0.3)
    assert private.epsilon(7) == epsilon(1.2, 0.3, 7, DELTA)


def test_participants_are_drawn_by_coins_of_their_own() -> None:
    generator = fresh_generator(3)
    rounds = [poisson_participants(20, 0.3, generator) for _ in range(2000)]
    came = np.zeros((2000, 20))
    for row, chosen in zip(came, rounds, strict=True):
        assert chosen == sorted(set(chosen))
        row[chosen] = 1
    # Each client's count is binomial; so is that of pairs, as coins do not know each other.
    assert 0.001 < stats.binom.cdf(came.sum(), 40000, 0.3) < 0.999
    assert (abs(came.sum(axis=0) - 600) < 4.5 * math.sqrt(2000 * 0.21)).all()
    pairs = came.T @ came
    off = pairs[~np.eye(20, dtype=bool)]
    assert (abs(off - 180) < 4.5 * math.sqrt(2000 * 0.09 * 0.91)).all()
    variance = came.sum(axis=1).var()
    assert variance == pytest.approx(20 * 0.21, rel=0.15)
    assert poisson_participants(5, 1.0, generator) == [0, 1, 2, 3, 4]
    assert [] in [poisson_participants(2, 0.1, generator) for _ in range(20)]
    again = fresh_generator(3)
    assert poisson_participants(20, 0.3, again) == rounds[0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("clip", one) for one in (0.0, -1.0, math.inf, math.nan)),
        *(("noise", one) for one in (-1.0, LEAST_NOISE / 2, math.inf, math.nan)),
        *(("sampling", one) for one in (0.0, 1.1, math.nan)),
        *(("delta", one) for one in (0.0, 1.0, math.nan)),
        ("clients", 0),
    ],
)
def test_numbers_out_of_range(name: str, value: float) -> None:
    words = {"noise": "noise_multiplier must be 0, or at least 0.05"}.get(name, f"{name} must ")
    with pytest.raises(ValueError, match=f"{words}.*, got {value}"):
        mean_of(**{name: value})


def test_numbers_of_accounts() -> None:
    with pytest.raises(TypeError, match=r"rounds must be an integer, got 1\.5"):
        epsilon(1.0, 0.5, 1.5, DELTA)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rounds must be at least 0, got -1"):
        epsilon(1.0, 0.5, -1, DELTA)
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        noise_for(1.0, 0.5, 0, DELTA)
    for target in (0.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="target must be positive and finite, got"):
            noise_for(target, 0.5, 1, DELTA)
    with pytest.raises(TypeError, match="clients must be an integer, got True"):
        poisson_participants(True, 0.5, fresh_generator())
    with pytest.raises(ValueError, match=r"sampling must lie in \(0, 1\], got 2"):
        poisson_participants(3, 2, fresh_generator())


def test_accounting_needs_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    mean_of(noise=1.0).mean({}, LIKE)
    with pytest.raises(ImportError, match=r'pip install "fedkd-fast\[privacy\]"'):
        epsilon(1.0, 0.5, 1, DELTA)


def test_mixed_names_of_clients() -> None:
    updates: dict[Client, Update] = {"b": random_updates(1)[0], 2: random_updates(1, 1)[0]}
    assert mean_of().mean(updates, LIKE)["w"].shape == (12, 10)
