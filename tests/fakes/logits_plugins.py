"""Logits processors, and a package's metadata that offers them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

ENTRY_POINTS = """[meshserve.logits_processors]
count-down = tests.fakes.logits_plugins:CountDown
raises = tests.fakes.logits_plugins:Raises
misshapes = tests.fakes.logits_plugins:Misshapes
"""


def install(folder: Path) -> None:
    """Make a package of `folder`, which is to be on the path, that offers the processors below."""
    metadata = folder / "logits_plugins-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: logits-plugins\nVersion: 1.0\n"
    )
    (metadata / "entry_points.txt").write_text(ENTRY_POINTS)


class CountDown:
    """Has the output count down from `start`, by adding `by` to the logit of the next number. What
    it takes to be the next hangs on prompt and output."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self._start = int(arguments["start"])
        self._by = float(arguments.get("by", 1000))

    def __call__(self, prompt: Sequence[int], output: Sequence[int], logits: Tensor) -> Tensor:
        logits[(self._start - len(output) + prompt[0]) % len(logits)] += self._by
        return logits


class Raises:
    """Fails, once the output has some tokens."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self._after = int(arguments.get("after", 0))

    def __call__(self, prompt: Sequence[int], output: Sequence[int], logits: Tensor) -> Tensor:
        if len(output) >= self._after:
            raise RuntimeError("no logits today")
        return logits


class Misshapes:
    """Gives back too few logits."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        """Takes no arguments."""

    def __call__(self, prompt: Sequence[int], output: Sequence[int], logits: Tensor) -> Tensor:
        return logits[1:]
