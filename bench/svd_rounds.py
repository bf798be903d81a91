"""Whole models, method against method: each result is checked, then rounds in which all take turns.

CPU seconds of the one thread that works. A round goes through all methods at each matrix before it
goes to the next matrix, so what disturbs a machine for a second disturbs all of them.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from svd_floor import Floor
from svd_peers import STARTS, Case, Method, Product, cut, ours
from torch import Tensor

Row = list[float]  # seconds or milliseconds by matrix
RANK_SLACK = 0.05  # beyond the smallest rank; one component is always allowed


@dataclass(frozen=True)
class Verdict:
    """What a result is worth, in float64."""

    lost: float  # |A - U·diag(σ)·Vᵀ|² / |A|²
    missed: bool  # lost more than 1 - T
    excess: int  # K beyond the optimum
    too_wide: bool
    skew: float | None  # largest entry of |UᵀU - I| and |VᵀV - I|; None where there is no SVD


def judge(case: Case, energy: float, product: Product) -> Verdict:
    left, right = product.left.double(), product.right.double()
    scaled = left if product.sigma is None else left * product.sigma.double()
    lost = float((case.matrix.double() - scaled @ right).square().sum()) / case.squares
    rank, best = right.shape[0], case.optimum[energy]
    return Verdict(
        lost,
        not lost < 1 - energy,
        rank - best,
        rank - best > max(1.0, RANK_SLACK * best),
        None if product.sigma is None else max(skew(left.mT), skew(right)),
    )


def skew(rows: Tensor) -> float:
    return float((rows @ rows.mT - torch.eye(len(rows), dtype=rows.dtype)).abs().max())


def seconds(call: Callable[..., object], *given: object) -> float:
    began = time.thread_time()
    call(*given)
    return time.thread_time() - began


class Rounds:
    """Verdicts and seconds of every method at every energy."""

    def __init__(self, cases: list[Case], energies: list[float], methods: dict[str, Method]):
        self.cases, self.energies, self.methods = cases, energies, methods
        self.starts = [start for start in STARTS if f"ours, {start}" in methods]
        self.verdicts: dict[tuple[str, float], dict[int, Verdict]] = defaultdict(dict)
        self.errors: dict[str, str] = {}
        # By method and energy, then by round.
        self.seconds: dict[tuple[str, float], list[Row]] = defaultdict(list)
        self.list_seconds: dict[tuple[str, float], Row] = defaultdict(list)
        self.floor: dict[float, list[list[Floor]]] = defaultdict(list)

    def check(self) -> None:
        """Judge every result once, which also warms up; a method that raises has no verdict."""
        for index, case in enumerate(self.cases):
            for name, method in self.methods.items():
                try:
                    self._judge(index, case, name, method)
                except (ArithmeticError, ValueError, RuntimeError) as error:
                    self.errors[name] = f"{case.name}: {error}"

    def _judge(self, index: int, case: Case, name: str, method: Method) -> None:
        whole = method.call(case, 1.0) if method.complete else None
        for energy in self.energies:
            found = cut(whole, energy, case.squares) if whole else method.call(case, energy)
            self.verdicts[name, energy][index] = judge(case, energy, found)

    def run(self, rounds: int) -> None:
        """Take the time of everything that has a verdict."""
        for number in range(rounds):
            taking = {
                name: method
                for name, method in self.methods.items()
                if method.most_rounds is None or number < method.most_rounds
            }
            for name in taking:
                for energy in self.energies:
                    self.seconds[name, energy].append([math.nan] * len(self.cases))
            for energy in self.energies:
                self.floor[energy].append([])
            for index, case in enumerate(self.cases):
                for name, method in taking.items():
                    self._time(index, case, name, method)
                for energy in self.energies:
                    self.floor[energy][-1].append(Floor.measure(case, energy))
            for energy in self.energies:
                for start in self.starts:
                    took = seconds(ours, self.cases, energy, start)
                    self.list_seconds[start, energy].append(took)

    def _time(self, index: int, case: Case, name: str, method: Method) -> None:
        took = math.nan
        for energy in self.energies:
            if index in self.verdicts[name, energy]:
                if math.isnan(took) or not method.complete:
                    took = seconds(method.call, case, energy)
                self.seconds[name, energy][-1][index] = took

    # ---- summary -----------------------------------------------------------------------------

    def ratio(self, rows: list[Row], others: list[Row]) -> float | None:
        """Median over rounds of ``Σ rows / Σ others``, over the matrices that both have."""
        found = []
        for row, other in zip(rows, others, strict=False):  # a slow method takes fewer rounds
            pairs = [(a, b) for a, b in zip(row, other, strict=True) if not math.isnan(a + b)]
            if pairs:
                found.append(sum(a for a, _ in pairs) / sum(b for _, b in pairs))
        return three(statistics.median(found)) if found else None

    def summary(self, energy: float) -> dict[str, Any]:
        """Return times, ratios and verdicts; "over" is the median over rounds of whole models."""
        floors = [[floor.seconds for floor in row] for row in self.floor[energy]]
        methods = {}
        for name in self.methods:
            rows = self.seconds[name, energy]
            minima = [min(column) for column in zip(*rows, strict=True)]
            methods[name] = {
                "rounds": len(rows),
                "over_ours": {
                    start: self.ratio(rows, self.seconds[f"ours, {start}", energy])
                    for start in self.starts
                },
                "over_floor": self.ratio(rows, floors),
                "ms": three(1e3 * solved_sum(minima)),
                "round_ms": [three(1e3 * solved_sum(row)) for row in rows],
                "matrix_ms": [None if math.isnan(one) else three(1e3 * one) for one in minima],
                **self.worth(name, energy),
            }
        lists = {
            start: {
                "ms": three(1e3 * min(self.list_seconds[start, energy])),
                "torch.linalg.svd_over_ours": self.ratio(
                    [[sum(row)] for row in self.seconds["torch.linalg.svd", energy]],
                    [[one] for one in self.list_seconds[start, energy]],
                ),
            }
            for start in self.starts
        }
        ranks = [case.optimum[energy] for case in self.cases]
        return {
            "ranks": ranks,
            "methods": methods,
            "ours_in_one_call": lists,
            "floor": Floor.summary([floor for row in self.floor[energy] for floor in row]),
        }

    def worth(self, name: str, energy: float) -> dict[str, Any]:
        """Sum up a method's verdicts: nothing that it misses is left out."""
        found = list(self.verdicts[name, energy].values())
        skews = [one.skew for one in found if one.skew is not None]
        return {
            "failed": len(self.cases) - len(found),
            "misses": sum(one.missed for one in found),
            "worst_lost_over_allowed": max(
                (float(f"{one.lost / (1 - energy):.6g}") for one in found), default=None
            ),
            "worst_excess_rank": max((one.excess for one in found), default=None),
            "too_wide": sum(one.too_wide for one in found),
            "worst_skew": three(max(skews)) if skews else None,
        }


def solved_sum(row: Row) -> float:
    return sum(one for one in row if not math.isnan(one))


def three(value: float) -> float:
    return float(f"{value:.3g}")
