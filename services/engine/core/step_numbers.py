"""What a step's tokens and sequences are, in numbers that a device is sent, and their padding."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from services.engine.core.preparation import Preparation


def padded(array: npt.NDArray[Any], size: int, value: int) -> npt.NDArray[Any]:
    """The array, made that long by a value."""
    longer = np.full(size, value, array.dtype)
    longer[: len(array)] = array
    return longer


@dataclass(slots=True)
class StepNumbers:
    """The numbers of a step, on the host.

    Attributes:
        token_ids, positions, logits_rows: as ForwardBatch has them.
        slots: [groups, num_tokens].
        query_starts, contexts: as DeviceLengths has them.
        owners: the row of each sequence in the block tables.
        adapters: the slot of each token's, -1 for none; None: of nobody.
    """

    token_ids: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    logits_rows: npt.NDArray[np.int64]
    slots: npt.NDArray[np.int64]
    query_starts: npt.NDArray[np.int32]
    contexts: npt.NDArray[np.int32]
    owners: npt.NDArray[np.int32]
    adapters: npt.NDArray[np.int32] | None

    @classmethod
    def of(
        cls,
        step: Preparation,
        token_ids: npt.NDArray[np.int64],
        adapters: tuple[int, ...] | None,
    ) -> StepNumbers:
        """Those of a step as it is. adapters: by sequence."""
        of_tokens = None
        if adapters is not None:
            of_tokens = np.repeat(np.array(adapters, np.int32), step.plan.token_counts)
        return cls(
            token_ids=token_ids,
            positions=step.positions,
            logits_rows=np.array(step.logits_rows, np.int64),
            slots=step.slots.reshape(-1, len(token_ids)),
            query_starts=np.array([0, *accumulate(step.plan.token_counts)], np.int32),
            contexts=np.array(step.context_lengths, np.int32),
            owners=step.rows.astype(np.int32),
            adapters=of_tokens,
        )

    def pad_tokens(self, size: int, slots: npt.NDArray[np.int64]) -> None:
        """Make so many tokens of them; those that pad go to these slots."""
        more = size - len(self.token_ids)
        self.token_ids = padded(self.token_ids, size, 0)
        self.positions = padded(self.positions, size, 0)
        pads = np.broadcast_to(np.resize(slots, more), (len(self.slots), more))
        self.slots = np.concatenate([self.slots, pads], axis=1)
        if self.adapters is not None:
            self.adapters = padded(self.adapters, size, -1)

    def pad_sequences(self, size: int, num_tokens: int, padding_row: int) -> None:
        """Make as many sequences and rows of logits as there are tokens, of which `num_tokens` are
        no padding: a sequence for each token that is, the others have none."""
        sequences = len(self.contexts)
        ends = np.minimum(num_tokens + 1 + np.arange(size - sequences), size)
        self.logits_rows = padded(self.logits_rows, size, 0)
        self.query_starts = np.concatenate([self.query_starts, ends]).astype(np.int32)
        self.contexts = padded(self.contexts, size, 0)
        self.contexts[sequences : sequences + size - num_tokens] = 1
        self.owners = padded(self.owners, size, padding_row)

    def arrays(self) -> list[npt.NDArray[Any]]:
        """All of them, in the order in which they are sent: those of tokens first, which lie in the
        same places in all steps of so many."""
        return [
            self.token_ids,
            self.positions,
            self.slots,
            *([] if self.adapters is None else [self.adapters]),
            self.logits_rows,
            self.query_starts,
            self.contexts,
            self.owners,
        ]
