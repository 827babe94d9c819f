"""The check that an engine makes of its kernels at start-up passes with those in CUDA C++."""

from __future__ import annotations

import pytest
import torch

from services.engine.core.kernels import cuda, examples
from services.engine.core.kernels.checking_apart import check_one
from services.engine.core.kernels.registry import OPS
from tests.fakes.cuda.emulator import Emulator

cuda.register()
# The examples name an op for each; some are declared where they are imported from.
assert examples is not None
SERVED = sorted(
    op.name
    for op in OPS.values()
    if any(each.name == "cuda" for each in op.implementations.get("cuda", ()))
)


@pytest.mark.slow
@pytest.mark.parametrize("op", SERVED)
def test_every_op_gives_what_its_reference_gives(emulated: Emulator, op: str) -> None:
    with torch.inference_mode():
        assert check_one((op, "cuda"), torch.device("cpu"), "cuda") == ""
