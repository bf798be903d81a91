"""What all methods share: the record of one, the learner that a client trains, and its steps."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedkd_fast.adapters import add_adapter
from fedkd_fast.distillation import DistillationConfig
from fedkd_fast.models import run_model, trainable_parameters
from fedkd_fast.tasks import IGNORED_LABEL, Batch, Task
from fedkd_fast.trees import Tree, tensor_bytes

if TYPE_CHECKING:
    from fedkd_fast.methods.packing import Packing

Role = Literal["mentor", "mentee"]


@dataclass(frozen=True)
class LocalSettings:
    """How a client trains."""

    lr_mentor: float  # larger learns faster, until it diverges
    lr_mentee: float  # likewise
    seed: int  # of what a client initialises for itself
    client: int = 0  # whose models these are, for tasks that give each client its own head
    initial_seed: int = 0  # of what all clients initialise alike: adapters
    weight_decay: float = 0.0  # of matrices, as in AdamW; larger holds them closer to zero
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    mutual: bool = True  # False: the mentor teaches the mentee and learns from labels alone
    warmup_steps: int = 0  # the first steps of a client, whose learning rate rises to the full one
    clip_norm: float | None = None  # longest gradient of a model; longer ones are scaled down
    bfloat16: bool = False  # forward and backward in bfloat16 where that is safe
    checkpoint: bool = False  # recompute activations in backward: less memory, a third more time
    refresh_steps: int = 0  # after each broadcast, of the mentor alone, taught by the mentee
    mentor_adapter: str | None = None  # train a low-rank adapter and the head of the mentor alone
    mentee_adapter: str | None = None  # likewise of the mentee; only these are sent
    proximal: float = 0.0  # fedprox: pull towards the shared parameters
    participation: float = 1.0  # scaffold: share of all clients that train in a round
    device: str = "cpu"  # where the models lie and learn


class Losses(NamedTuple):
    """Mean losses over the samples of a round; None where there is no such model."""

    mentor: float | None
    mentee: float | None


class Learner:
    """The models of one client and the way they are trained.

    Models, optimizers and batches lie on `device`. What travels is on the CPU, as codecs are.

    Args:
        task: builds the models.
        settings: how to train.
        mentor: whether there is a mentor.
        mentee: whether there is a mentee.
        shares: which of them is exchanged, if any is.
    """

    def __init__(
        self,
        task: Task,
        settings: LocalSettings,
        *,
        mentor: bool = False,
        mentee: bool = False,
        shares: Role | None = None,
    ) -> None:
        self.settings, self.device = settings, torch.device(settings.device)
        self.mentor: nn.Module | None = None
        self.mentee: nn.Module | None = None
        if mentor:
            built = task.build_mentor(settings.client)
            self.mentor = self._prepared(built, settings.mentor_adapter)
        if mentee:
            built = task.build_mentee(settings.client)
            self.mentee = self._prepared(built, settings.mentee_adapter)
        self.shared = None if shares is None else self._model(shares)
        private = tuple(getattr(task, "private", ()))
        # Looked for once: what learns of a model, and what of that is shared, has to stay the same.
        self._shared = {
            name: value
            for name, value in (trainable_parameters(self.shared) if self.shared else {}).items()
            if not name.startswith(private)
        }
        models = (self.mentor, self.mentee)
        self._nbytes = sum(learning_bytes(model) for model in models if model is not None)

    def _prepared(self, model: nn.Module, adapter: str | None) -> nn.Module:
        if adapter is not None:
            add_adapter(model, adapter, self.settings.initial_seed)
        if self.settings.checkpoint:
            if not hasattr(model, "gradient_checkpointing_enable"):
                raise ValueError(
                    "gradient_checkpointing needs models of transformers, got "
                    f"{type(model).__name__}"
                )
            # The other kind does not see inputs without gradients: those of frozen embeddings.
            options: Any = {"use_reentrant": False}
            pretrained: Any = model
            pretrained.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        # Built on the CPU, so that initial weights are the same on every device.
        return model.to(self.device)

    def _model(self, role: Role) -> nn.Module:
        model = self.mentor if role == "mentor" else self.mentee
        assert model is not None
        return model

    def shared_parameters(self) -> dict[str, nn.Parameter]:
        """Return what is exchanged of the shared model: what learns and is not the client's own."""
        return dict(self._shared)

    def adapted(self, role: Role) -> bool:
        """Tell whether only an adapter and the head of a model are trained."""
        settings = self.settings
        adapter = settings.mentor_adapter if role == "mentor" else settings.mentee_adapter
        return adapter is not None

    def exchanged(self) -> dict[str, Tensor]:
        """Return copies of all that travels, by name, on the CPU."""
        return {
            name: value.detach().to("cpu", copy=True)
            for name, value in self.shared_parameters().items()
        }

    def adopt(self, state: Mapping[str, Tensor]) -> None:
        """Take over what the server holds now, from whatever device."""
        with torch.no_grad():
            for name, parameter in self.shared_parameters().items():
                parameter.copy_(state[name])

    def refused(self) -> None:
        """Take back what was to follow from this round's reply, which the server does not count.

        Called before `adopt`, and only where no later message makes up for the reply.
        """

    def train(self, batches: Iterable[Batch], lr_share: float = 1.0) -> Losses:
        """Train on all batches in turn, with this share of the learning rates."""
        raise NotImplementedError

    def refresh(self, batches: Iterable[Batch], lr_share: float = 1.0) -> None:
        """Let what is private learn from what is shared, where a method has both."""

    def placed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Go through batches, each brought to where the models lie."""
        for batch in batches:
            yield batch.to(self.device)

    def state(self) -> Tree:
        """Return all that training changes, for `load`; the tensors are shared, not copied."""
        return {
            role: None if model is None else changing(model)
            for role, model in (("mentor", self.mentor), ("mentee", self.mentee))
        }

    def load(self, state: Tree) -> None:
        """Go on where `state` of a learner with equal settings was taken."""
        for role, model in (("mentor", self.mentor), ("mentee", self.mentee)):
            if model is not None:
                restore(model, state[role])

    def nbytes(self) -> int:
        """Return about what it takes in memory while it learns."""
        return self._nbytes

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Return the context of a forward pass."""
        if not self.settings.bfloat16:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


