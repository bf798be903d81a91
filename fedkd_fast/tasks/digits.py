"""Handwritten digits: scikit-learn's 1,797 real 8×8 images, and small vision transformers."""

from __future__ import annotations

import csv
import io
import math
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedkd_fast._extras import needed
from fedkd_fast._files import read_text
from fedkd_fast._seeds import derived_seed
from fedkd_fast.models import build_vit, run_model
from fedkd_fast.tasks import Batch, TaskOptions, recipe
from fedkd_fast.tasks.content import content_digest
from fedkd_fast.tasks.drawn import DrawnShard, DrawnShards, put_together
from fedkd_fast.tasks.partition import Indices, deal

CLASSES = 10
SIDE = 8
LARGEST_PIXEL = 16.0
# The test images are the same in every run, whatever its seed.
TEST_SPLIT_SEED = 0
TEST_PART = 0.2
# Weights of 0.02, the custom at width 768, leave so narrow a network nearly silent: mentors of two
# layers, 64 wide, trained alone, lost two points by them (0.912 for 0.932, seeds 0 to 2).
INITIALIZER_RANGE = 0.1
# A row of pixels is a token: eight tokens and the class token.
PATCH_SIZE = (1, SIDE)
# Training images are turned, scaled and moved a little at random, by at most this much, for every
# method alike: a shard has some 360 images, and what a model is shown twice teaches it little. What
# clients draw is moved as much once and for all: it is what tells their data apart.
LARGEST_TURN = math.radians(10)
LARGEST_SCALING = 0.1
LARGEST_MOVE = 0.5  # pixels
MOVES = 4  # turn, scaling, right, down


