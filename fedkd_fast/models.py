"""Mentor and mentee models: built from transformers, run, saved, loaded; what of them is shared.

Any ``nn.Module`` serves as a model: it takes the inputs of a batch by keyword and returns logits,
or an object with ``logits`` and, if it has them, ``hidden_states`` and ``attentions``, like the
models of transformers. What collects the latter only when it is told to, by the arguments
``output_hidden_states`` and ``output_attentions``, has a true attribute ``layers_on_request``.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fedkd_fast._device import device_of, on_device
from fedkd_fast._files import names_folder, read_json_object, replacing
from fedkd_fast._seeds import seeded

if TYPE_CHECKING:
    from fedkd_fast.losses import ModelOutput

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
# What transformers and safetensors raise over files that are damaged or hold nonsense.
_LOAD_ERRORS = (
    *(OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError),
    SafetensorError,
)


class PlainOutputs(NamedTuple):
    """Logits of a model that returns nothing else."""

    logits: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class MeanOfModels(nn.Module):
    """Several models that vote: the logarithm of the mean of their probabilities."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, **inputs: Tensor) -> PlainOutputs:
        """Return logits whose softmax is the mean over models."""
        found = [run_model(model, inputs).logits.double().softmax(-1) for model in self.models]
        return PlainOutputs(torch.stack(found).mean(0).log().float())


def is_pretrained_model(model: nn.Module) -> bool:
    """Tell whether a model is one of transformers, without importing transformers."""
    return hasattr(model, "save_pretrained") and hasattr(model, "config")


