"""What every op owes to a CUDA program: its stream, its device, its graphs, no hidden waiting."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from op_samples import ASYNCHRONOUS, BITS, COUNT, OPS, SCALE, check, noise, overwrite
from torch import Tensor

from fedkd_fast import ops, reference
from fedkd_fast.losses import MutualDistillationLoss

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

# A delay kernel counts cycles: at about 2 GHz, 25 ms and half a second. The short one lets a read
# that does not wait for its stream come too early; a launch on the default stream behind the long
# one comes too late.
SHORT_CYCLES, LONG_CYCLES = 50_000_000, 1_000_000_000


@pytest.mark.parametrize("name", OPS)
def test_runs_on_the_current_stream(name: str) -> None:
    op, side = OPS[name], torch.cuda.Stream()
    data, late = ([part.cuda() for part in op.sample(seed)] for seed in (0, 1))
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        # Fills this stream's pool of memory, because allocating anew may wait for the whole device;
        # what it leaves there is the result of other data.
        op.call(*data)
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG_CYCLES)
    default_is_idle = torch.cuda.Event()
    default_is_idle.record()
    with torch.cuda.stream(side):
        torch.cuda._sleep(SHORT_CYCLES)
        overwrite(data, late)
        found = [part.cpu() for part in op.call(*data)]
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
    op.call(*data)
    request.getfixturevalue("waiting_is_an_error")
    op.call(*data)


@pytest.mark.parametrize("name", ASYNCHRONOUS)
def test_returns_while_the_device_is_busy(name: str) -> None:
    # Torch's own watch does not see a wait inside the native code.
    op = OPS[name]
    data = [part.cuda() for part in op.sample(0)]
    op.call(*data)
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG_CYCLES)
    device_is_idle = torch.cuda.Event()
    device_is_idle.record()
    found = op.call(*data)
    waited = device_is_idle.query()
    check(found, op.truth(*op.sample(0)), op.eps)
    assert not waited, "the call came back only when the device was idle"


@pytest.mark.parametrize("name", ASYNCHRONOUS)
def test_a_graph_replays_it_on_new_data(name: str) -> None:
    op, side = OPS[name], torch.cuda.Stream()
    data, late = ([part.cuda() for part in op.sample(seed)] for seed in (0, 1))
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        op.call(*data)  # loads the kernels: a capture may not
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = op.call(*data)
    overwrite(data, late)
    graph.replay()
    check(found, op.truth(*op.sample(1)), op.eps)


def a_layered_loss() -> tuple[MutualDistillationLoss, list[Tensor], Callable[[], Tensor]]:
    """The whole loss, the tensors it has gradients for, and a step of it."""
    torch.manual_seed(0)
    loss = MutualDistillationLoss(
        mentor_hidden=12, mentee_hidden=8, layer_pairs=[(1, 0)], in_place=False
    ).cuda()
    parts = [
        torch.randn(*shape, device="cuda").requires_grad_()
        for shape in [(4, 3), (4, 3), (4, 5, 12), (4, 5, 8), (4, 2, 5, 5), (4, 2, 5, 5)]
    ]
    labels = torch.arange(4, device="cuda") % 3
    mask = (torch.arange(5, device="cuda") < torch.arange(2, 6, device="cuda")[:, None]).long()

    def step() -> Tensor:
        for part in (*parts, *loss.parameters()):
            part.grad = None
        outputs = [
            SimpleNamespace(
                logits=parts[model],
                hidden_states=[parts[2 + model]] * 3,
                attentions=[parts[4 + model]] * 2,
            )
            for model in range(2)
        ]
        total = loss(*outputs, labels, mask).total
        total.backward()
        return total.detach()

    return loss, parts, step


def test_the_whole_loss_does_not_wait(request: pytest.FixtureRequest) -> None:
    _, _, step = a_layered_loss()
    step()
    request.getfixturevalue("waiting_is_an_error")
    step()


def test_a_graph_replays_the_whole_loss() -> None:
    loss, parts, step = a_layered_loss()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total = step()
    captured = [part.grad for part in (*parts, *loss.parameters())]
    with torch.no_grad():
        for part in parts:
            part.mul_(0.5)
    graph.replay()
    found = [total.clone(), *(one.clone() for one in captured if one is not None)]
    expected = [step(), *(part.grad for part in (*parts, *loss.parameters()))]
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-7)


# Tensors of each call; all but one of them on one device.
SPLITS = [
    (name, odd)
    for name, count in [
        ("distill_loss", 3),
        ("layer_mse of maps", 4),
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
    if name.startswith("layer_mse"):
        ops.layer_mse(*arguments[:3], mask=arguments[3])
        return
    getattr(ops, name)(*arguments, *([COUNT] if name == "unpack_factors" else []))


@pytest.mark.parametrize(("name", "odd"), REFUSED_ON_CPU)
def test_one_argument_on_the_cpu_is_refused(name: str, odd: int) -> None:
    with pytest.raises(RuntimeError, match="must be on one device"):
        call(name, ["cpu" if index == odd else "cuda" for index in range(4)])


def test_a_basis_on_the_cpu_is_refused() -> None:
    with pytest.raises(RuntimeError, match="must be on one device"):
        ops.truncated_svd_list(
            [noise(0, 20, 20).cuda()],
            energy=0.9,
            earlier=[reference.Subspace(torch.ones(2, 20), torch.ones(2, dtype=torch.float64) / 2)],
        )


two_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@two_devices
@pytest.mark.parametrize(("name", "odd"), SPLITS)
def test_one_argument_on_another_gpu_is_refused(name: str, odd: int) -> None:
    with pytest.raises(RuntimeError, match="must be on one device"):
        call(name, [f"cuda:{int(index == odd)}" for index in range(4)])


@two_devices
@pytest.mark.parametrize("name", OPS)
def test_runs_on_the_device_of_its_data(name: str) -> None:
    op = OPS[name]
    assert torch.cuda.current_device() == 0
    found = op.call(*(part.to("cuda:1") for part in op.sample(0)))
    assert {part.device for part in found} == {torch.device("cuda:1")}
    assert torch.cuda.current_device() == 0
    check(found, op.truth(*op.sample(0)), op.eps)
