"""How a CPU's native kernels keep weights, by what a file stores them as.

They know bf16, and 4 and 8 bits in groups of 32 inputs. docs/models.md says the same in words.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

# In 4 and 8 bits with the levels that the file has.
KEPT_IN_4 = ("Q4_0", "Q4_1", "Q4_K")
KEPT_IN_8 = ("Q5_0", "Q5_1", "Q5_K", "Q8_0", "IQ4_NL", "IQ4_XS")
# To 8 bits: their groups are of 16 inputs.
ROUNDED = ("Q2_K", "Q3_K", "Q6_K")
FLOATS = ("F32", "F16", "BF16", "F64")


@dataclass(frozen=True, slots=True)
class StoredAs:
    """A way of storing weights that is not a type of a file: several tensors make a matrix.

    `kept` says how a CPU keeps them, `kept_on_gpu` how a GPU does where that is said apart.
    """

    name: str
    bits: int
    kept: str
    kept_on_gpu: str | None = None


def read_quantization(config: dict[str, Any]) -> StoredAs | None:
    """Return how config.json says that projections are stored; None for plain floats."""
    found = config.get("quantization_config")
    if not isinstance(found, dict):
        return None
    method = str(found.get("quant_method"))
    if (floats := _floats(found, method)) is not None:
        return floats
    names = {"gptq": "GPTQ", "awq": "AWQ"}
    weights = _weights_of_groups(found)
    bits = found.get("bits", weights.get("num_bits", 8))
    out_of_order = found.get("desc_act") is True or weights.get("actorder") == "group"
    if type(bits) is not int or bits not in (4, 8):
        name = f"{names.get(method, method)}, which is not read"
        return StoredAs(name, 8, f"{name} in 8 bits")
    name = f"{names.get(method, method)} {bits} bits"
    # Their groups are of inputs that do not lie beside each other.
    rounded = f"{name} in order of activations rounded to 8 bits"
    return StoredAs(name, bits, rounded if out_of_order else f"{name} in {bits} bits")


def _floats(config: dict[str, Any], method: str) -> StoredAs | None:
    weights = _weights_of_groups(config)
    if method == "compressed-tensors":
        if weights.get("type") != "float" or weights.get("num_bits", 8) != 8:
            return None
        group = weights.get("group_size") if weights.get("strategy") == "group" else None
        block = weights.get("block_structure") if group is None else [1, group]
    elif method in ("fp8", "fbgemm_fp8"):
        block = config.get("weight_block_size")
    else:
        return None
    in_blocks = f"FP8 in blocks of {'x'.join(map(str, block))}" if isinstance(block, list) else None
    is_weight_only = bool(weights) and _first_group(config).get("input_activations") is None
    name = in_blocks or "FP8"
    kept = f"{name} rounded to 8 bits"
    as_stored = "FP8 as stored, activations rounded to it; before Ada and Hopper 8 bits"
    return StoredAs(name, 8, kept, kept if in_blocks or is_weight_only else as_stored)


def _weights_of_groups(config: dict[str, Any]) -> dict[str, Any]:
    weights = _first_group(config).get("weights")
    return weights if isinstance(weights, dict) else {}


def _first_group(config: dict[str, Any]) -> dict[str, Any]:
    groups = config.get("config_groups")
    first = next(iter(groups.values()), None) if isinstance(groups, dict) else None
    return first if isinstance(first, dict) else {}


def kept_weights(kinds: Iterable[str], quantization: StoredAs | None = None) -> str:
    """Say how matrices stored as `kinds` are kept where nothing else is asked for."""
    found = set(kinds)
    parts = [] if quantization is None else [quantization.kept]
    parts += [f"{kind} in 4 bits" for kind in KEPT_IN_4 if kind in found]
    parts += [f"{kind} in 8 bits" for kind in KEPT_IN_8 if kind in found]
    parts += [f"{kind} rounded to 8 bits" for kind in ROUNDED if kind in found]
    if not parts:
        return "bf16"
    if found.intersection(FLOATS):
        parts.append("others in bf16, a head in 8 bits")
    return ", ".join(parts)
