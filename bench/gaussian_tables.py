"""Table set 1 of the rANS coder: frequencies of a Gaussian on a grid, as they stand in csrc/common.

    python bench/gaussian_tables.py > csrc/common/gaussian_tables.inc

Table l in -48..47 is of a standard deviation of r = 2^(l/16) steps. Of all symmetric frequencies
that sum to 4096, are at least 1 on the support and at least 1 for the escape, these have the least
expected code length. The tables are constants of the wire format: a change is another table set.
"""

from __future__ import annotations

import heapq
import math

TOTAL = 1 << 12
FIRST, LAST = -48, 47
REACH = 31  # largest symbol that a table can have

HEAD = """\
// Printed by bench/gaussian_tables.py: table set 1 of the wire format. A line for each table: the
// frequencies of 0, ±1, …, ±31, zeros beyond its support, and that of the escape.
// clang-format off
"""


def mass(begin: float, end: float) -> float:
    """Probability between two multiples of the standard deviation, 0 <= begin or symmetric."""
    if begin < 0:
        return math.erf(end / math.sqrt(2))
    return (math.erfc(begin / math.sqrt(2)) - math.erfc(end / math.sqrt(2))) / 2


def best_first(masses: list[float], units: int) -> list[tuple[float, int]]:
    """Gains of the first `units` steps from frequency 1 upwards, and whose they are; descending."""
    heap = [(-p * math.log2(2), who, 1) for who, p in enumerate(masses)]
    heapq.heapify(heap)
    found = []
    for _ in range(units):
        gain, who, frequency = heap[0]
        found.append((-gain, who))
        frequency += 1
        heapq.heapreplace(heap, (-masses[who] * math.log2(1 + 1 / frequency), who, frequency))
    return found


def table(level: int) -> list[int]:
    """Frequencies of 0..31 and of the escape."""
    ratio = 2.0 ** (level / 16)
    support = min(REACH, math.ceil(5 * ratio) + 1)
    tail = 2 * mass((support + 0.5) / ratio, math.inf)
    single = [mass(-0.5 / ratio, 0.5 / ratio), tail]
    pairs = [2 * mass((h - 0.5) / ratio, (h + 0.5) / ratio) for h in range(1, support + 1)]
    spare = TOTAL - len(single) - 2 * len(pairs)
    # Code length is a sum of convex functions of the frequencies. Steps of a pair take two units,
    # others one: the best of all ways to divide what is spare between the two kinds.
    of_single, of_pairs = best_first(single, spare), best_first(pairs, spare // 2)
    gains = [0.0]
    for gain, _ in of_single:
        gains.append(gains[-1] + gain)
    best, total, steps = -1.0, 0.0, 0
    for count in range(spare // 2 + 1):
        if total + gains[spare - 2 * count] > best:
            best, steps = total + gains[spare - 2 * count], count
        if count < len(of_pairs):
            total += of_pairs[count][0]
    frequencies = [1] * (1 + support)
    escape = 1
    for _, who in of_pairs[:steps]:
        frequencies[1 + who] += 1
    for _, who in of_single[: spare - 2 * steps]:
        frequencies[0] += who == 0
        escape += who == 1
    return [*frequencies, *[0] * (REACH - support), escape]


def text() -> str:
    """Return the whole file."""
    lines = [", ".join(map(str, table(level))) for level in range(FIRST, LAST + 1)]
    return HEAD + "".join(f"{{{line}}},\n" for line in lines)


if __name__ == "__main__":
    print(text(), end="")
