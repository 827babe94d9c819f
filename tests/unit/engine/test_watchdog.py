"""When a silent core is taken for hung, and when it is not."""

from __future__ import annotations

import pytest

from services.engine.core.messages import ModelFacts
from services.engine.watchdog import Watchdog, longest_step_s

MAX_BATCH_TOKENS = 512


def facts(parameters: int = 135_000_000, device: str = "cpu") -> ModelFacts:
    return ModelFacts(
        architecture="llama",
        num_layers=30,
        num_parameters=parameters,
        vocab_size=64,
        max_context_tokens=8192,
        eos_token_ids=(2,),
        dtype="bfloat16",
        device=device,
        block_size=16,
        num_blocks=64,
        kv_cache_memory_bytes=0,
        load_time_s=0.0,
    )


class Clock:
    """A watchdog over simulated time."""

    def __init__(self, model: ModelFacts | None = None) -> None:
        self.now_s = 1000.0
        self.watchdog = Watchdog(stall_timeout_s=3.0, restart_after_s=10.0)
        self.watchdog.begin(model or facts(), MAX_BATCH_TOKENS)

    def pass_silently(self, seconds: float, starved: float = 0.0) -> None:
        """`starved`: the share of the time in which the core waits for a processor."""
        end_s = self.now_s + seconds
        interval_s = self.watchdog.tick_interval_s
        while self.now_s < end_s:
            self.now_s += interval_s
            self.watchdog.tick(self.now_s, starved * interval_s)


def test_a_core_that_is_heard_is_not_stalled() -> None:
    clock = Clock()
    for _ in range(30):
        clock.pass_silently(1.0)
        assert not clock.watchdog.is_stalled
        clock.watchdog.heard()


def test_a_silent_core_is_stalled_in_time_for_health_to_say_so_within_five_seconds() -> None:
    clock = Clock()
    clock.pass_silently(2.5)
    assert not clock.watchdog.is_stalled
    clock.pass_silently(1.4)  # the probe comes once a second
    assert clock.watchdog.is_stalled
    assert not clock.watchdog.is_hopeless
    clock.watchdog.heard()
    assert not clock.watchdog.is_stalled


def test_a_core_silent_for_long_is_hopeless() -> None:
    clock = Clock()
    clock.pass_silently(11.0)
    assert clock.watchdog.is_hopeless


def test_a_front_that_was_held_up_itself_suspects_nobody() -> None:
    clock = Clock()
    clock.now_s += 3600  # stopped, or its virtual machine was
    clock.pass_silently(1.0)
    assert not clock.watchdog.is_stalled


def test_a_core_that_gets_no_processor_is_not_stalled() -> None:
    clock = Clock()
    clock.pass_silently(20.0, starved=0.9)
    assert not clock.watchdog.is_stalled
    clock.pass_silently(20.0, starved=0.9)  # it has had 4 seconds of them now
    assert clock.watchdog.is_stalled


def test_a_large_model_may_take_longer() -> None:
    clock = Clock(facts(parameters=7_000_000_000))
    step_s = longest_step_s(facts(parameters=7_000_000_000), MAX_BATCH_TOKENS)
    assert step_s > 30
    clock.pass_silently(step_s - 1)
    assert not clock.watchdog.is_stalled
    clock.pass_silently(2)
    assert clock.watchdog.is_stalled
    clock.pass_silently(5 * step_s)
    assert not clock.watchdog.is_hopeless
    clock.pass_silently(5 * step_s)
    assert clock.watchdog.is_hopeless


def test_a_card_is_given_less_time_than_a_processor() -> None:
    on_cpu = longest_step_s(facts(), MAX_BATCH_TOKENS)
    assert longest_step_s(facts(device="cuda:0"), MAX_BATCH_TOKENS) == pytest.approx(on_cpu / 50)


def test_a_new_core_starts_with_a_clean_record() -> None:
    clock = Clock()
    clock.pass_silently(11.0)
    clock.now_s += 5  # loading
    clock.watchdog.begin(facts(), MAX_BATCH_TOKENS)
    clock.pass_silently(1.0)
    assert not clock.watchdog.is_stalled
