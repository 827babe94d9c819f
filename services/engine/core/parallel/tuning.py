"""Which kernels compute products, chosen by what all ranks have measured: so all choose alike.

A sum over ranks is over when it is on the rank that takes the longest.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from services.engine.core.kernels.choice import Choice, Signature
from services.engine.core.parallel.wire import Timing


def agreed(found: Sequence[Sequence[Choice]]) -> list[Choice]:
    """What ranks are to go by: of each product, the longest that one of those took who measured
    it. Stages may have products that others have not."""
    together: dict[tuple[Signature, int], list[dict[str, float]]] = {}
    for choices in found:
        for each in choices:
            together.setdefault((each.signature, each.rows), []).append(each.seconds)
    return [
        Choice(
            signature,
            rows,
            {
                name: max(each[name] for each in seconds)
                for name in seconds[0]
                if all(name in each for each in seconds)
            },
        )
        for (signature, rows), seconds in together.items()
    ]


def to_wire(choices: Iterable[Choice]) -> list[Timing]:
    """Choices as they are sent."""
    return [
        Timing(
            op, str(dtype).removeprefix("torch."), outputs, inputs, bits, each.rows, each.seconds
        )
        for each in choices
        for op, dtype, outputs, inputs, bits in [each.signature]
    ]


def from_wire(timings: Iterable[Timing]) -> list[Choice]:
    """The choices that were sent."""
    return [
        Choice(
            (each.op, getattr(torch, each.dtype), each.outputs, each.inputs, each.bits),
            each.rows,
            each.seconds,
        )
        for each in timings
    ]
