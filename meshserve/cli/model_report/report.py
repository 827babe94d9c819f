"""All that is found out about a model, as one document with lasting keys (docs/cli.md)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from meshserve.cli.model_report.words import (
    TemplateFacts,
    TokenizerFacts,
    catalogue_sampling,
    read_licence,
    read_quantization,
    read_words,
)
from services.engine.core.encoding.config import EncoderConfig
from services.engine.core.fitness import Fitness, examine
from services.engine.core.generation_defaults import read_generation_defaults
from services.engine.core.model_config import ModelConfig, RopeConfig, SparseAttention
from services.engine.core.models.kept import KeptWeights
from services.engine.core.weights.pickled_outline import PickledOutline
from services.runtime.modelfiles import ModelFileError
from services.runtime.modelfiles.description import ModelDescription, describe
from services.runtime.modelfiles.tensor_kinds import stored_types
from services.runtime.settings import ModelSettings

# Concurrencies of the table where none is asked for.
CONCURRENCIES = (1, 8, 64)
# Tokens of a sequence where none are given: what a long chat takes, within the model's context.
TOKENS = 4096


def build_report(
    path: Path,
    *,
    cache_dir: Path | None,
    concurrencies: tuple[int, ...] = CONCURRENCIES,
    tokens: int | None = None,
    settings: ModelSettings | None = None,
) -> dict[str, Any]:
    """Return the document: what cannot be known of a damaged model is null.

    settings: how it is served, for what it then takes.
    """
    try:
        description: ModelDescription | None = describe(path)
        problem, precision = None, stored_types(path)
    except ModelFileError as error:
        description, problem, precision = None, str(error), {}
    served: dict[str, Any] = {}
    if settings is not None:
        served = {
            "dtype": settings.dtype,
            "max_context_tokens": settings.context_tokens,
            "sparse_attention": sparse_attention_of(settings),
        }
    fitness = examine(path, cache_dir=cache_dir, **served)
    tokenizer, template = read_words(path)
    config = fitness.config
    context = fitness.max_context_tokens
    wanted = min(tokens or TOKENS, context or TOKENS)
    return {
        "name": _name(path) if description is None else description.name,
        "path": str(path),
        "kind": "hf" if path.is_dir() else "gguf",
        "files": _files(description, fitness.pickled),
        "size_bytes": _size_bytes(description, fitness.pickled),
        "licence": read_licence(path, description.licence if description else None),
        "architecture": _architecture(description, config),
        "family": fitness.family,
        "role": None if config is None else _role(config),
        "num_parameters": fitness.num_parameters
        or (description.num_parameters if description else None),
        "dtype": description.dtype if description else None,
        "kept": description.kept if description else None,
        "kept_on_gpu": description.kept_on_gpu if description else None,
        "precision": precision,
        "pickled": _pickled(fitness.pickled),
        "quantization": read_quantization(path) if path.is_dir() else None,
        "max_context_tokens": context or (description.max_context_tokens if description else None),
        "context": _stretching(config),
        "shape": None if config is None else _shape(config),
        "vocab_size": config.vocab_size if config else (description and description.vocab_size),
        "tokenizer": {"kind": tokenizer.kind, "problem": tokenizer.problem},
        "has_chat_template": template is not None,
        "chat_template": _template(template),
        "generation": read_generation_defaults(path) | catalogue_sampling(path),
        "memory": _memory(fitness, concurrencies, wanted),
        "verdict": _verdict(fitness, tokenizer, problem, wanted),
    }


def _name(path: Path) -> str:
    return path.resolve().name if path.is_dir() else path.stem


def _files(description: ModelDescription | None, pickled: PickledOutline | None) -> list[str]:
    source = description or pickled
    return [] if source is None else [str(file) for file in source.files]


def _size_bytes(description: ModelDescription | None, pickled: PickledOutline | None) -> int | None:
    source = description or pickled
    return None if source is None else source.size_bytes


def _architecture(
    description: ModelDescription | None, config: ModelConfig | EncoderConfig | None
) -> str | None:
    source = description or config
    return None if source is None else source.architecture


def _pickled(pickled: PickledOutline | None) -> dict[str, Any] | None:
    if pickled is None:
        return None
    return {
        "files": [file.name for file in pickled.files],
        "tensors": pickled.tensors,
        "tensor_bytes": pickled.tensor_bytes,
    }


def _role(config: ModelConfig | EncoderConfig) -> str:
    return "decoder" if isinstance(config, ModelConfig) else "encoder"


def _stretching(config: ModelConfig | EncoderConfig | None) -> dict[str, Any] | None:
    if not isinstance(config, ModelConfig):
        return None
    rope: RopeConfig | None = config.rope
    if rope is None:
        return {"positions": "learned", "scaling": "none", "factor": 1.0, "trained_tokens": None}
    return {
        "positions": "rotary",
        "scaling": "llama3" if rope.scaling == "none" and rope.divisors else rope.scaling,
        "factor": rope.factor,
        "trained_tokens": rope.original_context_tokens or config.max_context_tokens,
    }


def _shape(config: ModelConfig | EncoderConfig) -> dict[str, Any]:
    shape: dict[str, Any] = {
        "layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "heads": config.heads,
        "head_dim": config.head_dim,
    }
    if isinstance(config, EncoderConfig):
        return {**shape, "labels": list(config.labels)}
    experts = config.experts
    windows = Counter(window for window in config.windows if window is not None)
    return {
        **shape,
        "kv_heads": config.kv_heads,
        "windows": [
            {"tokens": window, "layers": layers} for window, layers in sorted(windows.items())
        ],
        "sparse_attention": _sparse(config),
        "experts": None if experts is None else experts.count,
        "experts_per_token": None if experts is None else experts.per_token,
    }


def _sparse(config: ModelConfig) -> dict[str, int] | None:
    if config.sparse_attention is None:
        return None
    return {
        "window": config.sparse_attention.window,
        "global_tokens": config.sparse_attention.global_tokens,
        "layers": sum(config.window(layer) is None for layer in range(config.num_layers)),
    }


def sparse_attention_of(settings: ModelSettings) -> SparseAttention | None:
    """What the settings have layers see that would see all."""
    chosen = settings.sparse_attention
    return None if chosen is None else SparseAttention(chosen.window, chosen.global_tokens)


def _template(template: TemplateFacts | None) -> dict[str, Any] | None:
    if template is None:
        return None
    return {
        "source": template.source,
        "names": list(template.names),
        "roles": list(template.roles),
        "tools": template.tools,
        "problem": template.problem,
    }


def _memory(fitness: Fitness, concurrencies: tuple[int, ...], tokens: int) -> dict[str, Any] | None:
    if not fitness.footprints:
        return None
    return {
        "device": fitness.device,
        "free_bytes": fitness.free_bytes,
        "tokens": tokens,
        "weights": {
            choice: {"bytes": each.total_weight_bytes, "by_format": each.weight_bytes}
            for choice, each in fitness.footprints.items()
        },
        "kv_cache": [
            {
                "sequences": count,
                "bytes": _kv_bytes(fitness, "auto", count, tokens),
                "total_bytes": {
                    choice: each.total_weight_bytes + _kv_bytes(fitness, choice, count, tokens)
                    for choice, each in fitness.footprints.items()
                },
            }
            for count in concurrencies
        ],
    }


def _kv_bytes(fitness: Fitness, choice: KeptWeights, sequences: int, tokens: int) -> int:
    return fitness.kv_cache_bytes(choice, sequences=sequences, tokens=tokens)


def _verdict(
    fitness: Fitness, tokenizer: TokenizerFacts, problem: str | None, tokens: int
) -> dict[str, Any]:
    footprint = fitness.footprints.get("auto")
    why_not = fitness.problem or problem or tokenizer.problem
    if why_not is None and footprint is not None:
        needed = footprint.total_weight_bytes + _kv_bytes(fitness, "auto", 1, tokens)
        if needed > fitness.free_bytes:
            why_not = (
                f"one sequence of {tokens} tokens takes {needed} bytes with the weights, and "
                f"{fitness.free_bytes} are free on {fitness.device}"
            )
    return {
        "runs": why_not is None,
        "on": None if footprint is None else "native" if footprint.native else "torch",
        "device": fitness.device,
        "instruction_set": fitness.instruction_set,
        "reason": why_not or (None if footprint is None else footprint.reason),
    }
