"""The pretrained encoder that the options of a task name: configuration, tokenizer, both models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from fedkd_fast._seeds import derived_seed
from fedkd_fast.models import load_config, load_tokenizer
from fedkd_fast.tasks import TaskOptions
from fedkd_fast.tasks.batching import model_inputs

# Makes a model of a source: `build_text_classifier` and its like.
Builder = Callable[..., nn.Module]


def check_labels(model: nn.Module, labels: Sequence[str]) -> None:
    """Hold the labels of data to score a model on against those that it was made for.

    Scores compare indices: names that changed, or changed places, would make them meaningless.

    Args:
        model: of transformers; others, which know no names, pass.
        labels: of the data, in the order of their indices.

    Raises:
        ValueError: they are others.
    """
    known = getattr(getattr(model, "config", None), "id2label", None)
    if known is not None and known != dict(enumerate(labels)):
        made_for = [name for _, name in sorted(known.items())]
        raise ValueError(
            f"the data's labels are not those of the run: {list(labels)}, the model has {made_for}"
        )


class Encoder:
    """Makes mentor and mentee of one encoder; nothing is loaded before it is needed.

    Args:
        options: ``mentor`` names the encoder, ``mentee`` another one of the same vocabulary;
            ``mentee_layers`` defaults to a third of the mentor's, and to all of them with a
            ``mentee_adapter``.
        builder: makes a model of source, labels, layers and seed.
        prefix_space: tokenise words as they are within a text, for texts that come as words.

    Raises:
        ValueError: no encoder is named, or texts would be cut to nothing.
    """

    def __init__(
        self, options: TaskOptions, task: str, builder: Builder, *, prefix_space: bool = False
    ) -> None:
        if options.mentor is None:
            raise ValueError(f"mentor must name a pretrained encoder for task {task}, got None")
        if options.max_length < 3:
            raise ValueError(f"max_length must be at least 3, got {options.max_length}")
        self._options, self._source = options, options.mentor
        self._builder, self._prefix_space = builder, prefix_space

    @cached_property
    def config(self) -> Any:
        """Configuration of the mentor.

        Raises:
            ValueError: it cannot be loaded, or knows fewer positions than texts may be long.
        """
        return self._load_config(self._source)

    def _load_config(self, source: str) -> Any:
        config = load_config(source)
        positions = getattr(config, "max_position_embeddings", None)
        if positions is not None and self._options.max_length > positions:
            raise ValueError(
                f"max_length must be at most {positions}, the positions that {source} "
                f"knows, got {self._options.max_length}"
            )
        return config

    @cached_property
    def tokenizer(self) -> Any:
        """Tokenizer of both models."""
        _ = self.config  # checks the length that texts are cut to
        return load_tokenizer(self._source, prefix_space=self._prefix_space)

    def tokenise(self, texts: Sequence[Any], **how: Any) -> Any:
        """Tokenise texts, cut to the length asked for."""
        length = self._options.max_length
        return self.tokenizer(list(texts), truncation=True, max_length=length, **how)

    def inputs(self, tokens: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Pad to the longest text: ``input_ids`` and ``attention_mask``, both (N, L)."""
        return model_inputs(tokens, self.tokenizer.pad_token_id or 0)

    def build_mentor(self, labels: Sequence[str]) -> nn.Module:
        """Load the whole encoder, with a head whose weights the seed decides."""
        return self._build(self._source, labels, None)

    def build_mentee(self, labels: Sequence[str]) -> nn.Module:
        """Load the first layers of the encoder, or another one, with a head of the same seed.

        Raises:
            ValueError: a mentee of another vocabulary, of fewer layers than asked for, or of fewer
                positions than texts may be long.
        """
        options = self._options
        if options.mentee is not None:
            config = self._load_config(options.mentee)
            if config.vocab_size != self.config.vocab_size:
                raise ValueError(
                    f"mentee must have the vocabulary of the mentor, {self.config.vocab_size} "
                    f"tokens, got {options.mentee!r} with {config.vocab_size}"
                )
            return self._build(options.mentee, labels, options.mentee_layers)
        layers = options.mentee_layers
        if layers is None and options.mentee_adapter is None:
            layers = max(1, self.config.num_hidden_layers // 3)
        return self._build(self._source, labels, layers)

    def _build(self, source: str, labels: Sequence[str], layers: int | None) -> nn.Module:
        _ = self.config  # checks the length of texts before anything is trained
        seed = derived_seed(self._options.seed)
        return self._builder(source, labels, layers=layers, seed=seed)
