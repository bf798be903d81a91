"""The mutual distillation loss as a module: FedKD's equations (1)-(7) over model outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fedkd_fast import ops
from fedkd_fast.reference import DENOMINATOR_FLOOR


class ModelOutput(Protocol):
    """What the loss reads of a model's output; the outputs of transformers have these names."""

    @property
    def logits(self) -> Tensor:
        """(N, C), or (N, L, C) for tokens."""

    @property
    def hidden_states(self) -> Sequence[Tensor] | None:
        """Output of the embeddings, then of each layer: (N, L, H) or (N, H)."""

    @property
    def attentions(self) -> Sequence[Tensor] | None:
        """Attention probabilities of each layer: (N, heads, L, L)."""


@dataclass(frozen=True)
class DistillationConfig:
    """Which parts of equation (5) are added to the losses on the logits."""

    hidden: bool = True  # match hidden states: more signal for deep mentees, one GEMM per layer
    attention: bool = True  # match attention maps: needs models that return them


class MutualLosses(NamedTuple):
    """Scalars of one batch. Call `total.backward()`; everything else is detached, for reports."""

    mentor: Tensor  # eq (6): task_mentor + distill_mentor + hidden
    mentee: Tensor  # eq (7): task_mentee + distill_mentee + hidden
    total: Tensor  # what to differentiate: mentor + mentee with `hidden` counted once
    task_mentor: Tensor  # eq (1), mean cross entropy in nats
    task_mentee: Tensor  # eq (2)
    distill_mentor: Tensor  # eq (3), mean KL(s||t) / D
    distill_mentee: Tensor  # eq (4), mean KL(t||s) / D
    hidden: Tensor  # eq (5), mean of (hidden MSE + attention MSE) / D


def map_layers(mentor_layers: int, mentee_layers: int) -> list[tuple[int, int]]:
    """Pair layers from the top with stride ``mentor_layers // mentee_layers``, as FedKD does.

    ``map_layers(12, 4) == [(2, 0), (5, 1), (8, 2), (11, 3)]``: mentee layers 1-4 learn with mentor
    layers 3, 6, 9, 12.

    Args:
        mentor_layers: number of layers of the mentor.
        mentee_layers: number of layers of the mentee, in 1..mentor_layers.

    Returns:
        (mentor index, mentee index) from the bottom up: indices into `attentions`, and into
        `hidden_states` without its first entry, the output of the embeddings.

    Raises:
        ValueError: `mentee_layers` out of range.
    """
    if not 1 <= mentee_layers <= mentor_layers:
        raise ValueError(f"mentee_layers must lie in 1..{mentor_layers}, got {mentee_layers}")
    stride = mentor_layers // mentee_layers
    first = mentor_layers - 1 - (mentee_layers - 1) * stride
    return [(first + index * stride, index) for index in range(mentee_layers)]


