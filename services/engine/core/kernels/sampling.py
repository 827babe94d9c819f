"""Choosing tokens where the logits are: what a device is told of a step, and the ops that do it.

Kernels never make the host wait, and are the same for the same `SamplingForm`, whatever the numbers
are, so that a CUDA graph can hold them. Of the references those of `edit_logits` and `penalize` do
wait.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from services.engine.core.kernels.registry import declare

BLOCK = 128  # logits whose largest and whose mass are kept together
CANDIDATES = 4096  # logits of a row that are gathered to look for the smallest one kept
# Rows for which there is room at a time: more, of long drafts and of scored prompts, come one lot
# after the other, and have enough to do for a card in each.
ROWS_AT_ONCE = 512
MASK_BITS = 32


class Column(IntEnum):
    """The rows of `parameters`, [columns, rows] float64, in which each of these is exact."""

    TEMPERATURE = 0  # 0: the likeliest token
    TOP_K = 1  # 0: off
    TOP_P = 2  # 1: off
    LOG_MIN_P = 3  # -inf: off; rounded to float32
    UNIFORM = 4
    GIVEN = 5  # the token, where it is known; else -1
    LOGPROBS = 6  # likeliest tokens to report, -1 for no log-probabilities


class ChoiceStatus(IntEnum):
    """What became of a row."""

    CHOSEN = 0
    NOT_FINITE = 1


@dataclass(frozen=True, slots=True)
class SamplingForm:
    """What of a step decides which kernels run."""

    num_rows: int
    draws: bool = False  # a row has a temperature > 0
    filters: bool = False  # a row that is drawn has top-k, top-p or min-p
    gives: bool = False  # a row's token is known
    most_logprobs: int = -1  # likeliest tokens that a row reports; -1: no row reports any

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token of every row is all that is wanted: no parameters are read"""
        return not self.draws and not self.gives and self.most_logprobs < 0


