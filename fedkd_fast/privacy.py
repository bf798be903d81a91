"""Differential privacy of clients: clipped, noised means of updates, and what they give away.

Central client-level DP as in DP-FedAvg (McMahan et al. 2018). In each of T rounds each of N clients
takes part with probability q, by a coin of its own; the server releases::

    g = (Σ_i min(1, C/|u_i|)·u_i + N(0, (z·C)²·I)) / (q·N)

with u_i what the upload of client i decodes to, its norm taken over all that is released, and a
divisor that does not depend on who came. What clients and outsiders learn of any one client, by all
released models together, is then (ε, δ)-differentially private, where neighbours differ in all the
data of one client. The server is trusted: it sees every update.

**Clip, noise, compress: in this order.** What is clipped is the decoded frame, exactly what the
server would average otherwise. Clients may compress as they like and keep error feedback: a
residual carries what earlier rounds left out, so nothing that a client does bounds what it sends,
and the bound must be on what is received, each round. What becomes of g afterwards, by a server
optimizer, the codec of the broadcast and error feedback of the broadcast, is post-processing and
gives nothing away.

**What voids the guarantee.** Anything else that depends on the data and is released, or decides
what is: robust rules and refusals by the norms of the round (one client moves what the others
count), waiting for a quorum, weights by numbers of samples, scores or losses on clients' data,
stopping by them, spectra and logs of updates. A fixed number of participants in place of
`poisson_participants`, or participants that an observer knows, take away what the accounting
credits to sampling: it is q = 1 then. So does a seed that others know or guess, of noise or
participants: generators take theirs from the operating system unless a simulation asks for one.
They are statistical generators, not cryptographic ones.

Noise is drawn in float64, and what is released is rounded to the dtype. The accounting is that of
real numbers: which floats can come out at all depends on the data in their last bits (Mironov
2012), and there is no discrete or snapped noise here against that.
"""

from __future__ import annotations

import logging
import math
import secrets
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedkd_fast._extras import needed
from fedkd_fast.tensors import tied_names
from fedkd_fast.updates import Client, Update, add_to, fitting, in_order, norm_bound

_log = logging.getLogger(__name__)

# Privacy losses are rounded up to multiples of this, or of more where they spread wider.
_LOSS_STEP = 2e-4
# Less noise than this times the clipping norm is no privacy, whatever its ε.
LEAST_NOISE = 0.05


def fresh_generator(seed: int | None = None) -> np.random.Generator:
    """Return a generator for noise or for participants.

    Args:
        seed: None takes 256 bits from the operating system, as privacy needs. A number makes a
            simulation reproducible and voids the guarantee towards all who know it; give each use
            one of its own (`_seeds.derived_seed`).
    """
    entropy = secrets.randbits(256) if seed is None else seed
    return np.random.Generator(np.random.PCG64DXSM(entropy))


def poisson_participants(
    clients: int, sampling: float, generator: np.random.Generator
) -> list[int]:
    """Draw who takes part in a round: each client with probability `sampling`, independently.

    Nobody may be drawn: the round then releases noise alone, and must be held all the same.

    Args:
        clients: how many there are, N.
        sampling: q in (0, 1].
        generator: from `fresh_generator`, apart from that of the noise.

    Returns:
        Numbers from 0 to N - 1, ascending.

    Raises:
        TypeError: a number of clients that is no integer.
        ValueError: fewer than 1 client, or a probability out of its range.
    """
    _check_count("clients", clients, 1)
    _check_sampling(sampling)
    return [int(one) for one in np.flatnonzero(generator.random(clients) < sampling)]


def epsilon(noise_multiplier: float, sampling: float, rounds: int, delta: float) -> float:
    """Return ε of the (ε, δ)-differential privacy that rounds of `GaussianMean` give.

    By the privacy loss distribution of the Poisson-subsampled Gaussian mechanism (Google's
    dp-accounting), with one client more or less, rounded towards a larger ε; some 10 % below what
    Rényi divergences give. With q = 1, T Gaussian mechanisms are one of z/√T, whose ε is known
    exactly (Balle and Wang 2018).

    Args:
        noise_multiplier: z, the standard deviation of the noise of the sum, in clipping norms.
        sampling: q in (0, 1], the probability that a client takes part in a round.
        rounds: T, at least 0.
        delta: δ in (0, 1); well below 1/N.

    Returns:
        At least 0; ``inf`` without noise. Takes up to a second.

    Raises:
        TypeError: rounds that are no integer.
        ValueError: a number out of its range.
        ImportError: dp-accounting is not installed.
    """
    _check_noise(noise_multiplier)
    _check_sampling(sampling)
    _check_count("rounds", rounds, 0)
    _check_delta(delta)
    accounting = _accounting()
    if rounds == 0:
        return 0.0
    if noise_multiplier == 0.0:
        return math.inf
    if sampling == 1.0:
        sigma = noise_multiplier / math.sqrt(rounds)
        return float(accounting.get_epsilon_gaussian(sigma, delta))
    # How far losses go, of all rounds together and of one.
    spread = max(
        sampling * math.sqrt(rounds) / noise_multiplier,
        1.0 / noise_multiplier,
        0.05 / noise_multiplier**2,
    )
    accountant = accounting.pld.PLDAccountant(
        accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, _LOSS_STEP * max(1.0, spread)
    )
    event = accounting.GaussianDpEvent(noise_multiplier)
    accountant.compose(accounting.PoissonSampledDpEvent(sampling, event), rounds)
    return float(accountant.get_epsilon(delta))


