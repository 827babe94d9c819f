"""Calls of every op, of known numbers: what implementations are held to their references with.

An implementation gets the same arguments as the reference, made anew for it, because ops may write
into theirs: what they wrote is compared too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from services.engine.core.kernels.attention import AttentionMetadata
from services.engine.core.kernels.kv_layer import KVLayer, quantize_heads
from services.engine.core.kernels.low_rank import LowRankPart
from services.engine.core.sampler import SamplingBatch

_EPS = 1e-5
_BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of what the examples are; tokens and contexts are tried one after another."""

    hidden: int = 256
    intermediate: int = 384
    heads: int = 8
    kv_heads: int = 2
    head_dims: tuple[int, ...] = (64, 128)
    vocab: int = 1003
    tokens: tuple[int, ...] = (1, 19)
    # Of each step, (query length, context length) of its sequences.
    steps: tuple[tuple[tuple[int, int], ...], ...] = (
        ((1, 1), (1, 16), (1, 131)),
        ((37, 37), (1, 50), (5, 90)),
    )
    window: int = 24


SMALL = Sizes()
LLAMA_8B = Sizes(
    hidden=4096,
    intermediate=14336,
    heads=32,
    kv_heads=8,
    head_dims=(128,),
    vocab=128256,
    tokens=(1, 8, 64, 256, 2048),
    steps=(
        ((1, 8192),),
        tuple((1, 37 + 29 * index) for index in range(64)),
        ((2048, 2048),),
        ((512, 4096), (1, 1000), (5, 700), (300, 300)),
    ),
    window=1024,
)


@dataclass(frozen=True, slots=True)
class Example:
    """One call. `written` are what it writes into."""

    what: str
    args: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)
    written: tuple[Tensor, ...] = ()

    def outcome(self, run: Callable[..., Any]) -> list[Any]:
        """All that a function returns and writes, in an order."""
        returned = run(*self.args, **self.options)
        return [*_leaves(returned), *self.written]


class Maker:
    """Makes numbers without a pattern, the same ones each time."""

    def __init__(self, device: torch.device, sizes: Sizes) -> None:
        self.device = device
        self.sizes = sizes
        self._generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int, dtype: torch.dtype = torch.bfloat16, std: float = 1.0) -> Tensor:
        """Numbers of a normal distribution."""
        drawn = torch.randn(shape, generator=self._generator, device=self.device)
        return drawn.mul_(std).to(dtype)

    def integers(self, *shape: int, below: int) -> Tensor:
        """Whole numbers from 0 on, int64."""
        return torch.randint(below, shape, generator=self._generator, device=self.device)

    def order(self, length: int) -> Tensor:
        """The numbers below `length`, shuffled."""
        return torch.randperm(length, generator=self._generator, device=self.device)


_Makes: TypeAlias = Callable[[Maker], Iterator[Example]]
EXAMPLES: dict[str, _Makes] = {}


def examples_of(*ops: str) -> Callable[[_Makes], _Makes]:
    """Register examples for ops by their names."""

    def register(makes: _Makes) -> _Makes:
        for op in ops:
            EXAMPLES[op] = makes
        return makes

    return register


def difference(found: Sequence[Any], expected: Sequence[Any]) -> str | None:
    """How two outcomes differ by more than rounding; None where they do not."""
    if len(found) != len(expected):
        return f"{len(found)} results instead of {len(expected)}"
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        problem = _differs(one, other)
        if problem is not None:
            return f"result {index} {problem}"
    return None


