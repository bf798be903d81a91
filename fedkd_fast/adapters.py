"""Low-rank adapters (LoRA, Hu et al. 2021) on frozen models, by the peft library."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from fedkd_fast._extras import needed
from fedkd_fast._seeds import seeded

# What query and value projections are called in models of transformers and in those of this
# package.
_TARGETS = ("query", "value", "q_proj", "v_proj", "q_lin", "v_lin")
_PREFIX = "lora_"
_SPEC = re.compile(r"lora:([0-9]{1,4})(?::([0-9]+(?:\.[0-9]+)?))?")


def check_adapter(name: str, value: object) -> None:
    """Refuse what names no adapter.

    Raises:
        ValueError: something else than ``lora:RANK`` or ``lora:RANK:ALPHA``.
    """
    if isinstance(value, str):
        match = _SPEC.fullmatch(value)
        if match and int(match[1]) >= 1 and (match[2] is None or float(match[2]) > 0):
            return
    raise ValueError(
        f"{name} must be lora:RANK or lora:RANK:ALPHA, for instance lora:8, got {value!r}"
    )


def add_adapter(model: nn.Module, adapter: str, seed: int) -> None:
    """Freeze a model but for its head, and add low-rank matrices to its attention.

    ``W·x`` of every query and value projection becomes ``W·x + (α/r)·B·(A·x)`` with A of shape
    (r, in), drawn as `nn.Linear` draws, and B of shape (out, r), zero at the start. What trains
    afterwards are A, B and the head: all trainable parameters outside the encoder.

    Args:
        model: changed in place; a model of transformers, or one whose encoder lies in the
            attribute that its ``base_model_prefix`` names.
        adapter: ``lora:RANK`` or ``lora:RANK:ALPHA``; α is twice the rank unless it is given. More
            rank learns more and sends more.
        seed: of A; equal for all who exchange adapters.

    Raises:
        ValueError: no such adapter, or no query and value projections in the model.
        ImportError: peft is not installed.
    """
    check_adapter("adapter", adapter)
    peft = needed("peft", "an adapter", "peft", "train")
    found = sorted(
        {
            name.rsplit(".", 1)[-1]
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and name.endswith(_TARGETS)
        }
    )
    if not found:
        raise ValueError(
            f"adapter needs projections named {', '.join(_TARGETS)} in the model, and "
            f"{type(model).__name__} has none"
        )
    match = _SPEC.fullmatch(adapter)
    assert match is not None
    rank = int(match[1])
    alpha = float(match[2]) if match[2] is not None else 2.0 * rank
    prefix = getattr(model, "base_model_prefix", "")
    inside = f"{prefix}." if prefix else ""
    heads = {
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and inside and not name.startswith(inside)
    }
    make_config: Any = peft.LoraConfig
    config = make_config(r=rank, lora_alpha=alpha, target_modules=found, lora_dropout=0.0)
    with seeded(seed):
        peft.inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in heads or _PREFIX in name)


def merge_adapter(model: nn.Module) -> None:
    """Add adapters to the matrices they belong to, in place; the model needs no peft afterwards.

    ``W + (α/r)·B·A`` in the precision of W, so outputs may change in their last bits.
    """
    for name, module in list(model.named_modules()):
        if not hasattr(module, "lora_A"):
            continue
        layer: Any = module
        layer.merge()
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent) if parent else model, last, layer.get_base_layer())
