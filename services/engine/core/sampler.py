"""Chooses the next token of each row of logits: greedy, temperature, top-k, top-p, min-p.

One uniform number per row picks the token by inverting the cumulative distribution, so a sample
depends on its logits, its parameters and its (seed, position) alone, never on the batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from services.engine.core.errors import EngineError
from services.engine.core.kernels.registry import declare
from services.engine.core.logit_edits import LogitEdits, TokenMasks
from services.engine.core.messages import TokenLogprobs

# Candidates looked at first for top-p, and how many times more are looked at when their
# probabilities do not reach it: the nucleus of a trained model is nearly always small, and sorting
# the whole vocabulary is by far the dearest step of sampling.
_NUCLEUS_CANDIDATES = 256
_WIDENING = 8


class LogitsError(EngineError):
    """The logits of a row hold NaN or +Inf, or leave no token to choose."""


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """How each row of logits is sampled; all arrays are [rows].

    Values that are off: temperature 0 (greedy), top_k 0, top_p 1, min_p 0. `logprobs[i]` is the
    number of likeliest tokens to report for row i, or -1 for no log-probabilities at all. Tokens
    that a row's mask bars do not exist for it: log-probabilities are those among the others.
    `given[i]` is the token of a row whose token is known, and only its log-probability is not; -1
    where it is chosen.
    """

    temperature: npt.NDArray[np.float32]
    top_k: npt.NDArray[np.int64]
    top_p: npt.NDArray[np.float32]
    min_p: npt.NDArray[np.float32]
    uniforms: npt.NDArray[np.float64]
    logprobs: npt.NDArray[np.int64]
    edits: LogitEdits | None = None
    masks: TokenMasks | None = None
    given: npt.NDArray[np.int64] | None = None
    is_greedy: bool = False  # all rows are, and nothing else is on

    @staticmethod
    @lru_cache
    def greedy(num_rows: int) -> SamplingBatch:
        """The likeliest token of every row, and nothing else."""
        return SamplingBatch(
            temperature=np.zeros(num_rows, np.float32),
            top_k=np.zeros(num_rows, np.int64),
            top_p=np.ones(num_rows, np.float32),
            min_p=np.zeros(num_rows, np.float32),
            uniforms=np.zeros(num_rows),
            logprobs=np.full(num_rows, -1, np.int64),
            is_greedy=True,
        )

    @staticmethod
    def scoring(given: npt.NDArray[np.int64], logprobs: npt.NDArray[np.int64]) -> SamplingBatch:
        """The log-probabilities of tokens that are known."""
        greedy = SamplingBatch.greedy(len(given))
        return replace(greedy, given=given, logprobs=logprobs, is_greedy=False)

    def with_rows(self, rows: npt.NDArray[np.int64], other: SamplingBatch) -> SamplingBatch:
        """The same, but row `rows[i]` is sampled like row i of `other`, whose edits and masks name
        the rows of the whole."""
        columns: dict[str, Any] = {}
        for name in ("temperature", "top_k", "top_p", "min_p", "uniforms", "logprobs"):
            columns[name] = getattr(self, name).copy()
            columns[name][rows] = getattr(other, name)
        return replace(self, **columns, edits=other.edits, masks=other.masks)


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """One token per row, or the error of that row."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]
    errors: list[EngineError | None]


@declare
def sample(logits: Tensor, batch: SamplingBatch) -> SampledTokens:
    """Choose one token per row of `logits` ([rows, vocab] float32, edited in place).

    Order: masks, processors, penalties and biases, temperature, top-k, top-p over what top-k left,
    min-p. Tokens that tie with the last one kept are kept too, so that the choice does not hang on
    sort order.
    """
    if batch.masks is not None:
        batch.masks.apply(logits)
    reported = np.flatnonzero(batch.logprobs >= 0)
    raw = logits[_index(reported, logits.device)] if reported.size else None
    processed = None
    if batch.edits is not None:
        processed = batch.edits.process(logits)
        if processed is not None:
            logits[_index(processed.rows, logits.device)] = processed.logits
        batch.edits.apply(logits)
    drawn = np.flatnonzero(batch.temperature > 0)
    if raw is None and not drawn.size and batch.given is None and logits.device.type == "cpu":
        return _likeliest(logits)
    peaks, token_ids = logits.max(dim=-1)
    if drawn.size:
        rows = _index(drawn, logits.device)
        everything = drawn.size == len(batch.temperature)
        token_ids[rows] = _draw(logits if everything else logits[rows], batch, drawn)
    if batch.given is not None:
        given = torch.from_numpy(batch.given).to(logits.device)
        token_ids = torch.where(given >= 0, given, token_ids)
    # One transfer for all rows. NaN and +Inf reach the maximum, -Inf alone means nothing is left.
    host = torch.stack((token_ids, peaks.isfinite().long())).cpu()
    ids: list[int] = host[0].tolist()
    errors: list[EngineError | None] = [
        None if fine else logits_error() for fine in host[1].tolist()
    ]
    if processed is not None:
        for row, error in processed.errors.items():
            errors[row] = error
    logprobs: list[TokenLogprobs | None] = [None] * len(ids)
    if raw is not None:
        chosen = token_ids[_index(reported, logits.device)]
        for row, entry in zip(
            reported.tolist(), _logprobs(raw, chosen, batch.logprobs[reported]), strict=True
        ):
            logprobs[row] = entry
    return SampledTokens(ids, logprobs, errors)


