"""An op runs the best implementation that can run, and says which that is and why."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from services.engine.core.kernels import OPS, Op, select


def double(x: Tensor) -> Tensor:
    """Return twice x."""
    return x * 2


@pytest.fixture
def op() -> Op[[Tensor], Tensor]:
    return Op(double)


def test_an_op_without_implementations_runs_its_reference_and_says_so(
    op: Op[[Tensor], Tensor],
) -> None:
    assert op(torch.ones(1)).item() == 2
    assert str(op.select("cpu")) == "double: reference"
    assert op.__doc__ == "Return twice x."


def test_the_last_registered_that_can_run_is_chosen(op: Op[[Tensor], Tensor]) -> None:
    @op.implementation("cpu", name="plain")
    def plain(x: Tensor) -> Tensor:
        return x + 10

    @op.implementation("cpu", name="fast", unavailable=lambda: "no compiler found")
    def fast(x: Tensor) -> Tensor:
        return x + 20

    assert op(torch.ones(1)).item() == 2
    assert str(op.select("cpu")) == "double: plain; fast: no compiler found"
    assert op(torch.ones(1)).item() == 11
    assert op.reference(torch.ones(1)).item() == 2


def test_an_excluded_implementation_is_passed_over(op: Op[[Tensor], Tensor]) -> None:
    op.implementation("cpu", name="plain")(lambda x: x + 10)
    op.select("cpu")
    assert str(op.select("cpu", exclude={"plain"})) == "double: reference; plain: excluded"
    assert op(torch.ones(1)).item() == 2


def test_what_is_excluded_for_a_reason_is_shown_with_it(op: Op[[Tensor], Tensor]) -> None:
    op.implementation("cpu", name="plain")(lambda x: x + 10)
    assert str(op.select("cpu", {"plain": "it hangs"})) == "double: reference; plain: it hangs"


def test_what_is_refused_is_refused_of_its_op_alone() -> None:
    refused = {"rms_norm": {"triton": "it computes something else"}}
    silu = OPS["silu_and_mul"]
    silu.implementation("nowhere", name="triton")(silu.reference)
    norm = OPS["rms_norm"]
    norm.implementation("nowhere", name="triton")(norm.reference)
    try:
        selections = {each.op: each for each in select("nowhere", refused=refused)}
    finally:
        del silu.implementations["nowhere"], norm.implementations["nowhere"]
    assert str(selections["rms_norm"]).endswith("reference; triton: it computes something else")
    assert selections["silu_and_mul"].implementation == "triton"


def test_the_device_of_the_first_argument_decides(op: Op[[Tensor], Tensor]) -> None:
    op.implementation("meta", name="shapes only")(lambda x: x.expand(3))
    op.select("meta")
    op.select("cpu")
    assert op(torch.ones(1, device="meta")).shape == (3,)
    assert op(torch.ones(1)).shape == (1,)


def test_a_name_is_taken_once(op: Op[[Tensor], Tensor]) -> None:
    op.implementation("cpu", name="plain")(double)
    with pytest.raises(ValueError, match="already has an implementation named 'plain'"):
        op.implementation("cpu", name="plain")(double)
    with pytest.raises(ValueError, match="already has"):
        op.implementation("cpu", name="reference")(double)


def test_every_op_reports_at_start_up() -> None:
    assert {selection.op for selection in select("cpu")} == set(OPS)
    assert {"rms_norm", "add_rms_norm", "silu_and_mul", "rotary_embedding"} <= set(OPS)
    assert {"write_kv", "paged_attention"} <= set(OPS)