def _differs(found: Any, expected: Any) -> str | None:
    if not isinstance(expected, Tensor) or not isinstance(found, Tensor):
        return None if found == expected else f"is {found!r} instead of {expected!r}"
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return (
            f"is {list(found.shape)} {found.dtype} instead of {list(expected.shape)} "
            f"{expected.dtype}"
        )
    if expected.dtype == torch.int64:
        return None if torch.equal(found, expected) else "has other whole numbers"
    ones, others = found.float(), expected.float()
    infinite = others.isinf()
    if not torch.equal(ones[infinite], others[infinite]):
        return "is not infinite where it should be"
    error = (ones - others).abs().masked_fill_(infinite, 0.0)
    scale = others.masked_fill(infinite, 0.0).abs().max() if others.numel() else others.sum()
    # A step of an eight-bit float is an eighth of its value, others round much less.
    share = 0.13 if expected.dtype == torch.float8_e4m3fn else 0.03
    if bool((error <= share * scale + 1e-6).all()):  # False for NaN too
        return None
    worst = float(error.nan_to_num(nan=float("inf")).max())
    return f"is off by {worst:.3g} where the largest value is {float(scale):.3g}"


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple | list):
        for each in value:
            yield from _leaves(each)
    elif is_dataclass(value) and not isinstance(value, type):
        for each in fields(value):
            yield from _leaves(getattr(value, each.name))
    elif isinstance(value, Exception):
        yield type(value).__name__
    else:
        yield value


@examples_of("rms_norm")
def _rms_norm(make: Maker) -> Iterator[Example]:
    size = make.sizes.hidden
    for tokens in make.sizes.tokens:
        for dtype in (torch.bfloat16, torch.float16):
            args = make.normal(tokens, size, dtype=dtype), make.normal(size, dtype=dtype), _EPS
            yield Example(f"[{tokens}, {size}] {dtype}", args)


@examples_of("layer_norm")
def _layer_norm(make: Maker) -> Iterator[Example]:
    size = make.sizes.hidden
    for tokens in make.sizes.tokens:
        args = make.normal(tokens, size), make.normal(size), make.normal(size), _EPS
        yield Example(f"[{tokens}, {size}]", args)


@examples_of("add_rms_norm")
def _add_rms_norm(make: Maker) -> Iterator[Example]:
    size = make.sizes.hidden
    for tokens in make.sizes.tokens:
        args = make.normal(tokens, size), make.normal(tokens, size), make.normal(size), _EPS
        yield Example(f"[{tokens}, {size}]", args)


@examples_of("add_rms_norm_quantized")
def _add_rms_norm_quantized(make: Maker) -> Iterator[Example]:
    for example in _add_rms_norm(make):
        for dtype in (torch.int8, torch.float8_e4m3fn):
            # An implementation may write into the residual.
            args = (example.args[0], example.args[1].clone(), *example.args[2:], dtype)
            yield Example(f"{example.what} {dtype}", args)


@examples_of("quantize_rows")
def _quantize_rows(make: Maker) -> Iterator[Example]:
    size = make.sizes.hidden
    for tokens in make.sizes.tokens:
        for dtype in (torch.int8, torch.float8_e4m3fn):
            yield Example(f"[{tokens}, {size}] {dtype}", (make.normal(tokens, size), dtype))


@examples_of("silu_and_mul", "gelu_tanh_and_mul", "gelu_tanh")
def _activation(make: Maker) -> Iterator[Example]:
    size = 2 * make.sizes.intermediate
    for tokens in make.sizes.tokens:
        yield Example(f"[{tokens}, {size}]", (make.normal(tokens, size),))


@examples_of("linear")
def _linear(make: Maker) -> Iterator[Example]:
    inputs, outputs = make.sizes.hidden, make.sizes.intermediate
    weight = make.normal(outputs, inputs, std=0.02)
    for tokens in make.sizes.tokens:
        for bias in (None, make.normal(outputs)):
            args = make.normal(tokens, inputs), weight, bias
            yield Example(f"[{tokens}, {inputs}] to {outputs}", args)