def _likeliest(logits: Tensor) -> SampledTokens:
    """The likeliest token of each row, by numpy: waking torch's threads takes longer than this."""
    rows = logits.numpy()
    ids = rows.argmax(axis=-1)
    fine = np.isfinite(rows[np.arange(len(ids)), ids])
    errors: list[EngineError | None] = [None if each else logits_error() for each in fine.tolist()]
    return SampledTokens(ids.tolist(), [None] * len(ids), errors)


def _draw(logits: Tensor, batch: SamplingBatch, rows: npt.NDArray[np.int64]) -> Tensor:
    """One token per row of `logits` ([rows, vocab]), each drawn at a temperature > 0."""
    host = np.stack(
        (
            batch.temperature[rows],
            batch.top_k[rows],
            batch.top_p[rows],
            batch.min_p[rows],
            batch.uniforms[rows],
        )
    )
    temperature, top_k, top_p, min_p, uniforms = (
        torch.from_numpy(host).to(logits.device).unsqueeze(-1)
    )
    scaled = logits / temperature.float()
    peak = scaled.amax(dim=-1, keepdim=True)
    weights = (scaled - peak).exp_()
    filtered = np.flatnonzero((host[1] > 0) | (host[2] < 1))
    floor = peak + min_p.log().float()
    if filtered.size:
        index = _index(filtered, logits.device)
        some = slice(None) if filtered.size == len(rows) else index
        top_floor = _top_floor(
            scaled[some],
            weights[some],
            top_k[some].long(),
            top_p[some],
            widest=int(host[1].max()),
            nucleus=bool((host[2] < 1).any()),
        )
        floor[index] = torch.maximum(floor[index], top_floor)
    if filtered.size or host[3].any():
        weights.masked_fill_(scaled < floor, 0.0)
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    chosen = torch.searchsorted(cumulative, uniforms * cumulative[:, -1:], right=True)
    # Only rows with NaN can point past the end; they are reported as errors by the caller.
    return chosen.squeeze(-1).clamp_(max=logits.shape[-1] - 1)


def _top_floor(
    scaled: Tensor,
    weights: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    *,
    widest: int,
    nucleus: bool,
    candidates: int = _NUCLEUS_CANDIDATES,
) -> Tensor:
    """The smallest scaled logit that top-k and top-p (columns, [rows, 1]) keep in each row.

    `weights` ([rows, vocab]) are the unnormalised probabilities of `scaled`, 1 for the likeliest.
    """
    vocab = scaled.shape[-1]
    width = min(vocab, max(widest, candidates) if nucleus else widest)
    top = scaled.topk(width, dim=-1).values
    floor = torch.full_like(top[:, :1], -torch.inf)
    kept_weights = weights
    if widest:
        kth = top.gather(-1, (top_k.clamp(max=vocab) - 1).clamp(min=0, max=width - 1))
        floor = torch.where(top_k > 0, kth, floor)
        kept_weights = weights.masked_fill(scaled < floor, 0.0)
    if not nucleus:
        return floor
    mass = kept_weights.sum(dim=-1, keepdim=True, dtype=torch.float64)
    shares = (top - top[:, :1]).double().exp_().masked_fill_(top < floor, 0.0) / mass
    # A token is kept while the tokens before it have not reached top_p; the first always is.
    kept = ((shares.cumsum(dim=-1) - shares) < top_p).sum(dim=-1, keepdim=True).clamp(min=1)
    nucleus_floor = torch.where(top_p < 1, top.gather(-1, kept - 1), -torch.inf)
    if width < vocab:
        short = ((kept == width) & (top_p < 1) & (top_k == 0)).squeeze(-1)
        if bool(short.any()):
            nucleus_floor[short] = _top_floor(
                scaled[short],
                weights[short],
                top_k[short],
                top_p[short],
                widest=0,
                nucleus=True,
                candidates=width * _WIDENING,
            )
    return torch.maximum(floor, nucleus_floor)


def _logprobs(raw: Tensor, chosen: Tensor, counts: npt.NDArray[np.int64]) -> list[TokenLogprobs]:
    """Log-probabilities of `chosen` ([rows]) and of the likeliest tokens under `raw` logits."""
    logprobs = raw.log_softmax(dim=-1)
    own: list[float] = logprobs.gather(-1, chosen.unsqueeze(-1)).squeeze(-1).tolist()
    most = int(counts.max())
    if most == 0:
        return [TokenLogprobs(value) for value in own]
    top = logprobs.topk(min(most, raw.shape[-1]), dim=-1)
    values, ids = top.values.tolist(), top.indices.tolist()
    # What cannot be chosen is not reported.
    possible = (top.values > -torch.inf).sum(dim=-1).tolist()
    return [
        TokenLogprobs(own[row], ids[row][:count], values[row][:count])
        for row, count in enumerate(map(min, counts.tolist(), possible))
    ]


def logits_error() -> LogitsError:
    """What a row fails with."""
    return LogitsError(
        "the logits are not finite or leave no token to choose; nothing can be sampled from them"
    )


def _index(rows: npt.NDArray[np.int64], device: torch.device) -> Tensor:
    return torch.from_numpy(rows).to(device)
