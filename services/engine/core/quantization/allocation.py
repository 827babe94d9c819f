"""The bits that each projection gets within a budget."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from dataclasses import dataclass

from services.engine.core.quantization.layers import Unit

WIDTHS = (4, 8, 16)

# Of each unit by its path and its bits: how far the model's answers move, in nats for each token.
Divergences = Mapping[tuple[str, int], float]


@dataclass(frozen=True, slots=True)
class Budget:
    """How much may be spent: `size` of the memory that 16 bits take, or `perplexity` times theirs;
    one of the two."""

    size: float | None = None
    perplexity: float | None = None

    @staticmethod
    def parse(text: str) -> Budget:
        """Read "0.6x" or "1.02ppl"; raises ValueError for anything else."""
        for suffix, kind, least in (("ppl", "perplexity", 1.0), ("x", "size", 0.0)):
            if text.endswith(suffix):
                number = float(text.removesuffix(suffix))
                if not (math.isfinite(number) and number > least):
                    raise ValueError(f"{text!r} is no budget: it must be above {least:g}{suffix}")
                return Budget(**{kind: number})
        raise ValueError(f"{text!r} is neither a size like 0.6x nor a quality like 1.02ppl")


@dataclass(frozen=True, slots=True)
class Step:
    """A unit gets more bits: bytes that are added, and divergence that is taken away, which may be
    below 0."""

    path: str
    bits: int
    more_bytes: int
    gain: float


def steps_up(units: list[Unit], divergences: Divergences) -> list[Step]:
    """Return how all units get from 4 bits to 16, what gains most for each byte first.

    A unit may go from 4 to 8 and on to 16, or at once to 16.
    """
    by_path = {unit.path: unit for unit in units}
    offers = [_best_offer(unit, WIDTHS[0], divergences) for unit in units]
    heap = [(-_per_byte(offer), offer.path, offer) for offer in offers if offer is not None]
    heapq.heapify(heap)
    steps = []
    while heap:
        _, path, step = heapq.heappop(heap)
        steps.append(step)
        offer = _best_offer(by_path[path], step.bits, divergences)
        if offer is not None:
            heapq.heappush(heap, (-_per_byte(offer), path, offer))
    return steps


def _best_offer(unit: Unit, bits: int, divergences: Divergences) -> Step | None:
    """The step up that gains most for each byte."""
    offers = [
        Step(
            unit.path,
            more,
            unit.kept_bytes(more) - unit.kept_bytes(bits),
            _loss(divergences, unit.path, bits) - _loss(divergences, unit.path, more),
        )
        for more in WIDTHS
        if more > bits
    ]
    return max(offers, key=_per_byte) if offers else None


def _per_byte(step: Step) -> float:
    return step.gain / step.more_bytes


def after(units: list[Unit], steps: list[Step]) -> dict[str, int]:
    """The bits of each unit, by its path, after some steps."""
    return {unit.path: WIDTHS[0] for unit in units} | {step.path: step.bits for step in steps}


def within_size(units: list[Unit], divergences: Divergences, spare_bytes: int) -> dict[str, int]:
    """Return the bits of each unit, where so many bytes are left when all have 4 bits.

    What does not fit any more is left out, or gets a smaller step, and what comes after it goes on.
    """
    by_path = {unit.path: unit for unit in units}
    chosen = after(units, [])
    for step in steps_up(units, divergences):
        unit, now = by_path[step.path], chosen[step.path]
        for bits in (step.bits, *(each for each in WIDTHS if now < each < step.bits)):
            more_bytes = unit.kept_bytes(bits) - unit.kept_bytes(now)
            if more_bytes <= spare_bytes:
                chosen[step.path], spare_bytes = bits, spare_bytes - more_bytes
                break
    return chosen


def foretold_loss(chosen: Mapping[str, int], divergences: Divergences) -> float:
    """What the logarithm of perplexity grows by: the divergences of all units, added up."""
    return sum(_loss(divergences, path, bits) for path, bits in chosen.items())


def _loss(divergences: Divergences, path: str, bits: int) -> float:
    return 0.0 if bits == WIDTHS[-1] else divergences[path, bits]
