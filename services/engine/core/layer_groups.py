"""Which layers keep their keys and values in the same blocks of the KV cache."""

from __future__ import annotations

from dataclasses import dataclass

from services.engine.core.model_config import ModelConfig, SparseAttention, Window

# Each group has a block table of its own in every step: memory that more groups save is soon not
# worth what they cost.
_MOST_GROUPS = 8
_LEAST_SAVED = 0.1


@dataclass(frozen=True, slots=True)
class LayerGroups:
    """Layers in groups that have the same window, all of one size: so are their blocks, and what
    one group gives back another may take.

    Attributes:
        windows: of each group, what tokens see in its layers; None: all. Groups that see all come
            first.
        group_of_layer: index of its group, by layer.
        place_of_layer: its place in a block of its group, by layer.
        layers_per_block: places that a block has. The last group of a window may leave some empty.
    """

    windows: tuple[Window | None, ...]
    group_of_layer: tuple[int, ...]
    place_of_layer: tuple[int, ...]
    layers_per_block: int

    @classmethod
    def single(cls, num_layers: int, window: Window | None = None) -> LayerGroups:
        """All layers in one group."""
        return cls((window,), (0,) * num_layers, tuple(range(num_layers)), num_layers)

    @classmethod
    def of(cls, config: ModelConfig) -> LayerGroups:
        """The groups of a model: those that take least memory for its longest context."""
        context = config.max_context_tokens
        layers: dict[Window | None, list[int]] = {}
        for layer in range(config.num_layers):
            window = config.seen(layer)
            if _most_seen(window, context) == context:
                window = None  # it holds all that a sequence can have
            layers.setdefault(window, []).append(layer)
        if len(layers) == 1:
            return cls.single(config.num_layers, next(iter(layers)))
        by_window = sorted(layers.items(), key=lambda item: -_most_seen(item[0], context))
        most_groups = max(_MOST_GROUPS, len(layers))
        sizes = [
            size
            for size in range(1, config.num_layers + 1)
            if sum(-(-len(own) // size) for own in layers.values()) <= most_groups
        ]

        def tokens(size: int) -> int:
            return sum(
                -(-len(own) // size) * size * _most_seen(window, context)
                for window, own in by_window
            )

        size = min(sizes, key=lambda each: (tokens(each), -each))
        if tokens(size) > (1 - _LEAST_SAVED) * config.num_layers * context:
            return cls.single(config.num_layers)
        windows: list[Window | None] = []
        group_of_layer, place_of_layer = [0] * config.num_layers, [0] * config.num_layers
        for window, own in by_window:
            for index, layer in enumerate(own):
                group_of_layer[layer] = len(windows) + index // size
                place_of_layer[layer] = index % size
            windows += [window] * -(-len(own) // size)
        return cls(tuple(windows), tuple(group_of_layer), tuple(place_of_layer), size)


def _most_seen(window: Window | None, context: int) -> int:
    """How many tokens of a sequence a window shows at most."""
    if isinstance(window, SparseAttention):
        return min(window.window + window.global_tokens, context)
    return context if window is None else min(window, context)
