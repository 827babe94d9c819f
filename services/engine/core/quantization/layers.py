"""A model on calibration text, one layer in memory at a time."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from services.engine.core.batch import ForwardBatch
from services.engine.core.kernels.cpu.packing import GROUP_INPUTS, GroupedWeight, outline
from services.engine.core.layers import Linear, MergedLinear, StepContext
from services.engine.core.models.base import Model
from services.engine.core.models.loader import OpenedModel
from services.engine.core.weights.loading import weight_slots
from services.engine.core.weights.stored_linear import no_scales

_BLOCK_TOKENS = 16
# Computed at a time: what attention takes grows with it.
_TOKENS_AT_A_TIME = 2048


@dataclass(frozen=True, slots=True)
class Unit:
    """A projection that is kept in one precision: all that the engine computes as one matrix.

    `parts` are the tensors that hold it, by the model's names, and their outputs.
    """

    path: str  # layers.3.attention.qkv
    shape: tuple[int, int]
    parts: tuple[tuple[str, int], ...]

    def kept_bytes(self, bits: int) -> int:
        """What it takes in memory on the native kernels, rounded to `bits`, or 16: bf16."""
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

    @property
    def num_layers(self) -> int:
        return self.config.num_layers

    def units(self, layer_index: int) -> list[Unit]:
        """The projections of a layer that can be rounded, whose inputs are whole groups."""
        layer = self._model.layers[layer_index]
        return [
            self._unit(f"layers.{layer_index}.{name}", module)
            for name, module in layer.named_modules()
            if isinstance(module, Linear | MergedLinear)
            # A router decides; it is small, and every error of it sends a token elsewhere.
            and not name.endswith("router")
            and module.weight.shape[1] % GROUP_INPUTS == 0
            and module.weight.shape[0] % 8 == 0
        ]

    def _unit(self, path: str, module: Linear | MergedLinear) -> Unit:
        outputs, inputs = module.weight.shape
        parts: tuple[tuple[str, int], ...] = ((f"{path}.weight", outputs),)
        if isinstance(module, MergedLinear) and parts[0][0] not in self.opened.checkpoint.shapes:
            parent = path.rpartition(".")[0]
            parts = tuple((f"{parent}.{name}.weight", rows) for name, rows in module.sizes.items())
        return Unit(path, (outputs, inputs), parts)

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
                slot.copy_(checkpoint.read(path + name.removeprefix("it")))
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
        keys, values = torch.zeros(shape), torch.zeros(shape)
        # Every layer's keys and values lie in the same memory: it is computed from its first token.
        cache: Any = SimpleNamespace(
            keys=[keys] * config.num_layers,
            values=[values] * config.num_layers,
            block_size=_BLOCK_TOKENS,
        )
        batch = self._batch(torch.zeros(hidden.shape[:2], dtype=torch.int64))
        step = StepContext(batch, cache, torch.float32)
        output: Tensor = layer(hidden.reshape(tokens, -1), step)
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


def projections(layer: nn.Module, units: list[Unit]) -> dict[str, Linear | MergedLinear]:
    """The modules of a loaded layer by the paths of their units."""
    found: dict[str, Linear | MergedLinear] = {}
    for unit in units:
        _, _, within = unit.path.split(".", 2)
        module = layer.get_submodule(within)
        assert isinstance(module, Linear | MergedLinear)
        found[unit.path] = module
    return found


class InputProducts:
    """Adds up X^T X of the inputs of projections while a layer runs; a context manager."""

    def __init__(self, modules: dict[str, Linear | MergedLinear]) -> None:
        self.products = {
            path: torch.zeros(module.weight.shape[1], module.weight.shape[1])
            for path, module in modules.items()
        }
        self._modules = modules
        self._hooks: list[Any] = []

    def __enter__(self) -> InputProducts:
        for path, module in self._modules.items():
            products = self.products[path]

            def add(_: nn.Module, inputs: tuple[Tensor], products: Tensor = products) -> None:
                products.addmm_(inputs[0].T, inputs[0])

            self._hooks.append(module.register_forward_pre_hook(add))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
