"""Handwritten digits of 8 × 8 pixels, and a small network for them."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn


class Digits(nn.Module):
    """64 → 256 → 256 → 10, with the same first weights everywhere."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed  # NVFLARE reads arguments back from attributes
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layers = nn.Sequential(
                nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
            )

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, 64) to logits (N, 10)."""
        logits: Tensor = self.layers(images)
        return logits


def split(part: str) -> tuple[Tensor, Tensor]:
    """Return images (N, 64) float32 and labels (N,) of "train" or "test"."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype("float32")
    parts = train_test_split(images, labels, test_size=0.25, random_state=0)
    train_images, test_images, train_labels, test_labels = map(torch.as_tensor, parts)
    return (train_images, train_labels) if part == "train" else (test_images, test_labels)


def accuracy(model: Digits) -> float:
    """Return the share of test images that the model gets right."""
    images, labels = split("test")
    with torch.no_grad():
        return (model(images).argmax(1) == labels).double().mean().item()
