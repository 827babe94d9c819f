"""What a model makes of its token vectors, as its configuration and sentence-transformers' files
say: an embedding, or the scores of classes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from services.engine.core.encoding.pooling import POOLINGS, Pooling
from services.runtime.modelfiles import ModelFileError
from services.runtime.modelfiles.fields import Fields, read_json

Activation: TypeAlias = Literal["sigmoid", "softmax", "none"]

_FLAGS: dict[str, Pooling] = {
    "pooling_mode_cls_token": "first",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weighted_mean",
    "pooling_mode_lasttoken": "last",
}
_MODES: dict[str, Pooling] = {
    "cls": "first",
    "mean": "mean",
    "max": "max",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean": "weighted_mean",
    "lasttoken": "last",
}
assert set(_FLAGS.values()) == set(_MODES.values()) == set(POOLINGS)
_DENSE_ACTIVATIONS = {"Tanh": "tanh", "Identity": "linear", "GELU": "gelu", "ReLU": "relu"}
_MOST_WIDTH = 1 << 20


@dataclass(frozen=True, slots=True)
class DenseConfig:
    """A dense layer after the pooling; its weights are in `path`."""

    path: Path
    inputs: int
    outputs: int
    bias: bool
    activation: str


@dataclass(frozen=True, slots=True)
class OutputConfig:
    """`poolings` make a vector each, which lie one after the other."""

    poolings: tuple[Pooling, ...] = ("mean",)
    dense: tuple[DenseConfig, ...] = ()
    normalize: bool = False
    max_tokens: int | None = None  # that the model was made for; None: all of its positions
    # Of the logits of classes, and of the one logit that scores a pair.
    class_activation: Activation = "softmax"
    score_activation: Activation = "sigmoid"


def read_outputs(
    directory: Path, fields: Fields, hidden_size: int, *, labels: Sequence[str]
) -> OutputConfig:
    """Read what there is in a model's directory; without modules.json, tokens are averaged.

    fields: of its config.json; labels: the classes that it tells apart.

    Raises ModelFileError for a file that is damaged or asks for what is not supported.
    """
    poolings: tuple[Pooling, ...] = ("mean",)
    dense: list[DenseConfig] = []
    normalize = False
    width = hidden_size
    for kind, path in _modules(directory):
        if kind == "Pooling":
            poolings = _read_pooling(path)
            width = hidden_size * len(poolings)
        elif kind == "Dense":
            layer = _read_dense(path, width)
            dense.append(layer)
            width = layer.outputs
        elif kind == "Normalize":
            normalize = True
    return OutputConfig(
        poolings=poolings,
        dense=tuple(dense),
        normalize=normalize,
        max_tokens=_read_max_tokens(directory),
        class_activation=_class_activation(fields, len(labels)),
        score_activation=_score_activation(fields),
    )


def served_tokens(directory: Path, positions: int, own: int | None, wanted: int | None) -> int:
    """The longest sequence that is taken: as it is `wanted`, else the model's `own`, else as many
    as it has positions.

    Raises ModelFileError where more are wanted than it has positions.
    """
    if wanted is None:
        return min(own or positions, positions)
    if wanted > positions:
        raise ModelFileError(directory, f"has positions for {positions} tokens, not for {wanted}")
    return wanted


def _modules(directory: Path) -> list[tuple[str, Path]]:
    """The kind and the place of each step after the encoder."""
    path = directory / "modules.json"
    if not path.exists():
        return []
    try:
        parsed = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFileError(path, f"cannot be read: {error}") from None
    if not isinstance(parsed, list) or not all(isinstance(each, dict) for each in parsed):
        raise ModelFileError(path, "is not a list of modules")
    modules = []
    for each in parsed:
        module = Fields(path, each)
        kind = module.text("type").rpartition(".")[2]
        place = module.text("path", "")
        if kind not in ("Transformer", "Pooling", "Dense", "Normalize", "Dropout"):
            raise ModelFileError(path, f"{kind!r} is not supported", what="type")
        # A module lies in a folder of the model; anything else could be anywhere on the machine.
        if Path(place).name != place or place == "..":
            raise ModelFileError(path, f"{place!r} is no folder's name", what="path")
        modules.append((kind, directory / place))
    if not modules or modules[0][0] != "Transformer":
        raise ModelFileError(path, "does not begin with a transformer")
    return modules[1:]


def _read_pooling(directory: Path) -> tuple[Pooling, ...]:
    path = directory / "config.json"
    fields = Fields(path, read_json(path))
    named: Any = fields.raw.get("pooling_mode")
    if named is not None:
        modes = [named] if isinstance(named, str) else named
        if not isinstance(modes, list) or not all(str(mode) in _MODES for mode in modes):
            raise ModelFileError(path, f"{named!r} is not supported", what="pooling_mode")
        poolings = tuple(_MODES[mode] for mode in modes)
    else:
        poolings = tuple(pooling for flag, pooling in _FLAGS.items() if fields.flag(flag))
    return poolings or ("mean",)


def _read_dense(directory: Path, width: int) -> DenseConfig:
    path = directory / "config.json"
    fields = Fields(path, read_json(path))
    inputs, outputs = fields.integer("in_features"), fields.integer("out_features")
    if inputs != width:
        raise ModelFileError(path, f"{inputs} is not {width}", what="in_features")
    if not 1 <= outputs <= _MOST_WIDTH:
        problem = f"{outputs} is not between 1 and {_MOST_WIDTH}"
        raise ModelFileError(path, problem, what="out_features")
    if fields.flag("use_residual"):
        raise ModelFileError(path, "is not supported", what="use_residual")
    name = fields.text("activation_function", "torch.nn.modules.activation.Tanh")
    activation = _DENSE_ACTIVATIONS.get(name.rpartition(".")[2])
    if activation is None:
        raise ModelFileError(path, f"{name!r} is not supported", what="activation_function")
    return DenseConfig(directory, inputs, outputs, fields.flag("bias", default=True), activation)


def _read_max_tokens(directory: Path) -> int | None:
    path = directory / "sentence_bert_config.json"
    if not path.exists():
        return None
    fields = Fields(path, read_json(path))
    if fields.raw.get("max_seq_length") is None:
        return None
    max_tokens = fields.integer("max_seq_length")
    if max_tokens < 1:
        raise ModelFileError(path, f"{max_tokens} is below 1", what="max_seq_length")
    return max_tokens


def _class_activation(fields: Fields, num_labels: int) -> Activation:
    problem = fields.text("problem_type", "")
    if problem == "regression":
        return "none"
    if problem == "multi_label_classification" or num_labels == 1:
        return "sigmoid"
    return "softmax"


def _score_activation(fields: Fields) -> Activation:
    """sentence-transformers: a sigmoid unless the configuration names another."""
    own: Any = fields.raw.get("sentence_transformers") or {}
    name = own.get("activation_fn") if isinstance(own, dict) else None
    name = name or fields.raw.get("sbert_ce_default_activation_function")
    if name is None:
        return "sigmoid"
    kinds: dict[str, Activation] = {"Sigmoid": "sigmoid", "Identity": "none"}
    kind = kinds.get(str(name).rpartition(".")[2])
    if kind is None:
        raise ModelFileError(fields.path, f"{name!r} is not supported", what="activation_fn")
    return kind
