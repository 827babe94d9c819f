"""The masks of one step: which tokens each of its sequences may go on with."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from services.engine.core.constraints.grammar import Matcher
from services.engine.core.errors import EngineError
from services.engine.core.logit_edits import TokenMasks


@dataclass(frozen=True, slots=True)
class Follower:
    """A sequence of a step that follows a rule."""

    index: int  # in the step's plan
    first_row: int  # of its logits: the next token, then one row for each token of the draft
    matcher: Matcher
    draft: tuple[int, ...]


@dataclass(slots=True)
class MaskCounts:
    """The masks that have been made."""

    masks: int = 0
    us: int = 0  # spent on them


class StepMasks:
    """Masks for rows of logits, to be filled before these are sampled.

    Rows of sequences without a rule have none. Filling takes some ten microseconds a row, lets
    other threads run meanwhile, and may be done while the logits are computed.
    """

    def __init__(self, followers: list[Follower]) -> None:
        """Precondition: there is one at least."""
        self._followers = followers
        rows = [
            np.arange(each.first_row, each.first_row + 1 + len(each.draft), dtype=np.int64)
            for each in followers
        ]
        size = (sum(map(len, rows)), followers[0].matcher.num_words)
        self.masks = TokenMasks(np.concatenate(rows), _words(size))

    def fill(self, counts: MaskCounts) -> dict[int, EngineError]:
        """Write the masks; returns the errors of sequences that cannot go on, by their index."""
        started_ns = time.monotonic_ns()
        errors: dict[int, EngineError] = {}
        start = 0
        for each in self._followers:
            end = start + 1 + len(each.draft)
            error = each.matcher.fill(self.masks.words[start:end], each.draft)
            if error is not None:
                errors[each.index] = error
            start = end
        counts.masks += start
        counts.us += (time.monotonic_ns() - started_ns) // 1000
        return errors


def _words(size: tuple[int, int]) -> npt.NDArray[np.uint32]:
    """Room for masks, from which a GPU can fetch them itself where there is one."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return np.empty(size, np.uint32)
    return torch.empty(size, dtype=torch.int32, pin_memory=True).numpy().view(np.uint32)
