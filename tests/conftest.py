"""Fixtures shared by all tests."""

from __future__ import annotations

import pytest
import torch

# One thread: the suite's matrices are small, and threads that spin against each other are slower.
torch.set_num_threads(1)


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.cuda,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
            ],
        ),
    ]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device an op test runs on."""
    return torch.device(request.param)
