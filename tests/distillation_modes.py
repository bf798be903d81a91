"""Modes of distillation that tests of the op and of the module go through."""

from __future__ import annotations

import dataclasses

from fedkd_fast.distillation import DistillationConfig

PAPER, PUBLIC = DistillationConfig.paper(), DistillationConfig.public_code()
EVERYTHING = DistillationConfig(
    denominator="batch",
    denominator_gradient="attached",
    targets="attached",
    loss="joint",
    temperature=2.5,
    label_smoothing=0.1,
    task_weight=0.7,
    distill_weight=1.3,
    hidden_weight=0.6,
    attention_weight=5.0,
)
MODES = {
    "public_code": PUBLIC,
    "everything": EVERYTHING,
    "everything by sample": dataclasses.replace(EVERYTHING, denominator="sample"),
    # No D of several nats divides the divergences here: weighted so that τ² leaves them their size.
    "everything constant": dataclasses.replace(
        EVERYTHING, denominator="constant", distill_weight=0.16
    ),
    "batch": DistillationConfig(denominator="batch"),
    "constant": DistillationConfig(denominator="constant"),
    "attached": DistillationConfig(denominator_gradient="attached"),
    "batch attached": DistillationConfig(denominator="batch", denominator_gradient="attached"),
    "joint": DistillationConfig(loss="joint"),
    "joint attached": DistillationConfig(loss="joint", denominator_gradient="attached"),
    "joint targets": DistillationConfig(loss="joint", targets="attached"),
    "temperature": DistillationConfig(temperature=0.5),
    "smoothing": DistillationConfig(label_smoothing=0.2),
    "mean": DistillationConfig(kl_reduction="mean"),
}
