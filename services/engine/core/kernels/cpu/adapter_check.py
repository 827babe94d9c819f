"""A check of adapters in the native step, run at every start: as those of self_check.py, short."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from services.engine.core.kernels.cpu.adapter_slots import AdapterSlots
from services.engine.core.kernels.cpu.library import Library, check
from services.engine.core.kernels.cpu.packing import PackedLinear, pack_bf16, pack_grouped
from services.engine.core.kernels.cpu.program import Buffer, Epilogue, ProgramBuilder
from services.engine.core.kernels.cpu.self_check import (
    ROUNDINGS,
    VOCAB,
    Rounding,
    is_close,
    known_values,
    rounded,
    run_step,
    token_ids,
)
from services.engine.core.kernels.low_rank import LowRankPart

_SIZE = 64
# More than a tile, and no whole tiles.
_RANK = 20
# Rows that kernels take together, and one that is left.
_ROWS = 9


@check("adapters")
def adapts_correctly(library: Library) -> bool:
    """Whether what an adapter adds to a layer, gated and not, is what torch adds."""
    return all(
        _adapter_is_right(library, epilogue, ROUNDINGS[name])
        for epilogue in (Epilogue.STORE, Epilogue.GATED_SILU)
        for name in ("bf16", "q8")
    )


def _adapter_is_right(library: Library, epilogue: Epilogue, rounding: Rounding) -> bool:
    embedding = known_values(VOCAB, _SIZE)
    outputs = _SIZE * (2 if epilogue.gates else 1)
    # The layer itself adds little to what is looked for.
    modules = {
        "embedding": embedding,
        "layer": known_values(outputs, _SIZE) / 16,
        "same": torch.eye(_SIZE),
    }

    def pack(module: str, gated: bool) -> PackedLinear:
        if rounding is None:
            return pack_bf16(modules[module], gated=gated)
        return pack_grouped(rounding(modules[module]), gated=gated)

    def read(module: str, kind: str) -> Tensor:
        raise AssertionError("there are no norms")

    builder = ProgramBuilder(pack, read, max_positions=_ROWS, max_adapter_rank=_RANK)
    builder.embed("embedding")
    builder.convert(Buffer.RESIDUAL)
    builder.adapted_linear("layer", Buffer.PROJECTED, epilogue=epilogue)
    builder.convert(Buffer.PROJECTED)
    builder.linear("same", Buffer.LOGITS)
    builder.adapted[0].path = "layer"
    down = known_values(_RANK, _SIZE + 1)[:, 1:] / 4
    up = known_values(outputs, _RANK + 1)[:, 1:] / 4
    slots = AdapterSlots(builder.adapted, 1)
    slots.set(0, slots.pack({"layer": (LowRankPart(down, up, 0),)}))
    rows = rounded(embedding, rounding)[token_ids(_ROWS)]
    sums = rows @ rounded(modules["layer"], rounding).T + rows @ down.T @ up.T
    if epilogue.gates:
        gates, values = sums.chunk(2, dim=-1)
        sums = functional.silu(gates) * values
    return is_close(run_step(library, builder, _SIZE, _ROWS, adapters=slots.of((0,))), sums)
