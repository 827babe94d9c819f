"""Checkpoints of quantised models as the tools of their formats write them.

Each writer rounds matrices itself, packs them word by word as the format's description says, and
returns the values that it wrote.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]
# (levels [outputs, inputs], scales and zero points [outputs, groups]; all of int64 or float32)
Rounded = tuple[Tensor, Tensor, Tensor]

# AWQ: which of eight outputs lies in each nibble of a word, lowest first.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def round_in_groups(
    weight: Tensor, bits: int, groups: Tensor, num_groups: int, *, symmetric: bool
) -> Rounded:
    """Round each output's groups of inputs; groups: the group of each input."""
    most = (1 << bits) - 1
    levels = torch.zeros(weight.shape, dtype=torch.int64)
    scales = torch.zeros(weight.shape[0], num_groups)
    zeros = torch.zeros(weight.shape[0], num_groups, dtype=torch.int64)
    for group in range(num_groups):
        part = weight[:, groups == group]
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        if symmetric:
            largest = torch.maximum(-low, high)
            scale, zero = 2 * largest / most, torch.full_like(low, 1 << (bits - 1))
        else:
            scale = (high - low) / most
            zero = (-low / scale).round()
        scale = scale.half().float()
        level = (part / scale.unsqueeze(1)).round() + zero.unsqueeze(1)
        levels[:, groups == group] = level.clamp(0, most).long()
        scales[:, group], zeros[:, group] = scale, zero.long()
    return levels, scales, zeros


def dequantise(rounded: Rounded, groups: Tensor) -> Tensor:
    """scale * (level - zero point), written plainly."""
    levels, scales, zeros = rounded
    values = torch.empty(levels.shape)
    for column, group in enumerate(groups.tolist()):
        values[:, column] = scales[:, group] * (levels[:, column] - zeros[:, group])
    return values


