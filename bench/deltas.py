"""Updates of real models, round by round: what the bench of truncated_svd runs on.

    python bench/deltas.py --data PATH [--mentor PATH_OR_NAME] [--cache DIR] [--spectra FILE]
                           [--models minilm bert] [--optimizers adam sgd] [--seeds 0 1 2]

trains once, keeps the updates outside the repository and prints what they are like. Where nobody
has trained, `load` builds matrices with the same spectra and the same kinship of rounds, of Adam
and seed 0, which also are what the bench of truncated_svd takes.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedkd_fast._files import read_json_object, replacing
from fedkd_fast._seeds import derived_seed
from fedkd_fast.reference import select_rank

VERSION = 1  # of the recipe: another one must not find the matrices of this one
CACHE = Path("~/.cache/fedkd_fast")
SPECTRA = Path(__file__).parent / "spectra.json"
MODELS = ("minilm", "bert")
EMBEDDING = "embedding"
OPTIMIZERS = ("adam", "sgd")
Source = Literal["real", "spectra"]


class Recipe(NamedTuple):
    """What was trained, and how."""

    what: str  # one of MODELS, or EMBEDDING: a first gradient, that no optimiser has touched
    optimizer: str = "adam"
    seed: int = 0

    def __str__(self) -> str:
        # Adam and seed 0 came first and bear no names.
        optimizer = "" if self.optimizer == "adam" else f"-{self.optimizer}"
        return self.what + optimizer + (f"-s{self.seed}" if self.seed else "")


class Pair(NamedTuple):
    """One matrix's updates of two consecutive rounds."""

    name: str  # of the matrix, with the round of `current`
    previous: Tensor  # (P, Q) float32, as `current`
    current: Tensor
    source: Source  # "spectra": built to be like the real one


class SparseRows(NamedTuple):
    """A matrix most of whose rows are zero."""

    ids: Tensor  # (R,) int64, ascending: the other rows
    rows: Tensor  # (R, Q) float32
    height: int  # P, rows of zeros included
    source: Source


# ---- reading -------------------------------------------------------------------------------------


def cached(what: str, cache: Path | None) -> Path:
    return (cache or CACHE).expanduser() / f"deltas-{VERSION}" / f"{what}.safetensors"