class DigitsTask:
    """Ten-way classification of 8×8 images; mentor and mentee are vision transformers.

    The test split is fixed: 20 % of each class. The training images are dealt to clients class by
    class in shares drawn from a Dirichlet distribution, so clients differ mildly in size and mix.

    With ``samples_per_client``, there may be any number of clients: each draws so many of the
    training images with replacement, turned by at most 10°, scaled by 10 % and moved by half a
    pixel each way, the same each time it trains. Seed and client decide; nothing is kept of it.

    Args:
        options: ``batch_size``, ``mentee_layers`` (None: 1), ``partition``, ``samples_per_client``
            and ``seed`` are heeded.
        concentration: of the Dirichlet distribution; larger makes the clients more alike.

    Raises:
        ValueError: options that make no sense here.
        ImportError: scikit-learn is not installed.
    """

    name = "digits"
    metric = "accuracy"
    DEFAULTS: ClassVar[Mapping[str, Any]] = {
        "clients": 4,
        "rounds": 40,
        "local_epochs": 1,
        "batch_size": 32,
        "lr_mentor": 1e-3,
        "lr_mentee": 1e-3,
        "weight_decay": 0.3,
        # The matrices are so small that a second thread costs more than it gives.
        "threads": 1,
    }
    MENTOR_LAYERS = 3
    WIDTH = 64
    draws = True  # knows samples_per_client

    def __init__(self, options: TaskOptions | None = None, *, concentration: float = 3.0) -> None:
        options = options or TaskOptions()
        for field in ("data", "mentor", "mentee"):
            if getattr(options, field) is not None:
                raise ValueError(
                    f"{field} must be left out for task digits, which brings its own, "
                    f"got {getattr(options, field)!r}"
                )
        layers = 1 if options.mentee_layers is None else options.mentee_layers
        if not 1 <= layers <= self.MENTOR_LAYERS:
            raise ValueError(
                f"mentee_layers must lie in 1..{self.MENTOR_LAYERS}, the mentor's layers, "
                f"got {layers}"
            )
        if not concentration > 0:
            raise ValueError(f"concentration must be positive, got {concentration}")
        drawn = options.samples_per_client
        if drawn is not None and drawn < 1:
            raise ValueError(f"samples_per_client must be at least 1, got {drawn}")
        if drawn is not None and options.partition not in (None, "iid"):
            raise ValueError(
                "partition must be left out, or iid, with samples_per_client: every client draws "
                f"from all images alike, got {options.partition!r}"
            )
        self._options, self._mentee_layers = options, layers
        self._partition = options.partition or f"dirichlet:{concentration:g}"
        images, labels = _load()
        self._test = _test_indices(labels)
        self._train: Indices = np.setdiff1d(np.arange(len(labels)), self._test)
        # Before they are normalised, which may differ in the last bits from machine to machine.
        self.content = {
            split: content_digest(images[part], labels[part])
            for split, part in (("train", self._train), ("test", self._test))
        }
        training = images[self._train]
        self._shift, self._scale = float(training.mean()), float(training.std())
        self._images = self._normalise(images)  # (1797, 1, 8, 8)
        self._labels = torch.from_numpy(labels)  # (1797,)

    def _normalise(self, images: npt.NDArray[np.float64]) -> Tensor:
        scaled = torch.from_numpy((images - self._shift) / self._scale)
        return scaled.float().reshape(-1, 1, SIDE, SIDE)

    def _build(self, keep: int | None) -> nn.Module:
        return build_vit(
            image_size=SIDE,
            patch_size=PATCH_SIZE,
            hidden=self.WIDTH,
            layers=self.MENTOR_LAYERS,
            heads=4,
            intermediate=2 * self.WIDTH,
            classes=CLASSES,
            initializer_range=INITIALIZER_RANGE,
            seed=derived_seed(self._options.seed, 0),
            keep=keep,
        )

    def build_mentor(self, client: int = 0) -> nn.Module:
        """Make a vision transformer of three layers, 64 wide."""
        return self._build(None)

    def build_mentee(self, client: int = 0) -> nn.Module:
        """Make the first layer of the mentor, or as many layers as asked for.

        It starts from the mentor's own weights, as the paper's mentee does: the hidden states and
        attention maps that the two are to match begin as one.
        """
        return self._build(self._mentee_layers)

    def shards(self, clients: int, seed: int) -> Sequence[Indices | DrawnShard]:
        """Deal the training images to clients, or let each draw its own.

        Raises:
            ValueError: fewer images than clients, or a partition by a key: there are none.
        """
        if self._options.samples_per_client is not None:
            return DrawnShards(clients, seed, self._options.samples_per_client)
        labels = self._labels.numpy()[self._train]
        parts = deal(*(self._partition, clients, seed), samples=len(labels), labels=labels, keys={})
        return [self._train[part] for part in parts]

    def merge(self, shards: Sequence[Indices | DrawnShard]) -> Indices | DrawnShard:
        """Put shards together."""
        drawn = [shard for shard in shards if isinstance(shard, DrawnShard)]
        if drawn:
            return put_together(drawn)
        return np.concatenate(cast(Sequence[Indices], shards))

    def batches(self, shard: Indices | DrawnShard, seed: int) -> Iterable[Batch]:
        """Go through a shard once in random order, in batches of nearly equal size.

        Dealt images are augmented, anew each time; drawn ones were moved when they were drawn.
        """
        generator = np.random.default_rng(seed)
        drawn = shard.draw(len(self._train), MOVES) if isinstance(shard, DrawnShard) else None
        samples = self._train[drawn.indices] if drawn else cast(Indices, shard)
        order = generator.permutation(len(samples))
        for part in np.array_split(order, math.ceil(len(order) / self._options.batch_size)):
            index = torch.from_numpy(samples[part])
            moves = drawn.moves[:, part] if drawn else generator.uniform(-1, 1, (MOVES, len(part)))
            images = _moved(self._images[index], torch.from_numpy(moves).float())
            yield Batch({"pixel_values": images}, self._labels[index])

    def evaluate(
        self, model: nn.Module, *, split: str = "test", client: int = 0
    ) -> dict[str, float]:
        """Return the share of the 359 test images that are recognised."""
        index = torch.from_numpy(self._test)
        guesses = self._probabilities(model, self._images[index]).argmax(1)
        return {self.metric: float((guesses == self._labels[index]).double().mean())}

    @torch.inference_mode()
    def _probabilities(self, model: nn.Module, images: Tensor) -> Tensor:
        was_training = model.training
        model.eval()
        logits = run_model(model, {"pixel_values": images}).logits
        model.train(was_training)
        return logits.softmax(1).cpu()

    def describe(self) -> dict[str, Any]:
        """Return sizes and how the shards were made."""
        return {
            "samples_train": len(self._train),
            "samples_test": len(self._test),
            "classes": CLASSES,
            "shards": self._shards_text(),
            "mentor_layers": self.MENTOR_LAYERS,
            "mentee_layers": self._mentee_layers,
        }

    def _shards_text(self) -> str:
        size = self._options.samples_per_client
        if size is None:
            return self._partition
        return (
            f"{size} draws with replacement, each turned by up to {math.degrees(LARGEST_TURN):g}°, "
            f"scaled by up to {LARGEST_SCALING:.0%} and moved by up to {LARGEST_MOVE:g} pixels"
        )

    def defaults(self, method: str | None = None) -> dict[str, Any]:
        """Return the recipe of this task, for one method or for all."""
        return recipe(self.DEFAULTS, {}, method)

    def save_assets(self, folder: Path) -> None:
        """Write nothing: the weights are all that prediction needs."""

    def predict(
        self, model: nn.Module, data: str | None, *, client: int = 0
    ) -> Iterator[dict[str, Any]]:
        """Label images.

        Args:
            model: a trained model.
            client: has no meaning here: all have the same labels.
            data: a .npy, .npz or .csv file of 8×8 images with pixels 0 to 16, one image a row; None
                takes the test images.

        Yields:
            Records of ``index``, ``label``, ``probability``, and ``truth`` for the test images.

        Raises:
            ValueError: the file holds something else.
            OSError: the file cannot be read.
        """
        images = self._images[self._test] if data is None else self._normalise(read_images(data))
        truth = self._labels[self._test].tolist() if data is None else None
        for index, row in enumerate(self._probabilities(model, images)):
            record = {"index": index, "label": int(row.argmax()), "probability": float(row.max())}
            yield record if truth is None else record | {"truth": truth[index]}


