"""What examples are made of, and how what came of two calls is compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

EPS = 1e-5


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
# For kernels that are interpreted.
TINY = Sizes(
    hidden=128,
    heads=4,
    head_dims=(64,),
    vocab=203,
    tokens=(1, 5),
    steps=(((1, 1), (1, 40)), ((9, 9), (3, 30))),
    window=12,
)
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
