"""The shape of an encoder, read from a HF config.json."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from services.engine.core.encoding.layers import ACTIVATIONS
from services.runtime.modelfiles import ModelFileError
from services.runtime.modelfiles.fields import Fields

# No encoder comes near these; a file that claims more is refused before anything is sized by it.
_MOST = {
    "num_hidden_layers": 4096,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "num_attention_heads": 1 << 12,
    "vocab_size": 1 << 24,
    "max_position_embeddings": 1 << 24,
}
_MOST_LABELS = 1 << 16
_MOST_TOKEN_TYPES = 1 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderConfig:
    """What all families share."""

    architecture: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    vocab_size: int
    positions: int  # rows of the table of positions, or the longest sequence where there is none
    first_position: int = 0  # the row of a sequence's first token
    token_types: int = 0  # kinds of token types; 0: it has none
    norm_eps: float
    activation: str  # of feed-forward layers
    labels: tuple[str, ...] = ()  # of its classification head, in order; empty: it has none

    @property
    def head_dim(self) -> int:
        """Components of a head."""
        return self.hidden_size // self.heads

    @property
    def max_tokens(self) -> int:
        """The longest sequence that it can be given."""
        return self.positions - self.first_position


def read_common(fields: Fields, *, norm_eps: str, activation: str) -> dict[str, Any]:
    """The fields of EncoderConfig that families call alike; `norm_eps` and `activation` are the
    names of those that they do not.

    Raises ModelFileError for a number that is missing or cannot be a model's.
    """
    architecture = architecture_of(fields)
    numbers = {name: _bounded(fields, name, most) for name, most in _MOST.items()}
    if numbers["hidden_size"] % numbers["num_attention_heads"]:
        problem = f"{numbers['hidden_size']} is no multiple of num_attention_heads"
        raise ModelFileError(fields.path, problem, what="hidden_size")
    return {
        "architecture": architecture,
        "num_layers": numbers["num_hidden_layers"],
        "hidden_size": numbers["hidden_size"],
        "intermediate_size": numbers["intermediate_size"],
        "heads": numbers["num_attention_heads"],
        "vocab_size": numbers["vocab_size"],
        "positions": numbers["max_position_embeddings"],
        "norm_eps": _positive(fields, norm_eps),
        "activation": read_activation(fields, activation),
        "labels": read_labels(fields) if "ForSequenceClassification" in architecture else (),
    }


def architecture_of(fields: Fields) -> str:
    """The first of `architectures`. Raises ModelFileError where there is none."""
    architectures = fields.raw.get("architectures")
    if not (isinstance(architectures, list) and architectures):
        raise ModelFileError(fields.path, "names no architecture", what="architectures")
    return str(architectures[0])


def read_activation(fields: Fields, name: str, default: str = "gelu") -> str:
    """An activation function by its name. Raises ModelFileError for one that nobody knows."""
    activation = fields.text(name, default)
    if activation not in ACTIVATIONS:
        problem = f"{activation!r} is not supported, only {', '.join(ACTIVATIONS)} are"
        raise ModelFileError(fields.path, problem, what=name)
    return activation


def read_token_types(fields: Fields, default: int) -> int:
    """How many kinds of token types there are."""
    count = fields.integer("type_vocab_size", default)
    if not 0 <= count <= _MOST_TOKEN_TYPES:
        problem = f"{count} is not between 0 and {_MOST_TOKEN_TYPES}"
        raise ModelFileError(fields.path, problem, what="type_vocab_size")
    return count


def read_labels(fields: Fields) -> tuple[str, ...]:
    """The names of the classes, in order; two without names where nothing is said of them, as
    `transformers` has it.

    Raises ModelFileError for a table that does not number its classes from 0.
    """
    labels = fields.raw.get("id2label")
    if labels is None:
        count = fields.integer("num_labels", 2)
        if not 1 <= count <= _MOST_LABELS:
            problem = f"{count} is not between 1 and {_MOST_LABELS}"
            raise ModelFileError(fields.path, problem, what="num_labels")
        return tuple(f"LABEL_{index}" for index in range(count))
    if not isinstance(labels, dict) or not 1 <= len(labels) <= _MOST_LABELS:
        raise ModelFileError(fields.path, "is no table of classes", what="id2label")
    names = [labels.get(str(index)) for index in range(len(labels))]
    if None in names:
        raise ModelFileError(fields.path, "does not number its classes from 0", what="id2label")
    return tuple(map(str, names))


def _bounded(fields: Fields, name: str, most: int) -> int:
    number = fields.integer(name)
    if not 1 <= number <= most:
        raise ModelFileError(fields.path, f"{number} is not between 1 and {most}", what=name)
    return number


def _positive(fields: Fields, name: str) -> float:
    number = fields.number(name)
    if number <= 0:
        raise ModelFileError(fields.path, f"{number} is not a positive number", what=name)
    return number
