"""Projections of eight-bit floats (e4m3) as the tools that write them store them.

Of a projection with N inputs and M outputs:

    weight        float8_e4m3fn [M, N]
    weight_scale  float: [] or [1], for all of it; [M, 1], by output; [M / a, N / b] rounded up, by
                  block of a outputs and b inputs. What an element stands for is element * scale.

`quant_method` is "fp8" in what DeepSeek and Qwen release, where scales are called weight_scale_inv
and blocks are 128 x 128, and in what AutoFP8 writes; "fbgemm_fp8" in what Meta releases, with a
scale by output; "compressed-tensors" with the format "float-quantized" in what llm-compressor
writes (https://github.com/vllm-project/compressed-tensors), with any of these scales.

Activations are rounded token by token as they come, each row by its largest element. So the scales
of quantised activations and their upper bounds are not needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from services.engine.core.weights.stored_floats import StoredFloats
from services.engine.core.weights.tensor_files import FLOAT_TYPES, TensorEntry, check_part
from services.runtime.modelfiles.fields import Fields

# How many outputs and inputs share a scale; None: all.
Block: TypeAlias = tuple[int | None, int | None]

_ELEMENTS = "F8_E4M3"
_SCALES = ("weight_scale", "weight_scale_inv")
_OF_ACTIVATIONS = ("input_scale", "input_scale_ub", "activation_scale", "output_scale")
_WHOLE: Block = (None, None)
_BY_OUTPUT: Block = (1, None)


@dataclass(frozen=True, slots=True)
class FP8:
    """What a checkpoint's projections have in common; see `schemes.Scheme`.

    blocks: of each projection one of these, whichever its scales have the shape of.
    """

    blocks: tuple[Block, ...]
    is_weight_only: bool = False  # whether activations are left as they are

    def __str__(self) -> str:
        sizes = [f"{rows}x{inputs}" for rows, inputs in self.blocks if inputs is not None]
        return f"FP8 in blocks of {' and '.join(sizes)}" if sizes else "FP8"

    def owns(self, kind: str, entry: TensorEntry) -> bool:
        is_elements = kind == "weight" and entry.dtype == _ELEMENTS
        return is_elements or kind in _SCALES or kind in _OF_ACTIVATIONS

    def shape(self, parts: Mapping[str, TensorEntry]) -> tuple[int, int]:
        outputs, inputs = check_part(parts, "weight", (_ELEMENTS,), (None, None))
        found = [kind for kind in _SCALES if kind in parts]
        if not found:
            raise ValueError(f"has no {' and no '.join(_SCALES)}")
        scales = parts[found[0]]
        check_part(parts, found[0], FLOAT_TYPES, scales.shape)
        self._block((outputs, inputs), scales.shape)
        return outputs, inputs

    def read(self, parts: Mapping[str, Tensor]) -> StoredFloats:
        elements = parts["weight"]
        scales = next(parts[kind] for kind in _SCALES if kind in parts)
        block = self._block(tuple(elements.shape), tuple(scales.shape))
        rows = -(-elements.shape[0] // block[0])
        return StoredFloats(elements, scales.reshape(rows, -1), block, self.is_weight_only)

    def _block(self, shape: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, int]:
        """How many outputs and inputs share a scale; raises ValueError for scales of no shape that
        they may have."""
        allowed: list[tuple[int, ...]] = []
        for block in self.blocks:
            outputs, inputs = (
                whole if size is None else size for size, whole in zip(block, shape, strict=True)
            )
            fitting = (-(-shape[0] // outputs), -(-shape[1] // inputs))
            # Tools leave out dimensions of one.
            own = [fitting, *([fitting[:1]] if block[1] is None else [])]
            own += [()] if block == _WHOLE else []
            if scales in own:
                return outputs, inputs
            allowed.append(fitting)
        wanted = " or ".join(str(list(each)) for each in allowed)
        raise ValueError(f"has scales of the shape {list(scales)}, not {wanted}")


def read_fp8(config: Fields) -> FP8:
    """Read `quantization_config` of the method "fp8"; raises ModelFileError for what cannot be
    read."""
    _check(config, "activation_scheme", ("dynamic", "static"))
    _check(config, "fmt", ("e4m3",))
    if config.raw.get("weight_block_size") is None:
        return FP8((_WHOLE,))
    return FP8((_read_block(config, "weight_block_size"),))


def read_fbgemm_fp8(config: Fields) -> FP8:
    """Read `quantization_config` of the method "fbgemm_fp8", which says nothing of weights."""
    return FP8((_BY_OUTPUT,))


def read_float_groups(groups: Fields) -> FP8:
    """Read `config_groups` of compressed-tensors; raises ModelFileError for what cannot be read."""
    blocks: dict[Block, None] = {}
    is_weight_only = False
    for name in groups.raw:
        group = groups.table(name)
        weights = None if group is None else group.table("weights")
        if group is None or weights is None:
            raise groups.error(name, "does not say how weights are stored")
        _check(weights, "type", ("float",))
        if (bits := weights.integer("num_bits", 8)) != 8:
            raise weights.error("num_bits", f"{bits} is not supported for floats, only 8 is")
        if not weights.flag("symmetric", default=True):
            raise weights.error("symmetric", "floats with zero points are not supported")
        blocks[_block_of(weights)] = None
        is_weight_only |= group.table("input_activations") is None
    return FP8(tuple(blocks), is_weight_only)


def _block_of(weights: Fields) -> Block:
    strategy = weights.text("strategy", "tensor")
    if strategy == "block":
        return _read_block(weights, "block_structure")
    if strategy == "group":
        if (size := weights.integer("group_size")) < 1:
            raise weights.error("group_size", f"{size} is not positive")
        return (1, size)
    known = {"tensor": _WHOLE, "channel": _BY_OUTPUT}
    if strategy not in known:
        names = ", ".join((*known, "group", "block"))
        raise weights.error("strategy", f"{strategy!r} is not supported, only {names} are")
    return known[strategy]


def _read_block(fields: Fields, name: str) -> Block:
    size = fields.raw.get(name)
    if not (
        isinstance(size, list)
        and len(size) == 2
        and all(type(each) is int and each > 0 for each in size)
    ):
        raise fields.error(name, f"{size!r} is not two positive integers: outputs and inputs")
    return size[0], size[1]


def _check(fields: Fields, name: str, known: tuple[str, ...]) -> None:
    if (found := fields.text(name, known[0])) not in known:
        verb = "is" if len(known) == 1 else "are"
        problem = f"{found!r} is not supported, only {', '.join(map(repr, known))} {verb}"
        raise fields.error(name, problem)
