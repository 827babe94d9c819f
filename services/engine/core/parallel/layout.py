"""Which rank computes what: heads and columns within a layer, layers one after another."""

from __future__ import annotations

from dataclasses import dataclass, replace

from services.engine.core.errors import StartupError
from services.engine.core.model_config import ModelConfig

# Rows of a share of the vocabulary come in eights: so matrix products read them 16 bytes at a time.
_VOCABULARY_MULTIPLE = 8


@dataclass(frozen=True, slots=True)
class Layout:
    """How many ranks share each layer (`tensor`), and how many stages of layers there are.

    Ranks that share layers follow one another: they exchange most, and are to be on one machine.
    """

    tensor: int
    stages: int

    @property
    def num_ranks(self) -> int:
        """All of them."""
        return self.tensor * self.stages

    def place(self, rank: int) -> Place:
        """Where a rank stands."""
        return Place(self, rank)

    def ranks_of(self, stage: int) -> list[int]:
        """Those that share the layers of a stage."""
        return list(range(stage * self.tensor, (stage + 1) * self.tensor))


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank stands in its layout."""

    layout: Layout
    rank: int

    @property
    def stage(self) -> int:
        """The stage whose layers it computes."""
        return self.rank // self.layout.tensor

    @property
    def tensor_rank(self) -> int:
        """Which of the ranks of its stage it is."""
        return self.rank % self.layout.tensor

    @property
    def is_first(self) -> bool:
        """Whether it embeds tokens."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """Whether it computes logits."""
        return self.stage == self.layout.stages - 1

    @property
    def before(self) -> int:
        """The rank that its hidden states come from."""
        return self.rank - self.layout.tensor

    @property
    def behind(self) -> int:
        """The rank that its hidden states go to."""
        return self.rank + self.layout.tensor


def check_layout(config: ModelConfig, layout: Layout) -> None:
    """Raise StartupError unless a model can be divided so."""
    tensor = layout.tensor
    widths = {"heads": config.heads}
    if config.experts is None or config.experts.dense_layers:
        widths["intermediate_size"] = config.intermediate_size
    if config.experts is not None:
        widths["intermediate_size of an expert"] = config.experts.intermediate_size
    for name, width in widths.items():
        if width % tensor:
            raise StartupError(
                f"tensor_parallel is {tensor}, which does not divide the model's {name} ({width}); "
                f"numbers that do: {_listed(_divisors(config, widths))}"
            )
    if config.kv_heads % tensor and tensor % config.kv_heads:
        raise StartupError(
            f"tensor_parallel is {tensor}, which neither divides the model's KV heads "
            f"({config.kv_heads}) nor is a multiple of them; numbers that fit: "
            f"{_listed(_divisors(config, widths))}"
        )
    if layout.stages > config.num_layers:
        raise StartupError(
            f"pipeline_parallel is {layout.stages}, but the model has {config.num_layers} layers"
        )


def _divisors(config: ModelConfig, widths: dict[str, int]) -> list[int]:
    return [
        tensor
        for tensor in range(1, config.heads + 1)
        if not any(width % tensor for width in widths.values())
        and not (config.kv_heads % tensor and tensor % config.kv_heads)
    ]


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def share_of_vocabulary(vocab_size: int, tensor: int) -> int:
    """Rows of the embedding that each rank has; those beyond the vocabulary are zeros."""
    share = -(-vocab_size // tensor)
    return -(-share // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE


def shard_config(config: ModelConfig, tensor: int) -> ModelConfig:
    """The shape of what one rank has of a model: a decoder with fewer heads and narrower layers.

    KV heads of which there are fewer than ranks are on several of these. The hidden size stays.
    """
    experts = config.experts
    if experts is not None:
        experts = replace(experts, intermediate_size=experts.intermediate_size // tensor)
    return replace(
        config,
        heads=config.heads // tensor,
        kv_heads=max(1, config.kv_heads // tensor),
        intermediate_size=max(1, config.intermediate_size // tensor),
        vocab_size=share_of_vocabulary(config.vocab_size, tensor),
        experts=experts,
    )
