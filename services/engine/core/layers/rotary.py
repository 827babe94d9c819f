"""Rotary frequencies and the ways in which models stretch them over longer contexts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from services.engine.core.kernels import rotary_angles
from services.engine.core.model_config import RopeConfig


class RotaryEmbedding:
    """Cosines and sines of the tokens' angles, computed once per step for all layers.

    `served_context_tokens` is the longest sequence that will be served; dynamic scaling and
    LongRoPE depend on it. Cached keys cannot be rotated anew when a sequence grows, so these take
    the frequencies of that length for all sequences: those of short ones whenever it is within the
    trained context.
    """

    def __init__(self, config: RopeConfig, served_context_tokens: int) -> None:
        self.frequencies, self.amplitude = rotary_frequencies(config, served_context_tokens)

    def angles(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return (cos, sin) as `rotary_embedding` takes them: [num_tokens, 1, rotary_dim] each."""
        if self.frequencies.device != positions.device:
            self.frequencies = self.frequencies.to(positions.device)
        return rotary_angles(positions, self.frequencies, self.amplitude, dtype)


def rotary_frequencies(config: RopeConfig, served_context_tokens: int) -> tuple[Tensor, float]:
    """Return the angular frequencies, float32 [rotary_dim / 2], and the factor on cos and sin.

    They are computed on the CPU whatever the device, so that every device sees the same ones.
    """
    theta, rotary_dim = config.theta, config.rotary_dim
    amplitude = 1.0
    if config.scaling == "dynamic":
        theta = _dynamic_theta(config, served_context_tokens)
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device="cpu") / rotary_dim
    frequencies = 1.0 / (theta**exponents)
    if config.scaling == "linear":
        frequencies = frequencies / config.factor
    elif config.scaling == "llama3":
        frequencies = _llama3_frequencies(config, frequencies)
    elif config.scaling == "yarn":
        frequencies = _yarn_frequencies(config, frequencies)
        amplitude = _yarn_amplitude(config)
    elif config.scaling == "longrope":
        amplitude = _longrope_amplitude(config)
    is_long = config.long_divisors is not None and (
        served_context_tokens > config.original_context_tokens
    )
    divisors = config.long_divisors if is_long else config.divisors
    if divisors is not None:
        frequencies = frequencies / torch.tensor(divisors, dtype=torch.float32, device="cpu")
    return frequencies, amplitude


def _dynamic_theta(config: RopeConfig, served_context_tokens: int) -> float:
    """NTK-aware base for a context beyond the trained one."""
    trained = config.original_context_tokens
    length = max(served_context_tokens, trained)
    stretch = config.factor * length / trained - (config.factor - 1)
    return float(config.theta * stretch ** (config.rotary_dim / (config.rotary_dim - 2)))


def _llama3_frequencies(config: RopeConfig, frequencies: Tensor) -> Tensor:
    """Llama 3.1: long wavelengths are divided by the factor, short ones kept, others blended."""
    wavelengths = 2 * math.pi / frequencies
    trained, low, high = (
        config.original_context_tokens,
        config.low_freq_factor,
        config.high_freq_factor,
    )
    keep = ((trained / wavelengths - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - keep) * frequencies / config.factor + keep * frequencies


def _yarn_frequencies(config: RopeConfig, frequencies: Tensor) -> Tensor:
    """YaRN (Peng et al., arXiv:2309.00071), section 3.2: blend by rotations within the context."""

    def dimension_of(rotations: float) -> float:
        turns = config.original_context_tokens / (rotations * 2 * math.pi)
        return config.rotary_dim * math.log(turns) / (2 * math.log(config.theta))

    low, high = dimension_of(config.beta_fast), dimension_of(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.rotary_dim - 1)
    if low == high:
        high += 0.001  # the ramp needs a width
    dimensions = torch.arange(config.rotary_dim // 2, dtype=torch.float32, device="cpu")
    interpolate = ((dimensions - low) / (high - low)).clamp(0.0, 1.0)
    return frequencies / config.factor * interpolate + frequencies * (1 - interpolate)


def _yarn_amplitude(config: RopeConfig) -> float:
    """YaRN's attention temperature, put on cos and sin (section 3.4 of the paper)."""

    def scale(weight: float) -> float:
        return 1.0 if config.factor <= 1 else 0.1 * weight * math.log(config.factor) + 1.0

    if config.attention_factor is not None:
        return config.attention_factor
    if config.mscale and config.mscale_all_dim:
        return scale(config.mscale) / scale(config.mscale_all_dim)
    return scale(1.0)


def _longrope_amplitude(config: RopeConfig) -> float:
    """LongRoPE (Ding et al., arXiv:2402.13753) as Phi-3 has it: a temperature on cos and sin."""
    if config.attention_factor is not None:
        return config.attention_factor
    if config.factor <= 1:
        return 1.0
    return math.sqrt(1 + math.log(config.factor) / math.log(config.original_context_tokens))
