"""Bytes of an update at a given relative error: ours, FedKD's payload, and what others have.

    python bench/rate_distortion.py --out bench/results/rate_distortion.json [--keep-peers]

runs on the real updates that are there: `python bench/deltas.py --data PATH --optimizers adam sgd
--seeds 0 1 2` makes them. Ours are whole frames, headers and all; peers are payloads with the side
information that decoding needs, without any header. With --keep-peers only ours are measured again,
and sets that the file lacks.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import deltas
import torch
from provenance import facts
from rate_case import Case, Coded, Peer
from rate_dense import DENSE_CODECS, DENSE_POINTS
from rate_factors import FACTOR_CODECS, FP32
from rate_packages import PACKAGE_CODECS, PACKAGE_POINTS
from rate_tables import show
from torch import Tensor

from fedkd_fast import decompress, inspect
from fedkd_fast._files import read_json_object, replacing
from fedkd_fast.codec.message import CODECS
from fedkd_fast.compress import Compressor

TARGETS = [0.90, 0.95, 0.98, 0.995]
PEERS = FACTOR_CODECS | DENSE_CODECS | PACKAGE_CODECS
POINTS = PACKAGE_POINTS | DENSE_POINTS
ROUNDING = 1e-6  # of shares that this bench and a codec sum in other orders
NOTES = [
    "error: |X - Y| / |X| over all matrices of a set; target T: sqrt(1 - T) at most for each",
    "worst: largest lost share of a matrix's squared norm over what it may lose; missed: matrices "
    "above 1; of ours with one step for all, that of all matrices together",
    "fp32_factors_over_this: bytes of FedKD's float32 factors over bytes of this, on the same set",
    "ideal entropy: empirical, of the integers of each matrix, with tables free of charge: a bound "
    "for coders with the same contexts; zstd, which finds others, may go below",
    "FedKD's factors fall back to the matrix in the same precision where that is smaller; integers "
    "have the scales and clips that lose least, and 8 bits where fewer do not reach the target",
    "EDEN: mixes two widths by rows; its scale is the one of least squares, not the unbiased one",
    "points: codecs without a knob, and ours at the error that they have on the whole set",
    "embedding: the rows that are not zero of one batch's gradient of MiniLM's word embeddings",
]

Record = dict[str, Any]


class Sum:
    """What a codec takes for several matrices."""

    def __init__(self) -> None:
        self.size = self.lost = self.total = 0.0
        self.worst: float | None = None
        self.kinds: Counter[str] = Counter()
        self.missed = self.unreachable = 0

    def add(self, case: Case, coded: Coded | None, allowed: float | None) -> None:
        """Count one matrix, and whether its promise was kept."""
        if coded is None:
            self.unreachable += 1
            return
        share = case.share(coded.decoded)
        self.size += coded.size
        self.lost += share * case.total
        self.total += case.total
        if coded.kind:
            self.kinds[coded.kind] += 1
        if allowed is not None:
            self.worst = max(self.worst or 0.0, share / allowed)
            self.missed += share > allowed * (1 + ROUNDING)

    def record(self) -> Record:
        """Return what belongs into the result."""
        if self.unreachable:
            return {"unreachable": self.unreachable}
        error = (self.lost / self.total) ** 0.5
        found: Record = {"bytes": round(self.size), "error": round(error, 6)}
        if self.worst is not None:
            found |= {"worst": round(self.worst, 4), "missed": self.missed}
        return found | ({"kinds": dict(self.kinds)} if self.kinds else {})


# ---- ours ----------------------------------------------------------------------------------------


def our_codecs() -> dict[str, Record]:
    """List the arguments of Compressor that stand for a codec, by the name of the row."""
    found: dict[str, Record] = {}
    for codec in CODECS:
        if codec == "raw":  # loses nothing
            continue
        found[f"ours, {codec}"] = {"codec": codec}
        together: Record = {"codec": codec, "scope": "message"}
        try:
            Compressor(TARGETS[0], **together)
        except (TypeError, ValueError):
            continue
        found[f"ours, {codec}, one step for all"] = together
    return found


def ours(cases: list[Case], energy: float, options: Record) -> Record:
    frame = Compressor(energy, **options).compress({case.name: case.matrix for case in cases})
    decoded, total = decompress(frame), Sum()
    together = options.get("scope") == "message"
    for case in cases:
        total.add(case, Coded(0, decoded[case.name]), None if together else 1 - energy)
    if together:
        total.worst = total.lost / total.total / (1 - energy)
        total.missed = int(total.worst > 1 + ROUNDING)
    total.size = len(frame)
    total.kinds.update(line.mode.name for line in inspect(frame))
    return total.record()


# ---- a set ---------------------------------------------------------------------------------------


def measure_peers(
    cases: list[Case], targets: list[float], peers: dict[str, Peer], points: dict[str, Peer]
) -> Record:
    """Code every matrix with every peer; one matrix after the other, so that few are held."""
    sums = {target: {name: Sum() for name in peers} for target in targets}
    point_sums = {name: Sum() for name in points}
    for case in cases:
        for target in targets:
            for name, peer in peers.items():
                coded = peer.call(case, 1 - target)
                sums[target][name].add(case, coded, 1 - target)
        for name, peer in points.items():
            point_sums[name].add(case, peer.call(case), None)
        case.shared.clear()
        vars(case).pop("svd", None)
    return {
        "targets": {
            str(target): {name: one.record() for name, one in found.items()}
            for target, found in sums.items()
        },
        "points": {name: one.record() for name, one in point_sums.items()},
    }


def add_ours(cases: list[Case], found: Record) -> None:
    """Put our rows in front, and the ratios to the paper's payload into all."""
    codecs = our_codecs()
    for target, records in found["targets"].items():
        mine = {name: ours(cases, float(target), options) for name, options in codecs.items()}
        peers = {name: record for name, record in records.items() if not name.startswith("ours, ")}
        paper = peers[FP32]["bytes"]
        found["targets"][target] = mine | peers
        for record in found["targets"][target].values():
            if "bytes" in record:
                record["fp32_factors_over_this"] = round(paper / record["bytes"], 3)
    for record in found["points"].values():
        energy = 1 - record["error"] ** 2
        mine = {name: ours(cases, energy, options) for name, options in codecs.items()}
        record["ours"] = {
            name: one | {"point_over_this": round(record["bytes"] / one["bytes"], 3)}
            for name, one in mine.items()
        }