def _load() -> tuple[npt.NDArray[np.float64], Indices]:
    datasets = needed("sklearn.datasets", "task digits", "scikit-learn", "train")
    images, labels = datasets.load_digits(return_X_y=True)
    return images.astype(np.float64), labels.astype(np.int64)


def _test_indices(labels: Indices) -> Indices:
    generator = np.random.default_rng(TEST_SPLIT_SEED)
    chosen = []
    for digit in range(CLASSES):
        members = generator.permutation(np.flatnonzero(labels == digit))
        chosen.append(members[: round(TEST_PART * len(members))])
    return np.sort(np.concatenate(chosen))


def _moved(images: Tensor, moves: Tensor) -> Tensor:
    """Turn, scale and move each image; what comes in from outside is background.

    Args:
        images: (N, 1, 8, 8) float32.
        moves: (4, N) within [-1, 1], of the largest turn, scaling and move right and down.
    """
    turn, scaling, right, down = moves  # (N,) each
    scale = 1.0 + LARGEST_SCALING * scaling
    cosine, sine = scale * torch.cos(LARGEST_TURN * turn), scale * torch.sin(LARGEST_TURN * turn)
    # Coordinates run from -1 to 1 over the side of an image.
    pixel = 2.0 * LARGEST_MOVE / SIDE
    rows = [[cosine, -sine, pixel * right], [sine, cosine, pixel * down]]
    maps = torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)  # (N, 2, 3)
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    # Outside an image grid_sample sees zeros: the darkest pixel has to be zero meanwhile.
    background = images.min()
    return F.grid_sample(images - background, grid, align_corners=False) + background


def read_images(path: str) -> npt.NDArray[np.float64]:
    """Read 8×8 images as rows of 64 pixels.

    Raises:
        ValueError: another kind of file, other shapes, pixels that are no numbers within 0..16.
        OSError: the file cannot be read.
    """
    suffix = Path(path).suffix
    if suffix == ".csv":
        images = _read_csv(path)
    elif suffix in (".npy", ".npz"):
        images = _read_numpy(path)
    else:
        raise ValueError(f"data must be a .npy, .npz or .csv file of 8×8 images, got {path}")
    pixels = SIDE * SIDE
    if images.ndim == 2 and images.shape == (SIDE, SIDE):
        images = images.reshape(1, pixels)
    if images.ndim not in (2, 3) or images[0:1].size != pixels:
        raise ValueError(f"{path} must hold 8×8 images, (N, 8, 8) or (N, 64), got {images.shape}")
    images = images.reshape(len(images), pixels)
    if not np.all((images >= 0) & (images <= LARGEST_PIXEL)):
        raise ValueError(
            f"{path} must hold pixels within 0..16, got {images.min()}..{images.max()}"
        )
    return images


def _read_numpy(path: str) -> npt.NDArray[np.float64]:
    try:
        # Without pickle: a data file must not be able to run code.
        with open(path, "rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if not isinstance(loaded, np.ndarray):
                if len(loaded.files) != 1:
                    raise ValueError(f"one array is expected, got {', '.join(loaded.files)}")
                loaded = np.asarray(loaded[loaded.files[0]])
        if loaded.dtype.kind not in "buif":
            raise ValueError(f"pixels must be real numbers, got dtype {loaded.dtype}")
        pixels: npt.NDArray[np.float64] = loaded.astype(np.float64)
        return pixels
    except (ValueError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} cannot be read as images: {error}") from error


def _read_csv(path: str) -> npt.NDArray[np.float64]:
    rows: list[list[float]] = []
    reader = csv.reader(io.StringIO(read_text(Path(path)).removeprefix("\ufeff"), newline=""))
    try:
        for cells in reader:
            row = [float(cell) for cell in cells]
            if len(row) not in (0, SIDE * SIDE):
                raise ValueError(f"64 pixels wanted, got {len(row)}")
            if row:
                rows.append(row)
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from error
    if not rows:
        raise ValueError(f"{path} holds no images")
    return np.array(rows)
