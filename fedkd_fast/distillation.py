"""How mentor and mentee teach each other: every choice that FedKD's text and code leave open."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args, get_type_hints


@dataclass(frozen=True)
class DistillationConfig:
    """Modes of the mutual distillation loss; the defaults are those of the paper.

    Wu et al., Nature Communications 13:2032 (2022), eqs (1)-(7), for sample i with mentor t and
    mentee s, divergences ``KL_t = KL(s_i || t_i)`` and ``KL_s = KL(t_i || s_i)``::

        D_i = CE_t,i + CE_s,i
        L_t = mean_i [task · CE_t,i + (distill · τ² · KL_t,i + h_i) / D_i]
        L_s = mean_i [task · CE_s,i + (distill · τ² · KL_s,i + h_i) / D_i]
        h_i = Σ_pairs [hidden · MSE(H_t,i, W_h · H_s,i) + attention · MSE(A_t,i, A_s,i)]
    """

    # D_i as written; or the mean over the batch for all of it, as the public code has it; or the
    # constant 1: no adaptive weighting, which is standard deep mutual learning.
    denominator: Literal["sample", "batch", "constant"] = "sample"
    # Attached: a model can also lower its loss by a larger D, that is by a worse task loss. A
    # constant D does not move, so then it is the same as detached.
    denominator_gradient: Literal["detached", "attached"] = "detached"
    # Attached: with a joint loss, the teacher of a divergence moves towards its pupil as well.
    targets: Literal["detached", "attached"] = "detached"
    # Mean: divided by the number of classes too, so that distillation fades for large C.
    kl_reduction: Literal["batchmean", "mean"] = "batchmean"
    # Separate: L_t trains the mentor and L_s the mentee. Joint: L_t + L_s trains both.
    loss: Literal["separate", "joint"] = "separate"
    # Learned: W_h is trained by both losses. Identity: the widths must agree.
    projection: Literal["learned", "identity"] = "learned"
    # Included: padded positions count in the means over positions of hidden states and attention.
    padding: Literal["excluded", "included"] = "excluded"
    # Bfloat16: products with W_h round their factors, for machines where that is faster.
    hidden_products: Literal["full", "bfloat16"] = "full"
    hidden: bool = True  # match hidden states: more signal for deep mentees, up to 3 GEMMs a layer
    attention: bool = True  # match attention maps: needs models that return them
    temperature: float = 1.0  # τ: more weight on unlikely classes; logits are divided by it in KL
    label_smoothing: float = 0.0  # share of the label's probability spread over all classes
    task_weight: float = 1.0  # more: labels count more than the other model
    distill_weight: float = 1.0  # more: predictions of the other model count more
    hidden_weight: float = 1.0  # more: hidden states count more
    attention_weight: float = 1.0  # more: attention maps count more

    def __post_init__(self) -> None:
        hints = _hints()
        for name, value in vars(self).items():
            choices = get_args(hints[name])
            if choices and value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
            if hints[name] is bool and not isinstance(value, bool):
                raise TypeError(f"{name} must be True or False, got {value!r}")
            if hints[name] is float:
                if isinstance(value, bool) or not isinstance(value, (int, float)):
                    raise TypeError(f"{name} must be a number, got {value!r}")
                if not (math.isfinite(value) and value >= 0.0):
                    raise ValueError(f"{name} must be finite and at least 0, got {value}")
        if self.temperature == 0.0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")
        if self.label_smoothing >= 1.0:
            raise ValueError(f"label_smoothing must be below 1, got {self.label_smoothing}")

    @classmethod
    def paper(cls) -> DistillationConfig:
        """Return the method as the paper describes it: these are the defaults."""
        return cls()

    @classmethod
    def public_code(cls) -> DistillationConfig:
        """Return what the authors' released code does: one loss, and nothing in it is constant."""
        return cls(
            denominator="batch",
            denominator_gradient="attached",
            targets="attached",
            kl_reduction="mean",
            loss="joint",
            projection="identity",
            padding="included",
        )

    def divergence_factor(self, classes: int) -> float:
        """Return what a divergence is multiplied by in the loss: distill · τ², or that over C."""
        factor = self.distill_weight * self.temperature**2
        return factor / classes if self.kl_reduction == "mean" else factor


@cache
def _hints() -> dict[str, Any]:
    return get_type_hints(DistillationConfig)
