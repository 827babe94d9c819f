"""Tokens chosen on a device are those of `sampler.sample`, and the host need not wait for them."""

from __future__ import annotations

import numpy as np
import torch

from services.engine.core.device_sampling import DeviceSampler
from services.engine.core.sampler import SamplingBatch, sample

CPU = torch.device("cpu")


def random_batch(rows: int, seed: int) -> SamplingBatch:
    rng = np.random.default_rng(seed)
    return SamplingBatch(
        temperature=rng.choice([0.0, 0.7, 1.0, 1.7], rows).astype(np.float32),
        top_k=rng.choice([0, 0, 1, 3, 40, 5000], rows),
        top_p=rng.choice([1.0, 1.0, 0.95, 0.5, 1e-6], rows).astype(np.float32),
        min_p=rng.choice([0.0, 0.0, 0.02, 0.5], rows).astype(np.float32),
        uniforms=rng.random(rows),
        logprobs=rng.choice([-1, 0, 5], rows),
    )


def test_one() -> None:
    for at_once in (True, False):
        for vocab in (3, 600, 2000):
            batch = random_batch(16, vocab)
            logits = torch.randn(16, vocab) * 3
            expected = sample.reference(logits.clone(), batch)
            sampler = DeviceSampler(CPU, 16, vocab, at_once=at_once)
            found = sampler.launch(logits.clone(), batch).result()
            assert found.token_ids == expected.token_ids
            assert found.errors == expected.errors
