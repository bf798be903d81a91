"""News recommendation on a pretrained encoder, PLM-NR: titles to news, clicks to users, scores."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from fedkd_fast.models import PlainOutputs, freeze_embeddings, load_config, load_pretrained

# As in the code of FedKD (Wu et al., Nature Communications 13:2032).
NEWS_WIDTH = 64
QUERY_WIDTH = 200
DROPOUT = 0.2


class AdditiveAttention(nn.Module):
    """Mean of vectors, weighted by what they hold: ``Σ_i softmax_i(q·tanh(W·x_i + b)) · x_i``."""

    def __init__(self, width: int, query_width: int = QUERY_WIDTH) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, query_width)
        # Without bias: softmax would not see one.
        self.weight = nn.Linear(query_width, 1, bias=False)

    def forward(self, vectors: Tensor, mask: Tensor) -> Tensor:
        """Pool vectors.

        Args:
            vectors: (N, L, H).
            mask: (N, L) bool, True for what counts.

        Returns:
            (N, H), zero where nothing counts.
        """
        logits = self.weight(torch.tanh(self.hidden(vectors)))[..., 0]  # (N, L)
        # Not -inf, of which softmax makes NaN where nothing counts.
        shares = logits.masked_fill(~mask, torch.finfo(logits.dtype).min).softmax(1)
        pooled: Tensor = ((shares * mask).to(vectors.dtype)[:, :, None] * vectors).sum(1)
        return pooled


class NewsModel(nn.Module):
    """Scores of candidate news for users with a history of clicks.

    ``news = V·pool(dropout(encoder(title)))``, ``user = pool(news of the history)``, ``score =
    user·news``, where pool is `AdditiveAttention`. A user without history is zero: all candidates
    have equal scores.

    Args:
        encoder: of titles; a model of transformers.
        width: H of its hidden states.
    """

    base_model_prefix: ClassVar[str] = "encoder"
    layers_on_request: ClassVar[bool] = True

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.dropout = nn.Dropout(DROPOUT)
        self.pooling = AdditiveAttention(width)
        self.projection = nn.Linear(width, NEWS_WIDTH)
        self.user = AdditiveAttention(NEWS_WIDTH)

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """Let the encoder recompute its activations in backward."""
        cast(Any, self.encoder).gradient_checkpointing_enable(**options)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        candidates: Tensor,
        history: Tensor,
        history_mask: Tensor,
        **layers: bool,
    ) -> PlainOutputs:
        """Score candidates.

        Args:
            input_ids: (U, L) titles, each once.
            attention_mask: (U, L), 1 for tokens.
            candidates: (N, C) indices of titles.
            history: (N, S) indices of titles that the user clicked.
            history_mask: (N, S) bool, False for padding.
            layers: what else to return, as models of transformers take it.

        Returns:
            logits (N, C), and hidden_states (U, L, H) and attentions (U, heads, L, L) of titles.
        """
        outputs = cast(Any, self.encoder)(
            input_ids=input_ids, attention_mask=attention_mask, **layers
        )
        news = self._news(outputs.last_hidden_state, attention_mask)  # (U, 64)
        users = self.users(news[history], history_mask)  # (N, 64)
        logits = (news[candidates] * users[:, None]).sum(2)
        return PlainOutputs(
            logits, getattr(outputs, "hidden_states", None), getattr(outputs, "attentions", None)
        )

    def _news(self, states: Tensor, attention_mask: Tensor) -> Tensor:
        vectors: Tensor = self.projection(self.pooling(self.dropout(states), attention_mask != 0))
        return vectors

    def news(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the vectors of titles, (U, 64)."""
        outputs = cast(Any, self.encoder)(input_ids=input_ids, attention_mask=attention_mask)
        return self._news(outputs.last_hidden_state, attention_mask)

    def users(self, news: Tensor, mask: Tensor) -> Tensor:
        """Return the vectors of users, (N, 64), of the news that they clicked, (N, S, 64)."""
        vectors: Tensor = self.user(news, mask)
        return vectors


def load_encoder(source: str, *, layers: int | None = None, weights: bool = True) -> nn.Module:
    """Load a pretrained encoder without a head, or its first layers; its embeddings are frozen.

    Args:
        source: folder or name of a pretrained encoder.
        layers: keep this many layers from the bottom; None keeps all.
        weights: False: leave them random, for who has other ones; a configuration then suffices.

    Raises:
        ImportError: transformers is not installed.
        ValueError: the encoder cannot be loaded, or has fewer layers.
    """
    import transformers

    auto: Any = transformers.AutoModel
    config = load_config(source, layers=layers)
    if weights:
        model = load_pretrained(auto, source, config)
    else:
        model = freeze_embeddings(auto.from_config(config, attn_implementation="eager"))
    if hasattr(model, "pooler"):
        cast(Any, model).pooler = None  # a head that nobody would train
    return model
