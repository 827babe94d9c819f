"""A core process over the hash model: the real process loop, around a model that is quick."""

from __future__ import annotations

import os
import sys

from services.engine.core.engine import EngineCore
from services.engine.core.messages import ModelFacts
from services.engine.core.process import run
from services.engine.core.settings import CoreSettings
from tests.fakes.engines import make_engine
from tests.fakes.hash_model import EOS_TOKEN_ID, VOCAB_SIZE

NUM_BLOCKS = 64
BLOCK_SIZE = 4
CONTEXT_TOKENS = NUM_BLOCKS * BLOCK_SIZE
COMMAND = (sys.executable, "-m", "tests.fakes.core")


def build_engine(settings: CoreSettings) -> tuple[EngineCore, ModelFacts]:
    """A small engine; a model path of "missing" is a start that fails."""
    if settings.model_path == "missing":
        raise FileNotFoundError("there is no such model")
    engine = make_engine(
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK_SIZE,
        max_batch_tokens=settings.max_batch_tokens,
        max_running_sequences=settings.max_running_sequences,
        max_waiting_sequences=settings.max_waiting_sequences,
    )
    facts = ModelFacts(
        architecture="hash",
        num_layers=1,
        num_parameters=1,
        vocab_size=VOCAB_SIZE,
        max_context_tokens=CONTEXT_TOKENS,
        eos_token_ids=(EOS_TOKEN_ID,),
        dtype="float32",
        device="cpu",
        block_size=BLOCK_SIZE,
        num_blocks=NUM_BLOCKS,
        kv_cache_memory_bytes=0,
        load_time_s=0.0,
    )
    return engine, facts


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(run(int(sys.argv[1]), build_engine))
