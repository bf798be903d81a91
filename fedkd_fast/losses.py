"""The mutual distillation loss as a module: FedKD's equations (1)-(7) over model outputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fedkd_fast import ops
from fedkd_fast.distillation import DistillationConfig
from fedkd_fast.reference import DistillLoss, LayerMse

__all__ = [
    "DistillationConfig",
    "ModelOutput",
    "MutualDistillationLoss",
    "MutualLosses",
    "map_layers",
]


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
        """Attention maps of each layer, (N, heads, L, L), as they multiply the values.

        So transformers returns them: in training, after dropout.
        """


class MutualLosses(NamedTuple):
    """Scalars of one batch. Call `total.backward()`; everything else is detached, for reports."""

    mentor: Tensor  # eq (6): task_mentor + distill_mentor + hidden
    mentee: Tensor  # eq (7): task_mentee + distill_mentee + hidden
    total: Tensor  # what to differentiate: mentor + mentee; separate losses count `hidden` once
    task_mentor: Tensor  # eq (1), mean cross entropy in nats, times its weight
    task_mentee: Tensor  # eq (2)
    distill_mentor: Tensor  # eq (3), mean KL(s||t) / D, times its weight and τ²
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
    that count. Where the layers are those of U texts that samples have in common, text u with the
    share w_iu in sample i (``layer_share``), h_i is the mean over the sample's texts::

        h_i   = Σ_u w_iu · Σ_pairs [MSE(H_t,u, W_h · H_s,u) + MSE(A_t,u, A_s,u)] / D_i

    So it is with `DistillationConfig.paper()`, the default, which holds D and the peer's
    probabilities constant; the fields of the configuration say what else there is.

    Separate losses: `total` gives the mentor the gradient of L_t, the mentee that of L_s, and W_h
    that of both. Joint losses: everything has the gradient of L_t + L_s.

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
        in_place: bool = False,
    ) -> None:
        """Build the projections: identity where the widths are equal, else Xavier-uniform.

        Args:
            config: the modes, and which parts of equation (5) to use; None: those of the paper.
            mentor_hidden: width H of the mentor's hidden states, where the config asks for them.
            mentee_hidden: width H of the mentee's hidden states, likewise.
            layer_pairs: (mentor index, mentee index) pairs as `map_layers` makes them; may be empty
                when the config asks for logits alone.
            in_place: let the gradients of the logits take their memory, as `ops.distill_loss` does:
                for vocabularies, where these are the largest tensors there are. Nobody may read the
                logits afterwards; backward raises where a model needs them for its own gradients.

        Raises:
            ValueError: a width below 1, a negative index, no pair although the config asks for
                hidden states or attention maps, or different widths without a projection.
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
        learned = self.config.projection == "learned"
        if self.config.hidden and not learned and mentor_hidden != mentee_hidden:
            raise ValueError(
                'projection="identity" needs hidden states of one width, got '
                f"mentor_hidden={mentor_hidden} and mentee_hidden={mentee_hidden}"
            )
        self.in_place = in_place
        self.mentor_hidden = mentor_hidden
        self.mentee_hidden = mentee_hidden
        self.projections = nn.ModuleList()
        for _ in self.layer_pairs if self.config.hidden and learned else ():
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
        sample_weight: Tensor | None = None,
        layer_share: Tensor | None = None,
    ) -> MutualLosses:
        """Compare two outputs for one batch.

        Args:
            mentor: output with logits (N, C), or (N, L, C) for token classification, and, where the
                config asks for them, hidden_states and attentions.
            mentee: likewise, with the same C and L; widths and head counts may differ. Attention
                maps of models with different head counts are averaged over heads first.
            labels: (N,) or (N, L) int64; -100 marks rows or tokens that do not count.
            attention_mask: (N, L), 1 for tokens and 0 for padding, which then stays out of every
                mean, unless the configuration includes it. None means that there is no padding.
            sample_weight: (N,) weights of the samples in all means, >= 0; None for equal ones.
            layer_share: (N, U) shares w of texts in samples, >= 0, rows adding up to 1, where
                hidden_states, attentions and attention_mask are of U texts. None: each sample is
                its own text.

        Returns:
            `MutualLosses`; 0 where no label counts.

        Raises:
            ValueError: shapes that do not fit, or hidden states or attentions that are missing.
            RuntimeError: from the ops.
        """
        _check_logits(mentor.logits, mentee.logits, labels)
        if sample_weight is not None and sample_weight.shape != labels.shape[:1]:
            raise ValueError(
                f"sample_weight must have shape {tuple(labels.shape[:1])}, "
                f"got {tuple(sample_weight.shape)}"
            )
        if layer_share is not None and layer_share.shape[:-1] != labels.shape[:1]:
            raise ValueError(
                f"layer_share must have shape ({len(labels)}, texts), "
                f"got {tuple(layer_share.shape)}"
            )
        logits, targets, weight = (mentor.logits, mentee.logits), labels, sample_weight
        if labels.dim() > 1:
            logits = logits[0].flatten(0, 1), logits[1].flatten(0, 1)
            targets = labels.flatten()
            if weight is not None:
                weight = weight[:, None].expand(labels.shape).flatten()

        def on_logits(denominator_grad: Tensor | None = None) -> DistillLoss:
            return ops.distill_loss(
                *(*logits, targets),
                sample_weight=weight,
                denominator_grad=denominator_grad,
                config=self.config,
                in_place=self.in_place,
            )

        config = self.config
        attached = config.denominator_gradient == "attached"
        if config.hidden or config.attention:
            # An attached D has to be known before what it divides, and that before D's gradient.
            with torch.set_grad_enabled(torch.is_grad_enabled() and not attached):
                rows = on_logits()
            shares = _shares(rows.denominator, labels, sample_weight)
            # A joint loss has the term of each model.
            scale = 2 * shares.sample if config.loss == "joint" else shares.sample
            if layer_share is None:
                total, error = self._layers(mentor, mentee, scale, attention_mask)
            else:
                share = layer_share.detach().to(scale.dtype)
                # No matrix products: autocast would round them.
                scale = (scale[:, None] * share).sum(0)  # (U,)
                total, errors = self._layers(mentor, mentee, scale, attention_mask)
                error = (share * errors).sum(1)  # (N,)
            hidden = total.detach() / 2 if config.loss == "joint" else total.detach()
            if attached:
                pull = -(error * shares.row)
                pull = pull[:, None].expand(shares.counted.shape).reshape(-1)
                rows = on_logits(2 * pull if config.loss == "joint" else pull)
            losses = rows.mentor_loss + hidden, rows.mentee_loss + hidden, rows.total + total
        else:
            rows = on_logits()
            hidden = rows.task_mentor.new_zeros(())
            losses = rows.mentor_loss, rows.mentee_loss, rows.total
        return MutualLosses(
            *losses,
            task_mentor=rows.task_mentor,
            task_mentee=rows.task_mentee,
            distill_mentor=rows.distill_mentor,
            distill_mentee=rows.distill_mentee,
            hidden=hidden,
        )

    def _layers(
        self, mentor: ModelOutput, mentee: ModelOutput, scale: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return Σ_u scale_u · error_u, and the errors: both squared errors over all pairs."""
        config = self.config
        counts = None if mask is None or config.padding == "included" else mask != 0
        found = []
        for wanted, weight, compare in (
            (config.hidden, config.hidden_weight, self._hidden),
            (config.attention, config.attention_weight, self._attention),
        ):
            if wanted:
                factor = scale if weight == 1.0 else scale * weight
                found += [(weight, one) for one in compare(mentor, mentee, factor, counts)]
        total = torch.stack([one.total for _, one in found]).sum()
        return total, torch.stack([weight * one.errors for weight, one in found]).sum(0)

    def _hidden(
        self, mentor: ModelOutput, mentee: ModelOutput, scale: Tensor, counts: Tensor | None
    ) -> Iterator[LayerMse]:
        samples = len(scale)
        for index, (top, low) in enumerate(self.layer_pairs):
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
            if wide.shape[:-1] != narrow.shape[:-1] or wide.shape[0] != samples:
                raise ValueError(
                    "hidden_states of mentor and mentee must agree in samples and tokens, got "
                    f"shapes {tuple(wide.shape)} and {tuple(narrow.shape)} for "
                    f"{samples} samples"
                )
            mask = None if wide.dim() == 2 else _token_mask(counts, wide.shape[:2])
            if not self.projections:
                yield ops.layer_mse(wide, narrow, scale, mask=mask)
                continue
            yield ops.projected_mse(
                *(wide, narrow, self.projections[index].get_parameter("weight"), scale),
                mask=mask,
                # Trained by both losses, each of which has the term once.
                weight_gradient=2.0 if self.config.loss == "separate" else 1.0,
                products=torch.bfloat16 if self.config.hidden_products == "bfloat16" else None,
            )

    def _attention(
        self, mentor: ModelOutput, mentee: ModelOutput, scale: Tensor, counts: Tensor | None
    ) -> Iterator[LayerMse]:
        for top, low in self.layer_pairs:
            left = _layer(mentor.attentions, top, "mentor", "attentions", _ATTENTION_HINT)
            right = _layer(mentee.attentions, low, "mentee", "attentions", _ATTENTION_HINT)
            if (
                left.dim() != 4
                or left.shape[2:] != right.shape[2:]
                or not (len(left) == len(right) == len(scale))
            ):
                raise ValueError(
                    "attentions of mentor and mentee must have shapes (N, heads, L, L) that agree "
                    f"in N and L, got {tuple(left.shape)} and {tuple(right.shape)} for "
                    f"{len(scale)} samples"
                )
            if left.shape[1] != right.shape[1]:
                left, right = left.mean(1, keepdim=True), right.mean(1, keepdim=True)
            yield ops.layer_mse(
                left, right, scale, mask=_token_mask(counts, (left.shape[0], left.shape[2]))
            )


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


class _Shares(NamedTuple):
    """What the layers' errors are multiplied by; 0 for a sample without a counted label."""

    sample: Tensor  # (N,) in h: the sample's share of the weights over its D
    row: Tensor  # (N,) in -∂h/∂D of each of its rows, relative to the row's share
    counted: Tensor  # (N, 1) or (N, L), rows with a label


def _shares(denominator: Tensor, labels: Tensor, sample_weight: Tensor | None) -> _Shares:
    """Weigh sample i by its share and 1 / D_i, D_i the mean over its rows that count."""
    counted = (labels if labels.dim() > 1 else labels[:, None]) != -100  # (N, 1) or (N, L)
    weight = denominator.new_ones(len(labels))
    if sample_weight is not None:
        weight = sample_weight.detach().to(denominator.dtype)
    rows = counted.sum(1)
    present = (rows > 0) & (weight > 0)
    mean = torch.where(counted, denominator.reshape(counted.shape), 0.0).sum(1)
    inverse = torch.where(present, rows.clamp(min=1) / mean, 0.0)
    weight = torch.where(present, weight, 0.0)
    of_samples, of_rows = weight.sum(), (weight * rows).sum()
    of_samples = torch.where(of_samples > 0, of_samples, 1.0)
    return _Shares(
        weight / of_samples * inverse,
        of_rows / of_samples * inverse.square() / rows.clamp(min=1),
        counted,
    )


def _token_mask(counts: Tensor | None, shape: Sequence[int]) -> Tensor | None:
    if counts is not None and counts.shape != tuple(shape):
        raise ValueError(
            f"attention_mask must have shape {tuple(shape)}, got {tuple(counts.shape)}"
        )
    return counts
