"""On a GPU tokens are chosen as on a CPU, with nothing to wait for between launch and result."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from services.engine.core.device_sampling import DeviceSampler
from services.engine.core.kernels import registry
from services.engine.core.logit_edits import LogitEdits, TokenMasks
from services.engine.core.messages import Sampling, SequenceRequest
from services.engine.core.sampler import SamplingBatch, sample
from services.engine.core.sequence import Sequence

pytestmark = pytest.mark.gpu
SHAPES = [(1, 151936), (8, 128256), (64, 50257), (600, 32000)]
WAITS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")


@pytest.fixture(scope="module")
def gpu() -> torch.device:
    registry.select("cuda")
    return torch.device("cuda")


def batch_of(rows: int, seed: int) -> SamplingBatch:
    rng = np.random.default_rng(seed)
    return SamplingBatch(
        temperature=rng.choice([0.0, 0.7, 1.0, 1.7], rows).astype(np.float32),
        top_k=rng.choice([0, 0, 1, 40, 5000], rows),
        top_p=rng.choice([1.0, 1.0, 0.95, 0.5], rows).astype(np.float32),
        min_p=rng.choice([0.0, 0.0, 0.02], rows).astype(np.float32),
        uniforms=rng.random(rows),
        logprobs=rng.choice([-1, 0, 20], rows),
    )


def plain(rows: int, seed: int) -> SamplingBatch:
    off = np.zeros(rows, np.int64)
    return replace(
        batch_of(rows, seed),
        temperature=np.ones(rows, np.float32),
        top_k=off,
        top_p=np.ones(rows, np.float32),
        min_p=np.zeros(rows, np.float32),
        logprobs=off - 1,
    )


def edited(rows: int, vocab: int) -> SamplingBatch:
    # Each has said one token more that the host does not know, some of them again.
    edits = LogitEdits(torch.arange(rows, device="cuda"))
    sampling = Sampling(repetition_penalty=1.2, presence_penalty=0.5, logit_bias={3: 1.0})
    for row in range(rows):
        request = SequenceRequest(row, [1, 2, 2, 7], sampling)
        sequence = Sequence(request, arrival=row, eos_token_ids=(), max_tokens=9, queued_ns=0)
        sequence.row = row
        edits.add(row, sequence, said=row)
    words = np.random.default_rng(0).integers(0, 2**32, (rows, -(-vocab // 32)), np.uint32)
    masks = TokenMasks(np.arange(rows), words)
    return replace(batch_of(rows, 5), edits=edits, masks=masks)


def logits_of(rows: int, vocab: int, device: torch.device) -> Tensor:
    return (torch.randn(rows, vocab) * 4).bfloat16().float().to(device)


@pytest.mark.parametrize(("rows", "vocab"), SHAPES)
@pytest.mark.parametrize("kind", ["mixed", "edited", "greedy"])
def test_tokens_are_those_of_a_cpu(gpu: torch.device, rows: int, vocab: int, kind: str) -> None:
    batch = {
        "mixed": lambda: batch_of(rows, 0),
        "edited": lambda: edited(rows, vocab),
        "greedy": lambda: SamplingBatch.greedy(rows),
    }[kind]()
    logits = logits_of(rows, vocab, gpu)
    expected = sample.reference(logits.cpu(), batch)
    found = DeviceSampler(gpu, rows, vocab).launch(logits, batch).result()
    differ = [row for row in range(rows) if found.token_ids[row] != expected.token_ids[row]]
    # Weights differ in their last bits: a uniform number may fall on the other side of an edge.
    assert len(differ) <= rows // 200, differ
    for row in set(range(rows)).difference(differ):
        mine, wanted = found.logprobs[row], expected.logprobs[row]
        assert (mine is None) == (wanted is None)
        if mine is not None and wanted is not None:
            assert mine.logprob == pytest.approx(wanted.logprob, abs=1e-4)
            assert mine.top_logprobs == pytest.approx(wanted.top_logprobs, abs=1e-4)


def test_the_same_logits_give_the_same_tokens_in_every_batch(gpu: torch.device) -> None:
    logits, batch = logits_of(64, 128256, gpu), batch_of(64, 3)
    sampler = DeviceSampler(gpu, 64, 128256)
    together = sampler.launch(logits.clone(), batch).result()
    for row in range(0, 64, 7):
        columns = {
            name: getattr(batch, name)[row : row + 1]
            for name in ("temperature", "top_k", "top_p", "min_p", "uniforms", "logprobs")
        }
        alone = sampler.launch(logits[row : row + 1].clone(), SamplingBatch(**columns)).result()
        assert alone.token_ids == [together.token_ids[row]]
        assert alone.logprobs == [together.logprobs[row]]


@pytest.mark.parametrize("kind", ["greedy", "plain", "mixed", "edited"])
def test_nothing_waits_between_launch_and_result(gpu: torch.device, kind: str) -> None:
    rows, vocab = 16, 128256
    sampler = DeviceSampler(gpu, rows, vocab)
    batch = {
        "greedy": lambda: SamplingBatch.greedy(rows),
        "plain": lambda: plain(rows, 0),
        "mixed": lambda: batch_of(rows, 0),
        "edited": lambda: edited(rows, vocab),
    }[kind]()
    logits = logits_of(rows, vocab, gpu)
    for _ in range(3):  # kernels are compiled, memory is pinned
        sampler.launch(logits.clone(), batch).result()
    copies = [logits.clone() for _ in range(2)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            with record_function("launches"):
                first = sampler.launch(copies[0], batch)
                second = sampler.launch(copies[1], batch)
            tokens = first.result()
            assert second.result().token_ids == tokens.token_ids
    finally:
        torch.cuda.set_sync_debug_mode("default")
    events = profiler.events() or []
    launches = next(each.time_range for each in events if each.name == "launches")
    waits = [
        each.name
        for each in events
        if each.name in WAITS and launches.start <= each.time_range.start <= launches.end
    ]
    assert waits == []


def test_the_next_step_reads_tokens_before_the_host_has_them(gpu: torch.device) -> None:
    sampler = DeviceSampler(gpu, 4, 1000)
    logits = logits_of(4, 1000, gpu)
    first = sampler.launch(logits.clone(), SamplingBatch.greedy(4))
    read = first.token_ids * 2  # on the same stream
    second = sampler.launch(-logits, SamplingBatch.greedy(4))
    assert read.tolist() == [2 * each for each in first.result().token_ids]
    assert second.result().token_ids == logits.argmin(dim=-1).tolist()


@pytest.mark.parametrize("form", ["greedy", "plain", "filtered"])
def test_a_captured_step_samples_every_batch_of_its_form(gpu: torch.device, form: str) -> None:
    rows, vocab = 8, 151936
    sampler = DeviceSampler(gpu, rows, vocab)

    def batch(seed: int) -> SamplingBatch:
        if form == "greedy":
            return SamplingBatch.greedy(rows)
        if form == "plain":
            return plain(rows, seed)
        return replace(plain(rows, seed), top_p=np.full(rows, 0.9, np.float32))

    logits = logits_of(rows, vocab, gpu)
    sampler.launch(logits, batch(0)).result()
    graph = torch.cuda.CUDAGraph()
    staged = sampler.stage(batch(0))
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        sampler.enqueue(logits, staged)
    sampler.fetch().result()
    for seed in (1, 2):
        logits.copy_(logits_of(rows, vocab, gpu))
        expected = DeviceSampler(gpu, rows, vocab).launch(logits, batch(seed)).result()
        assert sampler.stage(batch(seed)) == staged
        graph.replay()
        assert sampler.fetch().result() == expected
