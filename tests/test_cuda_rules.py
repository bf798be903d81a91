"""What every op owes to a CUDA program: its stream, its device, its graphs, no hidden waiting."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fedkd_fast import ops, reference

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

# A delay kernel counts cycles: at about 2 GHz, 25 ms and half a second. The short one lets a read
# that does not wait for its stream come too early; a launch on the default stream behind the long
# one comes too late.
SHORT_CYCLES, LONG_CYCLES = 50_000_000, 1_000_000_000

# Logits are float64, so kernel and specification differ by a handful of roundings each.
ROUNDINGS = 32
EPS = torch.finfo(torch.float64).eps

BITS = torch.tensor([4, 1, 0, 16, 7, 8], dtype=torch.uint8)
SCALE = torch.tensor([0.3, 1.0, 1.0, 1e-4, 0.03, 0.02])
COUNT = 1001


class Op(NamedTuple):
    """An op as a function of its data, and its truth.

    Scales and widths are the same for any seed and lie on the CPU, where nothing waits for them.
    """

    sample: Callable[[int], list[Tensor]]  # data by seed, on the CPU
    run: Callable[..., list[Tensor]]
    truth: Callable[..., list[Tensor]]  # on the CPU
    eps: float = EPS  # of the arithmetic that float64 results come from


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sample_logits(seed: int) -> list[Tensor]:
    labels = torch.arange(64) * (seed + 3) % 1500
    labels[5] = -100
    return [noise(seed, 64, 1500).double(), noise(seed + 100, 64, 1500).double(), labels]


def losses_and_gradients(
    loss: Callable[..., reference.DistillLoss], mentor: Tensor, mentee: Tensor, labels: Tensor
) -> list[Tensor]:
    mentor, mentee = mentor.detach().requires_grad_(), mentee.detach().requires_grad_()
    result = loss(mentor, mentee, labels)
    gradients = torch.autograd.grad(result.mentor_loss + result.mentee_loss, [mentor, mentee])
    return [*(value.detach() for value in result), *gradients]


OPS = {
    "distill_loss": Op(
        sample_logits,
        lambda *data: losses_and_gradients(ops.distill_loss, *data),
        lambda *data: losses_and_gradients(reference.distill_loss, *data),
    ),
    "pack_factors": Op(
        lambda seed: [noise(seed, len(BITS), COUNT)],
        lambda values: [ops.pack_factors(values, SCALE, BITS)],
        lambda values: [reference.pack_factors(values, SCALE, BITS)],
    ),
    "unpack_factors": Op(
        lambda seed: [reference.pack_factors(noise(seed, len(BITS), COUNT), SCALE, BITS)],
        lambda codes: [ops.unpack_factors(codes, SCALE, BITS, COUNT)],
        lambda codes: [reference.unpack_factors(codes, SCALE, BITS, COUNT)],
    ),
    "reconstruct": Op(
        lambda seed: [noise(seed, 32, 130), noise(seed + 100, 32, 257)],
        lambda left, right: [ops.reconstruct(left, right)],
        lambda left, right: [reference.reconstruct(left, right)],
    ),
    "truncated_svd": Op(
        lambda seed: [noise(seed, 3, 40, 24)],
        lambda matrix: [ops.truncated_svd(matrix, energy=0.9).S.double()],
        lambda matrix: [reference.truncated_svd(matrix, energy=0.9).S.double()],
        torch.finfo(torch.float32).eps,
    ),
    "truncated_svd in float64": Op(
        lambda seed: [noise(seed, 3, 40, 24).double()],
        lambda matrix: [ops.truncated_svd(matrix, energy=0.9).S],
        lambda matrix: [reference.truncated_svd(matrix, energy=0.9).S],
    ),
}
# truncated_svd waits for the scan that finds NaN.
ASYNCHRONOUS = [name for name in OPS if not name.startswith("truncated_svd")]


def check(found: list[Tensor], truth: list[Tensor], eps: float = EPS) -> None:
    for ours, wanted in zip(found, truth, strict=True):
        ours = ours.cpu()
        if wanted.dtype != torch.float64:  # bytes and codes' values are the same everywhere
            assert torch.equal(ours, wanted)
            continue
        allowed = ROUNDINGS * eps * max(1.0, float(wanted.abs().max()))
        assert float((ours - wanted).abs().max()) <= allowed


def overwrite(targets: list[Tensor], sources: list[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


@pytest.mark.parametrize("name", OPS)
def test_runs_on_the_current_stream(name: str) -> None:
    op, side = OPS[name], torch.cuda.Stream()
    data, late = ([part.cuda() for part in op.sample(seed)] for seed in (0, 1))
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        # Fills this stream's pool of memory, because allocating anew may wait for the whole device;
        # what it leaves there is the result of other data.
        op.run(*data)
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG_CYCLES)
    default_is_idle = torch.cuda.Event()
    default_is_idle.record()
    with torch.cuda.stream(side):
        torch.cuda._sleep(SHORT_CYCLES)
        overwrite(data, late)
        found = [part.cpu() for part in op.run(*data)]
        inconclusive = default_is_idle.query()
    torch.cuda.synchronize()
    check(found, op.truth(*op.sample(1)), op.eps)
    if inconclusive:
        pytest.skip("the default stream became idle too early to tell the streams apart")


@pytest.fixture
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ASYNCHRONOUS)
def test_torch_is_not_asked_to_wait(name: str, request: pytest.FixtureRequest) -> None:
    op = OPS[name]
    data = [part.cuda() for part in op.sample(0)]
    op.run(*data)
    request.getfixturevalue("waiting_is_an_error")
    op.run(*data)


@pytest.mark.parametrize("name", ASYNCHRONOUS)
def test_returns_while_the_device_is_busy(name: str) -> None:
    # Torch's own watch does not see a wait inside the native code.
    op = OPS[name]
    data = [part.cuda() for part in op.sample(0)]
    op.run(*data)
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG_CYCLES)
    device_is_idle = torch.cuda.Event()
    device_is_idle.record()
    found = op.run(*data)
    waited = device_is_idle.query()
    check(found, op.truth(*op.sample(0)), op.eps)
    assert not waited, "the call came back only when the device was idle"


@pytest.mark.parametrize("name", ASYNCHRONOUS)
def test_a_graph_replays_it_on_new_data(name: str) -> None:
    op, side = OPS[name], torch.cuda.Stream()
    data, late = ([part.cuda() for part in op.sample(seed)] for seed in (0, 1))
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        op.run(*data)  # loads the kernels: a capture may not
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = op.run(*data)
    overwrite(data, late)
    graph.replay()
    check(found, op.truth(*op.sample(1)), op.eps)


# Tensors of each call; all but one of them on one device.
SPLITS = [
    (name, odd)
    for name, count in [
        ("distill_loss", 3),
        ("pack_factors", 3),
        ("unpack_factors", 3),
        ("reconstruct", 2),
    ]
    for odd in range(count)
]
# Scales and widths may lie on the CPU.
REFUSED_ON_CPU = [(name, odd) for name, odd in SPLITS if odd == 0 or "pack" not in name]


def call(name: str, devices: list[str]) -> None:
    tensors = OPS[name].sample(0)
    if name.endswith("pack_factors"):
        tensors += [SCALE, BITS]
    arguments = [part.to(place) for part, place in zip(tensors, devices, strict=False)]
    getattr(ops, name)(*arguments, *([COUNT] if name == "unpack_factors" else []))


@pytest.mark.parametrize(("name", "odd"), REFUSED_ON_CPU)
def test_one_argument_on_the_cpu_is_refused(name: str, odd: int) -> None:
    with pytest.raises(RuntimeError, match="must be on one device"):
        call(name, ["cpu" if index == odd else "cuda" for index in range(3)])


def test_a_basis_on_the_cpu_is_refused() -> None:
    with pytest.raises(RuntimeError, match="must be on one device"):
        ops.truncated_svd(noise(0, 20, 20).cuda(), energy=0.9, basis=torch.ones(2, 20))


two_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@two_devices
@pytest.mark.parametrize(("name", "odd"), SPLITS)
def test_one_argument_on_another_gpu_is_refused(name: str, odd: int) -> None:
    with pytest.raises(RuntimeError, match="must be on one device"):
        call(name, [f"cuda:{int(index == odd)}" for index in range(3)])


@two_devices
@pytest.mark.parametrize("name", OPS)
def test_runs_on_the_device_of_its_data(name: str) -> None:
    op = OPS[name]
    assert torch.cuda.current_device() == 0
    found = op.run(*(part.to("cuda:1") for part in op.sample(0)))
    assert {part.device for part in found} == {torch.device("cuda:1")}
    assert torch.cuda.current_device() == 0
    check(found, op.truth(*op.sample(0)), op.eps)