@dataclass(frozen=True)
class Method:
    """A way to train on data that lie at several clients."""

    name: str
    make_learner: Callable[[Task, LocalSettings], Learner]
    exchanges: bool  # something travels each round
    pools_data: bool = False  # all data at one place: no federation, the upper bound
    codec: str = "raw"  # unless another one is asked for
    # A codec of its own, of the configuration and a seed, instead of those of `Compressor`.
    packing: Callable[[Any, int], Packing] | None = None
    feedback: str = "none"  # which legs of such a codec send what was left out with the next
    feedback_decay: float = 1.0  # what is left of that by then
    # Beginnings of names of what the server only averages, whatever its optimizer and weights are.
    averaged: tuple[str, ...] = ()


def make_optimizer(
    modules: Iterable[nn.Module], lr: float, weight_decay: float
) -> torch.optim.AdamW:
    """Make AdamW over the trainable parameters; only matrices decay.

    The state is kept from round to round: with a fresh optimizer for the mentee each round the
    digits took 11 per cent more bytes for equal scores of the mentee and no better mentors (means
    of seeds 0 to 2), for a fresh Adam's first steps have the size of the learning rate in every
    entry, which is noise of full rank.
    """
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, fused=True)


def learning_bytes(module: nn.Module) -> int:
    """Return the bytes of parameters and buffers, and of the gradients and moments of Adam."""
    learning = sum(value.nbytes for value in trainable_parameters(module).values())
    return tensor_bytes([*module.parameters(), *module.buffers()]) + 3 * learning


def changing(model: nn.Module) -> dict[str, Tensor]:
    """Return what may change of a model while it is trained: trainable parameters and buffers."""
    return {**trainable_parameters(model), **dict(model.named_buffers())}