def pack_words(values: Tensor, bits: int) -> Tensor:
    """Pack along the last dimension, the first value in the lowest bits: int64 -> int32."""
    each = 32 // bits
    words = torch.zeros(*values.shape[:-1], values.shape[-1] // each, dtype=torch.int64)
    for place in range(each):
        words |= (values[..., place::each] & ((1 << bits) - 1)) << (place * bits)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def consecutive(inputs: int, group_size: int) -> Tensor:
    """The group of each input where groups follow one another; -1: one group."""
    return torch.arange(inputs) // (inputs if group_size == -1 else group_size)


def gptq(
    weight: Tensor,
    bits: int,
    group_size: int,
    *,
    symmetric: bool = True,
    act_order: bool = False,
    version: int = 1,
) -> tuple[Tensors, Tensor]:
    """One projection's tensors, and its values."""
    groups = consecutive(weight.shape[1], group_size)
    if act_order:
        groups = groups[torch.randperm(len(groups), generator=torch.Generator().manual_seed(1))]
    count = int(groups.max()) + 1
    levels, scales, zeros = rounded = round_in_groups(
        weight, bits, groups, count, symmetric=symmetric
    )
    if version == 1:
        zeros = zeros.clamp(min=1)  # it has no way to write a zero point of 0
        rounded = levels, scales, zeros
    stored = zeros - 1 if version == 1 else zeros
    tensors = {
        "qweight": pack_words(levels, bits).T.contiguous(),
        "qzeros": pack_words(stored.T.contiguous(), bits),
        "scales": scales.T.half().contiguous(),
        "g_idx": groups.int(),
    }
    return tensors, dequantise(rounded, groups)


def awq(weight: Tensor, group_size: int) -> tuple[Tensors, Tensor]:
    """One projection's tensors, and its values."""
    groups = consecutive(weight.shape[1], group_size)
    count = int(groups.max()) + 1
    levels, scales, zeros = rounded = round_in_groups(weight, 4, groups, count, symmetric=False)

    def pack(values: Tensor) -> Tensor:
        eights = values.reshape(values.shape[0], -1, 8)[:, :, list(AWQ_ORDER)]
        return pack_words(eights.reshape(values.shape), 4)

    tensors = {
        "qweight": pack(levels.T.contiguous()),
        "qzeros": pack(zeros.T.contiguous()),
        "scales": scales.T.half().contiguous(),
    }
    return tensors, dequantise(rounded, groups)


def compressed(
    weight: Tensor,
    bits: int,
    group_size: int,
    *,
    packed: bool,
    symmetric: bool = True,
    act_order: bool = False,
) -> tuple[Tensors, Tensor]:
    """One projection's tensors, and its values; group_size -1: a scale for each output."""
    groups = consecutive(weight.shape[1], group_size)
    if act_order:
        groups = groups[torch.randperm(len(groups), generator=torch.Generator().manual_seed(1))]
    count = int(groups.max()) + 1
    levels, scales, zeros = rounded = round_in_groups(
        weight, bits, groups, count, symmetric=symmetric
    )
    middle = 1 << (bits - 1)
    tensors = {"weight_scale": scales.half()}
    if packed:
        tensors["weight_packed"] = pack_words(levels, bits)
        tensors["weight_shape"] = torch.tensor(weight.shape)
        if not symmetric:
            tensors["weight_zero_point"] = pack_words(zeros.T.contiguous(), bits).T.contiguous()
    else:
        tensors["weight"] = (levels - middle).to(torch.int8)
        if not symmetric:
            tensors["weight_zero_point"] = (zeros - middle).to(torch.int8)
    if act_order:
        tensors["weight_g_idx"] = groups.int()
    return tensors, dequantise(rounded, groups)


# Outputs and inputs that share a scale; None: all of them.
Block = tuple[int | None, int | None]


def fp8(
    weight: Tensor,
    block: Block,
    *,
    scale: str = "weight_scale",
    dtype: torch.dtype = torch.float32,
    **beside: Tensor,
) -> tuple[Tensors, Tensor]:
    """One projection's tensors, and its values; beside: further tensors that a tool writes."""
    rows, columns = block[0] or weight.shape[0], block[1] or weight.shape[1]
    most = torch.finfo(torch.float8_e4m3fn).max
    elements = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    values = torch.empty(weight.shape)
    scales = torch.empty(-(-weight.shape[0] // rows), -(-weight.shape[1] // columns), dtype=dtype)
    for row in range(scales.shape[0]):
        for column in range(scales.shape[1]):
            part = (
                slice(row * rows, (row + 1) * rows),
                slice(column * columns, (column + 1) * columns),
            )
            # Rounded up a little, so that in few bits no element is beyond the largest.
            scales[row, column] = weight[part].abs().amax() / most * 1.01
            by = scales[row, column].float()
            elements[part] = (weight[part] / by).to(torch.float8_e4m3fn)
            values[part] = elements[part].float() * by
    stored = scales.view(()) if block == (None, None) else scales
    own = {kind: tensor.clone() for kind, tensor in beside.items()}
    return {"weight": elements, scale: stored, **own}, values


def gptq_config(bits: int, group_size: int, version: int = 1, **fields: Any) -> dict[str, Any]:
    """`quantization_config` of a GPTQ checkpoint."""
    written = {"checkpoint_format": "gptq_v2"} if version == 2 else {}
    return {"quant_method": "gptq", "bits": bits, "group_size": group_size, **written, **fields}


def awq_config(group_size: int, **fields: Any) -> dict[str, Any]:
    """`quantization_config` of an AWQ checkpoint."""
    known = {"bits": 4, "group_size": group_size, "zero_point": True, "version": "gemm"}
    return {"quant_method": "awq", **known, **fields}


def compressed_config(bits: int, *, packed: bool, **fields: Any) -> dict[str, Any]:
    """`quantization_config` of a compressed-tensors checkpoint."""
    weights = {"num_bits": bits, "type": "int", **fields}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized" if packed else "int-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }


def float_config(strategy: str, *, weight_only: bool = False, **fields: Any) -> dict[str, Any]:
    """`quantization_config` of a compressed-tensors checkpoint of eight-bit floats."""
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, **fields}
    inputs = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": None if weight_only else inputs,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def fp8_config(block: list[int] | None, **fields: Any) -> dict[str, Any]:
    """`quantization_config` of what DeepSeek, Qwen and AutoFP8 write."""
    size = {} if block is None else {"weight_block_size": block, "fmt": "e4m3"}
    return {"quant_method": "fp8", "activation_scheme": "dynamic", **size, **fields}


def quantise_checkpoint(
    directory: Path,
    model: Any,
    quantise: Callable[[Tensor], tuple[Tensors, Tensor]],
    config: dict[str, Any],
) -> None:
    """Rewrite a saved checkpoint with its layers' projections quantised, and change `model` to
    what was written."""
    tensors: Tensors = {}
    for name, parameter in model.state_dict().items():
        module = name.removesuffix(".weight")
        if parameter.dim() == 2 and ".layers." in name:
            parts, values = quantise(parameter)
            tensors |= {f"{module}.{kind}": part.contiguous() for kind, part in parts.items()}
            with torch.no_grad():
                parameter.copy_(values)
        elif not (name == "lm_head.weight" and model.config.tie_word_embeddings):
            tensors[name] = parameter.clone()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))


def damage(directory: Path, projection: str, change: dict[str, Tensor | None]) -> None:
    """Change tensors of a projection in a saved checkpoint, by their kinds; None: leave one out."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    for kind, tensor in change.items():
        tensors.pop(f"{projection}.{kind}", None)
        if tensor is not None:
            tensors[f"{projection}.{kind}"] = tensor
    save_file(tensors, file)
