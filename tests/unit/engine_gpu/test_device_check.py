"""Kernels that do not compute on a card what they should are not used there, whatever they do."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from services.engine.core.kernels import OPS, device_check, rms_norm
from services.engine.core.kernels.checking_apart import check_one, run_checks
from services.engine.core.kernels.device_check import Verdicts, check_device
from services.engine.core.kernels.examples import EXAMPLES
from services.engine.core.kernels.registry import Implementation

CPU = torch.device("cpu")

PLANTED = """
import os, signal, time
import torch
from services.engine.core.kernels import rms_norm

def planted(name):
    return rms_norm.implementation("planted", name=name)

@planted("sound")
def sound(hidden, weight, eps):
    print("not a result")
    return rms_norm.reference(hidden.clone(), weight, eps)

@planted("wrong")
def wrong(hidden, weight, eps):
    return rms_norm.reference(hidden, weight, eps) * 1.1

@planted("incomplete")
def incomplete(hidden, weight, eps):
    found = torch.full_like(hidden, float("nan"))
    found[:, 1:] = rms_norm.reference(hidden, weight, eps)[:, 1:]
    return found

@planted("of another shape")
def reshaped(hidden, weight, eps):
    return rms_norm.reference(hidden, weight, eps)[:, :-1]

@planted("raises")
def raises(hidden, weight, eps):
    raise RuntimeError("no such instruction")

@planted("crashes")
def crashes(hidden, weight, eps):
    os.kill(os.getpid(), signal.SIGSEGV)

@planted("exits")
def exits(hidden, weight, eps):
    os._exit(7)

@planted("hangs")
def hangs(hidden, weight, eps):
    time.sleep(3600)
"""


def test_each_kind_of_fault_is_refused_and_what_is_sound_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "planted_kernels.py").write_text(PLANTED)
    monkeypatch.syspath_prepend(str(tmp_path))
    kinds = ("wrong", "incomplete", "of another shape", "raises", "crashes", "exits", "hangs")
    names = [("rms_norm", kind) for kind in (*kinds, "sound")]
    problems = run_checks(names, "cpu", "planted", modules=["planted_kernels"], limit_s=2.0)
    assert problems["rms_norm", "sound"] == ""
    refused = Verdicts(problems).refused["rms_norm"]
    assert set(refused) == set(kinds)
    assert "is off by" in refused["wrong"]
    assert "is off by inf" in refused["incomplete"]
    assert "instead of" in refused["of another shape"]
    assert refused["raises"] == "it raises RuntimeError: no such instruction"
    assert refused["crashes"] == "it dies of SIGSEGV"
    assert refused["exits"].startswith("it ends its process with 7")
    assert refused["hangs"] == "it does not end within 2 s"


def test_what_cannot_even_be_started_is_not_used() -> None:
    problems = run_checks([("rms_norm", "any")], "cpu", "planted", modules=["no_such_module"])
    (problem,) = problems.values()
    assert problem.startswith("could not be checked: it ends its process with 1")
    assert "no_such_module" in problem


@pytest.fixture
def planted() -> Iterator[list[str]]:
    """Two implementations of an op, of which "wrong" is; the names that are checked."""
    rms_norm.implementation("planted", name="sound")(rms_norm.reference)
    rms_norm.implementation("planted", name="wrong")(lambda hidden, *_: hidden)
    rms_norm.implementation("planted", name="absent", unavailable=lambda: "no card")(
        rms_norm.reference
    )
    yield []
    del rms_norm.implementations["planted"]


def test_a_verdict_is_found_once_and_logged_at_each_start(
    planted: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def check_here(names: list[tuple[str, str]], *_: object) -> dict[tuple[str, str], str]:
        planted.extend(name for _, name in names)
        return {name: check_one(name, CPU, "planted") for name in names}

    monkeypatch.setattr(device_check, "run_checks", check_here)
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            verdicts = check_device(CPU, "planted", tmp_path)
        assert set(verdicts.refused["rms_norm"]) == {"wrong"}
        assert "wrong of rms_norm is not used: [1, 256]" in caplog.text
    assert planted == ["sound", "wrong"]
    # One that was not there before is checked, and no other.
    rms_norm.implementation("planted", name="newer")(rms_norm.reference)
    check_device(CPU, "planted", tmp_path)
    assert planted == ["sound", "wrong", "newer"]
    known = device_check.known_verdicts(CPU, tmp_path)
    assert known is not None
    assert set(known.refused["rms_norm"]) == {"wrong"}
    # Another driver, or other kernels, may do otherwise.
    monkeypatch.setattr(device_check, "_triton_version", lambda: "another")
    assert device_check.known_verdicts(CPU, tmp_path) is None
    check_device(CPU, "planted", tmp_path)
    assert planted == ["sound", "wrong", "newer", "sound", "wrong", "newer"]


def test_what_could_not_be_checked_is_tried_again(
    planted: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(names: list[tuple[str, str]], *_: object) -> dict[tuple[str, str], str]:
        planted.extend(name for _, name in names)
        return dict.fromkeys(names, "could not be checked: the card is full")

    monkeypatch.setattr(device_check, "run_checks", fail)
    for _ in range(2):
        refused = check_device(CPU, "planted", tmp_path).refused
        assert set(refused["rms_norm"]) == {"sound", "wrong"}
    assert planted == ["sound", "wrong"] * 2


def test_every_op_that_a_gpu_computes_in_its_own_way_has_examples() -> None:
    assert {name for name, op in OPS.items() if "cuda" in op.implementations} <= set(EXAMPLES)


@pytest.mark.parametrize("op", sorted(EXAMPLES.keys() & OPS.keys()))
def test_examples_are_calls_that_their_ops_take(op: str) -> None:
    OPS[op].implementation("itself", name="reference again")(OPS[op].reference)
    try:
        assert check_one((op, "reference again"), CPU, "itself") == ""
    finally:
        del OPS[op].implementations["itself"]


@pytest.mark.slow
def test_kernels_that_are_interpreted_pass() -> None:
    names = [(op, "triton") for op in ("add_rms_norm", "quantize_rows", "silu_and_mul", "write_kv")]
    known = [name for name in names if any(x.name == "triton" for x in implementations(name[0]))]
    assert len(known) > 2
    assert not Verdicts(run_checks(known, "cpu", "cuda")).refused


def implementations(op: str) -> Sequence[Implementation[..., Any]]:
    return OPS[op].implementations.get("cuda", ())
