"""What an encoder computes at once: the tokens of all sequences one after the other, unpadded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class EncoderBatch:
    """Tokens flattened over sequences; tensors live on the model's device.

    The tokens of one sequence are consecutive rows, `lengths[i]` of them after those of sequence
    i - 1. `second_text_starts[i]` is where the second text of a pair begins, `lengths[i]` where
    there is one text.
    """

    token_ids: Tensor  # [num_tokens] int64
    lengths: tuple[int, ...]
    second_text_starts: tuple[int, ...]
    positions: Tensor = field(init=False)  # [num_tokens] int64, from 0 in each sequence
    groups: tuple[EqualLengths, ...] = field(init=False)

    def __post_init__(self) -> None:
        device = self.token_ids.device
        positions = torch.cat([torch.arange(length) for length in self.lengths])
        object.__setattr__(self, "positions", positions.to(device))
        object.__setattr__(self, "groups", _group(self.lengths, device))

    @property
    def token_types(self) -> Tensor:
        """0 for the tokens of a first text and 1 for those of a second, [num_tokens] int64."""
        lengths = torch.tensor(self.lengths)
        starts = torch.tensor(self.second_text_starts).repeat_interleave(lengths)
        return (self.positions >= starts.to(self.positions.device)).long()


@dataclass(frozen=True, slots=True)
class EqualLengths:
    """Sequences of one length, which are attended to together. `rows` is None for all rows."""

    length: int
    rows: Tensor | None  # [num_sequences * length] int64


def make_batch(
    sequences: Sequence[Sequence[int]],
    second_text_starts: Sequence[int | None] | None = None,
    device: torch.device | str = "cpu",
) -> EncoderBatch:
    """A batch of token sequences, none of them empty."""
    starts = second_text_starts or [None] * len(sequences)
    lengths = tuple(len(sequence) for sequence in sequences)
    token_ids = [token_id for sequence in sequences for token_id in sequence]
    return EncoderBatch(
        torch.tensor(token_ids, device=device),
        lengths,
        tuple(
            length if start is None else start
            for start, length in zip(starts, lengths, strict=True)
        ),
    )


def _group(lengths: tuple[int, ...], device: torch.device) -> tuple[EqualLengths, ...]:
    if len(set(lengths)) == 1:
        return (EqualLengths(lengths[0], None),)
    starts: dict[int, list[int]] = {}
    row = 0
    for length in lengths:
        starts.setdefault(length, []).append(row)
        row += length
    return tuple(
        EqualLengths(
            length,
            (torch.tensor(first).view(-1, 1) + torch.arange(length)).flatten().to(device),
        )
        for length, first in starts.items()
    )
