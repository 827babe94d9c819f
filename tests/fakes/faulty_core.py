"""A core process whose model breaks as native code does, when a prompt asks for it."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable

from torch import Tensor

from services.engine.core.batch import ForwardBatch
from services.engine.core.engine import EngineCore
from services.engine.core.messages import ModelFacts
from services.engine.core.process import run
from services.engine.core.settings import CoreSettings
from tests.fakes import core
from tests.fakes.hash_model import HashCache, hash_model

COMMAND = (sys.executable, "-m", "tests.fakes.faulty_core")

_LENGTH = 6  # of a prompt that breaks something: one token, again and again
# A call that never returns; to Python other threads run on, or none does.
HANG = [50] * _LENGTH
HANG_HOLDING_THE_INTERPRETER = [51] * _LENGTH
SEGFAULT = [52] * _LENGTH
EXIT = [53] * _LENGTH

_FAULTS: dict[int, Callable[[], object]] = {
    HANG[0]: ctypes.CDLL(None).pause,
    HANG_HOLDING_THE_INTERPRETER[0]: ctypes.PyDLL(None).pause,
    SEGFAULT[0]: lambda: ctypes.string_at(0),
    EXIT[0]: lambda: os._exit(3),
}


def faulty_model(batch: ForwardBatch, cache: HashCache) -> Tensor:
    """The hash model, but for prompts that break it."""
    token_ids = batch.token_ids.tolist()
    start = 0
    for length in batch.query_lengths:
        first, *rest = token_ids[start : start + length]
        if len(rest) == _LENGTH - 1 and set(rest) == {first}:
            _FAULTS[first]()
        start += length
    return hash_model(batch, cache)


def build_engine(settings: CoreSettings) -> tuple[EngineCore, ModelFacts]:
    """The fake core's engine over the faulty model."""
    engine, facts = core.build_engine(settings)
    engine._runner._runner._model = faulty_model
    return engine, facts


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(run(int(sys.argv[1]), build_engine))