class MutualDistillationLoss(nn.Module):
    """Both models' losses in one call: task, adaptive distillation and adaptive hidden loss.

    For sample i with label y, mentor t and mentee s (Wu et al., Nature Communications 13:2032,
    eqs (1)-(7))::

        D_i   = max(CE(y_i, t_i) + CE(y_i, s_i), 1e-6)
        L_t,i = CE(y_i, t_i) + KL(s_i || t_i) / D_i + h_i
        L_s,i = CE(y_i, s_i) + KL(t_i || s_i) / D_i + h_i
        h_i   = Σ_pairs [MSE(H_t,i, W_h · H_s,i) + MSE(A_t,i, A_s,i)] / D_i

    averaged over samples; for token classification the first two terms of L are averaged over the
    tokens that count, each with its own D, and the D of h_i is the mean over the tokens of sample i
    that count. D and the peer's probabilities are constants. Both losses hold the same h, so
    `total`, which counts it once, gives every parameter exactly the gradient of its own model's
    loss: the mentor's of L_t, the mentee's and W_h of L_s.

    `projections` holds W_h, one linear map per layer pair. It belongs to the client and is never
    sent; give it to the optimizer of the mentee.
    """

    def __init__(
        self,
        config: DistillationConfig | None = None,
        *,
        mentor_hidden: int = 1,
        mentee_hidden: int = 1,
        layer_pairs: Sequence[tuple[int, int]] = (),
    ) -> None:
        """Build the projections: identity where the widths are equal, else Xavier-uniform.

        Args:
            config: which parts of equation (5) to use; None means all of them.
            mentor_hidden: width H of the mentor's hidden states, where the config asks for them.
            mentee_hidden: width H of the mentee's hidden states, likewise.
            layer_pairs: (mentor index, mentee index) pairs as `map_layers` makes them; may be empty
                when the config asks for logits alone.

        Raises:
            ValueError: a width below 1, a negative index, or no pair although the config asks for
                hidden states or attention maps.
        """
        super().__init__()
        self.config = config if config is not None else DistillationConfig()
        for name, width in (("mentor_hidden", mentor_hidden), ("mentee_hidden", mentee_hidden)):
            if width < 1:
                raise ValueError(f"{name} must be at least 1, got {width}")
        self.layer_pairs = [(int(mentor), int(mentee)) for mentor, mentee in layer_pairs]
        for pair in self.layer_pairs:
            if min(pair) < 0:
                raise ValueError(f"layer_pairs must hold indices >= 0, got {pair}")
        if not self.layer_pairs and (self.config.hidden or self.config.attention):
            raise ValueError("layer_pairs must not be empty with hidden=True or attention=True")
        self.mentor_hidden = mentor_hidden
        self.mentee_hidden = mentee_hidden
        self.projections = nn.ModuleList()
        for _ in self.layer_pairs if self.config.hidden else ():
            projection = nn.Linear(mentee_hidden, mentor_hidden, bias=False)
            if mentee_hidden == mentor_hidden:
                nn.init.eye_(projection.weight)
            else:
                nn.init.xavier_uniform_(projection.weight)
            self.projections.append(projection)

    def forward(
        self,
        mentor: ModelOutput,
        mentee: ModelOutput,
        labels: Tensor,
        attention_mask: Tensor | None = None,
    ) -> MutualLosses:
        """Compare two outputs for one batch.

        Args:
            mentor: output with logits (N, C), or (N, L, C) for token classification, and, where the
                config asks for them, hidden_states and attentions.
            mentee: likewise, with the same C and L; widths and head counts may differ. Attention
                maps of models with different head counts are averaged over heads first.
            labels: (N,) or (N, L) int64; -100 marks rows or tokens that do not count.
            attention_mask: (N, L), 1 for tokens and 0 for padding, which then stays out of every
                mean. None means that there is no padding.

        Returns:
            `MutualLosses`; 0 where no label counts.

        Raises:
            ValueError: shapes that do not fit, or hidden states or attentions that are missing.
            RuntimeError: from `ops.distill_loss`.
        """
        _check_logits(mentor.logits, mentee.logits, labels)
        classes = mentor.logits.shape[-1]
        rows = ops.distill_loss(
            mentor.logits.reshape(-1, classes),
            mentee.logits.reshape(-1, classes),
            labels.reshape(-1),
        )
        counted = labels != -100
        row_weight = counted.reshape(-1).to(rows.ce_mentor.dtype)  # (R,), sums to 1
        row_weight = row_weight / counted.sum().clamp(min=1)
        task_mentor = (rows.ce_mentor * row_weight).sum()
        task_mentee = (rows.ce_mentee * row_weight).sum()
        hidden = rows.mentor_loss.new_zeros(())
        if self.config.hidden or self.config.attention:
            weight = _sample_weight(rows.ce_mentor + rows.ce_mentee, counted)
            if self.config.hidden:
                hidden = hidden + self._hidden_loss(mentor, mentee, weight, attention_mask)
            if self.config.attention:
                hidden = hidden + self._attention_loss(mentor, mentee, weight, attention_mask)
        return MutualLosses(
            mentor=(rows.mentor_loss + hidden).detach(),
            mentee=(rows.mentee_loss + hidden).detach(),
            total=rows.total + hidden,
            task_mentor=task_mentor,
            task_mentee=task_mentee,
            distill_mentor=(rows.kl_mentor / rows.denominator * row_weight).sum(),
            distill_mentee=(rows.kl_mentee / rows.denominator * row_weight).sum(),
            hidden=hidden.detach(),
        )

    def _hidden_loss(
        self, mentor: ModelOutput, mentee: ModelOutput, weight: Tensor, mask: Tensor | None
    ) -> Tensor:
        terms = []
        for projection, (top, low) in zip(self.projections, self.layer_pairs, strict=True):
            # Entry 0 is the output of the embeddings.
            wide = _layer(mentor.hidden_states, top + 1, "mentor", "hidden_states", _HIDDEN_HINT)
            narrow = _layer(mentee.hidden_states, low + 1, "mentee", "hidden_states", _HIDDEN_HINT)
            for name, state, width in (
                ("mentor", wide, self.mentor_hidden),
                ("mentee", narrow, self.mentee_hidden),
            ):
                if state.shape[-1] != width:
                    raise ValueError(
                        f"hidden_states of the {name} must have width {width}, "
                        f"got shape {tuple(state.shape)}"
                    )
            if wide.shape[:-1] != narrow.shape[:-1] or wide.shape[0] != weight.shape[0]:
                raise ValueError(
                    "hidden_states of mentor and mentee must agree in samples and tokens, got "
                    f"shapes {tuple(wide.shape)} and {tuple(narrow.shape)} for "
                    f"{weight.shape[0]} samples"
                )
            error = _widen(wide - projection(narrow)).square().mean(-1)  # (N, L) or (N,)
            if error.dim() > 1:
                error = (error * _token_weight(mask, error.shape[0], error.shape[1], error)).sum(1)
            terms.append((error * weight).sum())
        return torch.stack(terms).sum()

    def _attention_loss(
        self, mentor: ModelOutput, mentee: ModelOutput, weight: Tensor, mask: Tensor | None
    ) -> Tensor:
        terms = []
        for top, low in self.layer_pairs:
            left = _layer(mentor.attentions, top, "mentor", "attentions", _ATTENTION_HINT)
            right = _layer(mentee.attentions, low, "mentee", "attentions", _ATTENTION_HINT)
            if left.dim() != 4 or left.shape[2:] != right.shape[2:] or len(left) != len(right):
                raise ValueError(
                    "attentions of mentor and mentee must have shapes (N, heads, L, L) that agree "
                    f"in N and L, got {tuple(left.shape)} and {tuple(right.shape)}"
                )
            if left.shape[1] != right.shape[1]:
                left, right = left.mean(1, keepdim=True), right.mean(1, keepdim=True)
            error = _widen(left - right).square().mean(1)  # (N, L, L)
            tokens = _token_weight(mask, error.shape[0], error.shape[1], error)  # (N, L)
            pairs = (error * tokens[:, :, None] * tokens[:, None, :]).sum((1, 2))  # (N,)
            terms.append((pairs * weight).sum())
        return torch.stack(terms).sum()


