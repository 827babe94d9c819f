"""Whether a model would run on this machine, on what and in what memory: before it is loaded."""

from __future__ import annotations

import contextlib
import difflib
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from services.engine.core.compiling import BuildError
from services.engine.core.encoding.config import EncoderConfig
from services.engine.core.encoding.families import ARCHITECTURES
from services.engine.core.encoding.loader import is_encoder, open_encoder
from services.engine.core.kernels.cpu import library
from services.engine.core.kernels.cpu.build import check_machine, find_compiler
from services.engine.core.memory import free_memory_bytes
from services.engine.core.model_config import ModelConfig, SparseAttention
from services.engine.core.models.dtype import resolve_dtype
from services.engine.core.models.footprint import (
    Footprint,
    decoder_footprint,
    encoder_footprint,
    kv_cache_bytes,
)
from services.engine.core.models.kept import KEPT_WEIGHTS, KeptWeights, multiplies_fp8
from services.engine.core.models.loader import (
    OpenedModel,
    build_skeleton,
    open_model,
    read_config,
)
from services.engine.core.models.registry import GGUF_FAMILIES, HF_FAMILIES
from services.engine.core.settings import KVCacheFormat
from services.engine.core.weights.pickled_outline import (
    PickledOutline,
    UnreadCheckpoint,
    outline_pickled,
)
from services.runtime.modelfiles import ModelFileError


@dataclass(frozen=True, slots=True)
class Fitness:
    """What comes of opening a model without loading it.

    Attributes:
        problem: why it cannot be loaded at all, None where it can.
        config: its shape; None where that cannot be read.
        family: the name of the class that computes it.
        max_context_tokens: the longest sequence that it would be given.
        num_parameters: of all its tensors, as its shape has them.
        footprints: by `weights`; those that cannot be had are absent.
        instruction_set: of the native kernels, where they run it.
        device: where it would run, "cpu" or "cuda:0".
        free_bytes: memory that is free there.
        pickled: what its weights say of themselves where they are all pickled, and refused.
    """

    problem: str | None
    config: ModelConfig | EncoderConfig | None = None
    family: str | None = None
    max_context_tokens: int | None = None
    num_parameters: int | None = None
    footprints: dict[KeptWeights, Footprint] = field(default_factory=dict)
    instruction_set: str | None = None
    device: str = "cpu"
    free_bytes: int = 0
    pickled: PickledOutline | None = None

    def kv_cache_bytes(
        self,
        weights: KeptWeights,
        *,
        sequences: int,
        tokens: int,
        kv_format: KVCacheFormat = "auto",
    ) -> int:
        """Bytes of the KV cache for sequences that share nothing; none for an encoder."""
        if not isinstance(self.config, ModelConfig):
            return 0
        return kv_cache_bytes(
            self.config,
            self.footprints[weights],
            sequences=sequences,
            tokens=tokens,
            kv_format=kv_format,
        )


def examine(
    path: Path,
    *,
    dtype: str = "auto",
    max_context_tokens: int | None = None,
    sparse_attention: SparseAttention | None = None,
    cache_dir: Path | None = None,
    weights: tuple[KeptWeights, ...] = KEPT_WEIGHTS,
) -> Fitness:
    """Open a model as an engine would, and say what would come of loading it.

    cache_dir: where compiled kernels are looked for; none are compiled. Never raises for a model
    that is damaged: that is its `problem`.
    """
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    free_bytes = free_memory_bytes(device)
    instruction_set, reason = _instruction_set(cache_dir)
    if device.type != "cpu":
        reason = f"the device is {device}"
    elif dtype not in ("auto", "bfloat16"):
        reason = f"the dtype is {dtype}"
    torch_dtype = resolve_dtype(dtype, device)
    # As backends.kept_weights has it.
    on_torch: tuple[KeptWeights, ...] = ("auto", "bfloat16")
    keeps_few_bits = device.type != "cpu" and torch_dtype != torch.float32
    if keeps_few_bits and not is_encoder(path):
        on_torch = tuple(each for each in KEPT_WEIGHTS if each != "fp8" or multiplies_fp8(device))
    how = _How(weights, reason, torch_dtype, keeps_few_bits, multiplies_fp8(device))
    try:
        config, context, skeleton, found = _open(path, how, max_context_tokens, sparse_attention)
        problem, pickled = None, None
    except ModelFileError as error:
        problem, pickled = _explained(error), outline_pickled(path)
        if pickled is None:
            return Fitness(problem, device=str(device), free_bytes=free_bytes)
        try:
            config, context, skeleton, found = _unread(path, pickled, how, sparse_attention)
        except ModelFileError:
            return Fitness(problem, device=str(device), free_bytes=free_bytes, pickled=pickled)
    return Fitness(
        problem,
        config,
        type(skeleton).__name__,
        context,
        sum(parameter.numel() for parameter in skeleton.parameters()),
        {name: each for name, each in found.items() if each.native or name in on_torch},
        instruction_set if any(each.native for each in found.values()) else None,
        str(device),
        free_bytes,
        pickled,
    )


