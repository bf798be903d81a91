"""What the GPU benches measure: for every op its shapes and rivals; needs no torch and no library.

A job is one implementation on one case. `ours…` are ways to call the op: `ours` as a caller does,
`ours-op` without autograd, `ours-warm` from earlier subspaces. `copy` moves as many bytes as the op
has to; `products` are the matrix products alone that it has to make. `bench.gpu.cases` makes the
calls.

There are two passes over all ops, in the order of the table, which is that of their importance: the
time on a lent card may end before the jobs do. Rivals that may take long come in the second.
"""

from __future__ import annotations

from itertools import zip_longest
from typing import Any, NamedTuple

from bench import shapes

COMPILED = "compile"
# They compile, or they run cuSOLVER: seconds a call.
LATE = (COMPILED, "torch.linalg.svd", "gram+eigh", "svd_lowrank-oracle", "gesvda", "gesvdj")
PASSES = ("quick", "late")
JOB_S = 40.0  # for one job with its inputs and its check; longer is too slow, or hangs
SLOW_S = 5.0  # a rival whose checked call took longer is not called again: that was its time


class Job(NamedTuple):
    """One implementation on one case."""

    op: str
    shape: tuple[int, ...]
    dtype: str
    impl: str


class Row(NamedTuple):
    """What is measured of one op."""

    stem: str  # of the op's files: tests/test_<stem>.py
    shapes: list[Any]
    dtypes: tuple[str, ...]
    impls: tuple[str, ...]


_WIDTHS = ("4 bits", "8 bits")
_PACK_IMPLS = ("ours", "eager", "copy", COMPILED)
# Of 2.8 bits a value, and of 5.8, of which two travel raw.
_LEVELS = ("level 12", "level 60")
_RANS_IMPLS = ("ours", "eager", "copy")
# A list of matrices is a (B, P, Q) for each of its shapes: all of a 12-layer BERT.
_BERT = (48, 768, 768, 12, 3072, 768, 12, 768, 3072)
TABLE: dict[str, Row] = {
    "distill_loss": Row(
        "distill_loss",
        shapes.DISTILL + shapes.DISTILL_LARGE,
        ("float32", "bfloat16"),
        ("ours", "ours-op", "eager", "copy", COMPILED),
    ),
    "layer_mse": Row(
        "layer_mse",
        shapes.MAPS,
        ("float32", "bfloat16"),
        ("ours", "ours-op", "eager", "copy", COMPILED),
    ),
    "projected_mse": Row(
        "projected_mse",
        shapes.STATES,
        ("float32", "bfloat16"),
        ("ours", "products", "eager", COMPILED),
    ),
    "rans_encode": Row("rans", shapes.RANS + shapes.RANS_LARGE, _LEVELS, _RANS_IMPLS),
    "rans_decode": Row("rans", shapes.RANS + shapes.RANS_LARGE, _LEVELS, _RANS_IMPLS),
    "reconstruct": Row(
        "pack_factors",
        shapes.PRODUCT + shapes.PRODUCT_LARGE,
        ("float32",),
        ("ours", "torch.matmul", "copy"),
    ),
    "pack_factors": Row("pack_factors", shapes.PACK + shapes.PACK_LARGE, _WIDTHS, _PACK_IMPLS),
    "unpack_factors": Row("pack_factors", shapes.PACK + shapes.PACK_LARGE, _WIDTHS, _PACK_IMPLS),
    "truncated_svd": Row(
        "truncated_svd",
        shapes.SVD,
        ("float32",),
        ("ours", "ours-warm", "torch.linalg.svd", "gram+eigh", "svd_lowrank-oracle"),
    ),
    "truncated_svd_list": Row(
        "truncated_svd",
        [_BERT],
        ("float32",),
        ("ours", "ours-warm", "torch.linalg.svd", "gesvda", "gesvdj"),
    ),
}


def is_ours(impl: str) -> bool:
    """Tell ways to call the op from its rivals."""
    return impl == "ours" or impl.startswith("ours-")


def jobs(part: str, only: str | None = None) -> list[Job]:
    """Everything to measure in a pass, the most important first.

    The second pass takes turns, a case of each op, and begins with the largest: where it has to
    stop early, every op has been compared on what it was made for.
    """
    late = part == "late"
    cases = [_cases(op, late) for op in ([only] if only else TABLE)]
    turns = zip_longest(*(reversed(each) for each in cases), fillvalue=[]) if late else cases
    return [job for turn in turns for case in turn for job in case]


def _cases(op: str, late: bool) -> list[list[Job]]:
    row = TABLE[op]
    impls = [impl for impl in row.impls if (impl in LATE) == late]
    return [
        [Job(op, shape, dtype, impl) for impl in impls]
        for shape in row.shapes
        for dtype in row.dtypes
    ]
