"""An encoder's core process around a runner that is quick: the real loop and batcher."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from services.engine.core.admission import QueueLimits
from services.engine.core.encoding.batcher import DynamicBatcher
from services.engine.core.encoding.core import EncoderCore
from services.engine.core.messages import EncodeRequest, ModelFacts
from services.engine.core.process import run
from services.engine.core.settings import CoreSettings

COMMAND = (sys.executable, "-m", "tests.fakes.encoder_core")
VOCAB_SIZE = 100
CONTEXT_TOKENS = 64
# Tokens that make a sequence do something else than be answered.
RAISING_TOKEN_ID, NAN_TOKEN_ID, SLOW_TOKEN_ID, STALLING_TOKEN_ID = 1, 2, 3, 4
SLOW_S = 0.4


class SumRunner:
    """Answers with the sum of a sequence's tokens, and the number of sequences in its batch."""

    def run(self, requests: Sequence[EncodeRequest]) -> list[npt.NDArray[np.float32]]:
        token_ids = {token_id for request in requests for token_id in request.token_ids}
        if RAISING_TOKEN_ID in token_ids:
            raise ValueError("a token that cannot be read")
        if SLOW_TOKEN_ID in token_ids:
            time.sleep(SLOW_S)
        if STALLING_TOKEN_ID in token_ids:
            time.sleep(3600)
        return [self._answer(request, len(requests)) for request in requests]

    def _answer(self, request: EncodeRequest, batch_size: int) -> npt.NDArray[np.float32]:
        total = float("nan") if NAN_TOKEN_ID in request.token_ids else sum(request.token_ids)
        return np.array([total, batch_size], np.float32)


def build_engine(settings: CoreSettings) -> tuple[EncoderCore, ModelFacts]:
    limits = QueueLimits(settings.batcher.max_waiting_sequences, settings.max_waiting_tokens)
    facts = ModelFacts(
        architecture="sum",
        num_layers=1,
        num_parameters=1,
        vocab_size=VOCAB_SIZE,
        max_context_tokens=CONTEXT_TOKENS,
        eos_token_ids=(),
        dtype="float32",
        device="cpu",
        block_size=0,
        num_blocks=0,
        kv_cache_memory_bytes=0,
        load_time_s=0.0,
        tasks=("embed",),
        embedding_size=2,
    )
    return EncoderCore(DynamicBatcher(settings.batcher, limits), SumRunner()), facts


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(run(int(sys.argv[1]), build_engine))
