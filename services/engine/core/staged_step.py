"""What a device is sent of a step to choose its tokens by, and what it brings back."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from torch import Tensor

from services.engine.core.errors import EngineError
from services.engine.core.kernels.sampling import Column, DeviceEdits, Penalties, SamplingForm
from services.engine.core.messages import TokenLogprobs
from services.engine.core.sampler import LogitsError, SampledTokens, SamplingBatch, logits_error


@dataclass(slots=True)
class StagedStep:
    """What a staged step has beside its parameters."""

    form: SamplingForm
    counts: npt.NDArray[np.int64]  # of log-probabilities, by row
    masks: tuple[Tensor, Tensor] | None = None
    penalties: Penalties | None = None
    edits: DeviceEdits | None = None
    unknown_rows: list[int] = field(default_factory=list)  # whose edits name unknown tokens
    reports: Tensor | None = None


def read_step(staged: StagedStep, chosen: Tensor, reports: Tensor | None) -> SampledTokens:
    """What a step has brought the host; nobody looks at rows that pad it."""
    token_ids, statuses = chosen.numpy()[:, : len(staged.counts)]
    errors: list[EngineError | None] = [None] * len(token_ids)
    if statuses.any():
        for row in statuses.nonzero()[0].tolist():
            errors[row] = logits_error()
    for row in staged.unknown_rows:
        errors[row] = LogitsError("a penalty, bias or bar names a token that does not exist")
    logprobs: list[TokenLogprobs | None] = [None] * len(token_ids)
    if reports is not None:
        most = staged.form.most_logprobs
        own, ids, values = (part.numpy() for part in reports.tensor_split((1, 1 + most)))
        for row in np.flatnonzero(staged.counts >= 0).tolist():
            likeliest = values[: int(staged.counts[row]), row]
            # What cannot be chosen is not reported.
            count = np.count_nonzero(likeliest > -np.inf)
            logprobs[row] = TokenLogprobs(
                float(own[0, row]),
                ids[:count, row].astype(np.int64).tolist(),
                likeliest[:count].tolist(),
            )
    return SampledTokens(token_ids.tolist(), logprobs, errors)


def form_of(batch: SamplingBatch, vocab_size: int) -> SamplingForm:
    """Which kernels sample `batch`."""
    num_rows = len(batch.temperature)
    if batch.is_greedy:
        return SamplingForm(num_rows)
    drawn = batch.temperature > 0
    filtered = drawn & ((batch.top_k > 0) | (batch.top_p < 1) | (batch.min_p > 0))
    return SamplingForm(
        num_rows,
        draws=bool(drawn.any()),
        filters=bool(filtered.any()),
        gives=batch.given is not None,
        most_logprobs=min(int(batch.logprobs.max()), vocab_size),
    )


def fill_parameters(parameters: npt.NDArray[np.float64], batch: SamplingBatch) -> None:
    """Write `parameters` ([columns, rows]), as the kernels of a step read them."""
    num_rows = len(batch.temperature)
    parameters[:, num_rows:] = 0.0  # pads it: the likeliest token is as good as any
    parameters = parameters[:, :num_rows]
    parameters[Column.TEMPERATURE] = batch.temperature
    parameters[Column.TOP_K] = batch.top_k
    parameters[Column.TOP_P] = batch.top_p
    with np.errstate(divide="ignore"):
        parameters[Column.LOG_MIN_P] = np.log(batch.min_p.astype(np.float64)).astype(np.float32)
    parameters[Column.UNIFORM] = batch.uniforms
    parameters[Column.GIVEN] = -1 if batch.given is None else batch.given
    parameters[Column.LOGPROBS] = batch.logprobs
