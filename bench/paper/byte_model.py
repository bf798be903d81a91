"""How Table 1 of FedKD's paper counts communication, as a formula.

Wu et al., Nature Communications 13:2032 (2022), give gigabytes per client without a formula; this
one meets every cell of the methods it compares with. One way of one round moves a model once::

    GB = transfers · size · 4·(layers + head) / 10⁹

4 bytes a parameter, 10⁹ bytes a gigabyte, embeddings left out, uploads and downloads both counted:

* a layer of an encoder of width H and feed-forward width F has ``4·(H² + H) + 2·H·F + F + H + 4·H``
  parameters: four projections, two feed-forward layers, two normalisations;
* the head of MIND is an additive attention with 200 queries over the tokens and a projection to 64
  news features; that of ADR is BERT's pooler and a classifier of two classes;
* averaging took 6 transfers on MIND and 4 on ADR, that is 3 and 2 rounds; SCAFFOLD moves a model
  and a control variate each way and took 2 rounds on both: 8 transfers;
* FedDropout moves 0.6 of a model, FedPAQ 16 or 8 bits of each 32, FetchSGD a quarter.

The 4-layer MiniLM and TinyBERT are counted as 384 wide, though TinyBERT's official release is 312.
What FedKD itself moves depends on the data; its cells say by which ratio SVD shrank a mentee.
"""

from __future__ import annotations

from dataclasses import dataclass

BYTES_PER_PARAMETER = 4
GIGABYTE = 10**9
QUERIES, NEWS_FEATURES = 200, 64
ADR_CLASSES = 2
# Of averaging; SCAFFOLD's are its own.
TRANSFERS = {"MIND": 6, "ADR": 4}
SCAFFOLD_TRANSFERS = {"MIND": 8, "ADR": 8}


@dataclass(frozen=True)
class Encoder:
    """A transformer of the BERT family without its embeddings."""

    layers: int
    hidden: int = 768
    intermediate: int = 3072

    def layer_parameters(self) -> int:
        """Count the parameters of one layer."""
        h, f = self.hidden, self.intermediate
        return 4 * (h * h + h) + (h * f + f) + (f * h + h) + 2 * 2 * h

    def head_parameters(self, task: str) -> int:
        """Count the parameters above the layers."""
        h = self.hidden
        if task == "MIND":
            return (h * QUERIES + QUERIES) + (QUERIES + 1) + (h * NEWS_FEATURES + NEWS_FEATURES)
        if task == "ADR":
            return (h * h + h) + ADR_CLASSES * (h + 1)
        raise ValueError(f"task must be MIND or ADR, got {task!r}")

    def parameters(self, task: str) -> int:
        """Count what travels of a model for a task."""
        return self.layers * self.layer_parameters() + self.head_parameters(task)


@dataclass(frozen=True)
class Row:
    """One method of the table."""

    encoder: Encoder
    size: float = 1.0  # of what is moved, of a float32 model
    scaffold: bool = False  # two model-sized objects each way, 2 rounds on both tasks

    def gigabytes(self, task: str) -> float:
        """Return what one client receives and sends."""
        transfers = (SCAFFOLD_TRANSFERS if self.scaffold else TRANSFERS)[task]
        moved = self.size * BYTES_PER_PARAMETER * self.encoder.parameters(task)
        return transfers * moved / GIGABYTE


_BASE, _SIX, _FOUR, _TWO = Encoder(12), Encoder(6), Encoder(4), Encoder(2)
_NARROW = Encoder(4, hidden=384, intermediate=1536)
ROWS = {
    "UniLM (Fed)": Row(_BASE),
    "DistilBERT 6": Row(_SIX),
    "DistilBERT 4": Row(_FOUR),
    "BERT-PKD 6": Row(_SIX),
    "BERT-PKD 4": Row(_FOUR),
    "TinyBERT 6": Row(_SIX),
    "TinyBERT 4": Row(_NARROW),
    "MiniLM 6": Row(_SIX),
    "MiniLM 4": Row(_NARROW),
    "UniLM 4": Row(_FOUR),
    "UniLM 2": Row(_TWO),
    "FetchSGD": Row(_BASE, size=1 / 4),
    "FedDropout": Row(_BASE, size=0.6),
    "SCAFFOLD": Row(_BASE, scaffold=True),
    "FedPAQ 16-bit": Row(_BASE, size=16 / 32),
    "FedPAQ 8-bit": Row(_BASE, size=8 / 32),
}
# Gigabytes as the table prints them: MIND, ADR.
PRINTED = {
    "UniLM (Fed)": ("2.05", "1.37"),
    "DistilBERT 6": ("1.03", "0.69"),
    "DistilBERT 4": ("0.69", "0.46"),
    "BERT-PKD 6": ("1.03", "0.69"),
    "BERT-PKD 4": ("0.69", "0.46"),
    "TinyBERT 6": ("1.03", "0.69"),
    "TinyBERT 4": ("0.17", "0.12"),
    "MiniLM 6": ("1.03", "0.69"),
    "MiniLM 4": ("0.17", "0.12"),
    "UniLM 4": ("0.69", "0.46"),
    "UniLM 2": ("0.35", "0.24"),
    "FetchSGD": ("0.51", "0.34"),
    "FedDropout": ("1.23", "0.82"),
    "SCAFFOLD": ("2.73", "2.74"),
    "FedPAQ 16-bit": ("1.03", "0.69"),
    "FedPAQ 8-bit": ("0.51", "0.34"),
    "FedKD 4": ("0.19", "0.12"),
    "FedKD 2": ("0.11", "0.07"),
}


def printed(name: str, task: str) -> str:
    """Return a cell of the table."""
    return PRINTED[name][list(TRANSFERS).index(task)]


def svd_ratio(layers: int, task: str) -> float:
    """Return by what factor SVD shrank FedKD's mentee of so many layers, by the printed cells."""
    plain, moved = (float(printed(f"{name} {layers}", task)) for name in ("UniLM", "FedKD"))
    return plain / moved
