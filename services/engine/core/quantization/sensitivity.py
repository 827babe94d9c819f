"""What rounding each projection alone does to the model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from services.engine.core.kernels.cpu.packing import GROUP_INPUTS
from services.engine.core.layers import Experts
from services.engine.core.quantization.grid import Rounded, round_to_nearest
from services.engine.core.quantization.layers import LayeredModel, Unit, module_of, weights_of

Progress = Callable[[str, int, int], None]


class Sensitivity:
    """Measures the mean Kullback-Leibler divergence of the next token's distribution from that of
    the unrounded model, with one projection at a time rounded.

    All variants go through a layer while it is loaded: what is held at a time is a layer, and the
    residual streams of all variants. `see` takes the layers in their order.
    """

    def __init__(self, model: LayeredModel) -> None:
        self._model = model
        self._reference = model.embed()
        self._variants: dict[tuple[str, int], Tensor] = {}

    @torch.inference_mode()
    def see(self, layer: nn.Module, rounded: dict[str, list[Rounded]], units: list[Unit]) -> None:
        """Take an unrounded layer, and its units rounded to 4 bits; leaves it as it was."""
        model = self._model
        for key, hidden in self._variants.items():
            self._variants[key] = model.run(layer, hidden)
        for unit in units:
            weights = weights_of(layer, unit)
            own = [weight.clone() for weight in weights]
            for bits in (4, 8):
                for index, weight in enumerate(weights):
                    each = (
                        rounded[unit.path][index]
                        if bits == 4
                        else round_to_nearest(own[index], bits)
                    )
                    weight.copy_(each.dequantize())
                with _rounding_inputs(layer, unit):
                    self._variants[unit.path, bits] = model.run(layer, self._reference)
            for weight, values in zip(weights, own, strict=True):
                weight.copy_(values)
        self._reference = model.run(layer, self._reference)

    @torch.inference_mode()
    def divergences(self) -> dict[tuple[str, int], float]:
        """In nats for each token, by unit and bits, once all layers were seen."""
        expected = [each.half() for each in self._model.log_probabilities(self._reference)]
        return {key: self._divergence(expected, hidden) for key, hidden in self._variants.items()}

    def _divergence(self, expected: list[Tensor], hidden: Tensor) -> float:
        total, tokens = 0.0, 0
        for wanted, found in zip(expected, self._model.log_probabilities(hidden), strict=True):
            wanted = wanted.float()
            total += float((wanted.exp() * (wanted - found)).sum())
            tokens += len(wanted)
        return max(total / tokens, 0.0)


def _rounding_inputs(layer: nn.Module, unit: Unit) -> AbstractContextManager[object]:
    """Rounds the inputs of a unit to 8 bits, as the native kernels do where weights are rounded."""
    module = module_of(layer, unit)
    if isinstance(module, Experts):
        # Experts' inputs are the router's as well, which takes them as they are.
        return nullcontext()

    def rounded(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        groups = inputs[0].view(len(inputs[0]), -1, GROUP_INPUTS)
        scales = groups.abs().amax(-1, keepdim=True).clamp_(min=1e-30) / 127
        return (((groups / scales).round_() * scales).view(inputs[0].shape),)

    return module.register_forward_pre_hook(rounded)