def noise_for(target: float, sampling: float, rounds: int, delta: float) -> float:
    """Return the least noise multiplier whose `epsilon` is at most the target, to 0.1 %.

    Args:
        target: ε, positive.
        sampling: as in `epsilon`.
        rounds: as in `epsilon`, at least 1.
        delta: as in `epsilon`.

    Returns:
        z, at least `LEAST_NOISE`. Takes some ten times what `epsilon` does.

    Raises:
        TypeError: rounds that are no integer.
        ValueError: a number out of its range.
        ImportError: dp-accounting is not installed.
    """
    if not 0.0 < target < math.inf:
        raise ValueError(f"target must be positive and finite, got {target}")
    _check_count("rounds", rounds, 1)
    high = 1.0
    while epsilon(high, sampling, rounds, delta) > target:
        high *= 2.0
    while high > LEAST_NOISE:
        low = max(high / 2.0, LEAST_NOISE)
        if epsilon(low, sampling, rounds, delta) > target:
            break
        high = low
    while high > 1.001 * low:
        middle = math.sqrt(low * high)
        if epsilon(middle, sampling, rounds, delta) > target:
            low = middle
        else:
            high = middle
    return high


class GaussianMean:
    """Means of updates that are private for each client; the equation stands at the module's head.

    Args:
        clip: C, the largest L2 norm of an update over all that is released. Smaller needs less
            noise and cuts more of the updates.
        noise_multiplier: z; larger is more private. 0 only clips, and gives no privacy.
        sampling: q, the probability that a client takes part in a round.
        clients: N, how many there are, whether they take part or not.
        delta: δ of the guarantee; well below 1/N.
        seed: of the noise; None takes it from the operating system. See `fresh_generator`.

    Raises:
        TypeError: a number of clients that is no integer.
        ValueError: a number out of its range.
    """

    def __init__(
        self,
        clip: float,
        noise_multiplier: float,
        *,
        sampling: float,
        clients: int,
        delta: float,
        seed: int | None = None,
    ) -> None:
        if not 0.0 < clip < math.inf:
            raise ValueError(f"clip must be positive and finite, got {clip}")
        _check_noise(noise_multiplier)
        _check_sampling(sampling)
        _check_count("clients", clients, 1)
        _check_delta(delta)
        self.clip, self.noise_multiplier = float(clip), float(noise_multiplier)
        self.sampling, self.clients, self.delta = float(sampling), clients, float(delta)
        self._generator = fresh_generator(seed)

    @property
    def expected(self) -> float:
        """The divisor ``q·N``, the same in every round."""
        return self.sampling * self.clients

    @property
    def deviation(self) -> float:
        """The standard deviation of the noise in each coordinate of the mean, ``z·C/(q·N)``."""
        return self.noise_multiplier * self.clip / self.expected

    def mean(
        self, updates: Mapping[Client, Update], like: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the noised mean of a round.

        Without the noise, no client changes it by more than ``C/(q·N)`` in L2 norm, whatever it
        sends. An update that is not finite counts as zero, and the divisor stays. Sums and noise
        are float64: memory is one model of that, beside the updates and one tensor's noise.

        Args:
            updates: by client, of those who take part; none at all is a round like any other.
            like: names, shapes and dtypes of what is released, all floating. Names that are tied
                there, by showing the same memory, stay tied, and count and are noised once.

        Returns:
            Means by name, in the dtypes of `like`.

        Raises:
            ValueError: a tensor that is not floating, which would be released unprotected; or an
                update that does not fit `like`, which a decoder with a schema refuses.
        """
        for name, one in like.items():
            if not one.is_floating_point():
                raise ValueError(
                    f"like must hold floating tensors only, got {name!r} {one.dtype}: it would be "
                    "released without noise"
                )
        tied = tied_names(like)
        totals = {
            name: torch.zeros(one.shape, dtype=torch.float64, device="cpu")
            for name, one in like.items()
            if name not in tied
        }
        for client in in_order(updates):
            self._add(totals, client, fitting(updates[client], like, f"update of client {client}"))
        for total in totals.values():
            noise = self._generator.standard_normal(total.numel())
            total.div_(self.expected)
            total.view(-1).add_(torch.from_numpy(noise), alpha=self.deviation)
        owners = {name: total.to(like[name].dtype) for name, total in totals.items()}
        return {name: owners[tied.get(name, name)] for name in like}

    def _add(self, totals: Mapping[str, Tensor], client: Client, update: Update) -> None:
        norm = norm_bound(update)
        if not math.isfinite(norm):
            _log.warning("update of client %s is not finite and counts as zero", client)
            return
        scale = self.clip / norm if norm > self.clip else 1.0
        for name, total in totals.items():
            add_to(total, update[name], scale)

    def epsilon(self, rounds: int) -> float:
        """Return what so many rounds have given away of each client; see `epsilon`."""
        return epsilon(self.noise_multiplier, self.sampling, rounds, self.delta)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the noise, fit for JSON; whoever knows it knows what comes."""
        return dict(self._generator.bit_generator.state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the noise where `state_dict` left it.

        Raises:
            ValueError: no state of this generator.
        """
        try:
            self._generator.bit_generator.state = dict(state)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"state must be of a PCG64DXSM generator, got {state!r}") from error


def _accounting() -> Any:
    return needed("dp_accounting", "epsilon", "dp-accounting", "privacy")


def _check_noise(value: float) -> None:
    if not (value == 0.0 or LEAST_NOISE <= value < math.inf):
        raise ValueError(
            f"noise_multiplier must be 0, or at least {LEAST_NOISE} and finite, got {value}"
        )


def _check_sampling(value: float) -> None:
    if not 0.0 < value <= 1.0:
        raise ValueError(f"sampling must lie in (0, 1], got {value}")


def _check_delta(value: float) -> None:
    if not 0.0 < value < 1.0:
        raise ValueError(f"delta must lie in (0, 1), got {value}")


def _check_count(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