def run_model(
    model: nn.Module, inputs: Mapping[str, Tensor], *, layers: bool = False
) -> ModelOutput:
    """Call a model on a batch, where the model lies.

    Args:
        model: any module of the kind described above, all of it on one device.
        inputs: tensors by name of the model's argument, on any device.
        layers: also ask the model for hidden states and attention maps, which takes time.
    """
    options: dict[str, bool] = {}
    if is_pretrained_model(model) or getattr(model, "layers_on_request", False):
        options = {"output_hidden_states": layers, "output_attentions": layers}
    device = device_of(model)
    placed = {name: on_device(value, device) for name, value in inputs.items()}
    outputs = model(**placed, **options)
    return PlainOutputs(outputs) if isinstance(outputs, Tensor) else cast("ModelOutput", outputs)


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that learn, by name: what of a shared model travels.

    Frozen parameters are the same at every client from the start. Buffers, for instance running
    statistics of batch normalisation, stay at the client as well.
    """
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def parameter_count(model: nn.Module) -> int:
    """Count the elements of all parameters, frozen ones included."""
    return sum(parameter.numel() for parameter in model.parameters())


def build_vit(
    *,
    image_size: int,
    patch_size: tuple[int, int],
    hidden: int,
    layers: int,
    heads: int,
    intermediate: int,
    classes: int,
    initializer_range: float,
    seed: int,
    keep: int | None = None,
) -> nn.Module:
    """Build a vision transformer for one-channel images, or its first layers, with random weights.

    Equal arguments give equal weights; what `keep` leaves has the weights of the whole model. There
    is no dropout.

    Args:
        image_size: height and width in pixels.
        patch_size: height and width of a token in pixels.
        hidden: width of the hidden states.
        layers: number of transformer layers.
        heads: attention heads; divide ``hidden``.
        intermediate: width of the feed-forward layers.
        classes: number of classes.
        initializer_range: standard deviation of the initial weights.
        seed: seed of the initial weights.
        keep: keep this many layers from the bottom; None keeps all.

    Raises:
        ImportError: transformers is not installed.
    """
    from transformers import ViTConfig, ViTForImageClassification

    # Its declared arguments leave out those of the base class.
    make_config: Any = ViTConfig
    config = make_config(
        image_size=image_size,
        patch_size=patch_size,
        num_channels=1,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=intermediate,
        num_labels=classes,
        initializer_range=initializer_range,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        # Only the plain implementation hands out attention maps.
        attn_implementation="eager",
    )
    with seeded(seed):
        model = ViTForImageClassification(config)
        if keep is not None:
            config.num_hidden_layers = keep
            weights = model.state_dict()
            model = ViTForImageClassification(config)
            model.load_state_dict({name: weights[name] for name in model.state_dict()})
    return cast(nn.Module, model)


def build_text_classifier(
    source: str, labels: Sequence[str], *, layers: int | None = None, seed: int
) -> nn.Module:
    """Load a pretrained encoder, or its first layers, with a new classification head.

    The embeddings are frozen: they hold half of the parameters of a small encoder, and mentor and
    mentee agree on them for ever. Equal arguments give equal weights, also of the new head.

    Args:
        source: folder or name of a pretrained encoder.
        labels: names of the classes, in the order of their indices.
        layers: keep this many layers from the bottom; None keeps all.
        seed: seed of the head.

    Raises:
        ImportError: transformers is not installed.
        ValueError: the encoder cannot be loaded, or has fewer layers.
    """
    from transformers import AutoModelForSequenceClassification

    return _build_classifier(AutoModelForSequenceClassification, source, labels, layers, seed)


def build_token_classifier(
    source: str, labels: Sequence[str], *, layers: int | None = None, seed: int
) -> nn.Module:
    """Load a pretrained encoder, or its first layers, with a new head over each token.

    All but the head, whose parameters begin with ``classifier.``, is as `build_text_classifier`
    makes it, whatever the labels are.

    Args:
        source: folder or name of a pretrained encoder.
        labels: names of the tags, in the order of their indices.
        layers: keep this many layers from the bottom; None keeps all.
        seed: seed of the head.

    Raises:
        ImportError: transformers is not installed.
        ValueError: the encoder cannot be loaded, has fewer layers, or calls its head otherwise.
    """
    from transformers import AutoModelForTokenClassification

    model = _build_classifier(AutoModelForTokenClassification, source, labels, layers, seed)
    if not hasattr(model, "classifier"):
        raise ValueError(
            f"mentor must be an encoder whose head for tokens is called classifier, got {source!r} "
            f"of class {type(model).__name__}"
        )
    return model


def _build_classifier(
    model_class: Any, source: str, labels: Sequence[str], layers: int | None, seed: int
) -> nn.Module:
    config = load_config(source, layers=layers)
    config.num_labels = len(labels)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}
    with seeded(seed):
        return load_pretrained(model_class, source, config)


def load_pretrained(model_class: Any, source: str, config: Any) -> nn.Module:
    """Load a model of transformers with weights of an encoder; its embeddings are frozen.

    Args:
        model_class: of transformers, with ``from_pretrained``.
        source: folder or name of a pretrained encoder.
        config: of the model, for instance of its first layers.

    Raises:
        ValueError: the encoder cannot be loaded.
    """
    options = {"config": config, "attn_implementation": "eager"}
    model = _loading(
        source, lambda **local: model_class.from_pretrained(source, **options, **local)
    )
    return freeze_embeddings(model)


def freeze_embeddings(model: nn.Module) -> nn.Module:
    """Let the embeddings of a model of transformers learn nothing, and return it."""
    for name, parameter in model.named_parameters():
        if "embeddings" in name:
            parameter.requires_grad_(False)
    return model


def load_config(source: str, *, layers: int | None = None) -> Any:
    """Load the configuration of a pretrained encoder, or that of its first layers.

    Raises:
        ImportError: transformers is not installed.
        ValueError: there is none, or it has fewer layers.
    """
    from transformers import AutoConfig

    config = _loading(source, lambda **local: AutoConfig.from_pretrained(source, **local))
    if layers is not None:
        if not 1 <= layers <= config.num_hidden_layers:
            raise ValueError(
                f"mentee_layers must lie in 1..{config.num_hidden_layers}, the layers of "
                f"{source}, got {layers}"
            )
        config.num_hidden_layers = layers
    return config


def load_tokenizer(source: str, *, prefix_space: bool = False) -> Any:
    """Load the tokenizer of a pretrained encoder.

    Args:
        source: folder or name of it.
        prefix_space: treat the first word of a text as one within a text, where the tokenizer
            tells them apart: for texts that come as separate words.

    Raises:
        ImportError: transformers is not installed.
        ValueError: there is none.
    """
    from transformers import AutoTokenizer

    options = {"add_prefix_space": True} if prefix_space else {}
    return _loading(
        source, lambda **local: AutoTokenizer.from_pretrained(source, **options, **local)
    )


def _loading(source: str, load: Callable[..., Any]) -> Any:
    """Load something of transformers in silence, and say what was wanted if that fails.

    What this machine has is taken from here: asking the hub first costs half a minute without a
    network.
    """
    wanted = f"mentor must be a folder or name that transformers can load, got {source!r}"
    if names_folder(source) and not Path(source).is_dir():
        raise ValueError(f"{wanted}: no such folder")
    with silent_hub(), _silent_transformers(), _refusing(wanted):
        try:
            return load(local_files_only=True)
        except (OSError, ValueError):
            if Path(source).is_dir():
                raise
            return load()


@contextlib.contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Turn whatever transformers raises over files that it cannot use into a ValueError."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except (*_LOAD_ERRORS, StrictDataclassError) as error:
        raise ValueError(f"{what}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Return the first line of a message, or two where the first only announces the second."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    count = 2 if lines and lines[0].endswith(":") else 1
    return " ".join(lines[:count]) or type(error).__name__


@contextlib.contextmanager
def silent_hub() -> Iterator[None]:
    """Keep the notices of huggingface_hub about each retry away; the error at the end suffices."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _silent_transformers() -> Iterator[None]:
    """Keep the bars and notices of transformers about new heads and left-out layers away.

    Both are what is wanted here.
    """
    import transformers

    # Its logging functions carry no types.
    logging: Any = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def save_model(model: nn.Module, folder: Path) -> None:
    """Write a model into a new folder: by ``save_pretrained``, or its state as safetensors."""
    folder.mkdir(parents=True)
    if is_pretrained_model(model):
        with _silent_transformers():
            cast(Any, model).save_pretrained(folder)
        return
    # Tied tensors share their memory, which the format cannot say.
    state = {name: value.cpu().contiguous().clone() for name, value in model.state_dict().items()}
    with replacing(folder / WEIGHTS_FILE) as part:
        save_file(state, part, metadata={"format": "pt"})