def restore(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Put back what `changing` returned.

    Raises:
        ValueError: values of another model.
    """
    own = changing(model)
    if own.keys() != values.keys():
        differing = sorted(own.keys() ^ values.keys())
        raise ValueError(f"state is of another model: {differing[0]!r} is in one of them alone")
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(values[name])


class Steps:
    """The optimizer of some modules, with warm-up and a bound on the gradient's norm."""

    def __init__(self, modules: Iterable[nn.Module], lr: float, settings: LocalSettings) -> None:
        self._optimizer = make_optimizer(modules, lr, settings.weight_decay)
        self._lr, self._settings, self._done = lr, settings, 0

    def zero_grad(self) -> None:
        """Forget gradients."""
        self._optimizer.zero_grad()

    def step(self, lr_share: float) -> None:
        """Take a step with this share of the learning rate."""
        settings = self._settings
        self._done += 1
        if self._done < settings.warmup_steps:
            lr_share *= self._done / settings.warmup_steps
        groups = self._optimizer.param_groups
        for group in groups:
            group["lr"] = self._lr * lr_share
        if settings.clip_norm is not None:
            parameters = itertools.chain.from_iterable(group["params"] for group in groups)
            torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
        self._optimizer.step()

    def state(self) -> Tree:
        """Return what the next steps depend on; the tensors are shared, not copied."""
        found = [self._optimizer.state.get(parameter) for parameter in self._parameters()]
        # Of a step count, which is a tensor of its own for each parameter, the number will do.
        moments = [None if one is None else {**one, "step": float(one["step"])} for one in found]
        return {"done": self._done, "moments": moments}

    def load(self, state: Tree) -> None:
        """Go on where `state` was taken; its tensors are taken over.

        Raises:
            ValueError: the state is of other parameters.
        """
        parameters, found = list(self._parameters()), state["moments"]
        alike = len(parameters) == len(found) and all(
            one is None or one["exp_avg"].shape == one["exp_avg_sq"].shape == parameter.shape
            for parameter, one in zip(parameters, found, strict=True)
        )
        if not alike:
            raise ValueError("the optimizer's state is of other parameters")
        self._done = state["done"]
        self._optimizer.state.clear()
        # Steps are counted on the device, too. One tensor for each, made at once.
        counts = [0.0 if one is None else one["step"] for one in found]
        steps = torch.tensor(counts, dtype=torch.float32, device="cpu").unbind()
        for parameter, one, step in zip(parameters, found, steps, strict=True):
            if one is not None:
                self._optimizer.state[parameter] = {
                    name: value.to(parameter.device)
                    for name, value in {**one, "step": step}.items()
                }

    def _parameters(self) -> Iterator[nn.Parameter]:
        for group in self._optimizer.param_groups:
            yield from group["params"]


class SoloLearner(Learner):
    """One model, trained by cross entropy."""

    def __init__(self, task: Task, settings: LocalSettings, role: Role, *, shares: bool) -> None:
        mentor = role == "mentor"
        super().__init__(
            task, settings, mentor=mentor, mentee=not mentor, shares=role if shares else None
        )
        self.model, self._role = self._model(role), role
        lr = settings.lr_mentor if mentor else settings.lr_mentee
        self._steps = Steps([self.model], lr, settings)

    def train(self, batches: Iterable[Batch], lr_share: float = 1.0) -> Losses:
        """Train on all batches in turn, with this share of the learning rate."""
        self.model.train()
        # Added up on the device, and looked at once: each look waits for all that is queued.
        total, samples = torch.zeros((), dtype=torch.float64, device=self.device), 0
        for batch in self.placed(batches):
            with self.autocast():
                logits = run_model(self.model, batch.inputs).logits
            loss = task_loss(logits, batch.labels)
            self._steps.zero_grad()
            torch.autograd.backward(loss)
            self.correct_gradients()
            self._steps.step(lr_share)
            total += loss.detach() * len(batch.labels)
            samples += len(batch.labels)
        mean = mean_loss(total, samples)
        return Losses(mean, None) if self._role == "mentor" else Losses(None, mean)

    def state(self) -> Tree:
        """Return the model and its optimizer's state."""
        return {**super().state(), "steps": self._steps.state()}

    def load(self, state: Tree) -> None:
        """Go on where `state` was taken."""
        super().load(state)
        self._steps.load(state["steps"])

    def correct_gradients(self) -> None:
        """Change the gradients of a step, for methods that do."""


def task_loss(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the mean cross entropy in nats over the labels (...) that count; logits (..., C).

    0 where none counts, as in `MutualDistillationLoss`.
    """
    total = F.cross_entropy(
        logits.float().flatten(0, -2),
        labels.flatten(),
        ignore_index=IGNORED_LABEL,
        label_smoothing=label_smoothing,
        reduction="sum",
    )
    return total / (labels != IGNORED_LABEL).sum().clamp_min(1)


def mean_loss(total: Tensor, samples: int) -> float:
    """Divide a sum over samples, which may be none."""
    return float(total) / max(samples, 1)
