"""What a step has a GPU launch, counted without one.

Models are on the meta device, at their real sizes; ops are those of an H100, in Triton and in CUDA
C++. Nothing is computed: each kernel that would be launched leaves its name instead, and so does
each operation of torch that is more than a view or memory.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from services.engine.core.batch import ForwardBatch
from services.engine.core.kernels import (
    OPS,
    DeviceLengths,
    GroupedMatrix,
    ScaledMatrix,
    cuda,
    triton,
)
from services.engine.core.kernels.cuda import library
from services.engine.core.kernels.cuda.linear import LinearNeeds
from services.engine.core.kernels.triton import linear_splits
from services.engine.core.kv_cache import KVCache
from services.engine.core.layers import Experts, Linear, MergedLinear
from services.engine.core.layers.linear import keep
from services.engine.core.model_config import ModelConfig
from services.engine.core.models import Model
from services.engine.core.models.loader import build_skeleton

META = torch.device("meta")
# Behind the name of a kernel in Triton that begins when the one before has ended, and not earlier.
LATE = ", late"
_GROUP_INPUTS = 128
# Of aten: what gives memory, without writing to it.
_MEMORY = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach")


def model_on_meta(config: ModelConfig, weights: str) -> Model:
    """A model without weights, as a GPU keeps them: "bfloat16", "int4", "w8a8" or "fp8"."""
    model = build_skeleton(config).to(torch.bfloat16).requires_grad_(False).eval()
    for path, module in model.named_modules():
        if path.endswith("router") or path == "head" or weights == "bfloat16":
            continue
        if isinstance(module, Linear | MergedLinear):
            keep(module, "weight", _matrix(module.weight, weights))
        elif isinstance(module, Experts) and weights == "int4":
            for name in ("gate_up", "down"):
                keep(module, name, _matrix(getattr(module, name), weights))
    model.logits_memory = torch.empty(512, config.vocab_size, device=META)
    return model


def _matrix(weight: Any, weights: str) -> GroupedMatrix | ScaledMatrix:
    *outer, inputs = weight.shape

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=META)

    if weights == "int4":
        levels = empty(*outer, inputs // 2, dtype=torch.uint8)
        scales = empty(*outer, inputs // _GROUP_INPUTS, dtype=torch.float16)
        return GroupedMatrix(levels, scales, None, 4)
    kind = torch.int8 if weights == "w8a8" else torch.float8_e4m3fn
    return ScaledMatrix(empty(*outer, inputs, dtype=kind), empty(*outer, dtype=torch.float32))


def decode_launches(
    model: Model, sequences: int, *, compiled: bool, has_adapters: bool = False
) -> list[str]:
    """What one captured step has launched in which so many sequences decode, in order.

    Kernels in Triton that no card begins early are marked as LATE, those in CUDA C++ all begin so.
    compiled: whether there are the kernels in CUDA C++. has_adapters: whether the step is one for
    those that go through adapters.
    """
    config = model.config
    model.take_adapters(max_adapters=8, max_rank=64)
    cache = KVCache(
        config.num_layers, 64, 16, config.kv_heads, config.head_dim, torch.bfloat16, META
    )

    def numbers(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=META)

    batch = ForwardBatch(
        token_ids=numbers(sequences),
        positions=numbers(sequences),
        slots=numbers(sequences),
        block_tables=numbers(sequences, 512, dtype=torch.int32),
        query_lengths=(1,) * sequences,
        context_lengths=(8192,) * sequences,
        logits_rows=numbers(sequences),
        lengths=DeviceLengths(
            numbers(sequences + 1, dtype=torch.int32), numbers(sequences, dtype=torch.int32)
        ),
        are_bounds=True,
        token_adapters=numbers(sequences, dtype=torch.int32) if has_adapters else None,
    )
    with _as_on_a_gpu(compiled=compiled) as launched:
        model(batch, cache)  # what is done once is done here
        launched.clear()
        model(batch, cache)
    return launched


@contextmanager
def _as_on_a_gpu(*, compiled: bool) -> Iterator[list[str]]:
    launched: list[str] = []

    def run(self: Any, *args: Any, **kwargs: Any) -> None:
        launched.append(self.fn.__name__ + ("" if "is_early" in kwargs else LATE))

    triton.activate()
    cuda.register()
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(linear_splits, "multiprocessors", return_value=132))
        for kind in (InterpretedFunction, JITFunction):
            stack.enter_context(mock.patch.object(kind, "run", run))
        library.use(_Library(launched) if compiled else None)
        stack.callback(library.use, None)
        try:
            for op in OPS.values():
                # In what order modules were imported is the tests' chance.
                known = sorted(op.implementations.get("cuda", []), key=lambda i: i.name == "cuda")
                stack.enter_context(mock.patch.dict(op.implementations, cuda=known))
                op.select("cuda", tensors_on="meta")
            stack.enter_context(_TorchLaunches(launched))
            yield launched
        finally:
            for op in OPS.values():
                op.select("meta")


class _Library:
    """Stands for the compiled kernels."""

    def __init__(self, launched: list[str]) -> None:
        self._launched = launched

    def call(self, name: str, arguments: ctypes.Structure, stream: int) -> None:
        if name == "linear_needs":
            needs = LinearNeeds.from_address(stream)
            needs.block_bytes, needs.block_outputs, needs.steps = 50_000, 16, 8
        else:
            self._launched.append(name)


class _TorchLaunches(TorchDispatchMode):
    """Notes operations of torch on tensors of the device."""

    def __init__(self, launched: list[str]) -> None:
        super().__init__()
        self._launched = launched

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func._can_decompose() and (name := func.name()) != "aten::linear":
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        name = func.name().removeprefix("aten::").partition(".")[0]
        tensors = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
        if (
            any(each.device == META for each in tensors)
            and not func.is_view
            and name not in _MEMORY
        ):
            self._launched.append(name)
        return result
