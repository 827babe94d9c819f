"""What rounding each projection alone does to the model, and the bits it gets within a budget."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from services.engine.core.quantization.grid import round_to_nearest
from services.engine.core.quantization.layers import LayeredModel, Unit, projections

WIDTHS = (4, 8, 16)
Progress = Callable[[str, int, int], None]

# Of each unit by its path and its bits: how far the model's answers move, in nats for each token.
Divergences = Mapping[tuple[str, int], float]


@torch.inference_mode()
def measure_divergences(model: LayeredModel, progress: Progress) -> dict[tuple[str, int], float]:
    """Return the mean Kullback-Leibler divergence of the next token's distribution from that of the
    unrounded model, with one projection at a time rounded to 4 and to 8 bits.

    All variants go through a layer while it is loaded: what is held at a time is a layer, and the
    residual streams of all variants.
    """
    reference = model.embed()
    variants: dict[tuple[str, int], Tensor] = {}
    for index in range(model.num_layers):
        progress("measuring layers", index, model.num_layers)
        layer, units = model.layer(index), model.units(index)
        for key, hidden in variants.items():
            variants[key] = model.run(layer, hidden)
        for path, module in projections(layer, units).items():
            own = module.weight.data.clone()
            for bits in WIDTHS[:-1]:
                module.weight.data.copy_(round_to_nearest(own, bits).dequantize())
                variants[path, bits] = model.run(layer, reference)
            module.weight.data.copy_(own)
        reference = model.run(layer, reference)
    progress("measuring layers", model.num_layers, model.num_layers)
    expected = [each.half() for each in model.log_probabilities(reference)]
    return {key: _divergence(model, expected, hidden) for key, hidden in variants.items()}


def _divergence(model: LayeredModel, expected: list[Tensor], hidden: Tensor) -> float:
    total, tokens = 0.0, 0
    for wanted, found in zip(expected, model.log_probabilities(hidden), strict=True):
        wanted = wanted.float()
        total += float((wanted.exp() * (wanted - found)).sum())
        tokens += len(wanted)
    return max(total / tokens, 0.0)


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


def allocate(
    units: list[Unit], divergences: Divergences, budget: Budget, fixed_bytes: int, whole_bytes: int
) -> dict[str, int]:
    """Return the bits of each unit, by its path.

    All start at 4 bits; what takes most divergence away for each byte gets more, until the budget
    is spent or met. Divergences of units are added up, and perplexity taken to grow by the
    exponential of their sum. fixed_bytes: of what is not rounded. whole_bytes: of all in 16 bits.
    """
    by_path = {unit.path: unit for unit in units}
    chosen = {unit.path: WIDTHS[0] for unit in units}
    size = fixed_bytes + sum(unit.kept_bytes(WIDTHS[0]) for unit in units)
    loss = sum(_loss(divergences, unit.path, WIDTHS[0]) for unit in units)
    offers = [_best_offer(unit, WIDTHS[0], divergences) for unit in units]
    heap = [offer for offer in offers if offer is not None]
    heapq.heapify(heap)
    while heap:
        if budget.perplexity is not None and math.exp(loss) <= budget.perplexity:
            break
        _, path, bits = heapq.heappop(heap)
        unit, now = by_path[path], chosen[path]
        grown = size + unit.kept_bytes(bits) - unit.kept_bytes(now)
        if budget.size is not None and grown > budget.size * whole_bytes:
            # Too large for what is left; a smaller step of the same unit may still fit.
            bits = next((each for each in WIDTHS if now < each < bits), 0)
            grown = size + unit.kept_bytes(bits) - unit.kept_bytes(now) if bits else grown
            if not bits or grown > budget.size * whole_bytes:
                continue
        loss += _loss(divergences, path, bits) - _loss(divergences, path, now)
        size, chosen[path] = grown, bits
        offer = _best_offer(unit, bits, divergences)
        if offer is not None:
            heapq.heappush(heap, offer)
    return chosen


def foretold_ratio(chosen: Mapping[str, int], divergences: Divergences) -> float:
    """Perplexity against that of 16 bits, as the divergences have it."""
    return math.exp(sum(_loss(divergences, path, bits) for path, bits in chosen.items()))


def _loss(divergences: Divergences, path: str, bits: int) -> float:
    return 0.0 if bits == WIDTHS[-1] else divergences[path, bits]


def _best_offer(unit: Unit, bits: int, divergences: Divergences) -> tuple[float, str, int] | None:
    """(minus the gain by byte, path, bits) of the step up that gains most."""
    offers = [
        (
            -(_loss(divergences, unit.path, bits) - _loss(divergences, unit.path, more))
            / (unit.kept_bytes(more) - unit.kept_bytes(bits)),
            unit.path,
            more,
        )
        for more in WIDTHS
        if more > bits
    ]
    return min(offers) if offers else None
