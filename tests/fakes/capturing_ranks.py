"""A rank that captures steps as if it had a device that can."""

from __future__ import annotations

import sys

from services.engine.core.parallel import worker
from tests.fakes.recorders import Replaying

COMMAND = (sys.executable, "-m", "tests.fakes.capturing_ranks")

if __name__ == "__main__":
    worker.make_recorder = lambda device: Replaying()
    sys.exit(worker.main())
