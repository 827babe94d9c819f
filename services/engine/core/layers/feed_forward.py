"""Feed-forward layers: gated, plain, and mixtures of experts."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from services.engine.core.kernels import (
    Activations,
    GroupedMatrix,
    choose_experts,
    gelu_tanh,
    grouped_mixture_of_experts,
    mixture_of_experts,
)
from services.engine.core.kernels.cpu.program import Buffer, Epilogue, ProgramBuilder
from services.engine.core.layers.linear import Linear, MergedLinear
from services.engine.core.model_config import ExpertsConfig, ModelConfig

_GATE_EPILOGUES = {"silu": Epilogue.GATED_SILU, "gelu_tanh": Epilogue.GATED_GELU}


class GatedFeedForward(nn.Module):
    """down(activation(gate(x)) * up(x)), SwiGLU or GeGLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        sizes = {"gate": config.intermediate_size, "up": config.intermediate_size}
        self.gate_up = MergedLinear(config.hidden_size, sizes, bias=config.mlp_bias)
        self.down = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.activation = config.activation

    @property
    def takes(self) -> torch.dtype | None:
        """The format that its input may come rounded to."""
        return self.gate_up.takes

    def forward(self, hidden: Activations) -> Tensor:
        """hidden: [num_tokens, hidden_size] -> the same shape."""
        gated = self.gate_up(hidden, gate=self.activation, to=self.down.takes)
        projected: Tensor = self.down(gated)
        return projected

    def lower(self, program: ProgramBuilder) -> None:
        """The same as operations of the native kernels, up to what `down` reads."""
        program.adapted_linear(
            self.gate_up, Buffer.GATED, epilogue=_GATE_EPILOGUES[self.activation]
        )
        program.convert(Buffer.GATED)


class FeedForward(nn.Module):
    """down(gelu(up(x)))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: [num_tokens, hidden_size] -> the same shape."""
        projected: Tensor = self.down(gelu_tanh(self.up(hidden)))
        return projected

    def lower(self, program: ProgramBuilder) -> None:
        """The same as operations of the native kernels, up to what `down` reads."""
        program.adapted_linear(self.up, Buffer.GATED, epilogue=Epilogue.GELU)
        program.convert(Buffer.GATED)


class Experts(nn.Module):
    """The matrices of a mixture of experts.

    Checkpoints hold those of each expert apart, `N.gate`, `N.up` and `N.down`, or those of all
    together, `gate`, `up` and `down`; `slots` gives the places of whichever are stored.

    gate_up, down: parameters, or each a GroupedMatrix.
    """

    gate_up: Any
    down: Any

    def __init__(self, experts: ExpertsConfig, hidden_size: int) -> None:
        super().__init__()
        self.count, self.size = experts.count, experts.intermediate_size
        self.gate_up = nn.Parameter(torch.empty(self.count, 2 * self.size, hidden_size))
        self.down = nn.Parameter(torch.empty(self.count, hidden_size, self.size))

    def slots(self, path: str, stored: Container[str]) -> dict[str, Tensor]:
        """Where each stored tensor goes: views into the parameters, if these are floats."""
        if not (isinstance(self.gate_up, Tensor) and isinstance(self.down, Tensor)):
            return {}
        parts = {
            "gate": self.gate_up.data[:, : self.size],
            "up": self.gate_up.data[:, self.size :],
            "down": self.down.data,
        }
        together = {f"{path}.{name}.weight": view for name, view in parts.items()}
        if any(name in stored for name in together):
            return together
        return {
            f"{path}.{index}.{name}.weight": view[index]
            for index in range(self.count)
            for name, view in parts.items()
        }

    def matrices(self) -> tuple[ExpertMatrices, ExpertMatrices]:
        """What `gate_up` and `down` are in a checkpoint."""
        return ExpertMatrices(self, ("gate", "up")), ExpertMatrices(self, ("down",))


@dataclass(frozen=True, slots=True, eq=False)
class ExpertMatrices:
    """A matrix of each expert, whose outputs checkpoints hold in these parts."""

    experts: Experts
    parts: tuple[str, ...]


class MixtureOfExperts(nn.Module):
    """A router that sends each token to a few experts, and these."""

    def __init__(self, config: ModelConfig, experts: ExpertsConfig) -> None:
        super().__init__()
        self.per_token, self.normalize = experts.per_token, experts.normalize
        self.router = Linear(config.hidden_size, experts.count, bias=False)
        self.experts = Experts(experts, config.hidden_size)

    @property
    def takes(self) -> torch.dtype | None:
        """None: its input is not to be rounded."""
        return None

    def route(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The experts of each token, and the share of each; both [num_tokens, experts of one]."""
        return choose_experts(self.router(hidden), self.per_token, self.normalize)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: [num_tokens, hidden_size] -> the same shape."""
        ids, weights = self.route(hidden)
        gate_up, down = self.experts.gate_up, self.experts.down
        if isinstance(gate_up, GroupedMatrix) or isinstance(down, GroupedMatrix):
            return grouped_mixture_of_experts(hidden, gate_up, down, ids, weights)
        return mixture_of_experts(hidden, gate_up, down, ids, weights)