_HIDDEN_HINT = "call the model with output_hidden_states=True"
_ATTENTION_HINT = (
    'load the model with attn_implementation="eager" and call it with output_attentions=True, '
    "or use DistillationConfig(attention=False)"
)


def _check_logits(mentor: Tensor, mentee: Tensor, labels: Tensor) -> None:
    if mentor.dim() not in (2, 3):
        raise ValueError(
            f"logits must have shape (N, C) or (N, L, C), got {tuple(mentor.shape)} for the mentor"
        )
    if mentor.shape != mentee.shape:
        raise ValueError(
            "logits of mentor and mentee must have one shape, got "
            f"{tuple(mentor.shape)} and {tuple(mentee.shape)}"
        )
    if labels.shape != mentor.shape[:-1]:
        raise ValueError(
            f"labels must have shape {tuple(mentor.shape[:-1])}, got {tuple(labels.shape)}"
        )


def _layer(
    layers: Sequence[Tensor] | None, index: int, model: str, field: str, hint: str
) -> Tensor:
    """Entry `index`; some attention implementations return an empty tuple or Nones instead."""
    if not layers or layers[0] is None:
        raise ValueError(f"{field} of the {model} are missing: {hint}")
    if index >= len(layers):
        raise ValueError(
            f"layer_pairs must fit the models: entry {index} of {field} of the {model} was asked "
            f"for, which has {len(layers)}"
        )
    return layers[index]


def _widen(error: Tensor) -> Tensor:
    """Square and sum 16-bit differences in float32."""
    return error.float() if error.dtype in (torch.float16, torch.bfloat16) else error


def _sample_weight(cross_entropy: Tensor, counted: Tensor) -> Tensor:
    """Weigh sample i by 1 / (D_i · samples that count): (N,), 0 for one without a counted label."""
    per_sample = counted.reshape(counted.shape[0], -1)  # (N, 1) or (N, L)
    tokens = per_sample.sum(1)
    mean = cross_entropy.reshape(per_sample.shape).sum(1) / tokens.clamp(min=1)
    inverse = mean.clamp(min=DENOMINATOR_FLOOR).reciprocal()
    present = tokens > 0
    return torch.where(present, inverse, 0.0) / present.sum().clamp(min=1)


def _token_weight(mask: Tensor | None, samples: int, length: int, like: Tensor) -> Tensor:
    """Weigh the tokens of a sample equally and its padding by 0: (N, L), each row sums to 1."""
    if mask is None:
        return like.new_full((samples, length), 1.0 / length)
    if mask.shape != (samples, length):
        raise ValueError(
            f"attention_mask must have shape {(samples, length)}, got {tuple(mask.shape)}"
        )
    tokens = (mask != 0).to(like.dtype)
    return tokens / tokens.sum(1, keepdim=True).clamp(min=1)
