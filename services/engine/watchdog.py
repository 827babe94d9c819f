"""Tells from a core's silence whether its step loop hangs.

A core that works is heard at every step, and one that idles answers pings from its step loop. So
silence means a step that has not ended: one that is long, or one that never will.
"""

from __future__ import annotations

import math

from services.engine.core.messages import ModelFacts

_PING_INTERVAL_S = 0.5
# Operations per second that a small machine reaches in a large step. Nothing finer is needed: the
# bounds made of it exist so that a large model is not taken for hung.
_MODEST_FLOPS = {"cpu": 2e11, "cuda": 1e13}
# How many times longer than the longest step such a machine needs is given up on.
_PATIENCE = 10


def longest_step_s(facts: ModelFacts, max_batch_tokens: int) -> float:
    """What a step of the most tokens takes a modest machine: two operations per parameter and
    token."""
    flops = _MODEST_FLOPS["cuda" if facts.device.startswith("cuda") else "cpu"]
    return 2 * facts.num_parameters * max_batch_tokens / flops


class Watchdog:
    """Counts how long a core has been silent while its front listened.

    A front that was itself held up (stopped, or starved by other processes) has heard nothing in
    that time, which says nothing about the core: only the time between ticks that came when they
    were due is counted. Nor does a core hang that other processes keep from the processors.
    """

    def __init__(self, stall_timeout_s: float, restart_after_s: float) -> None:
        self.silent_s = 0.0
        self.tick_interval_s = min(_PING_INTERVAL_S, stall_timeout_s / 6)
        self._stall_timeout_s = self._stalled_after_s = stall_timeout_s
        self._restart_timeout_s = self._hopeless_after_s = restart_after_s
        self._last_tick_s = math.inf  # none yet

    @property
    def is_stalled(self) -> bool:
        """Whether the core has been silent for longer than a step should take."""
        return self.silent_s > self._stalled_after_s

    @property
    def is_hopeless(self) -> bool:
        """Whether the core has been silent for so long that it has to be replaced."""
        return self.silent_s > self._hopeless_after_s

    def begin(self, facts: ModelFacts, max_batch_tokens: int) -> None:
        """A core is ready: watch it from here on, with bounds that its model can keep."""
        step_s = longest_step_s(facts, max_batch_tokens)
        self._stalled_after_s = max(self._stall_timeout_s, step_s)
        self._hopeless_after_s = max(self._restart_timeout_s, _PATIENCE * step_s)
        self._last_tick_s = math.inf
        self.heard()

    def heard(self) -> None:
        """The core has said something."""
        self.silent_s = 0.0

    def tick(self, now_s: float, starved_s: float = 0.0) -> None:
        """To be called every `tick_interval_s` while the front listens; `starved_s` is how long the
        core has waited for a processor since the last tick."""
        passed_s = min(max(0.0, now_s - self._last_tick_s), 2 * self.tick_interval_s)
        self.silent_s += max(0.0, passed_s - starved_s)
        self._last_tick_s = now_s
