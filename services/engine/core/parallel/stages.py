"""Which layers are on which stage: as many tokens as possible are to fit on the fullest card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from services.engine.core.errors import StartupError
from services.engine.core.layer_groups import LayerGroups


@dataclass(frozen=True, slots=True)
class Costs:
    """Bytes that a model takes on one rank of a stage, its share of each tensor.

    Attributes:
        layers: weights of each layer.
        first, last: weights beside the layers on the first and on the last stage.
        layer_block: keys and values of one layer in one block.
    """

    layers: tuple[int, ...]
    first: int
    last: int
    layer_block: int

    def weights(self, stage: range, num_layers: int) -> int:
        """Bytes of the weights on a stage with these layers."""
        own = sum(self.layers[stage.start : stage.stop])
        return own + self.first * (stage.start == 0) + self.last * (stage.stop == num_layers)


def divide_layers(
    costs: Costs,
    groups: LayerGroups,
    free_bytes: Sequence[int],
    *,
    fraction: float,
    enough_rows: int,
) -> list[range]:
    """The layers of each stage, in order.

    free_bytes: of each stage, the least that one of its ranks has. fraction: of what weights leave,
    for keys and values. Rows of blocks, for all layers, are as many as the fullest stage has room
    for; more than `enough_rows` are of no use, and of divisions with as many, the one with the
    least weights on a stage is taken: it takes longest.

    Raises:
        StartupError: there is a stage for which the weights are too much however they are divided.
    """
    num_layers, num_stages = len(costs.layers), len(free_bytes)
    # By stage and by the layer that the next one begins with: (rows, -bytes of the fullest stage),
    # and where this one begins.
    best: list[dict[int, tuple[tuple[int, int], int]]] = [{0: ((enough_rows, 0), 0)}]
    for stage, free in enumerate(free_bytes):
        behind = num_stages - 1 - stage
        ends = range(stage + 1, num_layers - behind + 1) if behind else (num_layers,)
        found: dict[int, tuple[tuple[int, int], int]] = {}
        for end in ends:
            for start, (before, _) in best[-1].items():
                if start >= end:
                    continue
                own = range(start, end)
                weights = costs.weights(own, num_layers)
                row = len(groups.windows) * stage_groups(groups, own).layers_per_block
                spare = free - weights
                rows = int(spare * fraction) // (row * costs.layer_block) if spare > 0 else -1
                value = min(before[0], rows), min(before[1], -weights)
                if end not in found or value > found[end][0]:
                    found[end] = value, start
        best.append(found)
    (rows, _), start = best[-1][num_layers]
    if rows < 0:
        total = sum(costs.layers) + costs.first + costs.last
        raise StartupError(
            f"the weights do not fit: a rank's share of all layers is {total} bytes, and the "
            f"stages have {', '.join(map(str, free_bytes))} bytes free; use more ranks"
        )
    bounds = [num_layers, start]
    for stage in range(num_stages - 1, 0, -1):
        bounds.append(best[stage][bounds[-1]][1])
    return [range(start, end) for start, end in pairwise(reversed(bounds))]


def stage_groups(groups: LayerGroups, stage: range) -> LayerGroups:
    """The groups of all layers, with places for those of a stage alone.

    Blocks and their tables are the same on every stage; what a block has room for is not.
    """
    places = [0] * len(groups.group_of_layer)
    counts = [0] * len(groups.windows)
    for layer in stage:
        group = groups.group_of_layer[layer]
        places[layer] = counts[group]
        counts[group] += 1
    return replace(groups, place_of_layer=tuple(places), layers_per_block=max(counts))
