"""News and clicks of the layout of MIND, and an encoder of three tiny layers, made on the spot."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch

TOPICS = (("goal", "match", "team"), ("bank", "stock", "price"), ("film", "song", "star"))
WORDS = [word for topic in TOPICS for word in topic]
NEWS, USERS, SHOWN = 60, 12, 6


def write_encoder(folder: Path, *, hidden: int = 16, layers: int = 3) -> str:
    """Save a BERT with random weights and a vocabulary of nine words."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir(parents=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=2 * hidden,
        max_position_embeddings=24,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    return str(folder)


def news_lines() -> list[str]:
    """Titles of one to five words of one of three topics."""
    generator = np.random.default_rng(0)
    lines = []
    for number in range(NEWS):
        topic = number % len(TOPICS)
        words = generator.choice(TOPICS[topic], generator.integers(1, 6))
        lines.append(f"N{number}\ttopic{topic}\tsub\t{' '.join(words)}\tabstract\turl\t[]\t[]\n")
    return lines


def behavior_lines(count: int, seed: int) -> list[str]:
    """Each user clicks one topic; some have no history, and one impression is all clicks."""
    generator = np.random.default_rng(seed)
    lines = []
    for number in range(count):
        user = int(generator.integers(USERS))
        topic = user % len(TOPICS)
        mine = np.flatnonzero(np.arange(NEWS) % len(TOPICS) == topic)
        clicks = generator.choice(mine, 0 if number % 5 == 0 else generator.integers(1, 8))
        shown = generator.choice(NEWS, SHOWN, replace=False)
        if number == 1:
            shown = mine[:2]
        labels = [int(news % len(TOPICS) == topic) for news in shown]
        if not any(labels):
            labels[0] = 1
        history = " ".join(f"N{news}" for news in clicks)
        candidates = " ".join(f"N{n}-{label}" for n, label in zip(shown, labels, strict=True))
        lines.append(f"{number}\tU{user}\t11/9/2019 8:00:00 AM\t{history}\t{candidates}\n")
    return lines


def write_news(folder: Path, *, official: bool = False, count: int = 40) -> Path:
    """Write train and test in one folder, packed, or as the official folders."""
    for seed, split in enumerate(("train", "dev")):
        lines = behavior_lines(count if split == "train" else 25, seed)
        if official:
            inner = folder / f"MINDsmall_{split}"
            inner.mkdir(parents=True)
            (inner / "news.tsv").write_text("".join(news_lines()))
            (inner / "behaviors.tsv").write_text("".join(lines))
            continue
        folder.mkdir(exist_ok=True, parents=True)
        name = "valid" if split == "dev" else split
        for path, content in (("news", news_lines()), (f"behaviors_{name}", lines)):
            with gzip.open(folder / f"{path}.tsv.gz", "wt", encoding="utf-8") as file:
                file.writelines(content)
    return folder
