"""Per-sequence changes to logits before sampling: penalties, biases, bars.

Everything here is gathered on the host as (row, token, number) triples and applied in one
vectorised operation per kind, whatever the number of rows; rows without edits cost nothing.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from services.engine.core.logits_processors import LogitsProcessorError, process
from services.engine.core.messages import Sampling
from services.engine.core.sequence import Sequence
from services.engine.core.token_counts import TokenCounts


def has_edits(sampling: Sampling) -> bool:
    """Whether these parameters ever change logits."""
    return bool(
        counts_tokens(sampling)
        or sampling.logit_bias
        or sampling.allowed_token_ids
        or sampling.banned_token_ids
        or sampling.logits_processors
    )


@dataclass(frozen=True, slots=True)
class TokenNumbers:
    """(row, token id, number) triples as arrays, in ascending order of rows."""

    rows: npt.NDArray[np.int64]
    token_ids: npt.NDArray[np.int64]
    numbers: npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class TokenMasks:
    """Which tokens may follow, one mask for each of some rows.

    Token t of a mask is bit t % 32 of its word t // 32; it may be chosen if its bit is 1.
    """

    rows: npt.NDArray[np.int64]  # [masks], no row twice
    words: npt.NDArray[np.uint32]  # [masks, ceil(vocab / 32)], contiguous

    def apply(self, logits: Tensor) -> None:
        """Set the logits ([rows, vocab]) of tokens that may not follow to -Inf, in place."""
        bits = np.unpackbits(self.words.view(np.uint8), axis=-1, bitorder="little")
        barred = torch.from_numpy(bits[:, : logits.shape[-1]] == 0).to(logits.device)
        rows = torch.from_numpy(self.rows).to(logits.device)
        logits[rows] = logits[rows].masked_fill_(barred, -torch.inf)


def counts_tokens(sampling: Sampling) -> bool:
    """Whether these parameters change logits by the tokens that came before."""
    return bool(
        sampling.repetition_penalty != 1.0
        or sampling.presence_penalty
        or sampling.frequency_penalty
    )


@dataclass(frozen=True, slots=True)
class ProcessedLogits:
    """What the logits processors of requests have made of some rows."""

    rows: npt.NDArray[np.int64]  # [processed]
    logits: Tensor  # [processed, vocab]
    errors: dict[int, LogitsProcessorError]  # by row; its logits are as they were


@dataclass(frozen=True, slots=True)
class CountedRow:
    """A row that is edited by the counts of all known tokens of a sequence, as they are when the
    edits are applied, and of the one that it has said since, if any.

    Attributes:
        said: where in the latest tokens that is; -1: there is none.
    """

    row: int
    sequence: Sequence
    counts: TokenCounts
    said: int = -1


class LogitEdits:
    """The edits of one step.

    Order: processors, penalties, biases, allowed tokens, banned tokens.
    """

    def __init__(self, latest: Tensor | None = None) -> None:
        """latest: [rows] int64, tokens that sequences have said since they were last told; a device
        may have yet to choose them."""
        self.latest = latest
        self._counted: list[CountedRow] = []
        self._repetition = _Triples()
        self._subtracted = _Triples()
        self._added = _Triples()
        self._banned = _Triples()
        self._allowed: list[tuple[int, tuple[int, ...]]] = []
        self._processed: list[tuple[int, Sequence, tuple[int, ...]]] = []

    def add(
        self,
        row: int,
        sequence: Sequence,
        counts: TokenCounts | None = None,
        draft: tuple[int, ...] = (),
        *,
        said: int = -1,
    ) -> None:
        """Gather the edits that a token of `sequence` asks for; its logits are `row`.

        It is the token after the known ones and those of `draft`: where the draft is not accepted
        so far, nobody looks at the row. `counts` has taken in all known tokens; without it they are
        counted here. `said` is where in the latest tokens one more is, if that is not -1; what is
        edited by it must be no draft, mask or processor.
        """
        sampling = sequence.sampling
        num_output_tokens = sequence.num_output_tokens + (said >= 0) + len(draft)
        barred = sequence.stops.barred_token_ids(num_output_tokens)
        if barred:
            self._banned.add(row, barred, 0.0)
        if not has_edits(sampling):
            return
        if counts_tokens(sampling):
            if counts is None:
                counts = TokenCounts()
                counts.advance(sequence.token_ids, sequence.num_prompt_tokens)
            if draft:
                seen, in_output = counts.after(draft)
                _penalize(row, sampling, seen, in_output, self._repetition, self._subtracted)
            else:
                self._counted.append(CountedRow(row, sequence, counts, said))
        if sampling.logits_processors:
            self._processed.append((row, sequence, draft))
        if sampling.logit_bias:
            biases = np.fromiter(sampling.logit_bias.values(), np.float32)
            self._added.add(row, sampling.logit_bias.keys(), biases)
        if sampling.allowed_token_ids:
            self._allowed.append((row, sampling.allowed_token_ids))
        if sampling.banned_token_ids:
            self._banned.add(row, sampling.banned_token_ids, 0.0)

    @property
    def has_processors(self) -> bool:
        """Whether a row is edited by logits processors."""
        return bool(self._processed)

    def process(self, logits: Tensor) -> ProcessedLogits | None:
        """Run the logits processors on their rows of `logits` ([rows, vocab] float32), which are
        not changed; None where there are none."""
        if not self._processed:
            return None
        made: list[Tensor] = []
        errors: dict[int, LogitsProcessorError] = {}
        for row, sequence, draft in self._processed:
            prompt = sequence.token_ids[: sequence.num_prompt_tokens]
            output = (*sequence.token_ids[sequence.num_prompt_tokens :], *draft)
            try:
                calls = sequence.sampling.logits_processors
                made.append(process(calls, prompt, output, logits[row]))
            except LogitsProcessorError as error:
                errors[row] = error
                made.append(logits[row])
        return ProcessedLogits(
            np.array([row for row, _, _ in self._processed]), torch.stack(made), errors
        )

    def apply(self, logits: Tensor) -> None:
        """Edit `logits` ([rows, vocab] float32), which have been processed, in place."""
        repetition, subtracted = self._penalties()
        if repetition:
            rows, ids, penalty = repetition.tensors(logits.device)
            seen = logits[rows, ids]
            # CTRL (1909.05858), with the sign taken into account so that it always lowers.
            logits[rows, ids] = torch.where(seen > 0, seen / penalty, seen * penalty)
        if subtracted:
            rows, ids, penalty = subtracted.tensors(logits.device)
            logits[rows, ids] -= penalty
        if self._added:
            rows, ids, bias = self._added.tensors(logits.device)
            logits[rows, ids] += bias
        for row, allowed in self._allowed:
            ids = torch.tensor(allowed, device=logits.device)
            kept = logits[row, ids]
            logits[row] = -torch.inf
            logits[row, ids] = kept
        if self._banned:
            rows, ids, _ = self._banned.tensors(logits.device)
            logits[rows, ids] = -torch.inf

    def counted(self, max_distinct: int) -> list[CountedRow]:
        """Rows that are edited by counts of at most so many distinct tokens."""
        return [each for each in self._counted if each.counts.num_distinct <= max_distinct]

    def by_kind(self, *, without_counted: int = -1) -> dict[str, TokenNumbers]:
        """The edits as arrays, for a kernel that applies them itself, in the order of `apply`.

        Kinds without edits are left out. Allowed and banned tokens have numbers without meaning.
        `counted(without_counted)` are left out too.
        """
        repetition, subtracted = self._penalties(without_counted)
        allowed = _Triples()
        for row, token_ids in self._allowed:
            allowed.add(row, token_ids, 0.0)
        kinds = {
            "repetition": repetition,
            "subtracted": subtracted,
            "added": self._added,
            "allowed": allowed,
            "banned": self._banned,
        }
        return {kind: triples.arrays() for kind, triples in kinds.items() if triples}

    def _penalties(self, without_counted: int = -1) -> tuple[_Triples, _Triples]:
        """What divides or multiplies logits, and what is subtracted from them."""
        if not self._counted:
            return self._repetition, self._subtracted
        repetition, subtracted = self._repetition.copy(), self._subtracted.copy()
        for each in self._counted:
            if each.counts.num_distinct > without_counted:
                seen, in_output = each.counts.after(self._said(each))
                sampling = each.sequence.sampling
                _penalize(each.row, sampling, seen, in_output, repetition, subtracted)
        return repetition, subtracted

    def _said(self, row: CountedRow) -> tuple[int, ...]:
        if row.said < 0:
            return ()
        assert self.latest is not None
        return (int(self.latest[row.said]),)


def _penalize(
    row: int,
    sampling: Sampling,
    seen: npt.NDArray[np.int64],
    in_output: npt.NDArray[np.int64],
    repetition: _Triples,
    subtracted: _Triples,
) -> None:
    if sampling.repetition_penalty != 1.0:
        repetition.add(row, seen, sampling.repetition_penalty)
    said = in_output.nonzero()[0]
    if said.size and (sampling.presence_penalty or sampling.frequency_penalty):
        penalties = sampling.presence_penalty + sampling.frequency_penalty * in_output[said]
        subtracted.add(row, seen[said], penalties)


class _Triples:
    """(row, token id, number) triples; a (row, token id) pair comes once per `add`."""

    def __init__(self) -> None:
        self._rows: list[npt.NDArray[np.int64]] = []
        self._ids: list[npt.NDArray[np.int64]] = []
        self._numbers: list[npt.NDArray[np.float32]] = []

    def __bool__(self) -> bool:
        return bool(self._rows)

    def copy(self) -> _Triples:
        """The same triples, to which more can be added."""
        other = _Triples()
        other._rows = self._rows.copy()
        other._ids = self._ids.copy()
        other._numbers = self._numbers.copy()
        return other

    def add(
        self,
        row: int,
        token_ids: Collection[int] | npt.NDArray[np.int64],
        numbers: float | npt.NDArray[np.floating],
    ) -> None:
        ids = (
            token_ids
            if isinstance(token_ids, np.ndarray)
            else np.fromiter(token_ids, np.int64, len(token_ids))
        )
        self._ids.append(ids)
        self._rows.append(np.full(ids.size, row, np.int64))
        self._numbers.append(np.broadcast_to(np.asarray(numbers, np.float32), ids.shape))

    def arrays(self) -> TokenNumbers:
        rows = np.concatenate(self._rows)
        ids = np.concatenate(self._ids)
        numbers = np.concatenate(self._numbers)
        if (rows[1:] < rows[:-1]).any():
            order = rows.argsort(kind="stable")
            rows, ids, numbers = rows[order], ids[order], numbers[order]
        return TokenNumbers(rows, ids, numbers)

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        arrays = self.arrays()
        return (
            torch.from_numpy(arrays.rows).to(device),
            torch.from_numpy(arrays.token_ids).to(device),
            torch.from_numpy(arrays.numbers).to(device),
        )
