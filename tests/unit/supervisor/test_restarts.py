"""Back-off doubles, patience ends, and a good run is forgiven."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from meshserve.supervisor.restarts import RestartLimits, RestartPolicy

LIMITS = RestartLimits(
    first_delay_s=0.5, max_delay_s=4.0, max_crashes=5, window_s=120.0, forgive_after_s=60.0
)


def test_each_crash_doubles_the_wait_until_the_limit_and_then_it_is_over() -> None:
    policy = RestartPolicy(LIMITS)
    delays = [policy.record_crash(now_s=float(second), uptime_s=0.1) for second in range(6)]
    assert delays == [0.5, 1.0, 2.0, 4.0, 4.0, None]


def test_a_good_run_starts_over() -> None:
    policy = RestartPolicy(LIMITS)
    for second in range(5):
        policy.record_crash(float(second), 0.0)
    assert policy.record_crash(100.0, uptime_s=60.0) == 0.5


def test_crashes_outside_the_window_do_not_count() -> None:
    policy = RestartPolicy(LIMITS)
    delays = [policy.record_crash(now_s=130.0 * i, uptime_s=0.0) for i in range(20)]
    assert delays == [0.5] * 20


@given(
    gaps=st.lists(st.tuples(st.floats(0.01, 200), st.floats(0, 100)), max_size=60),
    max_crashes=st.integers(0, 6),
)
def test_it_gives_up_exactly_when_too_many_crashes_fall_into_the_window(
    gaps: list[tuple[float, float]], max_crashes: int
) -> None:
    limits = RestartLimits(max_crashes=max_crashes, window_s=100.0, forgive_after_s=60.0)
    policy = RestartPolicy(limits)
    now_s, counted = 0.0, []
    for gap_s, uptime_s in gaps:
        now_s += gap_s
        delay_s = policy.record_crash(now_s, uptime_s)
        if uptime_s >= limits.forgive_after_s:
            counted = []
        counted = [at for at in counted if now_s - at <= limits.window_s] + [now_s]
        assert (delay_s is None) == (len(counted) > max_crashes)
        if delay_s is not None:
            assert limits.first_delay_s <= delay_s <= limits.max_delay_s
