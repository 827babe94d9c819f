"""A model on calibration text, one layer in memory at a time."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from services.engine.core.batch import ForwardBatch
from services.engine.core.kernels import KVLayer, silu_and_mul
from services.engine.core.kernels.cpu.packing import GROUP_INPUTS, GroupedWeight, outline
from services.engine.core.layer_groups import LayerGroups
from services.engine.core.layers import (
    Experts,
    Linear,
    MergedLinear,
    MixtureOfExperts,
    StepContext,
)
from services.engine.core.models.base import Model
from services.engine.core.models.loader import OpenedModel
from services.engine.core.weights.loading import weight_slots
from services.engine.core.weights.stored_linear import no_scales
from services.runtime.modelfiles import ModelFileError

_BLOCK_TOKENS = 16
# Files pack as many numbers of 4 bits into a word, and matrices are cut by their outputs.
_ROWS_OF_A_WORD = 8
# Computed at a time: what attention takes grows with it.
_TOKENS_AT_A_TIME = 2048


@dataclass(frozen=True, slots=True)
class Unit:
    """A projection that is kept in one precision: all that the engine computes as one matrix, or
    the same matrix of all experts of a layer.

    `matrices` are the tensors that hold each, by the model's names, and their outputs; `shape` is
    that of one of them.
    """

    path: str  # layers.3.attention.qkv
    shape: tuple[int, int]
    matrices: tuple[tuple[tuple[str, int], ...], ...]

    def kept_bytes(self, bits: int) -> int:
        """What it takes in memory on the native kernels, rounded to `bits`, or 16: bf16."""
        return len(self.matrices) * self._bytes_of_one(bits)

    def _bytes_of_one(self, bits: int) -> int:
        if bits == 16:
            return outline(torch.empty(self.shape, device="meta")).num_bytes
        scales = no_scales(self.shape)
        levels = torch.empty(self.shape, dtype=torch.uint8, device="meta")
        return outline(GroupedWeight(levels, scales, scales if bits == 4 else None, bits)).num_bytes


class LayeredModel:
    """Runs windows of tokens through a model's layers, loading each when its turn comes.

    windows: [num_windows, tokens], tokens a multiple of 16.
    """

    def __init__(self, opened: OpenedModel, windows: Tensor) -> None:
        self.opened = opened
        self.config = opened.config
        self._model: Model = opened.skeleton
        self._tokens = windows.shape[1]
        self._ids = windows
        for name, child in self._model.named_children():
            if name != "layers":
                self._model.add_module(name, self._loaded(name, child))

    def on(self, windows: Tensor) -> LayeredModel:
        """The same model, with nothing loaded again, on other windows."""
        other = copy.copy(self)
        other._tokens, other._ids = windows.shape[1], windows
        return other

    @property
    def num_layers(self) -> int:
        return self.config.num_layers

    def units(self, layer_index: int) -> list[Unit]:
        """The projections of a layer that can be rounded, whose inputs are whole groups."""
        found = []
        for name, module in self._model.layers[layer_index].named_modules():
            path = f"layers.{layer_index}.{name}"
            # A router decides; it is small, and every error of it sends a token elsewhere.
            if isinstance(module, Linear | MergedLinear) and not name.endswith("router"):
                found.append(self._unit(path, module))
            elif isinstance(module, Experts):
                found += _units_of_experts(path, module)
        return [
            unit
            for unit in found
            if unit.shape[1] % GROUP_INPUTS == 0 and unit.shape[0] % _ROWS_OF_A_WORD == 0
        ]

    def _unit(self, path: str, module: Linear | MergedLinear) -> Unit:
        outputs, inputs = module.weight.shape
        parts: tuple[tuple[str, int], ...] = ((f"{path}.weight", outputs),)
        if isinstance(module, MergedLinear) and parts[0][0] not in self.opened.checkpoint.shapes:
            parent = path.rpartition(".")[0]
            parts = tuple((f"{parent}.{name}.weight", rows) for name, rows in module.sizes.items())
        return Unit(path, (outputs, inputs), (parts,))

    def layer(self, layer_index: int) -> nn.Module:
        """A layer in float32, loaded now."""
        return self._loaded(f"layers.{layer_index}", self._model.layers[layer_index])

    def _loaded(self, path: str, module: nn.Module) -> nn.Module:
        checkpoint = self.opened.checkpoint
        made = _on_cpu(module)
        holder = nn.Module()
        holder.add_module("it", made)
        prefix = f"{path}."
        stored = {
            f"it.{name.removeprefix(prefix)}"
            for name in checkpoint.shapes
            if name.startswith(prefix)
        }
        with torch.no_grad():
            for name, slot in weight_slots(holder, stored).items():
                own = path + name.removeprefix("it")
                slot.copy_(checkpoint.read(own))
                if not slot.isfinite().all():
                    what = f"tensor {checkpoint.source_name(own)!r}"
                    problem = "has values that are no finite numbers"
                    raise ModelFileError(checkpoint.path, problem, what=what)
                checkpoint.release()
        return made.requires_grad_(False)

    @torch.inference_mode()
    def embed(self) -> Tensor:
        """What the first layer sees, float32 [num_windows, tokens, hidden_size]."""
        return torch.stack([self._model.embed(self._batch(window[None])) for window in self._ids])

    @torch.inference_mode()
    def run(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """Windows after a layer; hidden: [num_windows, tokens, hidden_size], and the result."""
        count = max(_TOKENS_AT_A_TIME // self._tokens, 1)
        return torch.cat([self._run(layer, some) for some in torch.split(hidden, count)])

    def _run(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        config, tokens = self.config, hidden.shape[0] * self._tokens
        shape = (tokens // _BLOCK_TOKENS, _BLOCK_TOKENS, config.kv_heads, config.head_dim)
        # Every layer's keys and values lie in the same memory: it is computed from its first token.
        cache: Any = SimpleNamespace(
            layers=[KVLayer(torch.zeros(shape), torch.zeros(shape))] * config.num_layers,
            block_size=_BLOCK_TOKENS,
            groups=LayerGroups.single(config.num_layers),
        )
        batch = self._batch(torch.zeros(hidden.shape[:2], dtype=torch.int64))
        step = StepContext(batch, cache, torch.float32)
        output = step.settled(layer(hidden.reshape(tokens, -1), step))
        return output.view(hidden.shape)

    @torch.inference_mode()
    def log_probabilities(self, hidden: Tensor) -> Iterator[Tensor]:
        """Those of all next tokens of each window, float32 [tokens, vocab_size]."""
        model = self._model
        head: Any = model.embedding.project if model.head is None else model.head
        for window in hidden:
            logits = head(model.norm(window))
            if (cap := self.config.logit_softcap) is not None:
                logits = torch.tanh(logits / cap) * cap
            yield logits.log_softmax(-1)

    def _batch(self, ids: Tensor) -> ForwardBatch:
        windows, tokens = ids.shape
        slots = torch.arange(windows * tokens)
        return ForwardBatch(
            token_ids=ids.reshape(-1),
            positions=torch.arange(tokens).repeat(windows),
            slots=slots,
            block_tables=(slots[::_BLOCK_TOKENS] // _BLOCK_TOKENS).int().view(windows, -1),
            query_lengths=(tokens,) * windows,
            context_lengths=(tokens,) * windows,
            logits_rows=slots,
        )


def _on_cpu(module: nn.Module) -> nn.Module:
    """A copy with memory for its parameters, and nothing in it yet."""
    return copy.deepcopy(module).to(torch.float32).to_empty(device="cpu").eval()


def _units_of_experts(path: str, experts: Experts) -> list[Unit]:
    """What `gate_up` and `down` are of all experts."""
    return [
        Unit(
            f"{path}.{name}",
            (stack.shape[1], stack.shape[2]),
            tuple(
                tuple(
                    (f"{path}.{index}.{part}.weight", stack.shape[1] // len(matrices.parts))
                    for part in matrices.parts
                )
                for index in range(experts.count)
            ),
        )
        for (name, stack), matrices in zip(
            experts.named_parameters(recurse=False), experts.matrices(), strict=True
        )
    ]


def module_of(layer: nn.Module, unit: Unit) -> nn.Module:
    """The module of a loaded layer that holds a unit: a projection, or all experts."""
    _, _, within = unit.path.split(".", 2)
    parent = layer.get_submodule(within.rpartition(".")[0])
    return parent if isinstance(parent, Experts) else layer.get_submodule(within)


def weights_of(layer: nn.Module, unit: Unit) -> list[Tensor]:
    """The matrices of a unit in a loaded layer, each [outputs, inputs], to be written to."""
    module = module_of(layer, unit)
    if isinstance(module, Experts):
        return list(module.get_parameter(unit.path.rpartition(".")[2]).data)
    return [module.get_parameter("weight").data]


class InputProducts:
    """Adds up X^T X of the inputs of units while a layer runs; a context manager.

    `of` gives that of each of a unit's matrices, and on how many tokens it saw.
    """

    def __init__(self, layer: nn.Module, units: list[Unit]) -> None:
        self._layer, self._units = layer, units
        self._found: dict[str, list[Tensor]] = {}
        self._tokens: dict[str, list[int]] = {}
        self._hooks: list[Any] = []
        for unit in units:
            size, count = unit.shape[1], len(unit.matrices)
            self._found[unit.path] = [torch.zeros(size, size) for _ in range(count)]
            self._tokens[unit.path] = [0] * count

    def of(self, unit: Unit) -> list[tuple[Tensor, int]]:
        """The products, float32 [inputs, inputs], and the tokens of each of a unit's matrices."""
        return list(zip(self._found[unit.path], self._tokens[unit.path], strict=True))

    def __enter__(self) -> InputProducts:
        of_experts: list[Unit] = []
        for unit in self._units:
            module = module_of(self._layer, unit)
            if isinstance(module, Experts):
                of_experts.append(unit)
            else:
                hook = partial(self._add, unit.path, 0)
                self._hooks.append(module.register_forward_pre_hook(hook))
        if of_experts:
            # They are called by what sends tokens to them.
            mixtures = (m for m in self._layer.modules() if isinstance(m, MixtureOfExperts))
            for mixture in mixtures:
                hook = partial(self._add_of_experts, of_experts)
                self._hooks.append(mixture.register_forward_pre_hook(hook))
        return self

    def _add(self, path: str, index: int, _: nn.Module, inputs: tuple[Tensor]) -> None:
        self._found[path][index].addmm_(inputs[0].T, inputs[0])
        self._tokens[path][index] += len(inputs[0])

    def _add_of_experts(
        self, units: list[Unit], module: MixtureOfExperts, inputs: tuple[Tensor]
    ) -> None:
        (hidden,), experts = inputs, module.experts
        ids, _ = module.route(hidden)
        for index in range(experts.count):
            sent = hidden[(ids == index).any(-1)]
            seen = {
                "gate_up": sent,
                "down": silu_and_mul(functional.linear(sent, experts.gate_up[index])),
            }
            for unit in units:
                self._add(unit.path, index, module, (seen[unit.path.rpartition(".")[2]],))

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
