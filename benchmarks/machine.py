"""What a report says of the machine and the code that it was measured with."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
# What decides how fast a matrix product can be; the rest of the flags says nothing here.
TOLD_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx_vnni",
    "amx_bf16",
    "amx_int8",
)


def describe_machine() -> dict[str, Any]:
    """Processor, memory and system; equal for two reports from one machine."""
    cpu = _cpuinfo()
    flags = set(cpu.get("flags", "").split())
    return {
        "processor": cpu.get("model name", platform.processor() or platform.machine()),
        "cores": os.cpu_count(),
        "instruction_sets": [flag for flag in TOLD_FLAGS if flag in flags],
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def code_revision() -> str:
    """The commit that is checked out, with a plus if files differ from it; empty without git."""
    try:
        commit = _git("rev-parse", "--short", "HEAD").strip()
        changed = _git("status", "--porcelain", "--untracked-files=no").strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
    return commit + ("+" if changed else "")


def load_average() -> float:
    """Runnable processes over the last minute: above a few tenths, somebody else is working."""
    return os.getloadavg()[0]


def _cpuinfo() -> dict[str, str]:
    """The first processor's entry."""
    entry: dict[str, str] = {}
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return entry
    for line in text.split("\n\n")[0].splitlines():
        name, _, value = line.partition(":")
        entry[name.strip()] = value.strip()
    return entry


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
