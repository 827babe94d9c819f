"""Kernels in Triton compile for the cards they are for, and keep what they compute in registers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("compile_kernels.py")


def compile_kernels(*modules: str, **environment: str) -> list[Mapping[str, Any]]:
    """A report of each form and card; see compile_kernels.py."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found = subprocess.run(
        [sys.executable, SCRIPT, *modules],
        env=inherited | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    return [json.loads(line) for line in found.stdout.splitlines()]


def form_of(report: Mapping[str, Any]) -> str:
    constants = ", ".join(f"{name}={value}" for name, value in report["constants"].items())
    pointers = " ".join(kind for kind in report["signature"].values() if kind.startswith("*"))
    where = f"{report['module']}.{report['kernel']}"
    return f"{where}({constants}; {pointers}) for sm_{report['card']}"


PLANTED = """
from triton import jit
from triton import language as tl
from services.engine.core.kernels.triton.specialisation import Specialisation

@jit
def refused(target, size: tl.constexpr):
    tl.store(target + tl.arange(0, size), tl.zeros((size // 2,), tl.float32))

@jit
def crowded(target, size: tl.constexpr):
    index = tl.arange(0, size)
    values = tl.load(target + index)
    tl.store(target + index, values - tl.max(values))

@jit
def sound(target, source, size: tl.constexpr):
    index = tl.arange(0, size)
    tl.store(target + index, tl.load(source + index).to(tl.float32))

COMPILED = (
    Specialisation(refused, {"target": "*fp32"}, {"size": 64}),
    Specialisation(sound, {"target": "*fp32", "source": "*fp8e4nv"}, {"size": 64}),
    Specialisation(crowded, {"target": "*fp32"}, {"size": 16384}, num_warps=1),
)
"""


def test_what_does_not_compile_and_what_spills_is_found(tmp_path: Path) -> None:
    (tmp_path / "planted.py").write_text(PLANTED)
    reports = compile_kernels(
        "planted", PYTHONPATH=str(tmp_path), TRITON_CACHE_DIR=str(tmp_path / "cache")
    )
    by_kernel = {(each["kernel"], each["card"]): each for each in reports}
    assert set(by_kernel) == {
        *(("refused", card) for card in (80, 90)),
        *(("crowded", card) for card in (80, 90)),
        ("sound", 90),  # there are no fp8 units before
    }
    assert "shape" in by_kernel["refused", 80]["error"]
    assert by_kernel["crowded", 90]["spilled_bytes"] > 0
    sound = by_kernel["sound", 90]
    assert (sound["error"], sound["spilled_bytes"]) == ("", 0)
    assert 0 < sound["registers"] < 64


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_kernel_compiles_for_every_card_it_is_for_without_spilling() -> None:
    reports = compile_kernels()
    refused = [f"{form_of(each)}: {each['error']}" for each in reports if each["error"]]
    assert not refused, "\n\n".join(refused)
    spilling = [
        f"{form_of(each)}: {each['registers']} registers and {each['spilled_bytes']} bytes beside"
        for each in reports
        if each["spilled_bytes"] and not each["may_spill"]
    ]
    assert not spilling, "\n".join(spilling)
