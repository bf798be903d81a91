"""What TensorBoard shows of a run while it goes on: losses, scores, bytes and energy by round."""

from __future__ import annotations

from pathlib import Path

from fedkd_fast._extras import needed
from fedkd_fast.records import RoundRecord


def require_tensorboard() -> None:
    """Check that events can be written.

    Raises:
        ImportError: tensorboard is not installed; the message says how to get it.
    """
    needed("torch.utils.tensorboard", "tensorboard=True", "tensorboard", "tensorboard")


class Events:
    """The events of one run.

    Args:
        folder: where their file goes.
        first: the first round that is added; older events of it and of later rounds do not count.

    Raises:
        ImportError: tensorboard is not installed.
    """

    def __init__(self, folder: Path, first: int) -> None:
        require_tensorboard()
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first)

    def add(self, record: RoundRecord) -> None:
        """Write what a round was like; it is on its way to the disk when this returns."""
        for tag, value in _scalars(record).items():
            if value is not None:
                self._writer.add_scalar(tag, value, record.round)
        self._writer.flush()

    def close(self) -> None:
        """Close the file; more than once does no harm."""
        self._writer.close()


def _scalars(record: RoundRecord) -> dict[str, float | None]:
    """Name the numbers of a round; dev and test scores are different curves."""
    return {
        "loss/mentor": record.loss_mentor,
        "loss/mentee": record.loss_mentee,
        f"score_{record.split}/mentor": record.score_mentor,
        f"score_{record.split}/mentee": record.score_mentee,
        f"score_{record.split}/both": record.score_mean,
        "bytes/up": record.bytes_up,
        "bytes/down": record.bytes_down,
        "energy": record.energy,
        "seconds/round": record.seconds,
        "seconds/codec": record.seconds_codec,
    }
