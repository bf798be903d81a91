"""How training samples are dealt to clients: at random, by class shares, or by a key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]
_MOST_ALIKE = 1e300  # beyond, draws are no numbers any more


def check_partition(value: object) -> None:
    """Refuse what names no partition.

    Raises:
        ValueError: something else than ``iid``, ``dirichlet:α``, ``key:NAME`` or ``file``.
    """
    if isinstance(value, str):
        kind, colon, rest = value.partition(":")
        if (value in ("iid", "file")) or (kind == "key" and rest):
            return
        if kind == "dirichlet" and colon and _concentration(rest) is not None:
            return
    raise ValueError(
        f"partition must be iid, dirichlet:CONCENTRATION, key:COLUMN or file, got {value!r}"
    )


def _concentration(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0.0 < value <= _MOST_ALIKE else None


def deal(
    partition: str,
    clients: int,
    seed: int,
    *,
    samples: int,
    labels: Sequence[object] | npt.NDArray[np.int64],
    keys: Mapping[str, Sequence[object]],
) -> list[Indices]:
    """Deal samples to clients; each sample goes to one client, and no client goes without.

    ``iid``: at random, nearly equally many. ``dirichlet:α``: class by class in shares drawn from a
    Dirichlet distribution; larger α makes clients more alike. ``key:NAME``: all samples with one
    value of the key to one client; the values, the most frequent first, each to the client that
    has the fewest samples by then.

    Args:
        partition: as above.
        clients: how many.
        seed: of what is random.
        samples: how many there are.
        labels: class of each sample, for ``dirichlet``.
        keys: values of each sample by name of the key, for ``key``.

    Raises:
        ValueError: fewer samples or values of the key than clients, no such key, no such partition.
    """
    check_partition(partition)
    if clients > samples:
        raise ValueError(f"clients must be at most {samples}, the training samples, got {clients}")
    generator = np.random.default_rng(seed)
    kind, _, rest = partition.partition(":")
    if kind == "iid":
        return np.array_split(generator.permutation(samples), clients)
    if kind == "dirichlet":
        return _by_class(np.asarray(labels), clients, float(rest), generator)
    if kind == "key":
        if rest not in keys:
            known = ", ".join(keys) or "none"
            raise ValueError(f"partition must name a key of the data ({known}), got {partition!r}")
        return _by_key([str(value) for value in keys[rest]], clients, partition)
    raise ValueError(f"partition {partition!r} needs data in several files, one a client")


def _by_class(
    labels: npt.NDArray[np.int64],
    clients: int,
    concentration: float,
    generator: np.random.Generator,
) -> list[Indices]:
    parts: list[list[Indices]] = [[] for _ in range(clients)]
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        shares = generator.dirichlet([concentration] * clients)
        cuts = np.floor(shares.cumsum()[:-1] * len(members)).astype(np.int64)
        for part, piece in zip(parts, np.split(members, cuts), strict=True):
            part.append(piece)
    shards = [np.concatenate(part) for part in parts]
    # With very many clients some get nothing: the largest shards then give one sample each.
    for index, shard in enumerate(shards):
        if not len(shard):
            donor = max(range(clients), key=lambda other: len(shards[other]))
            shards[index], shards[donor] = shards[donor][:1], shards[donor][1:]
    return shards


def _by_key(values: Sequence[str], clients: int, partition: str) -> list[Indices]:
    members: dict[str, list[int]] = {}
    for index, value in enumerate(values):
        members.setdefault(value, []).append(index)
    if clients > len(members):
        raise ValueError(
            f"clients must be at most {len(members)}, the values of {partition}, got {clients}"
        )
    parts: list[list[int]] = [[] for _ in range(clients)]
    for value in sorted(members, key=lambda one: (-len(members[one]), one)):
        min(parts, key=len).extend(members[value])
    return [np.array(part, dtype=np.int64) for part in parts]