@dataclass(frozen=True, slots=True)
class SamplingWorkspace:
    """What kernels keep between their passes over a row; zero where it is counted in.

    Attributes:
        maxima: [max_rows, blocks] float32, the largest logit of each block.
        masses: [max_rows, blocks] int64, the sum of exp(logit - the block's largest), in 2**-40.
        best: [max_rows] int64, the largest logit and its token, packed.
        arrivals, found: [max_rows] int32, programs that are done, and candidates.
        bounds: [max_rows, 3] float64: the largest logit, the mass, and the least of a candidate.
        candidates, candidate_tokens: [max_rows, CANDIDATES] float32 and int32.
    """

    maxima: Tensor
    masses: Tensor
    best: Tensor
    arrivals: Tensor
    found: Tensor
    bounds: Tensor
    candidates: Tensor
    candidate_tokens: Tensor

    @staticmethod
    def make(device: torch.device, max_rows: int, vocab_size: int) -> SamplingWorkspace:
        """Room for batches of up to `max_rows` rows."""
        max_rows = min(max_rows, ROWS_AT_ONCE)
        blocks = (max_rows, -(-vocab_size // BLOCK))
        candidates = (max_rows, CANDIDATES)

        def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return SamplingWorkspace(
            maxima=zeros(blocks, torch.float32),
            masses=zeros(blocks, torch.int64),
            best=zeros((max_rows,), torch.int64),
            arrivals=zeros((max_rows,), torch.int32),
            found=zeros((max_rows,), torch.int32),
            bounds=zeros((max_rows, 3), torch.float64),
            candidates=zeros(candidates, torch.float32),
            candidate_tokens=zeros(candidates, torch.int32),
        )


@declare
def choose_tokens(
    logits: Tensor,
    parameters: Tensor,
    chosen: Tensor,
    form: SamplingForm,
    workspace: SamplingWorkspace,
) -> None:
    """Choose one token per row of `logits` ([rows, vocab] float32), as `sampler.sample` does.

    Args:
        parameters: [columns, rows] float64, by `Column`; not read where the form is greedy.
        chosen: [2, rows] int64, to which tokens and statuses are written.
    """
    tokens, statuses = chosen
    peaks, likeliest = logits.max(dim=-1)
    tokens.copy_(likeliest)
    statuses.copy_(torch.where(peaks.isfinite(), ChoiceStatus.CHOSEN, ChoiceStatus.NOT_FINITE))
    if form.draws:
        temperature = parameters[Column.TEMPERATURE]
        tokens.copy_(torch.where(temperature > 0, _drawn(logits, parameters), tokens))
    if form.gives:
        given = parameters[Column.GIVEN].long()
        tokens.copy_(torch.where(given >= 0, given, tokens))


def _drawn(logits: Tensor, parameters: Tensor) -> Tensor:
    """A token of every row; one that is not drawn gets any."""
    columns = parameters.unsqueeze(-1)
    temperature = columns[Column.TEMPERATURE].float()
    scaled = logits / torch.where(temperature > 0, temperature, 1.0)
    peak = scaled.amax(dim=-1, keepdim=True)
    ordered = scaled.sort(dim=-1, descending=True).values
    shares = (ordered - peak).exp().double()
    top_k, top_p = columns[Column.TOP_K].long(), columns[Column.TOP_P]
    kth = ordered.gather(-1, (top_k - 1).clamp(0, logits.shape[-1] - 1))
    floor = torch.where(top_k > 0, kth, -torch.inf)
    shares = shares.masked_fill(ordered < floor, 0.0)
    before = shares.cumsum(dim=-1) - shares
    # A token is kept while the tokens before it have not reached top_p; the first always is.
    kept = (before < top_p * shares.sum(dim=-1, keepdim=True)).sum(dim=-1, keepdim=True)
    nucleus = ordered.gather(-1, kept.clamp(min=1) - 1)
    floor = torch.maximum(floor, torch.where(top_p < 1, nucleus, -torch.inf))
    floor = torch.maximum(floor, peak + columns[Column.LOG_MIN_P].float())
    weights = (scaled - peak).exp().masked_fill(scaled < floor, 0.0)
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    targets = columns[Column.UNIFORM] * cumulative[:, -1:]
    return (
        torch.searchsorted(cumulative, targets, right=True)
        .squeeze(-1)
        .clamp(max=logits.shape[-1] - 1)
    )


@declare
def report_logprobs(
    logits: Tensor,
    parameters: Tensor,
    tokens: Tensor,
    reports: Tensor,
    form: SamplingForm,
    workspace: SamplingWorkspace,
) -> None:
    """Log-probabilities of the tokens chosen and of the likeliest, by rows that report any.

    Args:
        logits: [rows, vocab] float32, those of the model.
        tokens: [rows] int64, the tokens chosen.
        reports: [1 + 2 * form.most_logprobs, rows] float64, to which are written the
            log-probability of the token chosen, then the likeliest tokens, the likeliest first and
            of those that tie the first of the vocabulary, then their log-probabilities. What a row
            does not report is left as it is, or not.
    """
    logprobs = logits.log_softmax(dim=-1)
    own = tokens.clamp(max=logits.shape[-1] - 1).unsqueeze(-1)
    reports[0] = logprobs.gather(-1, own).squeeze(-1).double()
    most = min(form.most_logprobs, logits.shape[-1])
    top = logprobs.sort(dim=-1, descending=True, stable=True)
    reports[1 : 1 + most] = top.indices[:, :most].T.double()
    start = 1 + form.most_logprobs
    reports[start : start + most] = top.values[:, :most].T.double()


@declare
def cap_logits(projected: Tensor, cap: float, logits: Tensor) -> None:
    """Bend `projected` ([rows, vocab] of any floats) into (-cap, cap) (Gemma 2, arXiv:2408.00118)
    and write them to `logits` ([rows, vocab] float32), which may be the same."""
    logits.copy_(projected).div_(cap).tanh_().mul_(cap)


@declare
def mask_logits(logits: Tensor, rows: Tensor, words: Tensor) -> None:
    """Set the logits ([rows, vocab] float32) of tokens that may not follow to -Inf, in place.

    Args:
        rows: [masks] int32, no row twice.
        words: [masks, ceil(vocab / 32)] int32, as `TokenMasks` has them.
    """
    bits = torch.arange(MASK_BITS, dtype=torch.int32, device=words.device)
    barred = ((words.unsqueeze(-1) >> bits) & 1) == 0
    barred = barred.flatten(1)[:, : logits.shape[-1]]
    logits[rows] = logits[rows].masked_fill(barred, -torch.inf)


@dataclass(frozen=True, slots=True)
class DeviceEdits:
    """Edits of logits, by kind and then by row.

    Attributes:
        rows: [edited] int32, the rows that have any; no row twice.
        offsets: [5, edited + 1] int32: entries offsets[kind, i] to offsets[kind, i + 1] are those
            of kind `EditKind` and of row rows[i].
        token_ids: [entries] int32, of the vocabulary.
        numbers: [entries] float32.
    """

    rows: Tensor
    offsets: Tensor
    token_ids: Tensor
    numbers: Tensor


class EditKind(IntEnum):
    """The kinds of edits, in the order in which they are applied."""

    REPETITION = 0  # divided by the number where it is positive, multiplied where not
    SUBTRACTED = 1
    ADDED = 2
    ALLOWED = 3  # where a row has any, all others are at -Inf; the number is overwritten
    BANNED = 4  # at -Inf; the number means nothing


@declare
def edit_logits(logits: Tensor, edits: DeviceEdits) -> None:
    """Apply edits to `logits` ([rows, vocab] float32) in place, as `LogitEdits.apply` does.

    `edits.numbers` may be written.
    """
    lengths = edits.offsets.diff(dim=-1)
    for kind in EditKind:
        part = slice(int(edits.offsets[kind, 0]), int(edits.offsets[kind, -1]))
        rows = edits.rows.long().repeat_interleave(lengths[kind])
        ids, numbers = edits.token_ids[part].long(), edits.numbers[part]
        old = logits[rows, ids]
        match kind:
            case EditKind.REPETITION:
                logits[rows, ids] = torch.where(old > 0, old / numbers, old * numbers)
            case EditKind.SUBTRACTED:
                logits[rows, ids] = old - numbers
            case EditKind.ADDED:
                logits[rows, ids] = old + numbers
            case EditKind.ALLOWED:
                logits[rows] = -torch.inf
                logits[rows, ids] = old
            case EditKind.BANNED:
                logits[rows, ids] = -torch.inf


@dataclass(frozen=True, slots=True)
class CountTable:
    """The distinct tokens of sequences, in any order, and how often each is in the output.

    Attributes:
        ids, in_output: [slots, places] int32; a sequence has a slot, a token of it a place.
    """

    ids: Tensor
    in_output: Tensor


@dataclass(frozen=True, slots=True)
class Penalties:
    """Rows that are penalised for the tokens of their sequences.

    Attributes:
        numbers: [3, penalised] float64: repetition penalty, presence penalty, frequency penalty.
        rows: [4, penalised] int32: the row of logits, the slot of its sequence, which no other has,
            how many distinct tokens that has, and where in `latest` the token is that it has said
            since; -1: there is none.
        ends: [penalised + 1] int32: changes ends[i] to ends[i + 1] are those of slot i.
        changed: [3, changes] int32: the place, its token, and how often that is in the output.
        latest: [rows] int64, tokens that the host may not know yet. They are counted here, but not
            in the table: that has what the host knows, whatever becomes of a step.
    """

    numbers: Tensor
    rows: Tensor
    ends: Tensor
    changed: Tensor
    latest: Tensor


@declare
def penalize(logits: Tensor, penalties: Penalties, table: CountTable) -> None:
    """Bring `table` up to date, then lower `logits` ([rows, vocab] float32) by it, in place, as
    `LogitEdits.apply` does."""
    ends = penalties.ends.tolist()
    for index, (row, slot, size, said) in enumerate(penalties.rows.T.tolist()):
        place, token_ids, in_output = penalties.changed[:, ends[index] : ends[index + 1]]
        table.ids[slot, place.long()] = token_ids
        table.in_output[slot, place.long()] = in_output
        ids, counts = table.ids[slot, :size].long(), table.in_output[slot, :size]
        if said >= 0:
            latest = penalties.latest[said : said + 1]
            counts = counts + (ids == latest)
            if not (ids == latest).any():
                ids, counts = torch.cat((ids, latest)), torch.cat((counts, counts.new_ones(1)))
        repetition, presence, frequency = penalties.numbers[:, index]
        old = logits[row, ids]
        divisor = repetition.float()
        new = torch.where(old > 0, old / divisor, old * divisor)
        subtracted = (presence + frequency * counts).float()
        logits[row, ids] = new - torch.where(counts > 0, subtracted, 0.0)
