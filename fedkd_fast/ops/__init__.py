"""The one door to the native ops: typed wrappers, fake kernels and autograd, a file for each op.

Every op has a specification of the same name in `fedkd_fast.reference` and a kernel of the same
name behind ``torch.ops.fedkd_fast``. Nothing here falls back to the specification: a missing binary
is an ImportError that names the command that mends it.
"""

from fedkd_fast.ops._distill_loss import (
    DistillBuffers,
    distill_buffers,
    distill_loss,
    distill_loss_out,
)
from fedkd_fast.ops._fit_factors import fit_factors
from fedkd_fast.ops._layer_mse import layer_mse, projected_mse
from fedkd_fast.ops._pack_factors import pack_factors, reconstruct, unpack_factors
from fedkd_fast.ops._rans import rans_decode, rans_encode
from fedkd_fast.ops._round_rows import dense_step, measure_rows, round_rows
from fedkd_fast.ops._truncated_svd import truncated_svd, truncated_svd_list

__all__ = [
    "DistillBuffers",
    "dense_step",
    "distill_buffers",
    "distill_loss",
    "distill_loss_out",
    "fit_factors",
    "layer_mse",
    "measure_rows",
    "pack_factors",
    "projected_mse",
    "rans_decode",
    "rans_encode",
    "reconstruct",
    "round_rows",
    "truncated_svd",
    "truncated_svd_list",
    "unpack_factors",
]
