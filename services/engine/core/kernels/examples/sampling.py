"""Choosing tokens, and what is done to logits before."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from services.engine.core.kernels.examples.base import Example, Maker, examples_of
from services.engine.core.kernels.sampling import (
    Column,
    CountTable,
    DeviceEdits,
    Penalties,
    SamplingForm,
    SamplingWorkspace,
)
from services.engine.core.sampler import SamplingBatch

_MOST_ROWS = 256


@examples_of("sample")
def _sample(make: Maker) -> Iterator[Example]:
    for rows in make.sizes.tokens:
        if rows > _MOST_ROWS:
            continue
        logits = make.normal(rows, make.sizes.vocab, dtype=torch.float32, std=4.0)
        yield Example(f"{rows} rows, greedy", (logits.clone(), SamplingBatch.greedy(rows)))
        numbers = np.arange(rows)
        batch = SamplingBatch(
            temperature=np.where(numbers % 3 == 2, 0.0, 0.8).astype(np.float32),
            top_k=np.where(numbers % 2, 40, 0),
            top_p=np.where(numbers % 4 > 1, 0.9, 1.0).astype(np.float32),
            min_p=np.where(numbers % 5 == 0, 0.02, 0.0).astype(np.float32),
            uniforms=(numbers + 0.5) / rows,
            logprobs=np.full(rows, -1),
        )
        yield Example(f"{rows} rows, drawn", (logits, batch))


@examples_of("choose_tokens")
def _choose_tokens(make: Maker) -> Iterator[Example]:
    for rows in _rows(make):
        for what, form in (
            ("greedy", SamplingForm(rows)),
            ("drawn", SamplingForm(rows, draws=True)),
            ("filtered", SamplingForm(rows, draws=True, filters=True)),
            ("given", SamplingForm(rows, gives=True)),
        ):
            logits = _logits(make, rows)
            chosen = torch.zeros(2, rows, dtype=torch.int64, device=make.device)
            workspace = SamplingWorkspace.make(make.device, rows, make.sizes.vocab)
            args = logits, _parameters(make, form), chosen, form, workspace
            yield Example(f"{rows} rows, {what}", args, written=(chosen,))


@examples_of("report_logprobs")
def _report_logprobs(make: Maker) -> Iterator[Example]:
    for rows in _rows(make):
        for most in (0, 5):
            form = SamplingForm(rows, most_logprobs=most)
            logits = _logits(make, rows)
            tokens = make.integers(rows, below=make.sizes.vocab)
            reports = torch.zeros(1 + 2 * most, rows, dtype=torch.float64, device=make.device)
            workspace = SamplingWorkspace.make(make.device, rows, make.sizes.vocab)
            args = logits, _parameters(make, form), tokens, reports, form, workspace
            yield Example(f"{rows} rows, {most} reported", args, written=(reports,))


@examples_of("cap_logits")
def _cap_logits(make: Maker) -> Iterator[Example]:
    for rows in _rows(make):
        projected = make.normal(rows, make.sizes.vocab, std=30.0)
        logits = torch.zeros(rows, make.sizes.vocab, device=make.device)
        yield Example(f"{rows} rows", (projected, 30.0, logits), written=(logits,))


@examples_of("mask_logits")
def _mask_logits(make: Maker) -> Iterator[Example]:
    for rows in _rows(make):
        logits = _logits(make, rows)
        masked = make.order(rows)[: -(-rows // 2)].int()
        words = make.integers(len(masked), -(-make.sizes.vocab // 32), below=1 << 32)
        words = (words - (1 << 31)).int()
        yield Example(f"{rows} rows", (logits, masked, words), written=(logits,))


@examples_of("edit_logits")
def _edit_logits(make: Maker) -> Iterator[Example]:
    for rows in _rows(make):
        logits = _logits(make, rows)
        # Each row has two edits of each kind; none may have a token twice within a kind.
        token_ids = torch.cat([make.order(make.sizes.vocab)[:2] for _ in range(5 * rows)]).int()
        starts = torch.arange(rows + 1, dtype=torch.int32, device=make.device) * 2
        kinds = torch.arange(5, dtype=torch.int32, device=make.device).unsqueeze(-1)
        numbers = make.normal(len(token_ids), dtype=torch.float32).abs() + 0.5
        edits = DeviceEdits(
            rows=torch.arange(rows, dtype=torch.int32, device=make.device),
            offsets=(kinds * 2 * rows + starts).contiguous(),
            token_ids=token_ids,
            numbers=numbers,
        )
        yield Example(f"{rows} rows", (logits, edits), written=(logits,))


@examples_of("penalize")
def _penalize(make: Maker) -> Iterator[Example]:
    for rows in _rows(make):
        logits = _logits(make, rows)
        penalised, size = -(-rows // 2), 30
        table = CountTable(
            torch.stack([make.order(make.sizes.vocab)[:size] for _ in range(penalised)]).int(),
            make.integers(penalised, size, below=4).int(),
        )
        numbers = make.normal(3, penalised, dtype=torch.float64).abs() + 0.5
        places = torch.stack(
            (
                make.order(rows)[:penalised],
                make.order(penalised),
                make.integers(penalised, below=size) + 1,
                # Some have said one more, be it new or not.
                make.integers(penalised, below=penalised + 1) - 1,
            )
        )
        # Each slot has a change, of the count of its first token.
        slots = places[1].long()
        changed = torch.stack(
            (torch.zeros_like(slots), table.ids[slots, 0].long(), torch.full_like(slots, 9))
        )
        ends = torch.arange(penalised + 1, dtype=torch.int32, device=make.device)
        latest = make.integers(penalised, below=make.sizes.vocab)
        latest[::2] = table.ids[slots, 0].long()[::2]
        penalties = Penalties(numbers, places.int(), ends, changed.int(), latest)
        written = logits, table.ids, table.in_output
        yield Example(f"{penalised} of {rows} rows", (logits, penalties, table), written=written)


def _rows(make: Maker) -> list[int]:
    return [rows for rows in make.sizes.tokens if rows <= _MOST_ROWS]


def _logits(make: Maker, rows: int) -> Tensor:
    return make.normal(rows, make.sizes.vocab, dtype=torch.float32, std=4.0)


def _parameters(make: Maker, form: SamplingForm) -> Tensor:
    numbers = torch.arange(form.num_rows, dtype=torch.float64)
    parameters = torch.zeros(len(Column), form.num_rows, dtype=torch.float64)
    parameters[Column.TEMPERATURE] = torch.where(numbers % 3 == 2, 0.0, 0.8)
    parameters[Column.TOP_P] = 1.0
    parameters[Column.LOG_MIN_P] = -torch.inf
    if form.filters:
        parameters[Column.TOP_K] = torch.where(numbers % 2 == 1, 40.0, 0.0)
        parameters[Column.TOP_P] = torch.where(numbers % 4 > 1, 0.9, 1.0)
    parameters[Column.UNIFORM] = (numbers + 0.5) / form.num_rows
    parameters[Column.GIVEN] = torch.where(numbers % 2 == 0, 7.0, -1.0) if form.gives else -1.0
    parameters[Column.LOGPROBS] = float(form.most_logprobs)
    return parameters.to(make.device)