def read_cache(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, remove it: {error}") from error


def load(model: str, cache: Path | None = None) -> list[Pair]:
    """Return the updates of consecutive rounds: real ones if the cache has them, else built ones.

    Args:
        model: one of `MODELS`.
        cache: folder that was given to ``--cache``; None is its default.

    Raises:
        ValueError: another model, or a damaged file; names it.
        OSError: neither a cache nor spectra.json.
    """
    if model not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {model!r}")
    if not cached(model, cache).is_file():
        return [build(record) for record in read_json_object(SPECTRA)[model]]
    deltas, pairs = read_cache(cached(model, cache)), []
    for key, current in deltas.items():
        number, name = key.split("/")
        previous = deltas.get(f"{int(number) - 1}/{name}")
        if previous is not None:
            pairs.append(Pair(f"{name}, round {number}", previous, current, "real"))
    return sorted(pairs, key=lambda pair: pair.name)


def load_rows(cache: Path | None = None) -> SparseRows:
    """Return the gradient of MiniLM's word embeddings for one batch, or one that is built.

    Raises:
        ValueError: a damaged file; names it.
        OSError: neither a cache nor spectra.json.
    """
    if cached(EMBEDDING, cache).is_file():
        found = read_cache(cached(EMBEDDING, cache))
        return SparseRows(found["ids"], found["rows"], int(found["height"]), "real")
    (record,) = read_json_object(SPECTRA)[EMBEDDING]
    noise = torch.Generator().manual_seed(record["seed"])
    ids = torch.randperm(record["height"], generator=noise)[: record["shape"][0]].sort().values
    return SparseRows(ids, build(record).current, record["height"], "spectra")


def last_update(recipe: Recipe, cache: Path | None = None) -> dict[str, Tensor]:
    """Return what the last round of a training added to each matrix: real ones alone.

    The rows that are not zero of the word embeddings' gradient stand for it.

    Raises:
        ValueError: a damaged file; names it.
        OSError: nobody has trained so.
    """
    path = cached(str(recipe), cache)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: bench/deltas.py makes it")
    found = read_cache(path)
    if recipe.what == EMBEDDING:
        return {"word_embeddings": found["rows"]}
    rounds = [(int(key.split("/")[0]), key.split("/")[1], value) for key, value in found.items()]
    last = max(number for number, _, _ in rounds)
    return {name: value for number, name, value in sorted(rounds) if number == last}


# ---- spectra -------------------------------------------------------------------------------------

ENERGIES = (0.90, 0.95, 0.98)
ENERGY = 0.95  # at which the rounds of built matrices are as akin as the real ones
SAMPLES = 24  # of a spectrum


def tall(matrix: Tensor) -> Tensor:
    return matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT


def captured(pair: Pair) -> tuple[list[int], list[float]]:
    """Return the ranks K of the previous matrix and how much of the current one its V_K hold.

    ``|A V_K|² / |A|²`` for each of `ENERGIES`; V lies on the short side.
    """
    _, sigma, vh = torch.linalg.svd(tall(pair.previous), full_matrices=False)
    ranks = [select_rank(sigma, energy) for energy in ENERGIES]
    held = (tall(pair.current) @ vh.mT).square().sum(0).cumsum(0)
    return ranks, [float(held[rank - 1] / held[-1]) for rank in ranks]


def samples(side: int) -> npt.NDArray[np.int64]:
    """Choose what to keep of a spectrum: between even and log-even, for both its ends count."""
    return np.unique((np.linspace(1, np.cbrt(side), SAMPLES) ** 3).round().astype(np.int64))


def thin(matrix: Tensor) -> list[float]:
    """Sample the singular values, four digits each."""
    sigma = torch.linalg.svdvals(tall(matrix))[samples(min(matrix.shape)) - 1]
    return [float(f"{value:.4g}") for value in sigma.tolist()]


def fill(values: list[float], side: int) -> Tensor:
    """Undo `thin`: straight lines between the samples of log σ over log k."""
    known, wanted = np.log(samples(side)), np.log(np.arange(1, side + 1))
    return torch.from_numpy(np.exp(np.interp(wanted, known, np.log(values)))).float()


def turn(side: int, drift: float, seed: int) -> Tensor:
    """Make an orthogonal matrix, the farther from the identity the larger `drift` is."""
    noise = torch.randn(side, side, generator=torch.Generator().manual_seed(seed))
    turned: Tensor = torch.linalg.qr(torch.eye(side) + drift * noise / math.sqrt(side)).Q
    return turned


def fit_drift(previous: Tensor, current: Tensor, share: float, seed: int) -> float:
    """Find the drift at which matrices of these spectra have the captured share, by bisection."""
    rank, energies = select_rank(previous, ENERGY), current.square() / current.square().sum()
    low, high = math.log(1e-2), math.log(10)
    for _ in range(10):
        middle = (low + high) / 2
        found = float(turn(len(current), math.exp(middle), seed)[:rank].square().sum(0) @ energies)
        low, high = (middle, high) if found > share else (low, middle)
    return float(f"{math.exp(low):.4g}")


def describe(pairs: list[Pair]) -> list[dict[str, Any]]:
    """Say of real pairs what `build` needs for similar ones."""
    records = []
    for seed, pair in enumerate(pairs):
        share, side = captured(pair)[1][ENERGIES.index(ENERGY)], min(pair.current.shape)
        previous, current = thin(pair.previous), thin(pair.current)
        drift = fit_drift(fill(previous, side), fill(current, side), share, seed)
        facts = {"name": pair.name, "shape": list(pair.current.shape)}
        figures = {"captured": round(share, 4), "drift": drift, "seed": seed}
        records.append(facts | figures | {"previous": previous, "current": current})
    return records


def build(record: dict[str, Any]) -> Pair:
    (rows, cols), seed = record["shape"], record["seed"]
    noise = torch.Generator().manual_seed(derived_seed(seed, 1))  # others than those of `turn`
    side = min(rows, cols)
    left, right = (
        torch.linalg.qr(torch.randn(length, side, generator=noise)).Q
        for length in (max(rows, cols), side)
    )
    turned = right @ turn(side, record["drift"], seed)
    previous = left * fill(record["previous"], side) @ right.mT
    current = left * fill(record["current"], side) @ turned.mT
    if rows < cols:
        previous, current = previous.mT.contiguous(), current.mT.contiguous()
    return Pair(record["name"], previous, current, "spectra")


def write_spectra(target: Path, cache: Path) -> None:
    """Keep what `load` and `load_rows` need without a cache; one matrix a line."""
    found = {model: describe(load(model, cache)) for model in MODELS}
    gradient = load_rows(cache)
    (record,) = describe([Pair(EMBEDDING, gradient.rows, gradient.rows, gradient.source)])
    found[EMBEDDING] = [record | {"height": gradient.height}]
    lines = (
        f"{json.dumps(model)}: [\n" + ",\n".join(map(json.dumps, records)) + "\n]"
        for model, records in found.items()
    )
    with replacing(target) as part:
        part.write_text("{\n" + ",\n".join(lines) + "\n}\n")


# ---- command line --------------------------------------------------------------------------------


def recipes(
    optimizers: Iterable[str], seeds: Iterable[int], models: Iterable[str] = (*MODELS, EMBEDDING)
) -> list[Recipe]:
    """List what to train; first those with the first seed, for each may take minutes."""
    return [
        Recipe(what, optimizer, seed)
        for seed in seeds
        for optimizer in optimizers
        for what in models
        if (what, optimizer) != (EMBEDDING, "sgd")
    ]


def make_missing(data: str | None, mentor: str | None, cache: Path, wanted: list[Recipe]) -> None:
    """Train what the cache lacks."""
    missing = [recipe for recipe in wanted if not cached(str(recipe), cache).is_file()]
    if not missing:
        return
    if data is None:
        raise ValueError(
            f"data must name a folder of texts where {cache} lacks {missing[0]}, got None"
        )
    if cache.is_file():
        raise ValueError(f"cache must be a folder, got the file {cache}")
    from train_deltas import make  # needs transformers

    for recipe in missing:
        began, target = time.monotonic(), cached(str(recipe), cache)
        target.parent.mkdir(parents=True, exist_ok=True)
        print(f"{recipe}: training", flush=True)
        tensors = make(recipe.what, data, mentor, recipe.optimizer, recipe.seed)
        with replacing(target) as part:
            save_file(tensors, part, metadata={"torch": torch.__version__})
        print(f"{recipe}: {time.monotonic() - began:.0f} s, kept in {target}", flush=True)


def table(model: str, pairs: list[Pair]) -> list[str]:
    """Say by shape how large the ranks are, and how much the subspace of a round before holds."""
    groups: dict[str, list[tuple[list[int], list[float]]]] = {}
    for pair in pairs:
        shape = "×".join(map(str, pair.current.shape))
        _, shares = captured(pair)
        sigma = torch.linalg.svdvals(tall(pair.current))
        ranks = [select_rank(sigma, energy) for energy in ENERGIES]
        groups.setdefault(shape, []).append((ranks, shares))
    lines = []
    for shape, found in groups.items():
        cells = []
        for index in range(len(ENERGIES)):
            ranks = [ranks[index] for ranks, _ in found]
            shares = [shares[index] for _, shares in found]
            cells.append(f"{min(ranks):4}-{max(ranks):<4}{min(shares):6.3f}-{max(shares):.3f}")
        lines.append(f"{model:8}{shape:10}{len(found):4}  " + "  ".join(cells))
    return lines


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", help="folder with train and test texts, as task text reads it")
    parser.add_argument(
        "--mentor", help="encoder that minilm starts from; default: all-MiniLM-L6-v2"
    )
    parser.add_argument("--cache", type=Path, default=CACHE, help="default: %(default)s")
    parser.add_argument(
        "--spectra", type=Path, help="write what stands for the matrices to this file"
    )
    models = [*MODELS, EMBEDDING]
    parser.add_argument("--models", nargs="+", default=models, choices=models)
    parser.add_argument("--optimizers", nargs="+", default=["adam"], choices=OPTIMIZERS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    arguments = parser.parse_args(argv)
    wanted = recipes(arguments.optimizers, arguments.seeds, arguments.models)
    torch.set_num_threads(1)  # other thread counts sum in another order
    try:
        make_missing(arguments.data, arguments.mentor, arguments.cache, wanted)
        if arguments.spectra is not None:
            write_spectra(arguments.spectra, arguments.cache)
        columns = "  ".join(f"K at {energy:.2f}, held  " for energy in ENERGIES)
        print(f"{'model':8}{'shape':10}pairs {columns}")
        for model in MODELS:
            print("\n".join(table(model, load(model, arguments.cache))), flush=True)
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
