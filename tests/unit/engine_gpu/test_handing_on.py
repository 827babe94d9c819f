"""What a kernel does not serve goes to the next best implementation, unless that is refused."""

from __future__ import annotations

import torch
from torch import Tensor

from services.engine.core.kernels.cuda.library import beneath
from services.engine.core.kernels.registry import Op


def halve(values: Tensor) -> Tensor:
    return values / 2


def test_one_that_was_excluded_is_not_handed_to_either() -> None:
    op = Op(halve)
    op.implementation("cuda", name="triton")(lambda values: values + 10)
    op.implementation("cuda", name="cutlass")(lambda values: values + 20)
    op.implementation("cuda", name="cuda")(lambda values: values + 30)
    zeros = torch.zeros(1)
    assert beneath(op)(zeros).item() == 20
    op.select("cuda", {"cutlass": "it hangs"})
    assert beneath(op)(zeros).item() == 10
    op.select("cuda", {"cutlass": "it hangs", "triton": "it differs"})
    assert beneath(op) is halve
