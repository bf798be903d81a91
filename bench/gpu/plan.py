"""What the GPU benches measure: for every op its shapes and rivals; needs no torch and no library.

A job is one implementation on one case. `ours…` are ways to call the op: `ours` as a caller does,
`ours-op` without autograd, `ours-warm` from earlier subspaces. `copy` moves as many bytes as the op
has to; `products` are the matrix products alone that it has to make. `bench.gpu.cases` makes the
calls.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from bench import shapes

COMPILED = "compile"


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
    "pack_factors": Row("pack_factors", shapes.PACK + shapes.PACK_LARGE, _WIDTHS, _PACK_IMPLS),
    "unpack_factors": Row("pack_factors", shapes.PACK + shapes.PACK_LARGE, _WIDTHS, _PACK_IMPLS),
    "reconstruct": Row(
        "pack_factors",
        shapes.PRODUCT + shapes.PRODUCT_LARGE,
        ("float32",),
        ("ours", "torch.matmul", "copy"),
    ),
    "rans_encode": Row("rans", shapes.RANS + shapes.RANS_LARGE, _LEVELS, _RANS_IMPLS),
    "rans_decode": Row("rans", shapes.RANS + shapes.RANS_LARGE, _LEVELS, _RANS_IMPLS),
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
}


def jobs(op: str) -> list[Job]:
    """Everything to measure of one op; what has to be compiled comes last, as it may be slow."""
    table = TABLE[op]
    cases = [(shape, dtype) for shape in table.shapes for dtype in table.dtypes]
    quick = [impl for impl in table.impls if impl != COMPILED]
    found = [Job(op, shape, dtype, impl) for shape, dtype in cases for impl in quick]
    if COMPILED in table.impls:
        found += [Job(op, shape, dtype, COMPILED) for shape, dtype in cases]
    return found
