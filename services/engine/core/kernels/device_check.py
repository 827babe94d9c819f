"""Whether the kernels of a GPU compute on this card, under this driver, what they should.

Before an engine uses any, each implementation of each op is run beside its reference. What fails is
not used, and the next best is. Verdicts are kept for as long as the card, the driver, torch, Triton
and the kernels stay the same.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from services.engine.core.kernels.checking_apart import UNCHECKED, Name, run_checks
from services.engine.core.kernels.registry import OPS
from services.runtime.modelfiles import default_cache_dir

logger = logging.getLogger(__name__)

_CORE = Path(__file__).parents[1]
_SOURCES = ("kernels/**/*.py", "kernels/**/*.cu", "kernels/**/*.h", "sampler.py", "sampling/**/*")
_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True, slots=True)
class Verdicts:
    """What came of checking: the problem of each implementation, "" for those that have none."""

    problems: Mapping[Name, str]

    @property
    def refused(self) -> dict[str, dict[str, str]]:
        """Those that must not be used, by op and name, with the reasons."""
        refused: dict[str, dict[str, str]] = {}
        for (op, name), problem in self.problems.items():
            if problem:
                refused.setdefault(op, {})[name] = problem
        return refused


def check_device(
    device: torch.device, device_type: str = "cuda", cache_dir: Path | None = None
) -> Verdicts:
    """Check what can run on `device` of the implementations for a device type, and log it.

    What was found before, on the same card with the same software, is found again in no time.
    """
    names = [
        (op.name, each.name)
        for op in OPS.values()
        for each in op.implementations.get(device_type, ())
        if each.unavailable() is None
    ]
    path = verdict_path(machine(device), cache_dir)
    problems = _read(path)
    unknown = [name for name in names if name not in problems]
    if unknown:
        logger.info("GPU kernels: checking %d of them, once for this card and driver", len(unknown))
        started_s = time.monotonic()
        problems |= run_checks(unknown, str(device), device_type)
        logger.info("GPU kernels: checked in %.0f s", time.monotonic() - started_s)
        _write(path, machine(device), problems)
    verdicts = Verdicts({name: problems[name] for name in names})
    for (op, name), problem in verdicts.problems.items():
        if problem:
            logger.error("GPU kernels: %s of %s is not used: %s (%s)", name, op, problem, path)
    return verdicts


def machine(device: torch.device) -> dict[str, str]:
    """What a verdict holds for: the card, the driver, torch, Triton and the kernels' sources."""
    found = {"torch": str(torch.__version__), "triton": _triton_version(), "sources": _hash()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["card"] = f"{properties.name}, {properties.major}.{properties.minor}"
        found["driver"] = _DRIVER.read_text() if _DRIVER.exists() else ""
    return found


def verdict_path(machine: Mapping[str, str], cache_dir: Path | None = None) -> Path:
    """Where the verdicts on a machine are kept."""
    key = hashlib.sha256(json.dumps(machine, sort_keys=True).encode()).hexdigest()[:16]
    return (cache_dir or default_cache_dir()) / "kernels" / f"gpu-{key}.json"


def known_verdicts(device: torch.device, cache_dir: Path | None = None) -> Verdicts | None:
    """What an engine found when it started here; None where none has."""
    problems = _read(verdict_path(machine(device), cache_dir))
    return Verdicts(problems) if problems else None


def _triton_version() -> str:
    try:
        from triton import __version__
    except ImportError:
        return "none"
    return str(__version__)


def _hash() -> str:
    found = hashlib.sha256()
    for path in sorted({path for pattern in _SOURCES for path in _CORE.glob(pattern)}):
        if path.is_file() and path.suffix != ".pyc":
            found.update(path.read_bytes())
    return found.hexdigest()


def _read(path: Path) -> dict[Name, str]:
    try:
        kept = json.loads(path.read_text())["problems"]
        return {(op, name): str(problem) for op, name, problem in kept}
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # there is none, or it is no verdict: then it is found again


def _write(path: Path, machine: Mapping[str, str], problems: Mapping[Name, str]) -> None:
    kept = [
        (*name, problem) for name, problem in problems.items() if not problem.startswith(UNCHECKED)
    ]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        written = path.with_suffix(f".{os.getpid()}")
        written.write_text(json.dumps({"machine": machine, "problems": kept}, indent=1))
        written.replace(path)
    except OSError as error:
        logger.warning("GPU kernels: they will be checked at the next start too: %s", error)