def load_model(folder: Path, build: Callable[[], nn.Module]) -> nn.Module:
    """Read what `save_model` wrote; the model is in evaluation mode.

    Args:
        folder: a folder of one model.
        build: makes a model of the right shape, for models that are not of transformers.

    Raises:
        ValueError: the folder holds no such model, or its weights are not those of the model.
        ImportError: the model is one of transformers, which is not installed.
    """
    if not (folder / WEIGHTS_FILE).is_file():
        raise ValueError(f"{folder} holds no {WEIGHTS_FILE}")
    if (folder / CONFIG_FILE).is_file():
        return _load_pretrained(folder)
    model = build()
    if is_pretrained_model(model):
        raise ValueError(f"{folder} holds no {CONFIG_FILE}")
    try:
        model.load_state_dict(load_file(folder / WEIGHTS_FILE))
    except _LOAD_ERRORS as error:
        raise ValueError(f"{folder / WEIGHTS_FILE} cannot be loaded: {_reason(error)}") from error
    return model.eval()


def _load_pretrained(folder: Path) -> nn.Module:
    import transformers

    names = read_json_object(folder / CONFIG_FILE).get("architectures")
    name = names[0] if isinstance(names, list) and names else names
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise ValueError(f"{folder / CONFIG_FILE} names no model of transformers, got {name!r}")
    model_class: Any = found
    with _silent_transformers(), _refusing(f"{folder} cannot be loaded"):
        model, loading = model_class.from_pretrained(
            folder,
            attn_implementation="eager",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    # transformers gives random values to weights that it misses or cannot fit, and goes on.
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if loading[problem]:
            what = problem.replace("_keys", " weights")
            example = min(map(str, loading[problem]))
            raise ValueError(
                f"{folder / WEIGHTS_FILE} does not fit {CONFIG_FILE}: {len(loading[problem])} "
                f"{what}, for instance {example}"
            )
    return cast(nn.Module, model.eval())