def measure(
    update: dict[str, Tensor], targets: list[float], peers: dict[str, Peer], points: dict[str, Peer]
) -> Record:
    cases = [Case(name, matrix) for name, matrix in update.items()]
    found = measure_peers(cases, targets, peers, points)
    add_ours(cases, found)
    return found


# ---- command line --------------------------------------------------------------------------------


def describe(recipe: deltas.Recipe, update: dict[str, Tensor]) -> Record:
    numel = sum(matrix.numel() for matrix in update.values())
    optimizer = None if recipe.what == deltas.EMBEDDING else recipe.optimizer
    origin: Record = {"model": recipe.what, "optimizer": optimizer, "seed": recipe.seed}
    return origin | {"matrices": len(update), "elements": numel, "dense_bytes": 4 * numel}


def there(wanted: Iterable[str] | None) -> list[deltas.Recipe]:
    """List what has been trained, or of that what is asked for by name."""
    recipes = deltas.recipes(deltas.OPTIMIZERS, range(10))
    found = [one for one in recipes if deltas.cached(str(one), None).is_file()]
    if wanted is None:
        return found
    by_name = {str(one): one for one in found}
    missing = [name for name in wanted if name not in by_name]
    if missing:
        raise ValueError(f"sets must have been trained by bench/deltas.py, got {missing}")
    return [by_name[name] for name in wanted]


def write(target: Path, result: Record) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as part:
        part.write_text(json.dumps(result) + "\n")


def main(argv: list[str] | None = None) -> None:
    given = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", help="minilm, bert-sgd-s1, …; default: all there are")
    parser.add_argument("--targets", nargs="+", type=float, default=TARGETS)
    parser.add_argument(
        "--keep-peers",
        action="store_true",
        help="take the peers of sets that the file has from it: one run can go on where one ended",
    )
    arguments = parser.parse_args(given)
    torch.set_num_threads(1)
    absent = {name: one.missing() for name, one in (PEERS | POINTS).items() if one.missing()}
    peers = {name: one for name, one in PEERS.items() if name not in absent}
    points = {name: one for name, one in POINTS.items() if name not in absent}
    try:
        recipes = there(arguments.sets)
    except ValueError as error:
        parser.error(str(error))
    provenance = facts(1)
    before: Record = read_json_object(arguments.out) if arguments.out.is_file() else {"sets": {}}
    result: Record = {
        "command": f"python bench/rate_distortion.py {shlex.join(given)}",
        "provenance": provenance,
        "notes": NOTES,
        "not_installed": before.get("not_installed", absent) if arguments.keep_peers else absent,
        "sets": {},
    }
    for recipe in recipes:
        began, update = time.monotonic(), deltas.last_update(recipe)
        found = before["sets"].get(str(recipe)) if arguments.keep_peers else None
        if found is None:
            found = measure(update, arguments.targets, peers, points)
            found["peers_commit"] = provenance["commit"]
        else:
            add_ours([Case(name, matrix) for name, matrix in update.items()], found)
        result["sets"][str(recipe)] = describe(recipe, update) | found
        print(f"{recipe}: {time.monotonic() - began:.0f} s", flush=True)
        # Sets take minutes, so what there is is kept after each; the others' peers too, to go on.
        others = before["sets"] if arguments.keep_peers else {}
        write(arguments.out, result | {"sets": others | result["sets"]})
    write(arguments.out, result)
    show(result)


if __name__ == "__main__":
    main()