@dataclass(frozen=True, slots=True)
class _How:
    """How a model would be loaded: by the settings `weights`; see `decoder_footprint`."""

    weights: tuple[KeptWeights, ...]
    why_not_native: str | None
    torch_dtype: torch.dtype
    keeps_few_bits: bool
    multiplies_fp8: bool

    def decoder(self, opened: OpenedModel) -> dict[KeptWeights, Footprint]:
        return {
            each: decoder_footprint(
                opened,
                each,
                why_not_native=self.why_not_native,
                torch_dtype=self.torch_dtype,
                keeps_few_bits=self.keeps_few_bits,
                multiplies_fp8=self.multiplies_fp8,
            )
            for each in self.weights
        }


def _open(
    path: Path,
    how: _How,
    max_context_tokens: int | None,
    sparse_attention: SparseAttention | None,
) -> tuple[ModelConfig | EncoderConfig, int, torch.nn.Module, dict[KeptWeights, Footprint]]:
    if is_encoder(path):
        encoder = open_encoder(path)
        with contextlib.closing(encoder.checkpoint):
            found: dict[KeptWeights, Footprint] = {
                each: encoder_footprint(
                    encoder, each, why_not_native=how.why_not_native, torch_dtype=how.torch_dtype
                )
                for each in how.weights
                if each != "fp8" and each != "w8a8"
            }
        config = encoder.skeleton.config
        context = min(encoder.outputs.max_tokens or config.max_tokens, config.max_tokens)
        return config, context, encoder.skeleton, found
    opened = open_model(
        path, max_context_tokens=max_context_tokens, sparse_attention=sparse_attention
    )
    with contextlib.closing(opened.checkpoint):
        found = how.decoder(opened)
    return opened.config, opened.config.max_context_tokens, opened.skeleton, found


def _unread(
    path: Path, pickled: PickledOutline, how: _How, sparse_attention: SparseAttention | None
) -> tuple[ModelConfig, int, torch.nn.Module, dict[KeptWeights, Footprint]]:
    """What a decoder's configuration tells, where its weights are not to be looked at.

    Raises ModelFileError for one that cannot be read, and for more layers than there are tensors.
    """
    config = replace(read_config(path), sparse_attention=sparse_attention)
    if config.num_layers > (pickled.tensors or 0):
        problem = f"claims {config.num_layers} layers but lists {pickled.tensors or 0} tensors"
        raise ModelFileError(path, problem)
    skeleton = build_skeleton(config)
    opened = OpenedModel(config, UnreadCheckpoint(path, skeleton), skeleton)
    return config, config.max_context_tokens, skeleton, how.decoder(opened)


def nearest_architecture(name: str) -> str | None:
    """The architecture that is served and whose name is nearest, None where none is near."""
    known = {each.lower(): each for each in (*HF_FAMILIES, *GGUF_FAMILIES, *ARCHITECTURES)}
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    return known[near[0]] if near else None


def _explained(error: ModelFileError) -> str:
    if not error.problem.startswith("architecture "):
        return str(error)
    name = error.problem.split("'")[1]
    near = nearest_architecture(name)
    hint = f"; the nearest that is: {near}" if near else ""
    return f"{error.path}: the architecture {name!r} is not served{hint}"


def _instruction_set(cache_dir: Path | None) -> tuple[str | None, str | None]:
    """That of the kernels which an engine would use here, else why there are none."""
    try:
        path = library.find(cache_dir)
        if path is None:
            check_machine()
            find_compiler()
            return "compiled at the first start", None
        names = library.isa_names(path)
    except (BuildError, library.UnavailableError) as error:
        return None, f"there are no native kernels: {error.problem}"
    return (names[0], None) if names else (None, "this processor has no AVX2")
