"""How few bits keep a budget of perplexity: by measuring whole models, not by adding up layers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

from services.engine.core.quantization.allocation import (
    WIDTHS,
    Divergences,
    after,
    foretold_loss,
    steps_up,
)
from services.engine.core.quantization.layers import Unit

# Models that are measured at most.
MOST_TRIALS = 8
# Not looked for: what takes this much less of what 16 bits take.
_LEAST_SAVING = 0.005


@dataclass(frozen=True, slots=True)
class Trial:
    """A model that was measured: bytes of its projections, and its perplexity against 16 bits'."""

    bytes: int
    perplexity_ratio: float


def meet_perplexity(
    units: list[Unit],
    divergences: Divergences,
    most_ratio: float,
    measure: Callable[[dict[str, int]], float],
) -> tuple[dict[str, int], list[Trial]]:
    """Return bits with which a model was measured to keep a budget, and all models measured.

    measure: the perplexity of a model with these bits of its units, by their paths, against that of
    16 bits. Where none of those measured keeps the budget, all units have 16: that is what it is
    measured against. Units get more bits in one order, what gains most for each byte first. Where
    to stop is found by what single layers foretell, corrected by what was measured, and then by
    halves.
    """
    steps = steps_up(units, divergences)
    start = sum(unit.kept_bytes(WIDTHS[0]) for unit in units)
    sizes = list(accumulate((step.more_bytes for step in steps), initial=start))
    least = foretold_loss(after(units, []), divergences)
    losses = list(accumulate((-step.gain for step in steps), initial=least))
    too_few, enough = -1, len(steps)
    trials: list[Trial] = []
    wanted = math.log(most_ratio)
    while len(trials) < MOST_TRIALS and enough - too_few > 1:
        if too_few >= 0 and sizes[enough] - sizes[too_few] < _LEAST_SAVING * sizes[-1]:
            break
        if enough == len(steps):
            guess = next((at for at, loss in enumerate(losses) if loss <= wanted), enough)
        else:
            half = (sizes[max(too_few, 0)] + sizes[enough]) / 2
            guess = next(at for at, size in enumerate(sizes) if size >= half)
        count = min(max(guess, too_few + 1), enough - 1)
        ratio = measure(after(units, steps[:count]))
        trials.append(Trial(sizes[count], ratio))
        if ratio <= most_ratio:
            enough = count
            continue
        too_few = count
        # As much less as it was too much, and more the more often that was not enough.
        short = 0.05 * (2 ** len(trials) - 1)
        wanted = losses[count] * math.log(most_ratio) / math.log(ratio) * max(1 - short, 0.1)
    return after(units, steps[:enough]), trials
