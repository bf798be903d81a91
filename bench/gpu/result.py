"""From single measurements to cases with ratios, and to a table."""

from __future__ import annotations

from typing import Any

from bench.gpu.plan import is_ours
from bench.gpu.stages import FAILED, MEASURED, NOT_REACHED, PASSED, SKIPPED, TOO_SLOW, WRONG_RESULT

Record = dict[str, Any]


_COUNTED = (PASSED, MEASURED, FAILED, SKIPPED, TOO_SLOW, NOT_REACHED)
_CASE = ("op", "shape", "dtype")
# What a table and a terminal bear; gpu.json has all of it.
_MOST_LETTERS, _MOST_FAILURES = 70, 20


def assemble(records: list[Record], copy_gb_per_s: float | None) -> list[Record]:
    """Put every way to call an op beside its rivals.

    A ratio is the rival's time over ours: above 1 we are faster. `bandwidth_share` is the rate at
    which the bytes that have to move do move, over that of a large copy on the same card.
    """
    found = []
    for own in (record for record in records if is_ours(record["impl"])):
        case = {name: own[name] for name in (*_CASE, "impl", "outcome")}
        case["error"] = own.get("error")
        if own["outcome"] == MEASURED:
            gb_per_s = own["moved_bytes"] / own["ms"] / 1e6
            case.update({name: own[name] for name in ("ms", "call_ms", "repeats", "deviation")})
            case["gb_per_s"] = gb_per_s
            case["bandwidth_share"] = gb_per_s / copy_gb_per_s if copy_gb_per_s else None
            case["tflop_per_s"] = own["flops"] / own["ms"] / 1e9 if own["flops"] else None
        case["peers"] = {
            peer["impl"]: _compare(own, peer)
            for peer in records
            if not is_ours(peer["impl"]) and all(peer[part] == own[part] for part in _CASE)
        }
        found.append(case)
    return found


def _compare(own: Record, peer: Record) -> Record:
    if peer["outcome"] != MEASURED:
        return {"outcome": peer["outcome"], "error": peer["error"]}
    both = own["outcome"] == MEASURED
    return {
        "outcome": MEASURED,
        "ms": peer["ms"],
        "call_ms": peer["call_ms"],
        "deviation": peer["deviation"],
        "ratio": peer["ms"] / own["ms"] if both else None,
        "call_ratio": peer["call_ms"] / own["call_ms"] if both else None,
    }


def failures(result: Record) -> list[str]:
    """Say in a line each what failed, the gravest first; empty after a good run.

    What the time did not suffice for, and rivals that took too long, are no failures.
    """
    stages = [
        f"{name}: {stage['error']}"
        for name, stage in result["stages"].items()
        if stage["outcome"] == FAILED
    ]
    broken = [record for record in result["measurements"] if record["outcome"] == FAILED]
    # What a terminal has no room for should not be these.
    broken.sort(key=lambda record: not record["error"].startswith(WRONG_RESULT))
    cases = [
        f"{record['op']} {_shape(record)} {record['dtype']} {record['impl']}: {record['error']}"
        for record in broken
    ]
    wrong = sum(record["error"].startswith(WRONG_RESULT) for record in broken)
    tests = result["stages"].get("tests", {}).get("failures", [])
    return [*stages, *cases[:wrong], *tests, *cases[wrong:]]


def _shape(record: Record) -> str:
    return "×".join(map(str, record["shape"]))


def summary(result: Record) -> list[str]:
    """The lines below the table: card, stages, failures."""
    lines = []
    for name, stage in result["stages"].items():
        counts = [f"{stage[kind]} {kind}" for kind in _COUNTED if kind in stage]
        said = ", ".join(counts) or stage.get("error") or stage.get("summary") or ""
        lines.append(f"{name:<10} {stage['outcome']:<11} {said}".rstrip())
    if card := result["machine"]:
        lines.append(
            f"{card['gpu']}, driver {card['driver']}, torch {card['torch']}: "
            f"copy {card['copy_gb_per_s']:.0f} GB/s, bf16 product "
            f"{card['bf16_tflop_per_s']:.0f} TFLOP/s"
        )
    bad = failures(result)
    lines += [f"FAILED {line}" for line in bad[:_MOST_FAILURES]]
    if len(bad) > _MOST_FAILURES:
        lines.append(f"FAILED {len(bad) - _MOST_FAILURES} more, see gpu.json")
    return lines


def rows(cases: list[Record]) -> list[tuple[str, ...]]:
    """The cells of the table; each rival as how many times faster we are, by the GPU's clock."""
    found: list[tuple[str, ...]] = []
    for case in cases:
        name = case["op"] + case["impl"].removeprefix("ours")
        if case["outcome"] != MEASURED:
            said = (case["outcome"], "", "", "", (case["error"] or "")[:_MOST_LETTERS])
        else:
            share = case["bandwidth_share"]
            said = (
                f"{case['ms']:.4f}",
                f"{case['call_ms']:.4f}",
                f"{case['gb_per_s']:.0f}",
                "" if share is None else f"{share:.2f}",
                " · ".join(f"{peer} {_ratio(figures)}" for peer, figures in case["peers"].items()),
            )
        found.append((name, _shape(case), case["dtype"], *said))
    return found


def _ratio(peer: Record) -> str:
    return f"{peer['ratio']:.2f}" if peer.get("ratio") is not None else peer["outcome"]


def show(result: Record) -> None:
    """Print table and summary."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ModuleNotFoundError:
        print("no table, because rich is not installed: pip install rich")
    else:
        console = Console(highlight=False, markup=False)
        # Piped output has no width of its own; one line a case is easier to read and to search.
        console.width = max(console.width, 140)
        table = Table("op", "shape", "dtype", box=None)
        for title in ("ms", "call ms", "GB/s", "of copy"):
            table.add_column(title, justify="right")
        table.add_column("peer's time / ours")
        for row in rows(result["cases"]):
            table.add_row(*row)
        console.print(table)
    print(*summary(result), sep="\n")
