"""Which part of every weight a rank has (Shoeybi et al., arXiv:1909.08053).

Projections into heads and into the feed-forward layer are divided by their outputs, those back out
of them by their inputs, so that a layer needs two sums over the ranks and nothing else.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from services.engine.core.kernels import AdapterParts, LowRankPart
from services.engine.core.model_config import ModelConfig
from services.engine.core.parallel.layout import Place, share_of_vocabulary

_NUMBER = re.compile(r"\.\d+(?=\.|$)")


@dataclass(frozen=True, slots=True)
class Cut:
    """What a rank has of a tensor: along `dim`, these ranges one after the other, and zeros behind
    them where that is less than `size`."""

    dim: int
    ranges: tuple[range, ...]
    size: int

    @classmethod
    def of(cls, dim: int, *ranges: range) -> Cut:
        """Ranges and nothing else."""
        return cls(dim, ranges, sum(map(len, ranges)))

    def joined(self, parts: list[Tensor]) -> Tensor:
        """What the rank has, of the ranges of a stored tensor."""
        rest = self.size - sum(map(len, self.ranges))
        if rest:
            shape = list(parts[0].shape)
            shape[self.dim] = rest
            parts = [*parts, parts[0].new_zeros(shape)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, self.dim)


class Partition:
    """What a rank has of each tensor of a model, by the model's names.

    Those that it knows nothing of (norms, routers, positions) are whole on every rank.
    """

    def __init__(self, config: ModelConfig, place: Place) -> None:
        tensor, index = place.layout.tensor, place.tensor_rank
        self._adds_biases = index == 0
        first_kv = index * config.kv_heads // tensor
        kv_heads = max(1, config.kv_heads // tensor)
        q = _share(config.heads * config.head_dim, tensor, index)
        kv = range(first_kv * config.head_dim, (first_kv + kv_heads) * config.head_dim)
        inner = _share(config.intermediate_size, tensor, index)
        all_q, all_kv, all_inner = (
            config.heads * config.head_dim,
            config.kv_heads * config.head_dim,
            config.intermediate_size,
        )
        share = share_of_vocabulary(config.vocab_size, tensor)
        first, last = (min(each * share, config.vocab_size) for each in (index, index + 1))
        self._vocabulary, self._vocabulary_share = range(first, last), share
        self._outputs: dict[str, tuple[range, ...]] = {
            "layers.attention.q": (q,),
            "layers.attention.k": (kv,),
            "layers.attention.v": (kv,),
            "layers.attention.qkv": (q, _moved(kv, all_q), _moved(kv, all_q + all_kv)),
            "layers.feed_forward.gate": (inner,),
            "layers.feed_forward.up": (inner,),
            "layers.feed_forward.gate_up": (inner, _moved(inner, all_inner)),
        }
        self._inputs: dict[str, range] = {
            "layers.attention.output": q,
            "layers.feed_forward.down": inner,
        }
        if config.experts is not None:
            expert = _share(config.experts.intermediate_size, tensor, index)
            self._outputs["layers.feed_forward.experts.gate"] = (expert,)
            self._outputs["layers.feed_forward.experts.up"] = (expert,)
            self._inputs["layers.feed_forward.experts.down"] = expert

    def sums_over_ranks(self, path: str) -> bool:
        """Whether what the module at `path` puts out is a part of a sum."""
        kind = _kind(path)
        return kind in self._inputs or kind == "embedding"

    def leaves_bias_to_others(self, path: str) -> bool:
        """Whether another rank adds the bias of the module at `path`: it is to count once."""
        return _kind(path) in self._inputs and not self._adds_biases

    def cut(self, name: str) -> Cut | None:
        """What the rank has of a tensor; None: all of it."""
        path, _, parameter = name.rpartition(".")
        kind = _kind(path)
        if kind in ("embedding", "head"):
            return Cut(-2, (self._vocabulary,), self._vocabulary_share)
        if kind in self._outputs:
            return Cut.of(-1 if parameter == "bias" else -2, *self._outputs[kind])
        if kind in self._inputs and parameter == "weight":
            return Cut.of(-1, self._inputs[kind])
        return None

    def cut_adapter(self, parts: AdapterParts) -> AdapterParts:
        """What the rank has of an adapter. An input's part of a sum stays one."""
        found: dict[str, tuple[LowRankPart, ...]] = {}
        for path, own in parts.items():
            kind = _kind(path)
            if kind in self._inputs:
                inputs = self._inputs[kind]
                found[path] = tuple(
                    LowRankPart(part.down[:, inputs.start : inputs.stop], part.up, part.first)
                    for part in own
                )
                continue
            cut = [piece for part in own for piece in _outputs_of(part, self._outputs[kind])]
            if cut:
                found[path] = tuple(cut)
        return found


def _kind(path: str) -> str:
    """A module's path without the numbers of its layer and its expert."""
    return _NUMBER.sub("", path)


def _share(size: int, tensor: int, index: int) -> range:
    return range(index * size // tensor, (index + 1) * size // tensor)


def _moved(own: range, by: int) -> range:
    return range(own.start + by, own.stop + by)


def _outputs_of(part: LowRankPart, ranges: tuple[range, ...]) -> list[LowRankPart]:
    """The outputs of an adapter's part that fall into ranges which lie one after the other."""
    found, place = [], 0
    for own in ranges:
        start = max(part.first, own.start)
        stop = min(part.first + len(part.up), own.stop)
        if start < stop:
            rows = part.up[start - part.first : stop - part.first]
            found.append(LowRankPart(part.down, rows, place + start - own.start))
        place += len(own)
    return found