@examples_of("rotary_embedding")
def _rotary_embedding(make: Maker) -> Iterator[Example]:
    for head_dim in make.sizes.head_dims:
        for rotary_dim in (head_dim, head_dim // 2):
            for tokens in make.sizes.tokens:
                heads = make.normal(tokens, make.sizes.heads, head_dim)
                angles = make.normal(tokens, 1, rotary_dim // 2, dtype=torch.float32)
                cos = torch.cat((angles.cos(), angles.cos()), -1).to(heads.dtype)
                sin = torch.cat((-angles.sin(), angles.sin()), -1).to(heads.dtype)
                yield Example(f"{list(heads.shape)}, {rotary_dim} of it", (heads, cos, sin))


def _cache(make: Maker, num_blocks: int, head_dim: int, dtype: torch.dtype) -> KVLayer:
    """A cache whose blocks hold numbers, as they would after many steps."""
    shape = (num_blocks, _BLOCK_SIZE, make.sizes.kv_heads, head_dim)
    parts, scales = [], []
    for _ in range(2):
        heads = make.normal(*shape).flatten(0, 1)
        stored, own_scales = quantize_heads(heads, dtype)
        parts.append(stored.view(shape))
        scales.append(None if own_scales is None else own_scales.view(shape[:-1]))
    return KVLayer(*parts, *scales)


_CACHE_DTYPES = (torch.bfloat16, torch.float8_e4m3fn, torch.int8)


@examples_of("write_kv")
def _write_kv(make: Maker) -> Iterator[Example]:
    for head_dim in make.sizes.head_dims:
        for dtype in _CACHE_DTYPES:
            for tokens in make.sizes.tokens:
                cache = _cache(make, -(-2 * tokens // _BLOCK_SIZE), head_dim, dtype)
                slots = make.order(cache.keys.shape[0] * _BLOCK_SIZE)[:tokens].contiguous()
                keys, values = (
                    make.normal(tokens, make.sizes.kv_heads, head_dim) for _ in range(2)
                )
                written = tuple(
                    each
                    for each in (cache.keys, cache.values, cache.key_scales, cache.value_scales)
                    if each is not None
                )
                what = f"{tokens} tokens of {head_dim} in {dtype}"
                yield Example(what, (keys, values, cache, slots), written=written)


@examples_of("rotary_kv")
def _rotary_kv(make: Maker) -> Iterator[Example]:
    for example in _write_kv(make):
        keys, values, cache, slots = example.args
        tokens, _, head_dim = keys.shape
        queries = make.normal(tokens, make.sizes.heads, head_dim)
        qkv = torch.cat((queries, keys, values), 1).flatten(1)
        angles = make.normal(tokens, 1, head_dim // 2, dtype=torch.float32)
        cos = torch.cat((angles.cos(), angles.cos()), -1).to(qkv.dtype)
        sin = torch.cat((-angles.sin(), angles.sin()), -1).to(qkv.dtype)
        norms = make.normal(head_dim), make.normal(head_dim)
        for what, own in (("plain", None), ("with norms", norms)):
            args = qkv, cache, slots, own, _EPS, (cos, sin)
            yield Example(f"{example.what}, {what}", args, written=example.written)


@examples_of("paged_attention")
def _paged_attention(make: Maker) -> Iterator[Example]:
    options: tuple[dict[str, Any], ...] = (
        {},
        {"window": make.sizes.window, "softcap": 30.0},
        {"window": make.sizes.window, "global_tokens": 4},
    )
    for head_dim in make.sizes.head_dims:
        for step in make.sizes.steps:
            for dtype in _CACHE_DTYPES:
                for chosen in options if dtype == torch.bfloat16 else options[:1]:
                    yield _attention_step(make, step, head_dim, dtype, chosen)


def _attention_step(
    make: Maker,
    step: tuple[tuple[int, int], ...],
    head_dim: int,
    dtype: torch.dtype,
    options: dict[str, Any],
) -> Example:
    lengths = [-(-context // _BLOCK_SIZE) for _, context in step]
    order = make.order(sum(lengths))
    tables = torch.zeros(len(step), max(lengths), dtype=torch.int32, device=make.device)
    start = 0
    for row, length in enumerate(lengths):
        tables[row, :length] = order[start : start + length]
        start += length
    metadata = AttentionMetadata(
        tuple(query for query, _ in step),
        tuple(context for _, context in step),
        tables,
        _BLOCK_SIZE,
    )
    tokens = sum(metadata.query_lengths)
    queries = make.normal(tokens, make.sizes.heads, head_dim)
    args = queries, _cache(make, len(order), head_dim, dtype), metadata, head_dim**-0.5
    what = f"{len(step)} sequences, {tokens} tokens of {head_dim} over {dtype} {options or ''}"
    return Example(what, args, options)


def _storage(make: Maker, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """What three layers keep in eleven blocks, and its scales."""
    shape = (3, 2, 11, _BLOCK_SIZE, make.sizes.kv_heads, make.sizes.head_dims[0])
    elements, scales = quantize_heads(make.normal(*shape), dtype)
    return elements, scales


@examples_of("copy_blocks")
def _copy_blocks(make: Maker) -> Iterator[Example]:
    for dtype in _CACHE_DTYPES:
        storage, scales = _storage(make, dtype)
        sources, destinations = make.order(11)[:10].chunk(2)
        written = (storage,) if scales is None else (storage, scales)
        args = storage, scales, sources, destinations
        yield Example(f"{dtype}", args, written=written)


@examples_of("swap_blocks")
def _swap_blocks(make: Maker) -> Iterator[Example]:
    for dtype in _CACHE_DTYPES:
        storage, scales = _storage(make, dtype)
        kept = (storage,) if scales is None else (storage, scales)
        row_bytes = sum(each[:, :, 0].nbytes for each in kept)
        host = make.integers(7, row_bytes, below=256).to(torch.uint8).cpu()
        if make.device.type == "cuda":
            host = host.pin_memory()
        args = storage, scales, make.order(11)[:5], host, make.order(7)[:5]
        yield Example(f"{dtype} out", args, {"to_host": True}, written=(host,))
        host = host % 64  # such bytes are numbers in all formats
        if make.device.type == "cuda":
            host = host.pin_memory()
        args = *args[:3], host, args[4]
        yield Example(f"{dtype} in", args, {"to_host": False}, written=kept)


@examples_of("add_low_rank")
def _add_low_rank(make: Maker) -> Iterator[Example]:
    inputs, outputs, rank = make.sizes.hidden, make.sizes.intermediate, 16
    part = LowRankPart(make.normal(rank, inputs), make.normal(outputs // 2, rank, std=0.1), 8)
    for tokens in make.sizes.tokens:
        projected, hidden = make.normal(tokens, outputs), make.normal(tokens, inputs)
        rows = make.order(tokens)[: -(-tokens // 2)].sort().values
        yield Example(f"{len(rows)} rows", (projected, hidden, rows, part), written=(projected,))


@examples_of("mixture_of_experts")
def _mixture_of_experts(make: Maker) -> Iterator[Example]:
    size, inner, experts = make.sizes.hidden, make.sizes.intermediate // 2, 8
    gate_up = make.normal(experts, 2 * inner, size, std=0.05)
    down = make.normal(experts, size, inner, std=0.05)
    for tokens in make.sizes.tokens:
        chosen = make.normal(tokens, experts, dtype=torch.float32).softmax(-1).topk(2)
        args = make.normal(tokens, size), gate_up, down, chosen.indices, chosen.values.bfloat16()
        yield Example(f"{tokens} tokens, 2 of {experts} experts", args)


@examples_of("sample")
def _sample(make: Maker) -> Iterator[Example]:
    for rows in make.sizes.tokens:
        if rows > 256:
            continue
        logits = make.normal(rows, make.sizes.vocab, dtype=torch.float32, std=4.0)
        yield Example(f"{rows} rows, greedy", (logits.clone(), SamplingBatch.greedy(rows)))
        numbers = np.arange(rows)
        batch = SamplingBatch(
            temperature=np.where(numbers % 3 == 2, 0.0, 0.8).astype(np.float32),
            top_k=np.where(numbers % 2, 40, 0),
            top_p=np.where(numbers % 4 > 1, 0.9, 1.0).astype(np.float32),
            min_p=np.where(numbers % 5 == 0, 0.02, 0.0).astype(np.float32),
            uniforms=(numbers + 0.5) / rows,
            logprobs=np.full(rows, -1),
        )
        yield Example(f"{rows} rows, drawn", (logits, batch))
